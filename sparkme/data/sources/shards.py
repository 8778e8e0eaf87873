"""Tar shards as in WebDataset, local or from a URL: many images in one file.

Every shard is indexed once, and the index (offset and size of each image) is kept in the cache folder. So the number of images
is known, each image can be read by itself, and the order of an epoch is a function of the seed, which a resumed run repeats.
Remote and compressed shards are copied into the cache folder first, and deleted when others need the space.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparkme.data.images import Stored
from sparkme.data.limits import scaled
from sparkme.data.sources.base import GLIMPSE, ImageSource, digest
from sparkme.data.sources.left_out import EXTENSIONS, LeftOut, passed_over_in, suffix_of
from sparkme.errors import CannotWrite, UserError, first_line
from sparkme.files import replaced_when_whole
from sparkme.text import printable

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz")
WINDOW = 16_384  # images that are shuffled together, from as many shards as they fill
MOST_BYTES = 2**28  # of an image file
MOST_SHARDS = 1_000_000
MOST_HEAD = 2**20  # bytes of one member's tar header
LONGEST_LABEL = 256
LABEL_SUFFIXES = (".cls", ".json")  # the first counts if both label as many images
OPEN_FILES = 32
TRIES, TIMEOUT_S = 3, 60
# Errors for which another try is useless: no space, no permission, and HTTP's for no permission and not found.
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, 401, 403, 404, 410)
_COPY = ".copy"  # not a shard's suffix, so that the cache may be the data folder itself


class Index(NamedTuple):
    """The images of a shard: offsets, sizes in bytes, and labels ("" for none)."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    problem: str  # why it ends early, or ""
    dotted: str  # two samples that WebDataset would join; then names end at their last dot
    conflict: str  # two labels of one sample, in words
    left_out: str  # skipped files, see `LeftOut.to_json`


class Cache:
    """A folder for copies and indexes of shards, safe for several processes. Above `most_bytes` of copies, the least recently
    used ones are deleted."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def path(self, known: str, suffix: str) -> Path:
        return self.folder / (hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()[:24] + suffix)

    @contextmanager
    def locked(self, known: str) -> Iterator[None]:
        """Lets in one process at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.path(known, ".lock").open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(f"{self.folder} cannot be written ({first_line(error)}); see --shard-cache") from error
        with file:
            yield

    def open(self, location: str, known: str) -> int:
        """A descriptor of the local, uncompressed copy of a shard, which is made if needed.

        Args:
            location: a file or a URL.
            known: key of the copy.

        Raises:
            OSError: the shard cannot be read, or there is no space.
        """
        path = self.path(known, _COPY)
        with self.locked(known):
            # Opened at once, under the lock or before it has its name, since other processes may delete copies at any time.
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                with suppress(OSError):  # another user's file
                    os.utime(path)
                return descriptor
            self._make_room()
            try:
                with replaced_when_whole(path) as temporary:
                    fetch(location, temporary, self.most_bytes)
                    _check_same(location, known)
                    descriptor = os.open(temporary, os.O_RDONLY)
            except CannotWrite as error:
                raise OSError(first_line(error.__cause__ or error)) from error
        return descriptor

    def _make_room(self) -> None:
        copies = []
        for entry in os.scandir(self.folder):
            if re.fullmatch(f"[0-9a-f]{{24}}{_COPY}", entry.name):  # only the cache's own files
                with suppress(OSError):  # another process was faster
                    copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.most_bytes:
                break
            with suppress(OSError):  # processes that have it open can go on reading
                os.unlink(path)
            total -= size


def fetch(location: str, path: Path, most_bytes: int) -> None:
    """Copies a shard to a file, decompressed. Raises OSError if it is incomplete or has more than `most_bytes`."""
    for attempt in range(TRIES):
        try:
            with _opened(location) as remote, path.open("wb") as file:
                _copy(_decompressed(remote, location), file, most_bytes)
                # http.client does not complain about a connection that ends early.
                if isinstance(remote, http.client.HTTPResponse) and remote.length:
                    raise ConnectionError(f"the connection ended {remote.length:,} bytes too early")
            return
        except (EOFError, lzma.LZMAError, zlib.error) as error:
            reason: Exception = error
            again = is_remote(location) and isinstance(error, EOFError)
        except Exception as error:  # http.client and fsspec's packages raise many kinds
            reason, code = error, getattr(error, "code", getattr(error, "errno", 0))
            final = isinstance(error, FileNotFoundError) or code in _FINAL
            again = is_remote(location) and not final and isinstance(error, OSError | http.client.IncompleteRead)
        if not again or attempt == TRIES - 1:
            raise OSError(first_line(reason)) from reason
        time.sleep(2**attempt)


