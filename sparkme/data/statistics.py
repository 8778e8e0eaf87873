"""What images are normalised by."""

from __future__ import annotations

from typing import NamedTuple

from sparkme.settings.shared import IMAGENET_MEAN, IMAGENET_STD, TrainingSettings


class Statistics(NamedTuple):
    """Mean and deviation of each channel, of values in [0, 1]."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def statistics_of(settings: TrainingSettings) -> Statistics:
    """What a run normalises its images by; older ones had ImageNet's and do not say so."""
    return Statistics(settings.mean, settings.std) if settings.mean else Statistics()
