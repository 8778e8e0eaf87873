"""A user's own dataset: `package.module:name` of an object with __len__ and __getitem__."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparkme.data.images import Stored
from sparkme.data.sources.base import ImageSource
from sparkme.errors import UserError, first_line

IMAGE_KEYS = ("image", "img", "jpg", "png", "pixel_values", "bytes")


class DatasetImages(ImageSource):
    """A dataset whose items are Pillow images, tensors (C, H, W), arrays or bytes; or tuples that start with one, or dicts with
    one under `image` or the like, as in torchvision and Hugging Face.

    Labels come from its attribute `targets` or `labels`, and their names from `classes`.

    Args:
        where: `package.module:name` of the dataset, or of a function without arguments that returns it.
        flag: its command-line flag, for messages.

    Raises:
        UserError: it cannot be imported, or is no such dataset.
    """

    def __init__(self, where: str, *, flag: str = "--data") -> None:
        self.description = where
        self.dataset = _imported(where, flag)
        try:
            self._length = len(self.dataset)
        except Exception as error:
            raise UserError(f"{flag} {where} has no length ({first_line(error)}); it needs __len__ and __getitem__") from error
        if self._length < 1:
            raise UserError(f"{flag} {where} has no images")

    def __len__(self) -> int:
        return self._length

    def name(self, number: int) -> str:
        return f"{self.description}, item {number}"

    def read(self, number: int) -> Stored:
        try:
            item = self.dataset[number]
            while isinstance(item, tuple | list) and item:
                item = item[0]
            if isinstance(item, dict):
                key = next((key for key in IMAGE_KEYS if key in item), None)
                if key is None:
                    raise ValueError(f"its keys are {', '.join(map(str, item))}; one must be of {', '.join(IMAGE_KEYS)}")
                item = item[key]
                item = item["bytes"] if isinstance(item, dict) and "bytes" in item else item
        except Exception as error:  # user code may raise anything
            raise OSError(f"{self.name(number)}: {type(error).__name__}: {first_line(error)}") from error
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(np.array(item))  # a writable copy
        if isinstance(item, Tensor):
            item = item.detach().cpu()
        if not isinstance(item, Image.Image | Tensor | bytes):
            raise OSError(f"{self.name(number)}: it is a {type(item).__name__}, not an image")
        return Stored(self.name(number), item)

    def labels(self) -> tuple[Tensor, list[str]]:
        values = getattr(self.dataset, "targets", getattr(self.dataset, "labels", None))
        if values is None or callable(values):
            raise ValueError(f"{self.description} has no labels: it needs an attribute `targets` with a number per image")
        try:
            given = torch.as_tensor(np.asarray(values)).flatten()
        except Exception as error:
            raise ValueError(f"{self.description}: its labels must be numbers: {first_line(error)}") from error
        labels = given.long()
        if len(labels) != len(self):
            raise ValueError(f"{self.description} has {len(labels)} labels for {len(self)} images")
        if not torch.equal(labels.to(given.dtype), given) or int(labels.min()) < 0:
            raise ValueError(f"{self.description} has labels that are not integers from 0")
        names = getattr(self.dataset, "classes", None)
        if isinstance(names, list | tuple) and len(names) > int(labels.max()):
            return labels, [str(name) for name in names]
        classes, labels = torch.unique(labels, return_inverse=True)
        return labels, [str(number) for number in classes.tolist()]


def _imported(where: str, flag: str) -> Any:
    module_name, _, name = where.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), name)
        if not hasattr(found, "__getitem__") or isinstance(found, type):
            found = found()
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UserError(f"{flag} {where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return found
