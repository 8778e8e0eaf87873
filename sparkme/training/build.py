"""Builds a run's network from its settings, for training and for reading checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sparkme.methods.base import MaskedAutoencoder
from sparkme.settings.pretrain import RECIPES, PretrainSettings
from sparkme.weights.checkpoint import build_encoder, described, load_weights, print_trial, settings_in


def build_network(settings: PretrainSettings, proof: Mapping[str, Any] | None = None) -> MaskedAutoencoder:
    """The network that settings describe, with random weights.

    Args:
        settings: a run's; those of a checkpoint are `from_config(PretrainSettings, checkpoint["config"])`.
        proof: the checkpoint's proof of the encoder's trial, see `sparkme.sparsify`.

    Raises:
        ValueError: a value is not allowed.
    """
    if settings.recipe not in RECIPES:
        raise ValueError(f"there is no recipe {settings.recipe!r}")
    method: type[MaskedAutoencoder] = resolve_name(RECIPES[settings.recipe].method)
    return method.create(build_encoder(settings, proof), settings)


def network_of(checkpoint: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """The network of a checkpoint, with its weights. Raises UserError if configuration and weights do not match."""
    with described(checkpoint, path):
        network = build_network(settings_in(checkpoint, path), checkpoint.get("proof"))
        load_weights(network, checkpoint["model"])
    print_trial(network.encoder, path)
    return network
