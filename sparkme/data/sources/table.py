"""Reads lists and tables of images, as spreadsheets, notebooks and other libraries write them.

The first bytes of a file tell its encoding. The existing image files tell its separator, its image column, and whether the
first line is a header.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import TextIO

from sparkme.data.sources.files import Files, Names, inside, look_through
from sparkme.data.sources.left_out import EXTENSIONS
from sparkme.errors import UserError, first_line

TABLES = (".csv", ".tsv")  # in other lists, a line may be one name with commas
IMAGE_HEADS = (
    "path",
    "filepath",
    "imagepath",
    "imgpath",
    "file",
    "filename",
    "fname",
    "imagefile",
    "imagefilename",
    "image",
    "img",
    "imagename",
    "imgname",
    "images",
    "photo",
    "picture",
    "name",
    "imageid",
    "imgid",
    "id",
)
_SAMPLE = 16  # lines that decide the format
_LONGEST_LINE = 2**16
_NO_UTF8 = "are not UTF-8, read as Windows-1252 (if that is wrong, save the file as UTF-8)"
# UTF-32 marks first, since they start like those of UTF-16.
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

Row = tuple[int, list[str]]  # line number, from 1, and cells


@dataclass
class Table:
    """A list or a table.

    Attributes:
        path: the file.
        encoding: of its text; for lines that are not UTF-8 see `legible`.
        separator: text between columns; "" if a line is one name, " " if its last word is a second column.
        head: the column names; empty if the file has no header.
        column: the image column.
        images: finds the images.
        width: number of columns.
    """

    path: Path
    encoding: str
    separator: str
    head: list[str]
    column: int
    images: ImageFinder
    width: int

    def rows(self) -> Iterator[Row]:
        """The lines that are not empty, without the header."""
        return islice(_rows(self.path, self.encoding, self.separator), 1 if self.head else 0, None)

    def name_of(self, column: int) -> str:
        return repr(self.head[column]) if self.head and self.head[column] else f"{column + 1}"

    def text_of(self, cell: str) -> str:
        text = legible(cell)
        if text != cell:
            self.images.changed[_NO_UTF8] += 1
        return text

    def notes(self) -> list[str]:
        """Notes about unusual encodings and names; complete once all rows are read."""
        found = [f"{self.path.name} is read as {self.encoding.upper()}"] if self.encoding != "utf-8-sig" else []
        if self.head and word_of(self.head[self.column]) not in IMAGE_HEADS:
            found.append(f"line 1 of {self.path.name} is used as its header: {', '.join(self.head)[:80]}")
        return found + [f"names in {self.path.name} that {how}: {count:,}" for how, count in self.images.changed.items()]


class ImageFinder:
    """Finds the files below a folder for the names in a table; `changed` counts names that needed changes, by change."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, os.path.abspath(root)
        self.prefix = ""
        self.known: dict[str, list[str]] | None = None
        self.changed: Counter[str] = Counter()

    def find(self, name: str) -> str | None:
        """The file's name below the folder, or None. Raises ValueError if several files match."""
        for how, candidate in self._candidates(name):
            path = os.path.normpath(candidate)  # after a link, .. would lead elsewhere
            if "\0" not in path and inside(self.top, path) and os.path.isfile(os.path.join(self.top, path)):
                if how:
                    self.changed[how] += 1
                return path
        return None

    def learn(self, names: Iterable[str]) -> None:
        """Learns from names that were not found: they may have another machine's prefix, or lack folder or suffix."""
        names = [*map(legible, names)]
        absolute = next((name for name in names if PureWindowsPath(name).is_absolute() or os.path.isabs(name)), None)
        if absolute is not None:
            parts = absolute.replace("\\", "/").split("/")
            below = (i for i in range(1, len(parts)) if os.path.isfile(os.path.join(self.top, *parts[i:])))
            if (start := next(below, None)) is not None:
                self.prefix = "/".join(parts[:start]) + "/"
            return
        is_whole = ("/" in name and os.path.splitext(name)[1].lower() in EXTENSIONS for name in names)
        if all(is_whole):
            return
        self.known = defaultdict(list)
        for file in look_through(self.root).names:
            stem = os.path.splitext(file)[0]
            for key in dict.fromkeys((stem, os.path.basename(stem), os.path.basename(file))):
                self.known[key].append(file)

    def _candidates(self, name: str) -> Iterator[tuple[str, str]]:
        """Possible file names, each with the change that it needs."""
        yield "", name
        text = legible(name)
        if text != name:
            yield _NO_UTF8, text
        if "\\" in text:
            text = text.replace("\\", "/")
            yield "have \\ for /", text
        if self.prefix and text.startswith(self.prefix):
            yield f"are below {self.prefix}, read as below {self.root}", text[len(self.prefix) :]
        if self.known is not None and text:
            found = self.known.get(os.path.normpath(text), [])
            if len(found) > 1:
                raise ValueError(f"which may be {found[0]} or {found[1]} in {self.root}; write full names")
            yield from ((f"lack their suffix or folder, found in {self.root}", file) for file in found)


def legible(text: str) -> str:
    """Decodes bytes that are not UTF-8 (surrogates in Python) as Windows-1252."""
    if text.isascii() or not any("\udc80" <= sign <= "\udcff" for sign in text):
        return text
    return text.encode(errors="surrogateescape").decode("cp1252", errors="replace")


def word_of(name: str) -> str:
    """A column name without case and punctuation: `Image ID`, `image_id` and `imageId` are one."""
    return re.sub(r"[\W_]+", "", name).lower()


