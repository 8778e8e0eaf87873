"""Parquet files with the bytes of images, as in Hugging Face's datasets."""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparkme.data.images import Stored
from sparkme.data.sources.base import ImageSource
from sparkme.errors import UserError, first_line
from sparkme.text import printable

CACHED_BYTES = 2**29  # of row groups, in each loader process
MOST_GROUP_BYTES = 2**31  # largest row group, since each process holds two in memory
BATCH_ROWS = 16
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "content"), ("label", "labels", "cls", "class")


class Columns(NamedTuple):
    """The image and label columns of a Parquet file, if they were named."""

    image: str | None = None
    label: str | None = None

    def refuse(self, where: str) -> None:
        """Raises UserError if a column is named for a source without columns."""
        if any(self):
            raise UserError(f"--{'image' if self.image else 'label'}-column is for Parquet files, but {where} is not one")


class Place(NamedTuple):
    """The place of image bytes in a Parquet file: the path to read, and the fields (or 0 for a list) down from its values."""

    path: str
    steps: tuple[str | int, ...]


class ParquetImages(ImageSource):
    """The rows of Parquet files. A column holds the bytes, directly, as field `bytes` of a struct, or in lists, whose first
    entry counts.

    Images are read by row group, in random order. Row groups that fit into memory are shuffled together, so small ones (some
    hundred images) shuffle better.

    Args:
        paths: the files, in order.
        description: for people.
        flag: their command-line flag, for messages.
        columns: found by name and type if not named.

    Raises:
        UserError: pyarrow is not installed, or a file has no images.
    """

    def __init__(
        self,
        paths: list[Path],
        description: str,
        *,
        flag: str = "--data",
        columns: Columns = Columns(),  # noqa: B008
    ) -> None:
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise UserError(f"{flag} {description}: Parquet needs pyarrow: pip install 'sparkme[parquet]'") from None
        self.paths, self.description, self.label_column = paths, description, columns.label
        image_column = columns.image
        groups, counts, largest, unread = list[tuple[int, int]](), list[int](), 1, 0
        self.places: list[Place] = []  # of each file
        for i, path in enumerate(paths):
            try:
                metadata = parquet.read_metadata(path)
                schema = parquet.read_schema(path)
                name = image_column or _image_column(schema)
                place = _place(schema, name) if name else None
            except Exception as error:  # pyarrow raises many kinds
                raise UserError(f"{flag} {path} cannot be read as Parquet: {first_line(error)}") from error
            if place is None or name is None:
                wanted = f"{name} that holds bytes" if name else "with the bytes of images"
                raise UserError(
                    f"{flag} {path} has no column {wanted}; its columns: {_described(schema)}; see --image-column, or use a "
                    "list (.txt) if it holds file names"
                )
            image_column = name
            self.places.append(place)
            self.schema = schema
            for group in range(metadata.num_row_groups):
                groups.append((i, group))
                counts.append(metadata.row_group(group).num_rows)
                largest = max(largest, metadata.row_group(group).total_byte_size)
                unread += _num_values(metadata.row_group(group), place) - counts[-1]
        self.notes = _notes(schema, str(image_column), unread, (*LABEL_COLUMNS, columns.label))
        if not sum(counts):
            raise UserError(f"{flag} {description} has no rows")
        if largest > MOST_GROUP_BYTES:
            raise UserError(
                f"{flag} {description}: a row group of {largest / 2**30:.1f} GiB; write smaller ones with some hundred images"
            )
        cached = max(2, CACHED_BYTES // largest)  # row groups
        self.blocks = torch.tensor([0, *np.cumsum(counts).tolist()])
        self._first = self.blocks.numpy()
        self.window = max(counts) * (cached - 1)  # a window may start and end inside a row group
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self.groups = np.array(groups)  # file and row group of each block
        self._owner = 0

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, number: int) -> Stored:
        name = self.name(number)
        block = bisect_right(self._first, number) - 1
        try:
            content = self._column(block)[number - self._first[block]].as_py()
            for step in self.places[self.groups[block, 0]].steps:
                content = content[step] if content else None
        except Exception as error:
            raise OSError(f"{name}: {first_line(error)}") from error
        if not isinstance(content, bytes):
            raise OSError(f"{name}: it has no bytes")
        return Stored(name, content)

    def _column(self, block: int) -> Any:
        """The images of a row group, cached in this process."""
        import pyarrow.parquet as parquet

        if self._owner != os.getpid():
            self._tables, self._owner = OrderedDict(), os.getpid()
        if block not in self._tables:
            file, group = self.groups[block].tolist()
            with parquet.ParquetFile(self.paths[file], memory_map=True) as opened:
                self._tables[block] = _read(opened, group, self.places[file].path)
            while len(self._tables) > 2 and sum(kept.nbytes for kept in self._tables.values()) > CACHED_BYTES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(block)
        return self._tables[block]

    def name(self, number: int) -> str:
        block = bisect_right(self._first, number) - 1
        file, group = self.groups[block].tolist()
        return f"{printable(self.paths[file])}, row {number - self._first[block]} of group {group}"

    def labels(self) -> tuple[Tensor, list[str]]:
        name = self.label_column or next((name for name in LABEL_COLUMNS if name in self.schema.names), None)
        if name is None or name not in self.schema.names:
            named = name or f"named {', '.join(LABEL_COLUMNS)}"
            raise ValueError(
                f"{self.description} has no labels: no column {named}; its columns: {_described(self.schema)}; see "
                "--label-column"
            )
        try:
            values = [_label(value) for value in self._values(name)]
        except ValueError as error:
            raise ValueError(f"{self.description}: the column {name} has {error}; see --label-column") from error
        known = self._class_names(name)
        if known:  # -1 stands for a secret label
            values = [None if value == -1 else value for value in values]
        given = [value for value in values if value is not None]
        if len(given) < len(values):
            self.notes = [
                *self.notes,
                f"left out: {len(values) - len(given)} of {len(values)} images without a label in {name}",
            ]
        if known and all(isinstance(value, int) and 0 <= value < len(known) for value in given):
            return torch.tensor([-1 if value is None else value for value in values], dtype=torch.long), known
        classes = sorted(set(given), key=lambda value: (isinstance(value, str), value))
        if len({*map(str, classes)}) < len(classes):
            raise ValueError(f"{self.description}: the column {name} has the same labels as numbers and as words; use one form")
        number: dict[int | str | None, int] = {None: -1} | {value: i for i, value in enumerate(classes)}
        return torch.tensor([number[value] for value in values], dtype=torch.long), [str(value) for value in classes]

    def _class_names(self, name: str) -> list[str]:
        """The class names of all files. Raises ValueError if they differ."""
        import pyarrow.parquet as parquet

        first, *others = [_class_names(parquet.read_schema(path), name) for path in self.paths]
        for path, names in zip(self.paths[1:], others, strict=True):
            if names != first:
                known, other = (", ".join(names[:8]) or "nothing" for names in (first, names))
                raise ValueError(f"numbers in {name} stand for {known} in {self.paths[0]}, but for {other} in {path}")
        return first

    def _values(self, name: str) -> list[Any]:
        import pyarrow.parquet as parquet

        values: list[Any] = []
        try:
            for path in self.paths:
                values += parquet.read_table(path, columns=[name], use_threads=False).column(name).to_pylist()
        except Exception as error:  # pyarrow raises many kinds
            raise ValueError(f"{path} has no readable labels in its column {name}: {first_line(error)}") from error
        return values


