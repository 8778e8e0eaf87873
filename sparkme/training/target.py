"""Losses and measures of fine-tuning, for one class or several labels per image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from sparkme.errors import UserError
from sparkme.settings.classification import ClassificationSettings


class LabelLoss(nn.Module):
    """Mean binary cross entropy of scores (B, labels) and bool labels of the same shape."""

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))


def create_loss(settings: ClassificationSettings) -> tuple[Any, nn.Module]:
    """timm's mixup and CutMix or None, and the loss of scores and labels."""
    if settings.several_labels:
        return None, LabelLoss()
    mixed = settings.mixup or settings.cutmix
    mix = (
        Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=settings.num_classes)
        if mixed
        else None
    )
    if settings.loss == "bce":
        return mix, BinaryCrossEntropy(smoothing=settings.smoothing)
    return mix, SoftTargetCrossEntropy() if mixed else nn.CrossEntropyLoss(label_smoothing=settings.smoothing)


def create_measure(classes: list[str], several_labels: bool) -> Measure:
    return Precision(classes) if several_labels else Accuracy(classes)


class Measure(ABC):
    """A measure of what a network predicts. `best` names the value by which the best weights are chosen."""

    best: str

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    @abstractmethod
    def add(self, outputs: Any, targets: Any) -> None:
        """Adds a batch, on the CPU; for classification scores (B, classes), and labels as in `Labelled`."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Adds the results of another process."""

    @property
    @abstractmethod
    def num_images(self) -> int: ...

    def check(self) -> None:
        """Raises UserError if there is nothing to measure."""
        if not self.num_images:
            raise UserError("none of the validation images can be read")

    @abstractmethod
    def values(self) -> dict[str, float]:
        """The values from 0 to 1, by name."""

    @abstractmethod
    def describe(self, values: dict[str, float]) -> str:
        """The values in words."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Draws pictures into the folder. Returns the classes' part of results.json."""


class Accuracy(Measure):
    """The share of images whose class has the highest score, or one of the five highest."""

    best = "top1"

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.top5 = 0
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)  # true class (row), predicted class (column)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        count = len(self.classes)
        highest = scores.topk(min(5, count), 1).indices
        self.top5 += int((highest == labels[:, None]).any(1).sum())
        self.confusion += torch.bincount(labels * count + highest[:, 0], minlength=count**2).view(count, count)

    def merge(self, other: Self) -> None:
        self.top5 += other.top5
        self.confusion += other.confusion

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    def values(self) -> dict[str, float]:
        total = max(1, self.num_images)
        return {"top1": float(self.confusion.diag().sum()) / total, "top5": self.top5 / total}

    def describe(self, values: dict[str, float]) -> str:
        return f"top-1 {100 * values['top1']:.1f} %" + (f", top-5 {100 * values['top5']:.1f} %" if "top5" in values else "")

    def write(self, folder: Path) -> dict[str, Any]:
        from sparkme.reporting.confusion import draw_confusion  # noqa: PLC0415  (matplotlib, in the first process alone)

        draw_confusion(self.confusion, self.classes, folder / "confusion.png")
        each = (self.confusion.diag() / self.confusion.sum(1).clamp_min(1)).tolist()
        return {"of_each_class": dict(zip(self.classes, each, strict=True)), "confusion": self.confusion.tolist()}


class Precision(Measure):
    """Mean average precision over the labels that some image has."""

    best = "map"

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.scores, self.labels = torch.empty(0, len(classes)), torch.empty(0, len(classes), dtype=torch.bool)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        self.scores, self.labels = torch.cat([self.scores, scores]), torch.cat([self.labels, labels])

    def merge(self, other: Self) -> None:
        self.add(other.scores, other.labels)

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def check(self) -> None:
        super().check()
        if not self.labels.any():
            raise UserError("none of the readable validation images has a label")

    def values(self) -> dict[str, float]:
        known = [value for value in self._of_each() if value is not None]
        return {"map": sum(known) / max(1, len(known))}

    def describe(self, values: dict[str, float]) -> str:
        return f"mean average precision {100 * values['map']:.1f} %"

    def write(self, folder: Path) -> dict[str, Any]:
        return {"average_precision": dict(zip(self.classes, self._of_each(), strict=True))}

    def _of_each(self) -> Sequence[float | None]:
        return [average_precision(*pair) for pair in zip(self.scores.unbind(1), self.labels.unbind(1), strict=True)]


def average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Average precision, as in scikit-learn: the area under precision over recall, in steps at each score.

    Args:
        scores: (N,) floats; equal ones are one step.
        labels: (N,) bool.

    Returns:
        From 0 to 1, or None if no label is set.
    """
    if not labels.any():
        return None
    values, order = scores.sort(descending=True)
    hits = labels[order].cumsum(0).double()
    is_step = torch.ones_like(labels)
    is_step[:-1] = values[1:] != values[:-1]
    precision = hits / torch.arange(1, len(hits) + 1)
    gains = hits[is_step].diff(prepend=hits.new_zeros(1))
    return float((precision[is_step] * gains).sum() / hits[-1])
