"""A run's network from its configuration, for the command that trains it and those that read its checkpoints."""

from __future__ import annotations

from typing import Any

from sparkme.models import create_encoder
from sparkme.spark import SparK


def build_network(config: dict[str, Any]) -> SparK:
    """The network that `config` (of config.json, or of a checkpoint) describes, with random weights.

    Raises:
        ValueError: a value of the configuration is not possible.
    """
    return SparK(
        create_encoder(config["model"], drop_path=config["drop_path"]),
        input_size=tuple(config["input_size"]),
        mask_ratio=config["mask_ratio"],
        decoder_width=config["decoder_width"],
        densify_norm=config["densify_norm"],
        patch=config["patch"],
    )