def open_table(path: Path, root: Path) -> Table:
    """Finds the format of a list or table whose names are below `root`. Raises UserError if it is empty or unreadable."""
    with table_errors(path):
        encoding, images = _encoding(path), ImageFinder(root)
        is_table = path.suffix.lower() in TABLES
        best: tuple[tuple[int, bool], str, int, list[list[str]]] | None = None
        for separator in (",", "\t", ";", "|", " ") if is_table else ("", "\t", ",", ";", " "):
            try:
                sample = [cells for _, cells in islice(_rows(path, encoding, separator), _SAMPLE)]
            except csv.Error:
                if separator == " ":
                    raise
                continue
            if not sample:
                raise UserError(f"{path} names no images")
            found, column = _best_column(sample, images)
            widths = {len(cells) for cells in sample}
            score = (found, len(widths) == 1 and (separator == "" or widths != {1}))
            if best is None or score > best[0]:
                best = score, separator, column, sample
            if score >= (len(sample), True):
                break
        assert best is not None
        (found, _), separator, column, sample = best
        has_head, column = _find_head(sample, column if found else None, images)
        images.changed.clear()
        head = [legible(name) for name in sample[0]] if has_head else []
        return Table(path, encoding, separator, head, column, images, len(sample[0]))


def _find_head(sample: list[list[str]], column: int | None, images: ImageFinder) -> tuple[bool, int]:
    """Whether the first line is a header, and the image column: `column` if some files were found."""
    first = sample[0]
    if column is not None:
        cell = first[column] if column < len(first) else ""
        is_name = not re.search(r"[./\\]", cell) and not cell.isdecimal()  # unlike file names with a suffix
        return images.find(cell) is None and (word_of(cell) in IMAGE_HEADS or is_name), column
    words = [word_of(cell) for cell in first]
    heads = [words.index(word) for word in IMAGE_HEADS if word in words]
    column = heads[0] if heads else 0
    images.learn(cells[column] for cells in sample[len(heads[:1]) :] if len(cells) > column)
    return bool(heads), column


def _best_column(sample: list[list[str]], images: ImageFinder) -> tuple[int, int]:
    """The number of files found in the best column, and that column; the first of equals."""
    counts = Counter({0: 0})
    for cells in sample:
        counts.update(i for i, cell in enumerate(cells[:64]) if images.find(cell) is not None)
    column, count = counts.most_common(1)[0]
    return count, column


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turns errors while reading a table into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _encoding(path: Path) -> str:
    """From the byte-order mark or, without one, from zero bytes: in UTF-16 mostly every second byte is zero."""
    with path.open("rb") as file:
        start = file.read(4096)
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) > 1 and start[first::2].count(0) > len(start) // 4:
            return encoding
    return "utf-8-sig"


def _rows(path: Path, encoding: str, separator: str) -> Iterator[Row]:
    with path.open(newline="", encoding=encoding, errors="surrogateescape") as file:
        lines = _lines(file)
        rows: Iterable[Row]
        if separator == "":
            rows = ((number, [line.rstrip("\r\n")]) for number, line in enumerate(lines, 1))
        elif separator == " ":
            rows = ((number, line.strip().rsplit(None, 1)) for number, line in enumerate(lines, 1))
        else:
            reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
            rows = ((reader.line_num, [cell.strip() for cell in cells]) for cells in reader)
        for number, cells in rows:
            says_separator = number == 1 and re.fullmatch(r"sep=.?", separator.join(cells).strip('"'))  # Excel's first line
            if not says_separator and any(cell.strip() for cell in cells):
                yield number, cells


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; raises ValueError for an endless line, as in a binary file."""
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
        yield line


def read_list(path: Path, root: Path | None = None, *, flag: str = "--data") -> Files:
    """The images that a list or table names, below `root` or the file's own folder.

    Raises:
        UserError: the file cannot be read, names no images, or names a file outside the root.
    """
    root = path.parent if root is None else root
    try:
        table = open_table(path, root)
        with table_errors(path):
            names = Names.pack(_entries(table))
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    if not names:
        raise UserError(f"{flag} {path} names no images")
    if not any(os.path.isfile(root / name) for name in names[:_SAMPLE]):
        raise UserError(f"{flag} {path} names {names[0][:80]!r}, but there is no such file in {root}; see --root")
    only = [f"only the image column {table.name_of(table.column)} of {path.name} is used"]
    notes = table.notes() + (only if table.width > 1 else [])
    return Files(root, names, f"{path}", notes=notes)


def _entries(table: Table) -> Iterator[str]:
    """The names of a list's images. Only the first ones are looked up, since looking up many would take long."""
    images, is_plain = table.images, True
    for count, (number, cells) in enumerate(table.rows()):
        if len(cells) <= table.column or not (name := cells[table.column]):
            raise UserError(f"{table.path}: line {number} has no column {table.name_of(table.column)}")
        if count < _SAMPLE or not is_plain:
            try:
                found = images.find(name)
            except ValueError as error:
                raise UserError(f"{table.path}: line {number} names {name[:80]!r}, {error}") from error
            is_plain = not images.changed
            name = found or name
        if "\0" in name or not inside(images.top, name):
            raise UserError(f"{outside(table, number, name)}; see --root")
        yield os.path.normpath(name)


def outside(table: Table, number: int, name: str) -> str:
    return f"{table.path}: line {number} names {name[:80]!r}, which lies outside {table.images.root}"
