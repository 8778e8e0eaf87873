"""What comes after pretraining begins here: weights of an encoder, from a checkpoint or a file, and what they expect."""

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
from sparkme.settings.shared import PixelSettings
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
    """Weights of an encoder, and the images they were trained on.

    Attributes:
        model: the network's name, see `sparkme.networks.create.create_dense`.
        state: tensors, among which its weights are, under the names of some library and behind some prefix. None for random
            weights.
        origin: where they come from, for people.
        channels: of the images.
        statistics: what the images are normalised by.
        background: what transparent images are laid on.
        input_size: height and width; None where it is not known.
        choice: what the user says of how the weights are found in the file.
        pixels: how the numbers of the images became values; None where it is not known.
        drop_path: that the network was trained with.
        proof: what is kept of its trial, see `sparkme.sparsify`.
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
        """The sparse encoder, and for people what was taken; `seed` draws random weights.

        Raises:
            UserError: the weights are of another network.
            ValueError: there is no such network, or it cannot be sparse.
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
        """The ordinary network with a new classifier, whose weights are drawn from torch's generator as it stands.

        Returns:
            The network, the names of what is not pretrained, and for people what was taken.

        Raises:
            UserError: the weights are of another network.
            ValueError: there is no such network, or it gives no features to classify.
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
            for name, value in found.state.items():  # the values themselves: `load_state_dict` of MNASNet wants more than names
                own[name].copy_(value)
        return network, [n for n in own if n not in found.state and not n.endswith(COUNTER)], found.note()

    def _find(self, own: dict[str, Tensor], *, head: Collection[str] = (), whole: bool = True) -> Found:
        assert self.state is not None
        wanted = Wanted(self.model, library_of(self.model), own, self.channels, head, whole)
        return find_weights(self.state, wanted, self.origin, self.choice)

    def head_of(self, network: nn.Module) -> str:
        """The path of the classifier in a network that `dense` made."""
        return "head" if isinstance(network, Classifier) else find_classifier(network, self.channels)

    def random(self) -> Pretrained:
        """The same network with random weights."""
        return replace(self, state=None, origin="random weights")


def load_encoder(path: Path | str, model: str | None = None) -> SparseEncoder:
    """The sparse encoder of a file, with its weights; features of images with hidden patches, or with none, are one call away.

    A network whose trial is kept in the file is not tried again, if its code and the libraries are what they were; one line on
    stderr says so where they are not.

    Args:
        path: what `read_pretrained` reads: a checkpoint, exported weights, a hub folder, or weights of another source.
        model: the network's name, where the file does not say it.

    Returns:
        A `SparseEncoder` on the CPU, in float32 and eval mode.

    Raises:
        UserError: no such file, or nothing in it that fits the network.
        ValueError: there is no such network, or it cannot be sparse.
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
    """The ordinary dense network that gives its feature maps by stride, for detectors and segmenters.

    Args:
        model: a checkpoint or weights, as `load_encoder` takes them; or the name of a network, which gets random weights; or a
            network of your own, which is copied.
        name: the network's name, where a file does not say it.
        taps, num_scales: see `sparkme.sparsify`; for names and networks of your own.
        drop_path: for files and names, see `sparkme.networks.create.create_dense`.

    Returns:
        A `Pyramid` on the CPU, or where your own network is.

    Raises:
        UserError: no such file; or its weights are of another network, or compute something else in the dense one.
        ValueError: there is no such network, or it has no hierarchy of feature maps.
    """
    if isinstance(model, nn.Module):
        return _pyramid_of(copy.deepcopy(model), taps, num_scales)
    path = Path(model)
    if isinstance(model, str) and not path.exists() and path.suffix not in STATE_DICTS and os.sep not in model:
        return _pyramid_of(_with_drop_path(model, 3, drop_path), taps, num_scales)
    pretrained = read_pretrained(path, name)
    encoder, _ = pretrained.encoder()
    dense = _with_drop_path(pretrained.model, pretrained.channels, drop_path)
    state = {key: value.clone() for key, value in encoder.dense_state_dict().items()}
    nn.Module.load_state_dict(dense, state, strict=False)  # not a method of its own class
    difference = max(verify(copy.deepcopy(dense), encoder, (2 * encoder.patch, 2 * encoder.patch)))
    if not difference < TOLERANCE:
        raise UserError(f"{path}: the maps of {pretrained.model} differ from those of its sparse encoder by {difference:.1g}")
    return Pyramid(dense, encoder.hierarchy, pretrained.statistics.mean, pretrained.statistics.std)


