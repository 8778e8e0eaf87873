"""What images are normalised by."""

from __future__ import annotations

from typing import Any, NamedTuple

# ImageNet's channel means and deviations, of values in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Statistics(NamedTuple):
    """Mean and deviation of each channel, of values in [0, 1]."""

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def statistics_of(config: dict[str, Any]) -> Statistics:
    """What a run normalises its images by; older ones had ImageNet's and do not say so."""
    return Statistics(tuple(config["mean"]), tuple(config["std"])) if config.get("mean") else Statistics()
