"""Lists and tables of images, as spreadsheets, notebooks and other libraries write them.

What such a file does not say is found: its encoding by its first bytes; what parts its columns, which of them names the images
and whether the first line is a head by the files that are there.
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

TABLES = (".csv", ".tsv")  # a line of other lists may be one name with commas
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
_SAMPLE = 16  # lines that are looked at first
_LONGEST_LINE = 2**16
_NO_UTF8 = "are no UTF-8, and read as Windows-1252 (if that is wrong, save it as UTF-8)"
# Those of UTF-32 begin as those of UTF-16.
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

Row = tuple[int, list[str]]  # the number of a line, from 1, and its cells


@dataclass
class Table:
    """A list or a table.

    Attributes:
        path: of the file.
        encoding: of its text; where a line is no UTF-8, see `legible`.
        separator: what parts the columns; empty where a line is a name, a space where its last word is a column of its own.
        head: the names of the columns; empty where the file has no head.
        column: which names the images.
        images: finds them.
        width: how many columns there are.
    """

    path: Path
    encoding: str
    separator: str
    head: list[str]
    column: int
    images: ImageFinder
    width: int

    def rows(self) -> Iterator[Row]:
        """The lines that are not empty, without the head."""
        return islice(_rows(self.path, self.encoding, self.separator), 1 if self.head else 0, None)

    def name_of(self, column: int) -> str:
        """For people."""
        return repr(self.head[column]) if self.head and self.head[column] else f"{column + 1}"

    def text_of(self, cell: str) -> str:
        """For labels."""
        text = legible(cell)
        if text != cell:
            self.images.changed[_NO_UTF8] += 1
        return text

    def notes(self) -> list[str]:
        """For people: what was read otherwise than as UTF-8 and names of files. Complete once all rows are read."""
        found = [f"{self.path.name} is read as {self.encoding.upper()}"] if self.encoding != "utf-8-sig" else []
        if self.head and word_of(self.head[self.column]) not in IMAGE_HEADS:
            found.append(f"line 1 of {self.path.name} is taken for its head: {', '.join(self.head)[:80]}")
        return found + [f"names in {self.path.name} that {how}: {count:,}" for how, count in self.images.changed.items()]


class ImageFinder:
    """Finds the files below a folder that a table's names mean.

    Attributes:
        changed: how many names were read otherwise than they are written, by how.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, os.path.abspath(root)
        self.prefix = ""
        self.known: dict[str, list[str]] | None = None
        self.changed: Counter[str] = Counter()

    def find(self, name: str) -> str | None:
        """The file's name below the folder, or None if there is none.

        Raises:
            ValueError: there are several.
        """
        for how, candidate in self._candidates(name):
            path = os.path.normpath(candidate)  # behind a link, .. would lead elsewhere
            if "\0" not in path and inside(self.top, path) and os.path.isfile(os.path.join(self.top, path)):
                if how:
                    self.changed[how] += 1
                return path
        return None

    def learn(self, names: Iterable[str]) -> None:
        """Finds out, from names none of which is found, what they may be: of another machine's folder, or parts of names."""
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
        """What a name may mean, and how it is read then."""
        yield "", name
        text = legible(name)
        if text != name:
            yield _NO_UTF8, text
        if "\\" in text:
            text = text.replace("\\", "/")
            yield "have \\ for /", text
        if self.prefix and text.startswith(self.prefix):
            yield f"are below {self.prefix}, and read as below {self.root}", text[len(self.prefix) :]
        if self.known is not None and text:
            found = self.known.get(os.path.normpath(text), [])
            if len(found) > 1:
                raise ValueError(f"which may be {found[0]} or {found[1]} in {self.root}; write the whole names")
            yield from ((f"lack their suffix or folder, and are found in {self.root}", file) for file in found)


def legible(text: str) -> str:
    """Bytes that are no UTF-8, which Python keeps as surrogates, as Windows-1252; what that has no sign for as ?."""
    if text.isascii() or not any("\udc80" <= sign <= "\udcff" for sign in text):
        return text
    return text.encode(errors="surrogateescape").decode("cp1252", errors="replace")


def word_of(name: str) -> str:
    """A column's name without what people write in different ways: `Image ID`, `image_id`, `imageId`."""
    return re.sub(r"[\W_]+", "", name).lower()


def open_table(path: Path, root: Path) -> Table:
    """Finds out how a list or a table is written.

    Args:
        path: the file.
        root: the folder that its names are below.

    Raises:
        UserError: it cannot be read, or is empty.
    """
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
    """Whether the first line is a head, and the column that names images, which is that of the files if some are found."""
    first = sample[0]
    if column is not None:
        cell = first[column] if column < len(first) else ""
        is_name = not re.search(r"[./\\]", cell) and not cell.isdecimal()  # as of files whose others have a suffix
        return images.find(cell) is None and (word_of(cell) in IMAGE_HEADS or is_name), column
    words = [word_of(cell) for cell in first]
    heads = [words.index(word) for word in IMAGE_HEADS if word in words]
    column = heads[0] if heads else 0
    images.learn(cells[column] for cells in sample[len(heads[:1]) :] if len(cells) > column)
    return bool(heads), column


def _best_column(sample: list[list[str]], images: ImageFinder) -> tuple[int, int]:
    """How many files a column names, and which, where it is the most of all; the first of equals."""
    counts = Counter({0: 0})
    for cells in sample:
        counts.update(i for i, cell in enumerate(cells[:64]) if images.find(cell) is not None)
    column, count = counts.most_common(1)[0]
    return count, column


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a table is read into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _encoding(path: Path) -> str:
    """By the mark at the start of the file or, without, by which bytes are 0: every second of UTF-16 mostly is."""
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
            says_separator = number == 1 and re.fullmatch(r"sep=.?", separator.join(cells).strip('"'))  # of Excel's
            if not says_separator and any(cell.strip() for cell in cells):
                yield number, cells


def _lines(file: TextIO) -> Iterator[str]:
    """Of a file that may be no text at all, and then one line as a whole."""
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
        yield line


def read_list(path: Path, root: Path | None = None, *, flag: str = "--data") -> Files:
    """Images that a list or a table names, in lines; relative to a root.

    Args:
        path: the file.
        root: the folder that the names are below; the file's own if None.
        flag: what the file was given by, for messages.

    Raises:
        UserError: it cannot be read, names nothing, or names something outside of the root.
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
        raise UserError(f"{flag} {path} names {names[0][:80]!r}, and there is no such file in {root}; see --root")
    only = [f"of {path.name} only column {table.name_of(table.column)} is read, which names the images"]
    notes = table.notes() + (only if table.width > 1 else [])
    return Files(root, names, f"{path}", notes=notes)


def _entries(table: Table) -> Iterator[str]:
    """The names of a list's images. Whether each is there is not looked up, which would take long where there are many."""
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
    """What to say of a name that leads out of the root."""
    return f"{table.path}: line {number} names {name[:80]!r}, which lies outside of {table.images.root}"
