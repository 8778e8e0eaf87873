"""A run's network from its settings, for the command that trains it and those that read its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.fcmae import FCMAE, initialise_encoder
from sparkme.methods.spark import SparK
from sparkme.settings.pretrain import RECIPES, PretrainSettings
from sparkme.weights.checkpoint import build_encoder, described, load_weights, print_trial, settings_in


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


def network_of(checkpoint: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """The network of a checkpoint, with its weights.

    Raises:
        UserError: its configuration does not describe a network, or not the one whose weights it holds.
    """
    with described(checkpoint, path):
        network = build_network(settings_in(checkpoint, path), checkpoint.get("proof"))
        load_weights(network, checkpoint["model"])
    print_trial(network.encoder, path)
    return network
