"""The interface of image sources."""

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

GLIMPSE = 2**12  # bytes at the end of a file, which tell most files of one size apart


def digest(*values: object) -> int:
    """A 63-bit hash, which fits into an int64."""
    found = _hash()
    for value in values:
        found.update(value if isinstance(value, bytes) else str(value).encode())
    return _as_int(found.digest())


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8)


def _as_int(found: bytes) -> int:
    return int.from_bytes(found) >> 1


class ImageSource(ABC):
    """Images by number.

    Loader processes read the images. They share the source's NumPy arrays and tensors, and open files themselves.

    Attributes:
        description: for people.
        blocks: (K + 1,) int64, if images that lie together (a tar shard, a Parquet row group) are faster to read together: the
            first number of each block, then the number of images; None if any order is as fast.
        window: with blocks, the number of consecutive images of an epoch that are shuffled together.
        problems: lines about damaged parts, which are left out.
        notes: lines about other parts that are left out or read in an unusual way.
    """

    description: str
    blocks: Tensor | None = None
    window: int = 1
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def remarks(self) -> list[str]:
        """Notes to print once, at the start."""
        return [*self.notes, *(f"left out: {problem}" for problem in self.problems[:10])]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, number: int) -> Stored:
        """One image as it is stored. Raises OSError, which names the image, if it cannot be read."""

    @abstractmethod
    def name(self, number: int) -> str:
        """The image's name for messages, which also identifies it."""

    def glimpse(self, number: int) -> int:
        """A cheap hash: equal for equal images, and different for most others. Raises OSError."""
        return self.digest(number)

    def digest(self, number: int) -> int:
        """A hash of the whole content. Raises OSError."""
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
        """(N,) int64 class numbers, -1 for images without one, and the class names. Raises ValueError without labels."""
        raise ValueError(f"{self.description} has no labels")

    def write_index(self, path: Path) -> None:  # noqa: B027
        """Saves what was slow to find out, for the next start."""


class Subset(ImageSource):
    """Some images of another source."""

    def __init__(self, source: ImageSource, numbers: Tensor) -> None:
        self.source, self.numbers, self.description = source, numbers, source.description
        self.problems, self.notes = source.problems, source.notes
        if source.blocks is not None and bool((numbers.diff() > 0).all()):
            self.blocks = torch.searchsorted(numbers, source.blocks)
            self.window = max(1, source.window * len(numbers) // len(source))  # as many blocks as in the source

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int) -> Stored:
        return self.source.read(int(self.numbers[number]))

    def glimpse(self, number: int) -> int:
        return self.source.glimpse(int(self.numbers[number]))

    def name(self, number: int) -> str:
        return self.source.name(int(self.numbers[number]))
