"""Reads an encoder's weights, from a checkpoint or a file, with the properties of the images that they expect."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparkme.data.dataset import pixels_of
from sparkme.data.planes import Pixels
from sparkme.data.statistics import Statistics, statistics_of
from sparkme.errors import UserError, first_line
from sparkme.networks.create import Classifier, add_drop_path, create_dense, create_encoder, find_classifier
from sparkme.networks.names import library_of
from sparkme.networks.pyramid import Pyramid
from sparkme.settings.declare import from_config
from sparkme.settings.saved import read_settings
from sparkme.settings.shared import CropSettings, PixelSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.hierarchy import find_hierarchy
from sparkme.state_dict import state_dict_of
from sparkme.weights.checkpoint import encoder_of, load_checkpoint, print_trial
from sparkme.weights.files import archive_damage, read_tensors, tensors_in
from sparkme.weights.format import STATE_DICTS
from sparkme.weights.prefixes import COUNTER, Choice, Found, Wanted, find_weights
from sparkme.weights.verify import TOLERANCE, verify


@dataclass(frozen=True)
class Pretrained:
    """Weights of an encoder, and the images that they were trained on.

    Attributes:
        model: the network's name, see `sparkme.networks.create.create_dense`.
        state: the file's tensors, with any library's names and any prefix; None for random weights.
        origin: the file, for people.
        channels: channels of the images.
        statistics: mean and standard deviation of the images.
        background: colour behind transparent pixels.
        input_size: height and width; None if unknown.
        choice: the user's choice among several sets of weights.
        pixels: conversion of pixel values; None if unknown.
        drop_path: rate with which the network was trained.
        proof: proof of its trial, see `sparkme.sparsify`.
    """

    model: str
    state: dict[str, Tensor] | None
    origin: str
    channels: int = 3
    statistics: Statistics = Statistics()  # noqa: RUF009
    background: str = "white"
    input_size: tuple[int, int] | None = None
    choice: Choice = Choice()  # noqa: RUF009
    pixels: Pixels | None = None
    drop_path: float = 0.0
    proof: dict[str, Any] | None = None

    def encoder(self, seed: int = 0) -> tuple[SparseEncoder, str]:
        """The sparse encoder, and a line about its weights; `seed` is for random weights.

        Raises:
            UserError: the weights are of another network.
            ValueError: an unknown network, or one that cannot be sparse.
        """
        torch.manual_seed(seed)
        encoder = create_encoder(self.model, in_channels=self.channels, drop_path=self.drop_path, proof=self.proof)
        if self.proof is not None:
            print_trial(encoder, self.origin)
        if self.state is None:
            return encoder, ""
        found = self._find(encoder.dense_state_dict())
        encoder.load_dense_state_dict(found.state)
        return encoder, found.note()

    def dense(self, num_classes: int, *, drop_path: float = 0.0) -> tuple[nn.Module, list[str], str]:
        """The ordinary network with a new random classifier.

        Returns:
            The network, the names of its weights that are not pretrained, and a line about the weights.

        Raises:
            UserError: the weights are of another network.
            ValueError: an unknown network, or one without features to classify.
        """
        network = create_dense(self.model, in_channels=self.channels, drop_path=drop_path, num_classes=num_classes)
        if library_of(self.model) == "torchvision":
            add_drop_path(network, drop_path)
        if self.state is None:
            return network, [], ""
        inner = network.network if isinstance(network, Classifier) else network
        own = {n: v for n, v in state_dict_of(inner).items() if isinstance(v, Tensor)}
        head = find_classifier(inner, self.channels) if inner is network else None
        is_head = [n for n in own if head is not None and (n.startswith(f"{head}.") or n.lower().startswith("aux"))]
        found = self._find(own, head=is_head, whole=False)
        with torch.no_grad():
            for name, value in found.state.items():  # by value: MNASNet's load_state_dict needs versions
                own[name].copy_(value)
        return network, [n for n in own if n not in found.state and not n.endswith(COUNTER)], found.note()

    def pyramid(self, *, drop_path: float = 0.0) -> Pyramid:
        """The dense network that returns its feature maps, in eval mode.

        Raises:
            UserError: the weights are of another network, or the dense network computes other maps with them.
            ValueError: an unknown network, one without a hierarchy of maps, or one that has no drop path.
        """
        if self.state is None:
            made = _pyramid_of(_with_drop_path(self.model, self.channels, drop_path).eval(), None, 4)
            made.mean, made.std = self.statistics
            return made
        encoder, _ = self.encoder()
        dense = _with_drop_path(self.model, self.channels, drop_path)
        state = {key: value.clone() for key, value in encoder.dense_state_dict().items()}
        nn.Module.load_state_dict(dense, state, strict=False)  # not a method of its own class
        difference = max(verify(copy.deepcopy(dense), encoder, (2 * encoder.patch, 2 * encoder.patch)))
        if not difference < TOLERANCE:
            text = f"the maps of {self.model} differ from those of its sparse encoder by {difference:.1g}"
            raise UserError(f"{self.origin}: {text}")
        dense.eval()
        return Pyramid(dense, encoder.hierarchy, self.statistics.mean, self.statistics.std)

    def _find(self, own: dict[str, Tensor], *, head: Collection[str] = (), whole: bool = True) -> Found:
        assert self.state is not None
        wanted = Wanted(self.model, library_of(self.model), own, self.channels, head, whole)
        return find_weights(self.state, wanted, self.origin, self.choice)

    def head_of(self, network: nn.Module) -> str:
        """The path of the classifier in a network of `dense`."""
        return "head" if isinstance(network, Classifier) else find_classifier(network, self.channels)

    def random(self) -> Pretrained:
        """The same network with random weights."""
        return replace(self, state=None, origin="random weights")


def load_encoder(path: Path | str, model: str | None = None) -> SparseEncoder:
    """The sparse encoder of a file, with its weights.

    The trial is skipped if the file has a proof of it, and code and libraries have not changed; otherwise a line on stderr says
    why the network is tried again.

    Args:
        path: a checkpoint, exported weights, a hub folder, or weights of another library.
        model: the network's name, if the file does not contain it.

    Returns:
        A `SparseEncoder` on the CPU, in float32 and eval mode.

    Raises:
        UserError: no such file, or its weights do not fit the network.
        ValueError: an unknown network, or one that cannot be sparse.
    """
    path = Path(path)
    tensors, checkpoint = _read(path)
    if checkpoint is None or checkpoint["config"].get("command") == "finetune":
        return _pretrained(path, tensors, checkpoint, model, Choice()).encoder()[0].eval()
    _check_model(model, checkpoint["config"].get("model"), path)
    return encoder_of(checkpoint, path).eval()


def pyramid(
    model: nn.Module | Path | str,
    *,
    name: str | None = None,
    taps: Sequence[str] | None = None,
    num_scales: int = 4,
    drop_path: float = 0.0,
) -> Pyramid:
    """The dense network that returns its feature maps by stride, for detection and segmentation.

    That of a file ends with its encoder, before attention at the network's end, which is untrained.

    Args:
        model: a checkpoint or weights, as for `load_encoder`; or the name of a network, which gets random weights; or your own
            network, which is copied.
        name: the network's name, if the file does not contain it.
        taps: see `sparkme.sparsify`; for names and your own networks.
        num_scales: likewise.
        drop_path: see `sparkme.networks.create.create_dense`; for files and names.

    Returns:
        A `Pyramid` on the CPU in eval mode, or on the device and in the mode of your own network. Without a file its `mean` and
        `std` are ImageNet's, or empty if the network takes other images than RGB.

    Raises:
        UserError: the file is missing, its weights are of another network, or the dense network computes other maps with them.
        ValueError: the network is unknown, or has no hierarchy of feature maps.
    """
    if isinstance(model, nn.Module):
        return _pyramid_of(copy.deepcopy(model), taps, num_scales)
    path = Path(model)
    if isinstance(model, str) and not path.exists() and path.suffix not in STATE_DICTS and os.sep not in model:
        dense = _with_drop_path(model, 3, drop_path)
        dense.eval()  # which may return nothing in a user's class
        return _pyramid_of(dense, taps, num_scales)
    return read_pretrained(path, name).pyramid(drop_path=drop_path)


def _with_drop_path(model: str, channels: int, drop_path: float) -> nn.Module:
    dense = create_dense(model, in_channels=channels, drop_path=drop_path)
    if library_of(model) == "torchvision":
        add_drop_path(dense, drop_path)
    return dense


def _pyramid_of(network: nn.Module, taps: Sequence[str] | None, num_scales: int) -> Pyramid:
    with torch.random.fork_rng(), torch.enable_grad():
        hierarchy = find_hierarchy(copy.deepcopy(network), num_scales, taps=taps)
    statistics = Statistics() if hierarchy.in_channels == 3 else Statistics((), ())
    return Pyramid(network, hierarchy, statistics.mean, statistics.std)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Reads a file: its tensors (see `read_tensors`) and None or, for a checkpoint of this project, {} and the checkpoint.

    Raises:
        UserError: no such file, or no weights in it.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_tensors(path), None
    try:
        return {}, load_checkpoint(path, mmap=True)
    except UserError as error:
        try:
            return read_tensors(path), None
        except UserError:
            if path.parent.name == "checkpoints" and archive_damage(path):  # the error lists other checkpoints
                raise error from None
            raise


def read_pretrained(path: Path, model: str | None = None, choice: Choice = Choice()) -> Pretrained:  # noqa: B008
    """Reads an encoder's weights.

    Args:
        path: a checkpoint of sparkme.pretrain or sparkme.finetune; a .safetensors or .pth file of sparkme.export; a hub folder
            of timm; or weights with the names of any library of `sparkme.weights`, under any prefix.
        model: the network's name, if the file does not contain it.
        choice: the user's choice among several sets of weights.

    Raises:
        UserError: no such file, or the network's name is unknown.
    """
    return _pretrained(path, *_read(path), model, choice)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if not path.exists():
        raise UserError(f"no file {path}")
    return read_weights(path)


def _check_model(given: str | None, own: str, path: Path) -> None:
    if given not in (None, own):
        raise UserError(f"--model {given}, but {path} has weights of {own}; leave out --model")


def _pretrained(
    path: Path, tensors: dict[str, Tensor], checkpoint: dict[str, Any] | None, model: str | None, choice: Choice
) -> Pretrained:
    if checkpoint is not None:
        found = _from_checkpoint(checkpoint, path, choice)
        _check_model(model, found.model, path)
        return found
    notes = _notes(path)
    if model is None and "network" not in notes:
        raise UserError(f"{path} does not name its network; pass --model NAME, such as resnet50 or timm:resnet50")
    size = json.loads(notes["input_size"]) if "input_size" in notes else None
    statistics = Statistics(*(tuple(json.loads(notes[name])) for name in ("mean", "std"))) if "mean" in notes else Statistics()
    return Pretrained(
        model or notes["network"],
        tensors,
        str(path),
        int(notes.get("channels", 3)),
        statistics,
        notes.get("background", "white"),
        (size[0], size[1]) if size else None,
        choice,
        _pixels(notes),
        float(notes.get("drop_path", 0.0)),
        json.loads(notes["proof"]) if "proof" in notes else None,
    )


def _pixels(notes: dict[str, str]) -> Pixels | None:
    """The conversion of pixel values that sparkme.export or sparkme.finetune wrote; None for other and older files."""
    kept: dict[str, Any] = {name: json.loads(notes[name]) for name in ("value_range", "upright") if name in notes}
    return pixels_of(from_config(PixelSettings, kept)) if "background" in notes else None


def weights_in(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The dense network's weights in a checkpoint of this project, for `find_weights`. Raises UserError."""
    if checkpoint["config"].get("command") == "finetune":
        return tensors_in({name: checkpoint[name] for name in ("model", "average") if name in checkpoint})
    return encoder_of(checkpoint, path).dense_state_dict()


