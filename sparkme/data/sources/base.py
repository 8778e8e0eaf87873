"""What every source of images has in common."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sparkme.data.images import Stored

GLIMPSE = 2**12  # bytes at the end of a file, where few files of one size are alike


def digest(*values: object) -> int:
    """63 bits of a hash, which fit into an int64."""
    found = _hash()
    for value in values:
        found.update(value if isinstance(value, bytes) else str(value).encode())
    return _as_int(found.digest())


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8)


def _as_int(found: bytes) -> int:
    return int.from_bytes(found) >> 1


class ImageSource(ABC):
    """Images by their numbers, wherever they are.

    Reading is done by the processes that load images, which share what the source keeps in NumPy arrays and tensors; files are
    opened there, and not before.

    Attributes:
        description: for people.
        blocks: (K + 1,) int64, where it is faster to read images that lie together (a tar shard, a row group of Parquet):
            the first number of each such part, and the number of images at the end; None where any order is as good.
        window: with blocks, how many images that follow one another in the order of an epoch are shuffled among each other.
        problems: what was damaged and is left out, in words.
        notes: what else is left out, or is not read as one may expect, a line each.
    """

    description: str
    blocks: Tensor | None = None
    window: int = 1
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def remarks(self) -> list[str]:
        """What is said once, at the start."""
        return [*self.notes, *(f"left out: {problem}" for problem in self.problems[:10])]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, number: int) -> Stored:
        """One image as it is stored.

        Raises:
            OSError: it cannot be read; names it.
        """

    @abstractmethod
    def name(self, number: int) -> str:
        """For messages, and to recognise the image by."""

    def glimpse(self, number: int) -> int:
        """Differs only where images differ, and mostly where they do: what is cheap to know of the content.

        Raises:
            OSError: it cannot be read.
        """
        return self.digest(number)

    def digest(self, number: int) -> int:
        """Is the same for images whose content is the same, and for no others.

        Raises:
            OSError: it cannot be read.
        """
        content = self.read(number).content
        if isinstance(content, Path):
            with content.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise OSError("an empty file")
                return _as_int(hashlib.file_digest(file, _hash).digest())
        if isinstance(content, Image.Image):
            return digest(content.mode, content.size, content.tobytes())
        if isinstance(content, Tensor):
            return digest(content.dtype, content.shape, content.contiguous().numpy().tobytes())
        if not content:
            raise OSError("an empty file")
        return digest(content)

    def subset(self, numbers: Sequence[int]) -> ImageSource:
        """Some of the images, in this order."""
        return Subset(self, torch.tensor(numbers, dtype=torch.long))

    def labels(self) -> tuple[Tensor, list[str]]:
        """(N,) int64, -1 where the image has none, and the names that the numbers stand for.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(f"{self.description} has no labels")

    def write_index(self, path: Path) -> None:  # noqa: B027
        """Keeps for the next start what was slow to find out."""


class Subset(ImageSource):
    """Some images of another source."""

    def __init__(self, source: ImageSource, numbers: Tensor) -> None:
        self.source, self.numbers, self.description = source, numbers, source.description
        self.problems, self.notes = source.problems, source.notes
        if source.blocks is not None and bool((numbers.diff() > 0).all()):
            self.blocks = torch.searchsorted(numbers, source.blocks)
            self.window = max(1, source.window * len(numbers) // len(source))  # of as many blocks as the source's

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int) -> Stored:
        return self.source.read(int(self.numbers[number]))

    def glimpse(self, number: int) -> int:
        return self.source.glimpse(int(self.numbers[number]))

    def name(self, number: int) -> str:
        return self.source.name(int(self.numbers[number]))
