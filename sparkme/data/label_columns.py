"""Reads classes, several labels per image, and the train/val split from the columns of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import NamedTuple

import torch
from torch import Tensor

from sparkme.data.sources.files import inside
from sparkme.data.sources.table import Table, legible, outside, table_errors, word_of
from sparkme.errors import UserError

TRAIN: tuple[str, ...] = ("train", "training")  # in any case
VAL: tuple[str, ...] = ("val", "valid", "validation", "test", "testing", "eval", "dev")
LABEL_HEADS = (
    "label",
    "labels",
    "class",
    "classes",
    "classname",
    "category",
    "categoryname",
    "target",
    "targets",
    "tag",
    "tags",
    "classid",
    "labelid",
    "categoryid",
)
_SPLIT_HEADS = ("split", "part", "set", "subset", "phase", "partition", "usage", "fold")
_IS_VAL_HEADS = ("isvalid", "isval", "isvalidation", "istest")
_INDEX_HEADS = ("", "unnamed0", "index")
_YES: tuple[str, ...] = ("1", "1.0", "true")
_NO: tuple[str, ...] = ("0", "0.0", "false")
_EMPTY = ("", "nan")  # pandas writes nan for a missing value
_SEPARATORS = "|;, "


@dataclass
class LabelledRows:
    """The images of a table with their labels.

    Attributes:
        images: names below the table's root.
        labels: (N,) int64 class numbers, or (N, classes) bool if images have several labels.
        classes: names of the classes or labels.
        is_val: (N,) bool: the validation images; None if the table has no split.
        notes: lines for people about left-out lines and unusual spellings.
    """

    images: list[str]
    labels: Tensor
    classes: list[str]
    is_val: Tensor | None
    notes: list[str]


class _Line(NamedTuple):
    number: int
    image: str
    cells: list[str]  # of the label columns
    part: str


class _Targets(NamedTuple):
    """Labels and classes as in `LabelledRows`, and their lines."""

    labels: Tensor
    classes: list[str]
    lines: list[_Line]


@dataclass
class _Columns:
    """The columns to read: those with labels, the split column or None, whether --labels named them, and notes."""

    labels: list[int]
    split: int | None
    asked: bool
    notes: list[str] = field(default_factory=list)


def read_label_columns(table: Table, names: Sequence[str] | None = None, separator: str | None = None) -> LabelledRows:
    """Reads a table with images and labels.

    Args:
        table: the table.
        names: the label columns; None: chosen by the header. Several columns hold 0 and 1, or one label name each.
        separator: text between several labels in a cell; "": a cell is always one label; None: not given.

    Raises:
        UserError: an image is missing or listed twice, or the labels are not usable; says what was found.
    """
    with table_errors(table.path):
        columns = _choose(table, names)
        lines = [*_lines(table, columns)]
    known = [line for line in lines if any(cell.lower() not in _EMPTY for cell in line.cells)]
    if not known:
        raise UserError(
            f"{table.path} has a header, but no lines with a label below it"
            if not lines
            else f"{table.path}: none of its {len(lines):,} lines has a label"
        )
    if len(columns.labels) == 1:
        targets = _of_one_column(table, columns, known, separator)
    else:
        targets = _of_columns(table, columns, known, separator)
    missing = len(lines) - len(targets.lines)
    if missing:
        columns.notes.append(f"left out: {missing:,} line{'s' * (missing > 1)} of {table.path.name} without a label")
    images, is_val = [line.image for line in targets.lines], _is_val(table, columns, targets.lines)
    return LabelledRows(images, targets.labels, targets.classes, is_val, table.notes() + columns.notes)


# Columns.


def _choose(table: Table, names: Sequence[str] | None) -> _Columns:
    if not table.head:
        if names is not None:
            raise UserError(f"{table.path} has no header; write the column names into its first line to use --labels")
        return _choose_by_place(table)
    words = [word_of(name) for name in table.head]
    others = [i for i in range(len(words)) if i != table.column]
    split = next((i for i in others if words[i] in _SPLIT_HEADS + _IS_VAL_HEADS), None)
    if names is not None:
        if unknown := [name for name in names if name not in table.head]:
            raise UserError(f"--labels {unknown[0]!r} is not a column of {table.path}; its columns are {_listed(table.head)}")
        labels = [table.head.index(name) for name in names]
        return _with_note(table, _Columns(labels, None if split in labels else split, asked=True))
    others = [i for i in others if i != split and words[i] not in _INDEX_HEADS]
    named = [words.index(word) for word in LABEL_HEADS if word in words and words.index(word) in others]
    return _with_note(table, _Columns(named[:1] or others, split, asked=False))


def _choose_by_place(table: Table) -> _Columns:
    """Without a header: the label follows the path, then an optional split; if the path is last, the label precedes it."""
    after = list(range(table.column + 1, table.width))
    labels = after[:1] or list(range(max(0, table.column - 1), table.column))
    if len(after) > 2:
        raise UserError(f"{table.path}: line 1 has {table.width} columns; add a header line above, such as path,label")
    return _with_note(table, _Columns(labels, after[1] if len(after) == 2 else None, asked=False))


def _with_note(table: Table, columns: _Columns) -> _Columns:
    if not columns.labels:
        raise UserError(f"{table.path} has no label column: line 1 is {_first_line(table)!r}; expected path,label")
    names = [table.head[i] for i in columns.labels] if table.head else []
    if twice := next((name for name in names if table.head.count(name) > 1 or names.count(name) > 1), None):
        raise UserError(f"{table.path}: column {twice!r} occurs or is named twice; leave one out")
    unread = [i for i in range(table.width) if i not in (table.column, columns.split, *columns.labels)]
    if unread:
        columns.notes.append(f"unused columns of {table.path.name}: {_listed([table.name_of(i) for i in unread])}")
    return columns


def _first_line(table: Table) -> str:
    return legible(",".join(table.head or next(iter(table.rows()))[1]))[:80]


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most])[:300] + (f", ... ({len(names)} in all)" if len(names) > most else "")


# Lines.


def _lines(table: Table, columns: _Columns) -> Iterator[_Line]:
    seen: dict[str, _Line] = {}
    last = max(table.column, *columns.labels)
    for number, cells in table.rows():
        while len(cells) > table.width and not cells[-1]:  # as spreadsheets write them
            cells.pop()
        if not last < len(cells) <= table.width or not cells[table.column]:
            expected = f"{len(table.head)} columns as in the header" if table.head else "path,label"
            quotes = f"; put names that contain {table.separator!r} in quotes" if len(cells) > table.width else ""
            raise UserError(f"{table.path}: line {number} is not {expected}: {','.join(cells)[:80]!r}{quotes}")
        part = cells[columns.split] if columns.split is not None and columns.split < len(cells) else ""
        labels = [table.text_of(cells[i]) for i in columns.labels]
        line = _Line(number, _image(table, number, cells[table.column]), labels, part.lower())
        if (before := seen.setdefault(line.image, line)) is not line:
            _refuse_twice(table, before, line, cells[table.column])
        yield line


def _image(table: Table, number: int, name: str) -> str:
    try:
        found = table.images.find(name)
    except ValueError as error:
        raise UserError(f"{table.path}: line {number} names {name[:80]!r}, {error}") from error
    if found is not None:
        return found
    if not inside(table.images.top, name):
        raise UserError(outside(table, number, name))
    advice = "; a header must name the image column, such as path" if number == 1 else ""
    if "://" in name or PureWindowsPath(name).is_absolute():
        advice = "; copy the images there and use names relative to it"
    missing = f"but there is no such file in {table.images.root}{advice}"
    raise UserError(f"{table.path}: line {number} names {name[:80]!r}, {missing}")


def _refuse_twice(table: Table, before: _Line, line: _Line, name: str) -> None:
    labels = [",".join(each.cells)[:40] for each in (line, before)]
    several = (
        ""
        if labels[0] == labels[1]
        else (
            f", first as {labels[1]!r}, now as {labels[0]!r}; remove one, or write both in one line as a|b and pass "
            "--label-separator '|' to finetune"
        )
    )
    raise UserError(
        f"{table.path}: line {line.number} names {name[:80]!r} again, after line {before.number}{several or '; remove one'}"
    )


def _is_val(table: Table, columns: _Columns, lines: Sequence[_Line]) -> Tensor | None:
    """The validation lines."""
    if columns.split is None or not any(line.part for line in lines):
        return None
    parts, name = [line.part for line in lines], table.name_of(columns.split)
    is_flag = bool(table.head) and word_of(table.head[columns.split]) in _IS_VAL_HEADS
    train, val, allowed = (_NO, _YES, "1 or 0") if is_flag else (TRAIN, VAL, "train or val")
    if not is_flag and all(part.isdecimal() for part in parts):
        columns.notes.append(f"column {name} of {table.path.name} holds numbers, not train or val, so it is not used")
        return None
    if (bad := next((part for part in parts if part not in (*train, *val)), None)) is not None:
        raise UserError(f"{table.path}: column {name} has {bad!r}; it must be {allowed}")
    return torch.tensor([part in val for part in parts])


# Labels.


def _of_one_column(table: Table, columns: _Columns, lines: list[_Line], separator: str | None) -> _Targets:
    found = [line.cells[0] for line in lines]
    name = table.name_of(columns.labels[0])
    different = sorted(set(found))
    _refuse_numbers(table, name, different)
    if separator and not any(separator in label for label in different):
        raise UserError(f"{table.path}: no label in column {name} contains --label-separator {separator!r}; leave it out")
    if separator:
        return _of_names(table, [_parted(line.cells, separator) for line in lines], lines)
    if separator is None:
        columns.notes.extend(_check_single(table, name, different))
    return _of_classes(table, found, lines)


def _of_columns(table: Table, columns: _Columns, lines: list[_Line], separator: str | None) -> _Targets:
    names = [table.head[i] for i in columns.labels]
    values = {cell.lower() for line in lines for cell in line.cells}
    if not values <= {*_YES, *_NO, *_EMPTY}:
        return _of_named_columns(table, columns, lines, separator, values)
    lines = [line for line in lines if all(cell.lower() not in _EMPTY for cell in line.cells)]
    labels = torch.tensor([[cell.lower() in _YES for cell in line.cells] for line in lines])
    is_one_each = len(lines) > 0 and bool((labels.sum(1) == 1).all())
    if columns.asked:
        if is_one_each:
            one_each = "has exactly one of these labels; without --labels they would be classes"
            columns.notes.append(f"each image of {table.path.name} {one_each}")
        return _Targets(labels, names, lines)
    if not is_one_each:
        raise UserError(
            f"{table.path}: columns {_listed(names)} hold 0 and 1, but not exactly one 1 per line; for several labels per "
            f"image pass {_flags(table)} --labels {','.join(names)[:200]} to finetune"
        )
    columns.notes.append(f"each line of {table.path.name} has one 1, which marks its class: {_listed(names)}")
    return _of_classes(table, [names[i] for i in labels.int().argmax(1).tolist()], lines)


def _of_named_columns(
    table: Table, columns: _Columns, lines: list[_Line], separator: str | None, values: Collection[str]
) -> _Targets:
    names = [table.head[i] for i in columns.labels]
    if not columns.asked:
        raise UserError(
            f"{table.path} has columns {_listed(names)}, but none is called label; pass {_flags(table)} --labels COLUMN to "
            "finetune or probe"
        )
    for i, name in enumerate(names):
        _refuse_numbers(table, name, sorted({line.cells[i] for line in lines}))
    numbers = [value for value in sorted(values, key=_flags_last) if _number(value) is not None and value not in _EMPTY]
    if numbers:
        raise UserError(
            f"{table.path}: columns {_listed(names)} contain {numbers[0]!r}; several label columns must hold only 0 and 1, or "
            "only names"
        )
    return _of_names(table, [_parted(line.cells, separator) for line in lines], lines)


def _flags(table: Table) -> str:
    """The flags that name the table."""
    root = table.images.root
    return f"--data {table.path}" + (f" --root {root}" if root != table.path.parent else "")


def _flags_last(value: str) -> tuple[bool, str]:
    return value in (*_YES, *_NO), value


def _parted(cells: Sequence[str], separator: str | None) -> list[str]:
    parts = [part.strip() for cell in cells for part in (cell.split(separator) if separator else [cell])]
    return [part for part in parts if part.lower() not in _EMPTY]


def _of_classes(table: Table, found: list[str], lines: list[_Line]) -> _Targets:
    number = _numbers_of(table, found)
    return _Targets(torch.tensor([number[label] for label in found]), [*number], lines)


def _of_names(table: Table, found: list[list[str]], lines: list[_Line]) -> _Targets:
    number = _numbers_of(table, {label for labels in found for label in labels})
    has = torch.zeros(len(found), len(number), dtype=torch.bool)
    for row, labels in zip(has, found, strict=True):
        row[[number[label] for label in labels]] = True
    return _Targets(has, [*number], lines)


def _numbers_of(table: Table, labels: Collection[str]) -> dict[str, int]:
    names = sorted(set(labels))
    if len(names) < 2:
        raise UserError(f"{table.path} has {len(names)} different labels; two or more are needed, in lines of path,label")
    return {name: i for i, name in enumerate(names)}


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


def _refuse_numbers(table: Table, name: str, labels: Collection[str]) -> None:
    """Raises UserError for numbers that are not integers: they are no class names."""
    numbers = {label: _number(label) for label in labels if label.lower() not in _EMPTY}
    values = [value for value in numbers.values() if value is not None]
    if len(values) < len(numbers) or all(value.is_integer() for value in values):
        return
    example = next(label for label, value in numbers.items() if value is not None and not value.is_integer())
    raise UserError(
        f"{table.path}: the labels in column {name} look like numbers for regression, such as {example!r}; sparkme learns "
        "classes only: use class names or integers"
    )


def _check_single(table: Table, name: str, labels: Collection[str]) -> list[str]:
    """Refuses cells with several labels; returns notes about cells that may have several."""
    if (listed := next((label for label in labels if label[:1] + label[-1:] in ("[]", "{}", "()")), None)) is not None:
        raise UserError(
            f"{table.path}: labels in column {name} are lists, such as {listed[:60]!r}; write them as a|b and pass "
            "--label-separator '|' to finetune"
        )
    for separator in _SEPARATORS:
        parted = [{part.strip() for part in label.split(separator)} for label in labels if separator in label.strip()]
        shared = [
            part for part, count in Counter(part for parts in parted for part in parts).items() if count > 1 or part in labels
        ]
        if not parted or (separator in ", " and not shared):
            continue
        example = next(label for label in labels if separator in label.strip())[:60]
        if shared and separator in "|;":
            raise UserError(
                f"{table.path}: cells of column {name} hold several labels, such as {example!r}; pass --label-separator "
                f"'{separator}' to finetune for several labels per image, or --label-separator '' if each cell is one class"
            )
        return [f"cells such as {example!r} are one class each; for several labels pass --label-separator '{separator}'"]
    return []
