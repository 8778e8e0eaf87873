"""What comes after pretraining begins here: weights of an encoder, from a checkpoint or a file, and what they expect."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparkme.data.dataset import Statistics, statistics_of
from sparkme.errors import UserError, first_line
from sparkme.interop.files import read_state_dict
from sparkme.interop.libraries import adopt
from sparkme.models import Classifier, add_drop_path, create_dense, create_encoder, find_classifier, library_of
from sparkme.sparse.encoder import SparseEncoder
from sparkme.training.build import network_of
from sparkme.training.checkpoint import load_checkpoint


@dataclass(frozen=True)
class Pretrained:
    """Weights of an encoder, and the images they were trained on.

    Attributes:
        model: the network's name, see `sparkme.models.create_dense`.
        state: its weights under the names of that network; a classifier's may be among them. None for random ones.
        origin: where they come from, for people.
        channels: of the images.
        statistics: what the images are normalised by.
        background: what transparent images are laid on.
        input_size: height and width; None where it is not known.
    """

    model: str
    state: dict[str, Tensor] | None
    origin: str
    channels: int = 3
    statistics: Statistics = Statistics()  # noqa: RUF009
    background: str = "white"
    input_size: tuple[int, int] | None = None

    def encoder(self, seed: int = 0) -> SparseEncoder:
        """The sparse encoder; `seed` draws random weights.

        Raises:
            UserError: the weights are of another network.
            ValueError: there is no such network, or it cannot be sparse.
        """
        torch.manual_seed(seed)
        encoder = create_encoder(self.model, in_channels=self.channels, drop_path=0.0)
        if self.state is not None:
            try:
                encoder.load_dense_state_dict(self._adopted(encoder.dense_state_dict()))
            except ValueError as error:
                raise UserError(f"{self.origin} does not fit {self.model}: {first_line(error)}") from error
        return encoder

    def dense(self, num_classes: int, *, drop_path: float = 0.0) -> tuple[nn.Module, list[str]]:
        """The ordinary network with a new classifier, whose weights are drawn from torch's generator as it stands.

        Returns:
            The network, and the names of what is not pretrained.

        Raises:
            UserError: the weights are of another network.
            ValueError: there is no such network, or it gives no features to classify.
        """
        network = create_dense(self.model, in_channels=self.channels, drop_path=drop_path, num_classes=num_classes)
        if library_of(self.model) == "torchvision":
            add_drop_path(network, drop_path)
        if self.state is None:
            return network, []
        inner = network.network if isinstance(network, Classifier) else network
        head = find_classifier(inner, self.channels)
        own = {n: v for n, v in inner.state_dict().items() if isinstance(v, Tensor)}
        state = self._adopted(own)
        is_head = {n for n in (*own, *state) if n.startswith(f"{head}.") or n.lower().startswith("aux")}
        is_head = is_head if inner is network else set()
        fitting = {n: v for n, v in state.items() if n in own and n not in is_head and own[n].shape == v.shape}
        self._check_fit(own, state, fitting, is_head)
        with torch.no_grad():
            for name, value in fitting.items():  # the values themselves: `load_state_dict` of MNASNet wants more than names
                own[name].copy_(value)
        return network, [n for n in own if n not in fitting and not n.endswith("num_batches_tracked")]

    def _check_fit(
        self, own: dict[str, Tensor], state: dict[str, Tensor], fitting: dict[str, Tensor], is_head: set[str]
    ) -> None:
        """Only what stands behind the last of the taken weights may be missing: the head, which is trained anew."""
        order = [n for n in own if not n.endswith("num_batches_tracked")]
        last = max((i for i, n in enumerate(order) if n in fitting), default=-1)
        missing = [n for n in order[: last + 1] if n not in fitting and n not in is_head]
        wrong = [n for n in own if n in state and n not in fitting and n not in is_head]
        unknown = [n for n in state if n not in own and n not in is_head]
        if not fitting or missing or wrong:
            raise UserError(
                f"{self.origin} does not fit {self.model}: {len(fitting)} of {len(own)} tensors are there"
                + (f", missing {', '.join(missing[:3])}" if missing else "")
                + (f", of another shape {', '.join(wrong[:3])}" if wrong else "")
            )
        if len(unknown) > len(fitting) / 4:
            raise UserError(f"{self.origin} has more than {self.model}: {', '.join(unknown[:3])}; is it of a larger network?")

    def head_of(self, network: nn.Module) -> str:
        """The path of the classifier in a network that `dense` made."""
        return "head" if isinstance(network, Classifier) else find_classifier(network, self.channels)

    def random(self) -> Pretrained:
        """The same network with random weights."""
        return replace(self, state=None, origin="random weights")

    def _adopted(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.state is not None
        state = self.state
        if own and all(f"network.{name}" in state for name in own):  # of a `Classifier`
            state = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        return adopt(state, own, library_of(self.model))[0]


def read_pretrained(path: Path, model: str | None = None) -> Pretrained:
    """Reads what an encoder's weights are kept in.

    Args:
        path: a checkpoint of sparkme.pretrain or sparkme.finetune; a .safetensors or .pth file of sparkme.export; a folder of
            timm's for the hub; or weights of another source, under the names of any library of `sparkme.interop`.
        model: the network's name; left out where the file says it.

    Raises:
        UserError: no such file, or it does not say of which network it is, and nobody else does.
    """
    if (checkpoint := _checkpoint(path)) is not None:
        found = _from_checkpoint(checkpoint, path)
        if model is not None and model != found.model:
            raise UserError(f"--model {model}, but {path} is of {found.model}; leave out --model")
        return found
    if not path.exists():
        raise UserError(f"no file {path}")
    notes = _notes(path)
    state = read_state_dict(path / "model.safetensors" if path.is_dir() else path)
    if model is None and "network" not in notes:
        raise UserError(f"{path} does not say of which network it is; pass --model NAME, such as resnet50 or timm:resnet50")
    size = json.loads(notes["input_size"]) if "input_size" in notes else None
    statistics = Statistics(*(tuple(json.loads(notes[name])) for name in ("mean", "std"))) if "mean" in notes else Statistics()
    return Pretrained(
        model or notes["network"], state, str(path), int(notes.get("channels", 3)), statistics,
        notes.get("background", "white"), (size[0], size[1]) if size else None,
    )  # fmt: skip


def _checkpoint(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None for a bare state dict and other formats.

    Raises:
        UserError: it is where checkpoints are, and damaged.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return None
    try:
        return load_checkpoint(path)
    except UserError:
        if path.parent.name == "checkpoints":
            raise
        return None


def _from_checkpoint(checkpoint: dict[str, Any], path: Path) -> Pretrained:
    config = checkpoint["config"]
    try:
        if config.get("command") == "finetune":
            state = checkpoint["model"]
        else:
            state = network_of(checkpoint, path).encoder.dense_state_dict()
        size = config["input_size"]
        return Pretrained(
            config["model"], state, f"{path} (step {checkpoint['step']})", config.get("channels", 3), statistics_of(config),
            config.get("background", "white"), (size[0], size[1]),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} has a configuration that describes no network: {type(error).__name__} {error}") from error


def _notes(path: Path) -> dict[str, str]:
    """What sparkme.export, or timm, wrote beside or into a file of weights."""
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text())
            settings = config["pretrained_cfg"]
            size = settings["input_size"]
            return {"network": f"timm:{config['architecture']}", "channels": str(size[0]), "input_size": json.dumps(size[1:]),
                    "mean": json.dumps(settings["mean"]), "std": json.dumps(settings["std"])}  # fmt: skip
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return dict(file.metadata() or {})
        beside = path.with_name(path.name + ".json")
        return {k: v for k, v in json.loads(beside.read_text()).items() if isinstance(v, str)} if beside.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {first_line(error)}") from error
