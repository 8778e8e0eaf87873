"""Mean and standard deviation for normalising images."""

from __future__ import annotations

from typing import NamedTuple

from sparkme.settings.shared import IMAGENET_MEAN, IMAGENET_STD, TrainingSettings


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, for values in [0, 1]."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def statistics_of(settings: TrainingSettings) -> Statistics:
    """A run's statistics. Older runs used ImageNet's and do not store them."""
    return Statistics(settings.mean, settings.std) if settings.mean else Statistics()