def _label(value: Any) -> int | str | None:
    """A label of any type as a number or word, or None. Raises ValueError for values that are no classes."""
    if isinstance(value, list) and len(value) < 2:
        value = value[0] if value else None
    if isinstance(value, list):
        raise ValueError(f"several labels per image, such as {str(value)[:60]}; each image must have one class")
    if isinstance(value, float | Decimal):
        if value != value:
            return None
        if math.isinf(value) or value != int(value):
            raise ValueError(f"numbers that are not integers, such as {value}; sparkme learns classes only")
        return int(value)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace") or None
    if value is not None and not isinstance(value, int | str):
        raise ValueError(f"values that are neither numbers nor words, such as {str(value)[:60]}")
    return None if value == "" else value


def _image_column(schema: Any) -> str | None:
    """The first column with image bytes; usual names come first."""
    names = (*(name for name in IMAGE_COLUMNS if name in schema.names), *schema.names)
    return next((str(name) for name in names if _place(schema, name) is not None), None)


def _place(schema: Any, name: str) -> Place | None:
    """The place of the bytes in a column or `column.field`, or None."""
    top, *fields = [name] if name in schema.names else name.split(".")
    if top not in schema.names:
        return None
    kind, steps = schema.field(top).type, list[str | int]()
    for field in fields:
        if not str(kind).startswith("struct") or kind.get_field_index(field) < 0:
            return None
        kind = kind.field(field).type
        steps.append(field)
    below = _steps_to_bytes(kind)
    if below is None:
        return None
    steps += below
    named = [top, *steps[: next((i for i, step in enumerate(steps) if step == 0), len(steps))]]
    return Place(".".join(map(str, named)), tuple(steps))