def _with_drop_path(model: str, channels: int, drop_path: float) -> nn.Module:
    dense = create_dense(model, in_channels=channels, drop_path=drop_path)
    if library_of(model) == "torchvision":
        add_drop_path(dense, drop_path)
    return dense


def _pyramid_of(network: nn.Module, taps: Sequence[str] | None, num_scales: int) -> Pyramid:
    with torch.random.fork_rng(), torch.enable_grad():
        hierarchy = find_hierarchy(copy.deepcopy(network), num_scales, taps=taps)
    return Pyramid(network, hierarchy)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Reads what a file has of tensors or, if it is a checkpoint of this project, the whole of that.

    Returns:
        The tensors, see `read_tensors`, and None; or none, and the checkpoint.

    Raises:
        UserError: no such file, or nothing of that kind in it.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_tensors(path), None
    try:
        return {}, load_checkpoint(path, mmap=True)
    except UserError as error:
        try:
            return read_tensors(path), None
        except UserError:
            if path.parent.name == "checkpoints" and archive_damage(path):  # it says which others there are
                raise error from None
            raise


def read_pretrained(path: Path, model: str | None = None, choice: Choice = Choice()) -> Pretrained:  # noqa: B008
    """Reads what an encoder's weights are kept in.

    Args:
        path: a checkpoint of sparkme.pretrain or sparkme.finetune; a .safetensors or .pth file of sparkme.export; a folder of
            timm's for the hub; or weights of another source, under the names of any library of `sparkme.weights`, wrapped in
            whatever way.
        model: the network's name; left out where the file says it.
        choice: what the user says of how the weights are found in it.

    Raises:
        UserError: no such file, or it does not say of which network it is, and nobody else does.
    """
    return _pretrained(path, *_read(path), model, choice)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if not path.exists():
        raise UserError(f"no file {path}")
    return read_weights(path)


def _check_model(given: str | None, own: str, path: Path) -> None:
    if given not in (None, own):
        raise UserError(f"--model {given}, but {path} is of {own}; leave out --model")


def _pretrained(
    path: Path, tensors: dict[str, Tensor], checkpoint: dict[str, Any] | None, model: str | None, choice: Choice
) -> Pretrained:
    if checkpoint is not None:
        found = _from_checkpoint(checkpoint, path, choice)
        _check_model(model, found.model, path)
        return found
    notes = _notes(path)
    if model is None and "network" not in notes:
        raise UserError(f"{path} does not say of which network it is; pass --model NAME, such as resnet50 or timm:resnet50")
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
    """What sparkme.export or sparkme.finetune wrote; earlier, they wrote other things only."""
    kept: dict[str, Any] = {name: json.loads(notes[name]) for name in ("value_range", "upright") if name in notes}
    return pixels_of(from_config(PixelSettings, kept)) if "background" in notes else None


def weights_in(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The dense network's weights in a checkpoint of this project, for `find_weights`.

    Raises:
        UserError: its configuration describes no network.
    """
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
            settings.size,
            choice,
            pixels_of(settings),
            drop_path,
            proof,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} has a configuration that describes no network: {type(error).__name__} {error}") from error


def _notes(path: Path) -> dict[str, str]:
    """What sparkme.export, or timm, wrote beside or into a file of weights."""
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
