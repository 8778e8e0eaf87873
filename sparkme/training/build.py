"""A run's network from its configuration, for the command that trains it and those that read its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.fcmae import FCMAE, initialise_encoder
from sparkme.methods.spark import SparK
from sparkme.training.config import RECIPES
from sparkme.weights.checkpoint import build_encoder, described, load_weights, print_trial


def build_network(config: dict[str, Any], proof: Mapping[str, Any] | None = None) -> MaskedAutoencoder:
    """The network that `config` (of config.json, or of a checkpoint) describes, with random weights.

    Args:
        config: see above.
        proof: what the checkpoint keeps of the encoder's trial, see `sparkme.sparsify`.

    Raises:
        ValueError: a value of the configuration is not possible.
    """
    recipe = config.get("recipe", "spark")  # older checkpoints do not say
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}")
    encoder = build_encoder(config, proof)
    options: dict[str, Any] = {name: config[name] for name in ("mask_ratio", "decoder_width", "patch")}
    options["input_size"] = tuple(config["input_size"])
    if recipe == "fcmae":
        initialise_encoder(encoder)
        return FCMAE(encoder, normalise_patches=config["norm_pix_loss"], **options)
    return SparK(encoder, densify_norm=config["densify_norm"], **options)


def network_of(checkpoint: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """The network of a checkpoint, with its weights.

    Raises:
        UserError: its configuration does not describe a network, or not the one whose weights it holds.
    """
    with described(checkpoint, path):
        network = build_network(checkpoint["config"], checkpoint.get("proof"))
        load_weights(network, checkpoint["model"])
    print_trial(network.encoder, path)
    return network
