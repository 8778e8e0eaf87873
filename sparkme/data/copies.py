"""Finds duplicate images: one file under two names, or equal bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sparkme.data.handover import Loader
from sparkme.data.sources import DatasetImages, Files, ImageSource
from sparkme.data.sources.base import digest


def first_copies(images: ImageSource) -> Tensor:
    """(N,) int64: for each image the first with the same content, mostly itself. A glimpse tells most images apart, and the
    others are read as a whole. Unreadable images have no copies."""
    glimpses = np.fromiter(_glimpses(images), np.int64, len(images))
    first, seen = torch.arange(len(images)), dict[tuple[int, int], int]()
    for number in _doubled(glimpses):
        try:
            first[number] = seen.setdefault((int(glimpses[number]), images.digest(number)), number)
        except OSError:
            continue
    return first


def first_links(files: Files) -> Tensor:
    """(N,) int64: for each file its first name, since links may give one file several names."""
    identities = np.fromiter((_identity(files, number) for number in range(len(files))), np.int64, len(files))
    first, seen = torch.arange(len(files)), dict[int, int]()
    for number in _doubled(identities):
        known = seen.setdefault(int(identities[number]), number)
        if os.path.samefile(files.path(known), files.path(number)):
            first[number] = known
    return first


def _doubled(values: np.ndarray) -> list[int]:
    """The indices of values that occur more than once."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: list[int] = np.flatnonzero(counts[place] > 1).tolist()
    return found


def _identity(files: Files, number: int) -> int:
    try:
        status = os.stat(files.path(number))
    except OSError:  # reading the image will report it
        return digest(b"unreadable", number)
    return digest(status.st_dev, status.st_ino)


class _Glimpses(Dataset[int]):
    def __init__(self, images: ImageSource) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> int:
        try:
            return self.images.glimpse(number)
        except OSError:
            return digest(b"unreadable", number)


def _glimpses(images: ImageSource) -> Iterable[int]:
    """The glimpse of each image. A user's dataset is read in other processes, since the loaders that fork later must not share
    what it opens, such as an HDF5 file."""
    dataset = _Glimpses(images)
    own = isinstance(images, DatasetImages)
    loader: Iterable[list[int]] = (
        Loader(dataset, workers=min(8, len(os.sched_getaffinity(0))), batch_size=64, collate_fn=list)
        if own
        else ([dataset[number]] for number in range(len(dataset)))
    )
    with tqdm(desc="looking for copies", total=len(dataset), unit=" images", delay=2, disable=not sys.stderr.isatty()) as bar:
        for group in loader:
            yield from group
            bar.update(len(group))
