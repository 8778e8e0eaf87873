"""The return values of `pretrain`, `finetune` and `predict` in Python: a run's folder, curves and network, and predictions."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from sparkme.sparse.encoder import SparseEncoder


class Curve(NamedTuple):
    """A metric over a run: lists of equal length."""

    steps: list[int]
    epochs: list[float]
    values: list[float]


@dataclass(frozen=True)
class TrainingRun:
    """A run of pretraining.

    Attributes:
        folder: the run's folder.
        finished: False if the run was stopped before its end; the same call then continues it.
    """

    folder: Path
    finished: bool

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def settings(self) -> Any:
        """A `PretrainSettings`, or the settings of a task of fine-tuning, with every default filled in."""
        from sparkme.settings.saved import read_settings  # noqa: PLC0415  (every command's settings)

        return read_settings(json.loads((self.folder / "config.json").read_text()))

    @property
    def curves(self) -> dict[str, Curve]:
        """Metrics by name: `loss`, `learning_rate`, `images_per_s` and others."""
        found: dict[str, Curve] = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            step, epoch = record.pop("step"), record.pop("epoch")
            for name, value in record.items():
                curve = found.setdefault(name, Curve([], [], []))
                curve.steps.append(step)
                curve.epochs.append(epoch)
                curve.values.append(value)
        return found

    @cached_property
    def encoder(self) -> SparseEncoder:
        """The sparse encoder with the newest weights, in eval mode on the CPU."""
        from sparkme.weights.pretrained import load_encoder  # noqa: PLC0415  (torch, which the command line does not need)

        return load_encoder(self.checkpoint)


@dataclass(frozen=True)
class FinetunedRun(TrainingRun):
    """A run of fine-tuning."""

    @property
    def weights(self) -> Path:
        """Weights of the best epoch."""
        return self.folder / "best.safetensors"

    @property
    def results(self) -> dict[str, Any]:
        """Metrics of the last and the best epoch, and of each class."""
        results: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return results

    @cached_property
    def network(self) -> nn.Module:
        """The network with its head and the best weights, in eval mode on the CPU."""
        from sparkme.weights.finetuned import read_finetuned  # noqa: PLC0415  (torch)

        return read_finetuned(self.folder).network


@dataclass(frozen=True)
class Predictions:
    """What `predict` wrote.

    Attributes:
        folder: the folder.
        finished: False if it was stopped before the last image.
    """

    folder: Path
    finished: bool

    @property
    def about(self) -> dict[str, Any]:
        """predict.json: `task`, `classes`, `num_images`, `unreadable` and the settings."""
        about: dict[str, Any] = json.loads((self.folder / "predict.json").read_text())
        return about

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The objects of predictions.json, or the lines of predictions.csv as text by column."""
        if (objects := self.folder / "predictions.json").is_file():
            found: list[dict[str, Any]] = json.loads(objects.read_text())
            return found
        with (self.folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
            return [*csv.DictReader(file)]
