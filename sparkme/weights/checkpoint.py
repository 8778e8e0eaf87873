"""Reads checkpoints of sparkme.pretrain and sparkme.finetune, which `sparkme.training` writes, and builds their encoders."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparkme.errors import UserError, first_line, unreadable_reason
from sparkme.networks.create import create_encoder
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.weights.files import archive_damage

FORMAT = 1


class DamagedCheckpoint(UserError):
    """A damaged checkpoint, or a file that cannot be read at all."""


def load_checkpoint(path: Path, *, verify: bool = True, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of this project, on the CPU, with `weights_only=True`.

    Args:
        path: the file.
        verify: compare its checksums.
        mmap: read tensors from the file on use, so that unused ones, such as the optimizer's, are never read.

    Raises:
        DamagedCheckpoint: it cannot be read, or its checksums differ.
        UserError: no such file, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    if verify and (problem := archive_damage(path)) is not None:  # before reading any of it
        raise DamagedCheckpoint(f"{path} is damaged: {problem}{_others(path)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused here
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a torn file may raise anything in the unpickler
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint ({unreadable_reason(error)}){_others(path)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of sparkme.pretrain (format {FORMAT})")
    if not isinstance(state["config"], dict) or not isinstance(state.get("step"), int) or state["step"] < 0:
        raise DamagedCheckpoint(f"{path} is a damaged checkpoint: its step or its configuration has the wrong type")
    return state


def _others(path: Path) -> str:
    """A note about other checkpoints in the folder."""
    others = sorted(p.name for p in path.parent.glob("step_*.pt") if p.resolve() != path.resolve())
    return f"; earlier ones beside it: {', '.join(others[-4:])}" if others else ""


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, even if it was moved."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


def encoder_of(checkpoint: dict[str, Any], path: Path) -> SparseEncoder:
    """The encoder of a checkpoint, with its weights. Raises UserError if configuration and weights do not match."""
    with described(checkpoint, path):
        encoder = build_encoder(settings_in(checkpoint, path), checkpoint.get("proof"))
        weights = {n.removeprefix("encoder."): v for n, v in checkpoint["model"].items() if n.startswith("encoder.")}
        load_weights(encoder, weights)
    print_trial(encoder, path)
    return encoder


def build_encoder(settings: PretrainSettings, proof: Mapping[str, Any] | None = None) -> SparseEncoder:
    """The encoder that settings describe, with random weights; `proof` is the checkpoint's, see `sparkme.sparsify`."""
    return create_encoder(settings.model, in_channels=settings.channels, drop_path=settings.drop_path, proof=proof)


def settings_in(checkpoint: dict[str, Any], path: Path) -> PretrainSettings:
    """The settings of a checkpoint. Raises UserError if they describe no network."""
    with described(checkpoint, path):
        settings = from_config(PretrainSettings, checkpoint["config"])
        for name in ("model", "input_size", "mask_ratio", "decoder_width", "drop_path"):
            if getattr(settings, name) is None:
                raise KeyError(name)
    return settings


def load_weights(network: nn.Module, state: dict[str, Any]) -> None:
    """Loads the weights of a checkpoint. Raises ValueError if they are of another network."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"its weights are of another network; has the code of the model changed? {first_line(error)}"
        ) from error


@contextmanager
def described(checkpoint: dict[str, Any], path: Path) -> Iterator[None]:
    """Turns errors while building a network from a checkpoint of sparkme.pretrain into a `UserError`."""
    if checkpoint["config"].get("command") == "finetune":
        raise UserError(f"{path} is a checkpoint of sparkme.finetune; use one of sparkme.pretrain")
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} has an invalid configuration: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}") from error


def print_trial(encoder: SparseEncoder, origin: Path | str | None) -> None:
    """Prints why the network of a file was tried again, which takes some seconds."""
    if origin is not None and encoder.tried_because:
        print(f"{origin}: the network was tried again: {encoder.tried_because}", file=sys.stderr, flush=True)
