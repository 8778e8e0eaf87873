"""Lists of image files in any folder, in little memory.

A million Python strings take 100 MB, and again in every loader process, since reference counts copy shared memory pages. Here
all names are one NumPy array, which forked processes share.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import overload

import numpy as np
from tqdm import tqdm

from sparkme.data.images import Stored
from sparkme.data.sources.base import GLIMPSE, ImageSource, digest
from sparkme.data.sources.left_out import (
    EXTENSIONS,
    LeftOut,
    advice,
    begins_like_image,
    is_passed_over,
    passed_over_in,
    suffix_of,
)
from sparkme.errors import UserError, first_line
from sparkme.files import replaced_when_whole
from sparkme.text import printable

# The colour photographs in scikit-image's wheel (skimage.data), all free to use; its other images are grey, or drawings.
_PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


INDEX_FROM = 20_000  # files; a shorter list is quick to rebuild
_INDEX_VERSION = 3
_SETTLED_S = 2.0  # at most one clock tick: two changes within one have the same time


class Names(Sequence[str]):
    """Many names in two arrays: their joined bytes (uint8), and the end of each (int64)."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> Names:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # negative indices and IndexError
        start = self.ends[number - 1] if number else 0
        return os.fsdecode(self.text[start : self.ends[number]].tobytes())


class Files(ImageSource):
    """Image files by their names.

    Args:
        root: the folder that the names are relative to.
        names: names of the files.
        description: for people.
        folders: the listed folders with their times of last change in ns, which decide whether an index is valid.
        problems: lines about folders that could not be listed.
        left_out: skipped files and folders.
        notes: lines about names that were read in an unusual way.
    """

    def __init__(
        self,
        root: Path,
        names: Names,
        description: str,
        folders: tuple[Names, np.ndarray] | None = None,
        problems: Sequence[str] = (),
        left_out: LeftOut | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.root, self.names, self.description, self.folders, self.problems = root, names, description, folders, problems
        self.left_out = left_out or LeftOut()
        self.notes = [*notes, *self.left_out.lines]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Files:
        return cls(Path(), Names.pack(map(str, paths)), f"{len(paths)} files")

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> Path:
        return self.root / self.names[number]

    def read(self, number: int) -> Stored:
        path = self.path(number)
        return Stored(printable(path), path)

    def name(self, number: int) -> str:
        return printable(self.path(number))

    def glimpse(self, number: int) -> int:
        with self.path(number).open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - GLIMPSE))
            return digest(size, file.read(GLIMPSE))

    def subset(self, numbers: Sequence[int]) -> Files:
        names = Names.pack(self.names[i] for i in numbers)
        files = Files(self.root, names, self.description, problems=self.problems)
        files.left_out, files.notes = self.left_out, self.notes
        return files

    def write_index(self, path: Path) -> None:
        """Saves the list of a folder with many files for the next start. Raises CannotWrite."""
        if self.folders is None or self.problems or len(self) < INDEX_FROM:
            return
        folders, times = self.folders
        with replaced_when_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                version=_INDEX_VERSION,
                root=str(self.root.absolute()),
                text=self.names.text,
                ends=self.names.ends,
                folders_text=folders.text,
                folders_ends=folders.ends,
                times=times,
                left_out=self.left_out.to_json(),
            )


def find_images(folder: Path, leave_out: Path | None = None, *, flag: str = "--data") -> list[Path]:
    """All images below a folder, see `list_folder`; prints notes about skipped files."""
    files = list_folder(folder, leave_out, flag=flag)
    for remark in files.remarks:
        print(f"note: {remark}", file=sys.stderr, flush=True)
    return [folder / name for name in files.names]