def _from_checkpoint(checkpoint: dict[str, Any], path: Path, choice: Choice) -> Pretrained:
    proof, drop_path = None, 0.0
    try:
        settings = read_settings(checkpoint["config"])
        if settings.command == "finetune":
            state = weights_in(checkpoint, path)
        else:
            encoder = encoder_of(checkpoint, path)
            state, proof, drop_path = encoder.dense_state_dict(), encoder.proof, settings.drop_path
        return Pretrained(
            settings.model,
            state,
            f"{path} (step {checkpoint['step']})",
            settings.channels,
            statistics_of(settings),
            settings.background,
            settings.size if isinstance(settings, CropSettings) else None,
            choice,
            pixels_of(settings),
            drop_path,
            proof,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} has an invalid configuration: {type(error).__name__} {error}") from error


def _notes(path: Path) -> dict[str, str]:
    """Metadata that sparkme.export or timm wrote into a file of weights or beside it."""
    try:
        if path.is_dir():
            timms = json.loads((path / "config.json").read_text())
            images = timms["pretrained_cfg"]
            size = images["input_size"]
            notes = {
                "network": f"timm:{timms['architecture']}",
                "channels": str(size[0]),
                "input_size": json.dumps(size[1:]),
                "mean": json.dumps(images["mean"]),
                "std": json.dumps(images["std"]),
            }
            return notes | timms.get("sparkme", {})
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return dict(file.metadata() or {})
        beside = path.with_name(path.name + ".json")
        return {k: v for k, v in json.loads(beside.read_text()).items() if isinstance(v, str)} if beside.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {first_line(error)}") from error
