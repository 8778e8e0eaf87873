"""Parquet files with the bytes of images, as Hugging Face's datasets have them."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkme.data.images import Stored, printable
from sparkme.data.sources.base import ImageSource
from sparkme.errors import UserError, first_line

CACHED_BYTES = 2**29  # of row groups, in each process that loads images
MOST_GROUP_BYTES = 2**31  # one that has more is not read: two are in memory, in each process
BATCH_ROWS = 16
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "content"), ("label", "labels", "cls", "class")


class ParquetImages(ImageSource):
    """The rows of Parquet files; a column has the bytes, by itself or as the field `bytes` of a struct.

    Images are read by row groups. Those of an epoch come in random order, and as many as fit into memory are shuffled among
    each other, so small row groups (some hundred images) give the better order.

    Args:
        paths: the files, in order.
        description: for people.
        flag: what they were given by, for messages.

    Raises:
        UserError: pyarrow is not installed, or a file is not of that kind.
    """

    def __init__(self, paths: list[Path], description: str, *, flag: str = "--data") -> None:
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise UserError(f"{flag} {description}: Parquet needs pyarrow: pip install 'sparkme[parquet]'") from None
        self.paths, self.description = paths, description
        groups, counts, largest = list[tuple[int, int]](), list[int](), 1
        self.column = ""
        for i, path in enumerate(paths):
            try:
                metadata = parquet.read_metadata(path)
                schema = parquet.read_schema(path)
                column = _image_column(schema)
            except Exception as error:  # pyarrow has many
                raise UserError(f"{flag} {path} cannot be read as Parquet: {first_line(error)}") from error
            if column is None or (self.column and column != self.column):
                raise UserError(
                    f"{flag} {path} has no column {self.column or 'with the bytes of images'}; its columns: "
                    f"{', '.join(schema.names[:8])}"
                )
            self.column, self.schema = column, schema
            for group in range(metadata.num_row_groups):
                groups.append((i, group))
                counts.append(metadata.row_group(group).num_rows)
                largest = max(largest, metadata.row_group(group).total_byte_size)
        if not sum(counts):
            raise UserError(f"{flag} {description} has no rows")
        if largest > MOST_GROUP_BYTES:
            raise UserError(
                f"{flag} {description}: a row group of {largest / 2**30:.1f} GiB; write smaller ones, of some hundred images"
            )
        cached = max(2, CACHED_BYTES // largest)  # row groups
        self.blocks = torch.tensor([0, *np.cumsum(counts).tolist()])
        self._first = self.blocks.numpy()
        self.window = max(counts) * (cached - 1)  # and may begin and end within one, so that it is of as many as are kept
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
        except Exception as error:
            raise OSError(f"{name}: {first_line(error)}") from error
        if not isinstance(content, bytes):
            raise OSError(f"{name}: it has no bytes")
        return Stored(name, content)

    def _column(self, block: int) -> Any:
        """The images of a row group, kept in this process for the next ones."""
        import pyarrow.parquet as parquet

        if self._owner != os.getpid():
            self._tables, self._owner = OrderedDict(), os.getpid()
        if block not in self._tables:
            file, group = self.groups[block].tolist()
            with parquet.ParquetFile(self.paths[file], memory_map=True) as opened:
                column = _read(opened, group, self.column)
            while str(column.type).startswith("struct"):
                column = _field(column, "bytes")
            self._tables[block] = column
            while len(self._tables) > 2 and sum(kept.nbytes for kept in self._tables.values()) > CACHED_BYTES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(block)
        return self._tables[block]

    def name(self, number: int) -> str:
        block = bisect_right(self._first, number) - 1
        file, group = self.groups[block].tolist()
        return f"{printable(self.paths[file])}, row {number - self._first[block]} of group {group}"

    def labels(self) -> tuple[Tensor, list[str]]:
        import pyarrow.parquet as parquet

        name = next((name for name in LABEL_COLUMNS if name in self.schema.names), None)
        if name is None:
            raise ValueError(f"{self.description} has no labels: no column {', '.join(LABEL_COLUMNS)}")
        values: list[Any] = []
        try:
            for path in self.paths:
                values += parquet.read_table(path, columns=[name], use_threads=False).column(name).to_pylist()
        except Exception as error:  # pyarrow has many
            raise ValueError(f"{path} has no labels that can be read in its column {name}: {first_line(error)}") from error
        if any(not isinstance(value, int | str) for value in values):
            raise ValueError(f"{self.description}: the column {name} has values that are neither numbers nor words")
        known = _class_names(self.schema, name)
        if known and all(isinstance(value, int) and 0 <= value < len(known) for value in values):
            return torch.tensor(values), known
        classes = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        number = {value: i for i, value in enumerate(classes)}
        return torch.tensor([number[value] for value in values]), [str(value) for value in classes]


def _image_column(schema: Any) -> str | None:
    """`image`, or `image.bytes`: the first column with bytes, of those that are named as is usual."""
    for name in (*(n for n in IMAGE_COLUMNS if n in schema.names), *schema.names):
        kind = schema.field(name).type
        if str(kind) in ("binary", "large_binary"):
            return str(name)
        if str(kind).startswith("struct"):
            fields = {kind.field(i).name: str(kind.field(i).type) for i in range(kind.num_fields)}
            if fields.get("bytes") in ("binary", "large_binary"):
                return f"{name}.bytes"
    return None


def _read(opened: Any, group: int, name: str) -> Any:
    """A column of a row group, piece by piece: a dictionary that is named again and again may be small in the file only."""
    import pyarrow

    pieces, size = [], 0
    # Without threads of its own, which a process that was forked may not have.
    for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=[name], use_threads=False):
        pieces.append(batch.column(0))
        size += pieces[-1].nbytes
        if size > MOST_GROUP_BYTES:
            raise OSError(f"a row group of more than {MOST_GROUP_BYTES / 2**30:.1f} GiB; write smaller ones")
    return pyarrow.chunked_array(pieces)


def _field(column: Any, name: str) -> Any:
    import pyarrow.compute as compute

    return compute.struct_field(column, name)


def _class_names(schema: Any, column: str) -> list[str]:
    """The names that Hugging Face's datasets keep beside the numbers."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][column]["names"]
        return [str(name) for name in names] if isinstance(names, list) else []
    except (KeyError, TypeError, ValueError):
        return []
