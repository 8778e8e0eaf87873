"""A run's network from its settings, for the command that trains it and those that read its checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sparkme.errors import UserError, first_line
from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.fcmae import FCMAE, initialise_encoder
from sparkme.methods.spark import SparK
from sparkme.networks.create import create_encoder
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import RECIPES, PretrainSettings
from sparkme.sparse.encoder import SparseEncoder


def build_network(settings: PretrainSettings, proof: Mapping[str, Any] | None = None) -> MaskedAutoencoder:
    """The network that settings describe, with random weights.

    Args:
        settings: of a run; those of a checkpoint are `from_config(PretrainSettings, checkpoint["config"])`.
        proof: what the checkpoint keeps of the encoder's trial, see `sparkme.sparsify`.

    Raises:
        ValueError: a value is not possible.
    """
    if settings.recipe not in RECIPES:
        raise ValueError(f"there is no recipe {settings.recipe!r}")
    encoder = build_encoder(settings, proof)
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("mask_ratio", "decoder_width", "patch")}
    options["input_size"] = settings.size
    if settings.recipe == "fcmae":
        initialise_encoder(encoder)
        return FCMAE(encoder, normalise_patches=settings.norm_pix_loss, **options)
    return SparK(encoder, densify_norm=settings.densify_norm, **options)


def build_encoder(settings: PretrainSettings, proof: Mapping[str, Any] | None = None) -> SparseEncoder:
    """The encoder of `build_network`."""
    return create_encoder(settings.model, in_channels=settings.channels, drop_path=settings.drop_path, proof=proof)


def network_of(checkpoint: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """The network of a checkpoint, with its weights.

    Raises:
        UserError: its configuration does not describe a network, or not the one whose weights it holds.
    """
    with _described(checkpoint, path):
        network = build_network(settings_in(checkpoint, path), checkpoint.get("proof"))
        load_weights(network, checkpoint["model"])
    print_trial(network.encoder, path)
    return network


def encoder_of(checkpoint: dict[str, Any], path: Path) -> SparseEncoder:
    """The encoder of a checkpoint alone, with its weights.

    Raises:
        UserError: as `network_of`.
    """
    with _described(checkpoint, path):
        encoder = build_encoder(settings_in(checkpoint, path), checkpoint.get("proof"))
        weights = {n.removeprefix("encoder."): v for n, v in checkpoint["model"].items() if n.startswith("encoder.")}
        load_weights(encoder, weights)
    print_trial(encoder, path)
    return encoder


def print_trial(encoder: SparseEncoder, origin: Path | str | None) -> None:
    """Says why the network of a file was tried again, if it was, which takes some seconds."""
    if origin is not None and encoder.tried_because:
        print(f"{origin}: the network was tried again: {encoder.tried_because}", file=sys.stderr, flush=True)


def settings_in(checkpoint: dict[str, Any], path: Path) -> PretrainSettings:
    """The settings of a checkpoint.

    Raises:
        UserError: they describe no network.
    """
    with _described(checkpoint, path):
        settings = from_config(PretrainSettings, checkpoint["config"])
        for name in ("model", "input_size", "mask_ratio", "decoder_width", "drop_path"):
            if getattr(settings, name) is None:
                raise KeyError(name)
    return settings


@contextmanager
def _described(checkpoint: dict[str, Any], path: Path) -> Iterator[None]:
    if checkpoint["config"].get("command") == "finetune":
        raise UserError(f"{path} is a checkpoint of sparkme.finetune, whose network is dense and paints nothing")
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} has a configuration that describes no network: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}") from error


def load_weights(network: nn.Module, state: dict[str, Any]) -> None:
    """Takes the weights of a checkpoint.

    Raises:
        ValueError: they are of another network.
    """
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"its weights are of another network; has the code of the model changed? {first_line(error)}"
        ) from error
