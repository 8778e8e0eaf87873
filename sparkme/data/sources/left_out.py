"""What of a folder or an archive is no picture to train on, and the lines that say so."""

from __future__ import annotations

import json
import re
from collections import Counter

from sparkme.data.images import printable

# Where network storage, Windows, macOS and file systems keep thumbnails, snapshots and what was deleted.
_OF_SYSTEMS = re.compile(
    r"@eaDir|@tmp|@recycle|@recently-snapshot|@__thumb|#recycle|#snapshot|~snapshot|\$recycle\.bin|system volume information"
    r"|lost\+found|found\.\d{3}|__macosx|network trash folder|temporary items|\.trash.*",
    re.IGNORECASE,
)
_MOST_NAMED = 8


def is_passed_over(folder: str) -> bool:
    """Whether a folder of this name is hidden, or is kept by a system for itself, such as `@eaDir`."""
    return _OF_SYSTEMS.fullmatch(folder) is not None or (folder.startswith(".") and folder not in (".", ".."))


def passed_over_in(name: str, *, hidden: bool) -> str | None:
    """The first folder in a file's name that is of a system or, where that counts, hidden."""
    folders = name.split("/")[:-1]
    return next((f for f in folders if is_passed_over(f) and (hidden or _OF_SYSTEMS.fullmatch(f))), None)


class LeftOut:
    """Counts what is passed over, by the name of the folder that is hidden or of a system.

    Attributes:
        folders: that are not looked into.
        files: of a list or an archive, which are in such a folder.
    """

    def __init__(self, folders: dict[str, int] | None = None, files: dict[str, int] | None = None) -> None:
        self.folders, self.files = Counter(folders), Counter(files)

    def add(self, other: LeftOut) -> None:
        for counter, more in zip(self._counters, other._counters, strict=True):
            counter.update(more)

    @property
    def _counters(self) -> tuple[Counter[str], ...]:
        return self.folders, self.files

    def to_json(self) -> str:
        return json.dumps(self._counters)

    @classmethod
    def from_json(cls, text: str) -> LeftOut:
        return cls(*json.loads(text))

    @property
    def lines(self) -> list[str]:
        """For people."""
        kinds = (f"{_many(self.folders, 'folder')} hidden or of a system", self.folders), (
            f"{_many(self.files, 'file')} in folders hidden or of a system", self.files)  # fmt: skip
        return [f"left out: {kind}: {_named(counter)}" for kind, counter in kinds if counter]


def _many(counter: Counter[str], noun: str) -> str:
    count = counter.total()
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _named(counter: Counter[str]) -> str:
    named = [f"{printable(name)} ({count:,})" for name, count in counter.most_common(_MOST_NAMED)]
    return ", ".join([*named, "others"] if len(counter) > _MOST_NAMED else named)