def _copy(source: Any, file: BinaryIO, most_bytes: int) -> None:
    """Copies at most `most_bytes`, since a small file may decompress to any size."""
    while piece := source.read(2**20):
        most_bytes -= len(piece)
        if most_bytes < 0:
            raise ValueError("its copy alone is larger than --shard-cache-gib; raise it")
        file.write(piece)


def _opened(location: str) -> Any:
    if location.startswith(("http://", "https://")):
        return urllib.request.urlopen(location, timeout=TIMEOUT_S)
    if is_remote(location):  # s3, gs and others, if their packages are installed
        import fsspec  # noqa: PLC0415  (optional)

        return fsspec.open(location, "rb").open()
    return open(location, "rb")


def _decompressed(file: Any, location: str) -> Any:
    name = location.partition("?")[0].lower()
    if name.endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=file)
    return lzma.LZMAFile(file) if name.endswith(".xz") else file


def is_remote(location: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def is_shard(location: str) -> bool:
    return location.partition("?")[0].lower().endswith(SUFFIXES)


def expand_braces(text: str) -> list[str]:
    """Expands `a{00..02}` to a00 a01 a02 and `a{x,y}` to ax ay, as a shell does, without nesting.

    Raises:
        ValueError: more than a million names, which must be a mistake.
    """
    parts: list[Sequence[str]] = []
    count = 1
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", text)):
        options: Sequence[str] = [part]
        if i % 2:
            ends = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", part)
            if ends:
                first, last = int(ends[1]), int(ends[2])
                if abs(last - first) >= MOST_SHARDS:
                    raise ValueError(f"{text} stands for more than {MOST_SHARDS:,} shards")
                width = max(map(len, ends.groups())) if any(e.startswith("0") and len(e) > 1 for e in ends.groups()) else 0
                step = 1 if last >= first else -1
                options = [f"{n:0{width}d}" for n in range(first, last + step, step)]
            else:
                options = part.split(",") if "," in part else [f"{{{part}}}"]
        count *= len(options)
        if count > MOST_SHARDS:
            raise ValueError(f"{text} stands for more than {MOST_SHARDS:,} shards")
        parts.append(options)
    return ["".join(words) for words in product(*parts)]


def read_index(file: Any) -> Index:
    """Indexes an open, uncompressed tar archive: image files, and `.cls` and `.json` of the same name for labels."""
    offsets: list[int] = []
    sizes: list[int] = []
    stems: list[str] = []
    labels, left_out = _Labels(), LeftOut()
    problem = ""
    try:
        with tarfile.open(fileobj=_Heads(file), mode="r:", tarinfo=_Member) as archive:  # type: ignore[call-overload]
            for member in archive:
                archive.members = []  # it would keep them all
                if member.size < 0:  # the loop would find it for ever
                    raise ValueError(f"a member has {member.size} bytes")
                stem, suffix = _stem(member.name.removeprefix("./"))  # a prefix that some names may have
                if not member.isreg() or member.issparse():  # links and devices hold no data
                    continue
                if (folder := passed_over_in(member.name, hidden=True)) is not None:
                    left_out.files[folder] += 1
                elif suffix in EXTENSIONS:
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                    stems.append(stem)
                elif suffix in LABEL_SUFFIXES and member.size < 2**20:
                    labels.add(stem, suffix, os.pread(file.fileno(), member.size, member.offset_data))
                elif suffix not in LABEL_SUFFIXES and not os.path.basename(member.name).startswith("."):
                    left_out.suffixes[suffix_of(member.name)] += 1
    except Exception as error:  # tarfile raises many kinds for bad archives, such as RecursionError
        problem = first_line(error)
    size = os.fstat(file.fileno()).st_size
    while offsets and offsets[-1] + sizes[-1] > size:
        problem = problem or "it is cut off"
        del offsets[-1], sizes[-1], stems[-1]
    found, dotted, conflict = labels.of(stems)
    text = np.array(found, dtype=np.str_)
    return Index(np.array(offsets, np.int64), np.array(sizes, np.int64), text, problem, dotted, conflict, left_out.to_json())


class _Labels:
    """The labels in a shard, matched to images by name.

    In WebDataset a sample's name ends at the first dot. If that joins images with their own labels, such as `patient0.slice3`
    and `patient0.slice4`, names end at the last dot.
    """

    def __init__(self) -> None:
        self.given: dict[str, dict[str, str]] = {suffix: {} for suffix in LABEL_SUFFIXES}  # by name up to the last dot
        self.conflicts: dict[str, str] = {}  # by suffix: a line about two labels of one sample

    def add(self, stem: str, suffix: str, content: bytes) -> None:
        if label := _label(content, suffix):
            known = self.given[suffix].setdefault(stem, label)
            if known != label:
                self._conflict(suffix, f"{stem}{suffix} occurs twice, as {known!r} and as {label!r}")

    def of(self, stems: list[str]) -> tuple[list[str], str, str]:
        """The label of each image ("" for none), or [] if no image has one; and `Index.dotted` and `Index.conflict`."""
        dotted = self._dotted(stems)
        best, conflict = list[str](), ""
        for suffix in LABEL_SUFFIXES:
            labels = self.given[suffix] if dotted else self._by_key(suffix)
            found = [labels.get(stem if dotted else _key(stem), "") for stem in stems] if labels else []
            if sum(map(bool, found)) > sum(map(bool, best)):
                best, conflict = found, self.conflicts.get(suffix, "")
        return best, dotted, conflict

    def _dotted(self, stems: list[str]) -> str:
        """Two images that share a key although one has a label with its full name, or ""."""
        images: dict[str, dict[str, None]] = {}
        for stem in stems:
            images.setdefault(_key(stem), {})[stem] = None
        for stem in (stem for given in self.given.values() for stem in given):
            others = images.get(_key(stem), {})
            if stem != _key(stem) and stem in others and len(others) > 1:
                return printable(f"{stem} and {next(other for other in others if other != stem)}")
        return ""

    def _by_key(self, suffix: str) -> dict[str, str]:
        labels: dict[str, tuple[str, str]] = {}
        for stem, label in self.given[suffix].items():
            other, known = labels.setdefault(_key(stem), (stem, label))
            if known != label:
                self._conflict(
                    suffix, f"{_key(stem)} has two labels, {known!r} in {other}{suffix} and {label!r} in {stem}{suffix}"
                )
        return {key: label for key, (_, label) in labels.items()}

    def _conflict(self, suffix: str, words: str) -> None:
        self.conflicts.setdefault(suffix, printable(words))


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error; `tarfile` takes one for the archive's end, unless it is the first."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError | tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"a damaged header ({error})") from error


class _Heads:
    """A file with a limit on header sizes: tarfile would read as much as an archive claims."""

    def __init__(self, file: Any) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, count: int) -> Any:
        if not 0 <= count <= MOST_HEAD:
            raise ValueError(f"a header of {count} bytes")
        return self._read(count)