def _steps_to_bytes(kind: Any) -> list[str | int] | None:
    """The steps from a value of an Arrow type to its bytes: through dictionaries, structs with a field `bytes`, and lists."""
    import pyarrow

    types = pyarrow.types
    while types.is_dictionary(kind) or isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.value_type if types.is_dictionary(kind) else kind.storage_type
    text = str(kind)
    if types.is_binary(kind) or types.is_large_binary(kind) or text == "binary_view" or types.is_fixed_size_binary(kind):
        return []
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        below = _steps_to_bytes(kind.field("bytes").type)
        return None if below is None else ["bytes", *below]
    if re.match(r"(large_|fixed_size_)?list(_view)?<", text):
        below = _steps_to_bytes(kind.value_type)
        return None if below is None else [0, *below]
    return None


def _num_values(group: Any, place: Place) -> int:
    """The number of images in a row group, including all entries of lists."""
    chunks = (group.column(i) for i in range(group.num_columns))
    counts = (chunk.num_values for chunk in chunks if chunk.path_in_schema.startswith(f"{place.path}."))
    return min(counts, default=group.num_rows)  # other fields may have more values


def _notes(schema: Any, image_column: str, unread: int, labels: Sequence[str | None]) -> list[str]:
    known = (image_column, image_column.partition(".")[0], *labels)
    others = [name for name in schema.names if name not in known and _place(schema, name)]
    notes = [f"left out: {unread} images of lists, whose first image is used"] if unread > 0 else []
    if others:
        notes.append(f"images come from the column {image_column}, not from {', '.join(others[:8])}; see --image-column")
    return notes


def _described(schema: Any) -> str:
    columns = [f"{printable(name)} {str(schema.field(name).type)[:60]}" for name in schema.names[:12]]
    return ", ".join([*columns, "..."] if len(schema.names) > 12 else columns)


def _read(opened: Any, group: int, name: str) -> Any:
    """A column of a row group, read in pieces, since a dictionary column may be small only in the file."""
    import pyarrow

    pieces, size = [], 0
    # Without pyarrow's threads, which a forked process may lack.
    for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=[name], use_threads=False):
        piece = batch.column(max(0, batch.schema.get_field_index(name)))  # image.jpg is part of image
        pieces.append(piece.dictionary_decode() if pyarrow.types.is_dictionary(piece.type) else piece)
        size += pieces[-1].nbytes
        if size > MOST_GROUP_BYTES:
            raise OSError(f"a row group of more than {MOST_GROUP_BYTES / 2**30:.1f} GiB; write smaller ones")
    return pyarrow.chunked_array(pieces)


def _class_names(schema: Any, column: str) -> list[str]:
    """The class names in Hugging Face's metadata, or []."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][column]["names"]
        return [str(name) for name in names] if isinstance(names, list) else []
    except (KeyError, TypeError, ValueError):
        return []
