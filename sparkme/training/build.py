"""A run's network from its configuration, for the command that trains it and those that read its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkme.errors import UserError, first_line
from sparkme.fcmae import FCMAE, initialise_encoder
from sparkme.masked import MaskedAutoencoder
from sparkme.models import create_encoder
from sparkme.spark import SparK
from sparkme.training.config import RECIPES


def build_network(config: dict[str, Any]) -> MaskedAutoencoder:
    """The network that `config` (of config.json, or of a checkpoint) describes, with random weights.

    Raises:
        ValueError: a value of the configuration is not possible.
    """
    recipe = config.get("recipe", "spark")  # older checkpoints do not say
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}")
    encoder = create_encoder(config["model"], in_channels=config.get("channels", 3), drop_path=config["drop_path"])
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
    if checkpoint["config"].get("command") == "finetune":
        raise UserError(f"{path} is a checkpoint of sparkme.finetune, whose network is dense and paints nothing")
    try:
        network = build_network(checkpoint["config"])
        load_weights(network, checkpoint["model"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} has a configuration that describes no network: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    return network


def load_weights(network: MaskedAutoencoder, state: dict[str, Any]) -> None:
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
