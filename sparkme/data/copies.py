"""Which images are there more than once: the same file under two names, or the same bytes."""

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
    """(N,) int64: of each image the first that has the same content, which mostly is itself. Of two that begin to differ
    somewhere, a glimpse tells most; the others are read as a whole. What cannot be read is like no other."""
    glimpses = np.fromiter(_glimpses(images), np.int64, len(images))
    first, seen = torch.arange(len(images)), dict[tuple[int, int], int]()
    for number in _doubled(glimpses):
        try:
            first[number] = seen.setdefault((int(glimpses[number]), images.digest(number)), number)
        except OSError:
            continue
    return first


def first_links(files: Files) -> Tensor:
    """(N,) int64: of each file the first name of it, since links may lead to one file from several places."""
    identities = np.fromiter((_identity(files, number) for number in range(len(files))), np.int64, len(files))
    first, seen = torch.arange(len(files)), dict[int, int]()
    for number in _doubled(identities):
        known = seen.setdefault(int(identities[number]), number)
        if os.path.samefile(files.path(known), files.path(number)):
            first[number] = known
    return first


def _doubled(values: np.ndarray) -> list[int]:
    """The places of values that are there more than once."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: list[int] = np.flatnonzero(counts[place] > 1).tolist()
    return found


def _identity(files: Files, number: int) -> int:
    try:
        status = os.stat(files.path(number))
    except OSError:  # which is said when it is read
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
    """One of each image. A dataset of the user's is read in other processes only: what it opens, such as an HDF5 file, those
    that load images later must not share."""
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
