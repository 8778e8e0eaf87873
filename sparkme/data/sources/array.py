"""A stack of images in one `.npy` file, common for scientific instruments and small benchmarks."""

from __future__ import annotations

import io
from functools import cached_property
from pathlib import Path

import numpy as np

from sparkme.data.images import Stored
from sparkme.data.sources.base import ImageSource
from sparkme.errors import UserError, first_line


class ArrayImages(ImageSource):
    """The images of an array (N, H, W), (N, H, W, C) or (N, C, H, W) of any numbers. The file is mapped, not loaded.

    Args:
        path: the `.npy` file.
        flag: the flag that named it, for messages.

    Raises:
        UserError: it cannot be read, or is not a stack of images.
    """

    def __init__(self, path: Path, *, flag: str = "--data") -> None:
        self.path, self.description = path, str(path)
        try:
            self.shape = self._array.shape
        except Exception as error:  # NumPy raises many kinds
            raise UserError(f"{flag} {path} cannot be read: {first_line(error)}") from error
        if len(self.shape) not in (3, 4) or 0 in self.shape:
            raise UserError(
                f"{flag} {path} is an array {self.shape}, not a stack of images (N, H, W), (N, H, W, C) or (N, C, H, W); put "
                "single images into a folder"
            )

    @cached_property
    def _array(self) -> np.ndarray:
        array: np.ndarray = np.load(self.path, allow_pickle=False, mmap_mode="r")
        return array

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_array"}  # each process maps the file itself

    def __len__(self) -> int:
        return int(self.shape[0])

    def name(self, number: int) -> str:
        return f"{self.path}[{number}]"

    def read(self, number: int) -> Stored:
        file = io.BytesIO()
        np.save(file, self._array[number], allow_pickle=False)
        return Stored(self.name(number), file.getvalue())
