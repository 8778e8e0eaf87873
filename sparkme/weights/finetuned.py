"""Reads a fine-tuned network with its head, for predictions and for export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparkme.data.dataset import pixels_of
from sparkme.data.planes import Pixels
from sparkme.data.statistics import Statistics
from sparkme.errors import UserError, first_line
from sparkme.networks.create import create_dense
from sparkme.networks.detectors import create_detector
from sparkme.networks.pyramid import Pyramid
from sparkme.networks.segmenters import create_segmenter
from sparkme.settings.declare import from_config
from sparkme.settings.finetune import TASKS
from sparkme.settings.shared import PixelSettings
from sparkme.weights.pretrained import Pretrained

BEST = "best.safetensors"  # in a run folder


@dataclass(frozen=True)
class Finetuned:
    """A network that `sparkme.finetune` trained.

    Attributes:
        network: with its head, in eval mode on the CPU; a segmenter and a classifier take normalised images.
        task: one of `sparkme.settings.finetune.TASKS`.
        model: the pretrained network's name.
        classes: their names.
        channels: of the images.
        statistics: mean and standard deviation of the images.
        background: colour behind transparent pixels.
        pixels: conversion of pixel values.
        settings: what else the task needs, such as `input_size` and `several_labels`, `val_side`, `long_side` and `head`, or
            `short_side`.
        path: the file.
    """

    network: nn.Module
    task: str
    model: str
    classes: list[str]
    channels: int
    statistics: Statistics
    background: str
    pixels: Pixels
    settings: Mapping[str, Any]
    path: Path


def read_finetuned(path: Path) -> Finetuned:
    """Reads the best weights of a run.

    Args:
        path: a run folder of `sparkme.finetune`, or a file `best.safetensors`.

    Raises:
        UserError: there is no such file, it is damaged, or it is not of `sparkme.finetune`.
    """
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no {BEST}; pass the folder of a finished run of sparkme.finetune, or that file")
    try:
        with safe_open(file, "pt") as opened:
            notes: dict[str, str] = dict(opened.metadata() or {})
            state: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as weights: {first_line(error)}") from error
    if "classes" not in notes:
        raise UserError(f"{file} is not of sparkme.finetune: it names no classes; pass the folder of a run")
    try:
        return _from(file, notes, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not fit its own description: {type(error).__name__}: {first_line(error)}") from error


def _from(file: Path, notes: dict[str, str], state: dict[str, Tensor]) -> Finetuned:
    known = {name: _plain(value) for name, value in notes.items()}
    task = notes.get("task", TASKS[0])
    channels, classes = int(notes["channels"]), json.loads(notes["classes"])
    statistics = Statistics(*(tuple(json.loads(notes[name])) for name in ("mean", "std")))
    network = _CREATE[task](notes["network"], channels, statistics, len(classes), known)
    nn.Module.load_state_dict(network, state)
    pixels = pixels_of(from_config(PixelSettings, {name: known.get(name) for name in ("value_range", "upright")}))
    background = notes.get("background", "white")
    return Finetuned(network.eval(), task, notes["network"], classes, channels, statistics, background, pixels, known, file)


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _classifier(model: str, channels: int, _: Statistics, num_classes: int, known: Mapping[str, Any]) -> nn.Module:
    return create_dense(model, in_channels=channels, num_classes=num_classes)


def _detector(model: str, channels: int, statistics: Statistics, num_classes: int, known: Mapping[str, Any]) -> nn.Module:
    pyramid = _pyramid(model, channels, statistics)
    options = {"channels": known["fpn_channels"], "norm": known["head_norm"], "proposals": known.get("proposals", 2000)}
    return create_detector(pyramid, known["head"], num_classes, **options)


def _segmenter(model: str, channels: int, statistics: Statistics, num_classes: int, known: Mapping[str, Any]) -> nn.Module:
    pyramid = _pyramid(model, channels, statistics)
    return create_segmenter(pyramid, known["head"], num_classes, channels=known["head_channels"])


def _pyramid(model: str, channels: int, statistics: Statistics) -> Pyramid:
    with torch.random.fork_rng():
        return Pretrained(model, None, "random weights", channels, statistics).pyramid()


_CREATE: dict[str, Callable[..., nn.Module]] = {
    "classification": _classifier,
    "detection": _detector,
    "segmentation": _segmenter,
}