def list_folder(folder: Path, leave_out: Path | None = None, *, flag: str = "--data", index: Path | None = None) -> Files:
    """All images below a folder, sorted; follows links, and visits each folder once.

    Args:
        folder: the folder.
        leave_out: a folder below it whose images do not count, such as the run's own pictures.
        flag: the command-line flag of the folder, for messages.
        index: a file of `Files.write_index`, valid as long as no folder has changed.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder")
    if index is not None and (known := _read_index(index, folder)) is not None:
        return known
    files = look_through(folder, leave_out)
    if not files:
        why = "".join(f"; {line}" for line in files.remarks)
        raise UserError(f"{flag} {folder} holds no images (looked for {', '.join(sorted(EXTENSIONS))}, in subfolders too){why}")
    return files


def look_through(folder: Path, leave_out: Path | None = None) -> Files:
    """The images below a folder, perhaps none, and the skipped files; see `list_folder`."""
    names: list[str] = []
    folders: list[str] = []
    times: list[int] = []
    problems: list[str] = []
    left_out = LeftOut()
    settled = time.time_ns() - int(_SETTLED_S * 1e9)
    seen: set[str] = {os.path.realpath(leave_out)} if leave_out else set()
    with tqdm(desc=f"listing {folder}"[:60], unit=" files", delay=2, disable=not sys.stderr.isatty()) as bar:
        waiting = [""]
        while waiting:
            below = waiting.pop()
            where = os.path.join(folder, below)
            if (real := os.path.realpath(where)) in seen:
                continue
            seen.add(real)
            before = len(names)
            found: list[str] = []
            try:
                changed = _changed(where)
                with os.scandir(where) as entries:
                    for entry in entries:
                        name = os.path.join(below, entry.name)
                        if _is_folder(entry):
                            if is_passed_over(entry.name):  # thumbnails, deleted files, notebook checkpoints
                                left_out.folders[entry.name] += 1
                            else:
                                found.append(name)
                        elif is_image(entry.name) and (_is_broken_link(entry) or entry.is_file()):
                            names.append(name)
                        elif not entry.name.startswith(".") and _is_file(entry):
                            suffix = suffix_of(entry.name)
                            if not suffix and begins_like_image(entry.path):
                                names.append(name)
                            else:
                                left_out.suffixes[suffix] += 1
                folders.append(below)
                times.append(changed if changed < settled else -1)  # -1 makes the index invalid
            except OSError as error:  # such as another user's folder
                problems.append(f"images in {printable(where)}: {first_line(error)}")
            waiting += sorted(found, reverse=True)  # so that of several links to a folder always the same one counts
            bar.update(len(names) - before)
    names.sort(key=lambda name: name.replace(os.sep, "\0"))  # folder by folder
    looked = Names.pack(folders), np.array(times, dtype=np.int64)
    return Files(folder, Names.pack(names), str(folder), looked, problems, left_out)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("._")  # macOS metadata


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_file()
    return False


def _changed(folder: str) -> int:
    """The time of a folder's last change in ns: st_ctime, since tar and rsync set st_mtime back."""
    return os.stat(folder).st_ctime_ns


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    """Reading reports a broken link. Pipes and devices, which reading would wait for, are no images."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _read_index(path: Path, folder: Path) -> Files | None:
    """The saved list, if it is of this folder and nothing below has changed."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if kept["version"] != _INDEX_VERSION or str(kept["root"]) != str(folder.absolute()):
                return None
            folders, times = Names(kept["folders_text"], kept["folders_ends"]), kept["times"]
            names, left_out = Names(kept["text"], kept["ends"]), LeftOut.from_json(str(kept["left_out"]))
        for below, known in zip(folders, times.tolist(), strict=True):
            if _changed(os.path.join(folder, below)) != known:
                return None
    except Exception:  # missing or damaged: the folder is listed again
        return None
    return Files(folder, names, str(folder), (folders, times), left_out=left_out)


def inside(top: str, name: str) -> bool:
    """Whether a relative or absolute name lies below an absolute folder; links may lead anywhere."""
    joined = os.path.normpath(os.path.join(top, name))
    return joined.startswith(top.rstrip(os.sep) + os.sep)


def without_others(files: Files) -> Files:
    """The files of a list without those in system folders and those known to be no images."""
    top, left_out, kept = os.path.abspath(files.root), LeftOut(), list[str]()
    for name in files.names:
        below = os.path.relpath(name, top) if os.path.isabs(name) else name
        if (folder := passed_over_in(below, hidden=False)) is not None:
            left_out.files[folder] += 1
        elif advice(suffix := suffix_of(name)):
            left_out.suffixes[suffix] += 1
        else:
            kept.append(name)
    if not kept:
        raise UserError(f"{files.description} names no images; {'; '.join(left_out.lines)}")
    if not left_out.lines:
        return files
    return Files(files.root, Names.pack(kept), files.description, left_out=left_out, notes=files.notes)


def demo_photographs() -> list[Path]:
    """The colour photographs in scikit-image's wheel. Raises UserError without scikit-image."""
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "without --data, training uses scikit-image's photographs, but scikit-image is not installed; "
            "pass --data FOLDER or install the extra: pip install 'sparkme[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0], "data")
    found = [folder / name for name in _PHOTOGRAPHS if (folder / name).is_file()]
    if not found:
        raise UserError(f"scikit-image ships none of its photographs in {folder}; pass --data FOLDER")
    return found