def _stem(name: str) -> tuple[str, str]:
    """A member's name up to its last dot, and its suffix ("" for a hidden file)."""
    stem, dot, suffix = name.rpartition(".")
    hidden = name.rpartition("/")[2].startswith(".")
    return stem, "" if hidden or not dot or "/" in suffix else f".{suffix.lower()}"


def _key(stem: str) -> str:
    """A sample's name in WebDataset: up to the first dot after the folders."""
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(content: bytes, suffix: str) -> str:
    label = ""
    with suppress(ValueError, RecursionError):
        if suffix == ".cls":
            label = content.decode().strip()
        elif isinstance(value := json.loads(content), dict):
            given = (value.get(name) for name in ("label", "cls", "class"))
            label = next((_word(value) for value in given if isinstance(value, str | int | float)), "")
    # A long text is no class, and in an array each label takes as much memory as the longest.
    return label if len(label) <= LONGEST_LABEL else ""


def _word(value: str | float) -> str:
    """1.0 is the class 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _known(location: str) -> str:
    """The identity of a shard: its path, size and time of change."""
    if is_remote(location):
        return location
    status = os.stat(location)
    return f"{os.path.abspath(location)} {status.st_size} {status.st_mtime_ns}"


def _check_same(location: str, known: str) -> None:
    if _known(location) != known:
        raise OSError("the shard has changed since the run began; restart the run")


class Shards(ImageSource):
    """Images in tar archives.

    Args:
        locations: files or URLs, in order.
        cache: for copies and indexes.
        description: for people.
        flag: their command-line flag, for messages.

    Raises:
        UserError: a shard cannot be read, or none holds an image.
    """

    window = WINDOW

    def __init__(self, locations: list[str], cache: Cache, description: str, *, flag: str = "--data") -> None:
        self.locations, self.cache, self.description = locations, cache, description
        self.problems = problems = list[str]()
        found: dict[int, tuple[str, Index]] = {}
        # Processes that start together begin at different shards, and so divide the indexing.
        first = len(locations) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        order = [*range(first, len(locations)), *range(first)]
        for i in tqdm(order, "indexing shards", unit=" shards", delay=2, disable=not sys.stderr.isatty()):
            try:
                found[i] = (known := _known(locations[i])), self._index(locations[i], known)
            except OSError as error:
                raise UserError(f"{flag}: the shard {printable(locations[i])} cannot be read: {first_line(error)}") from error
        self.known, parts = zip(*(found[i] for i in range(len(locations))), strict=True)
        for location, part in zip(locations, parts, strict=True):
            if part.problem:
                problems.append(f"{printable(location)} after {len(part.sizes)} images: {part.problem}")
        self.offsets = np.concatenate([part.offsets for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._labels = [part.labels for part in parts]
        self._conflict = next((f"{printable(at)}: {p.conflict}" for at, p in zip(locations, parts) if p.conflict), "")
        self._dotted = [part.dotted for part in parts if part.dotted]
        left_out = LeftOut()
        for part in parts:
            left_out.add(LeftOut.from_json(part.left_out))
        self.notes = left_out.lines
        self.blocks = torch.tensor([0, *np.cumsum([len(part.sizes) for part in parts]).tolist()])
        self._first = self.blocks.tolist()
        if not len(self.sizes):
            why = f": {self.problems[0]}" if self.problems else f" (looked for {', '.join(sorted(EXTENSIONS))})"
            why += "".join(f"; {note}" for note in self.notes)
            raise UserError(f"{flag} {description}: no images in {len(locations)} shards{why}")
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors of this process, by shard
        self._owner = 0

    def _index(self, location: str, known: str) -> Index:
        """The index of a shard, from the cache or new."""
        path = self.cache.path(known, ".npz")
        with self.cache.locked(f"the index of {known}"):  # not the lock of the copy, which is made inside
            with suppress(Exception), np.load(path, allow_pickle=False) as kept:  # missing or damaged
                words = (str(kept[name]) for name in ("problem", "dotted", "conflict", "left_out"))
                return Index(kept["offsets"], kept["sizes"], kept["labels"], *words)
            with open(self._opened(location, known), "rb") as file:
                index = read_index(file)
            with suppress(CannotWrite), replaced_when_whole(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **index._asdict())
        return index

    def _opened(self, location: str, known: str) -> int:
        if is_remote(location) or not location.lower().endswith(".tar"):
            return self.cache.open(location, known)
        _check_same(location, known)
        return os.open(location, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, number: int) -> Stored:
        shard = bisect_right(self._first, number) - 1
        size, offset = int(self.sizes[number]), int(self.offsets[number])
        where = self.name(number)
        if size > scaled(MOST_BYTES):
            raise OSError(f"{where}: a file of {size / 2**30:.1f} GiB is too large for an image; or raise --max-pixels")
        try:
            content = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise OSError(f"{where}: {first_line(error)}") from error
        if len(content) < size:
            raise OSError(f"{where}: the shard was truncated")
        return Stored(where, content)

    def glimpse(self, number: int) -> int:
        shard = bisect_right(self._first, number) - 1
        size = int(self.sizes[number])
        end = int(self.offsets[number]) + size
        piece = min(size, GLIMPSE)
        return digest(size, os.pread(self._descriptor(shard), piece, end - piece))

    def _descriptor(self, shard: int) -> int:
        """The descriptor of a shard, opened in this process; a few stay open."""
        if self._owner != os.getpid():  # after a fork: the parent's descriptors are its own
            self._open, self._owner = OrderedDict(), os.getpid()
        if shard not in self._open:
            self._open[shard] = self._opened(self.locations[shard], self.known[shard])
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]

    def name(self, number: int) -> str:
        shard = bisect_right(self._first, number) - 1
        return f"{printable(self.locations[shard])}, image {number - self._first[shard]}"

    def labels(self) -> tuple[Tensor, list[str]]:
        if any(len(part) != last - first for part, first, last in zip(self._labels, self._first, self._first[1:])):
            raise ValueError(f"{self.description}: not every shard has labels (.cls or .json files named as the images)")
        if self._conflict:
            raise ValueError(f"{self._conflict}; remove one")
        if self._dotted:
            split = (
                f"in {len(self._dotted)} of {len(self.locations)} shards, sample names end at their last dot; "
                f"WebDataset's rule (the first dot) would join {self._dotted[0]}"
            )
            self.notes = [*dict.fromkeys((*self.notes, split))]
        found = np.concatenate(self._labels)
        if (found == "").any():
            more = f"; {split}" if self._dotted else ""
            raise ValueError(f"{self.description}: {self.name(int((found == '').argmax()))} has no label{more}")
        classes, labels = np.unique(found, return_inverse=True)
        if all(name.isdecimal() for name in classes.tolist()):  # numbers sort as numbers
            order = np.argsort([int(name) for name in classes.tolist()], kind="stable")
            classes, labels = classes[order], np.argsort(order)[labels]
        return torch.from_numpy(labels.astype(np.int64)), classes.tolist()


def default_cache() -> Path:
    """The default folder for cached shards."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base, "sparkme", "shards")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir(), f"sparkme-shards-{os.getuid()}")
        with suppress(OSError):  # writing will report it
            folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder} belongs to another user; choose a folder with --shard-cache") from None
        print(f"note: {base} is not writable; shards are cached in {folder}, see --shard-cache", file=sys.stderr, flush=True)
    return folder
