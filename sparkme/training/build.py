"""A run's network from its configuration, for the command that trains it and those that read its checkpoints."""

from __future__ import annotations

from typing import Any

from sparkme.fcmae import FCMAE, initialise_encoder
from sparkme.masked import MaskedAutoencoder
from sparkme.models import create_encoder
from sparkme.spark import SparK


def build_network(config: dict[str, Any]) -> MaskedAutoencoder:
    """The network that `config` (of config.json, or of a checkpoint) describes, with random weights.

    Raises:
        ValueError: a value of the configuration is not possible.
    """
    encoder = create_encoder(config["model"], in_channels=config.get("channels", 3), drop_path=config["drop_path"])
    options: dict[str, Any] = {name: config[name] for name in ("mask_ratio", "decoder_width", "patch")}
    options["input_size"] = tuple(config["input_size"])
    if config.get("recipe", "spark") == "fcmae":  # older checkpoints do not say
        initialise_encoder(encoder)
        return FCMAE(encoder, normalise_patches=config["norm_pix_loss"], **options)
    return SparK(encoder, densify_norm=config["densify_norm"], **options)
