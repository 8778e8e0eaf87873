"""State-dict names of the official SparK code, whose encoders are timm's ResNets and the ConvNeXt authors' networks."""

import re

from torch import Tensor

_ENCODER = "sparse_encoder.sp_cnn."
_NEVER_USED = ("imn_m", "imn_s", "norm_black", "config")  # buffers the official code keeps for old checkpoints
_HEADS = ("fc.", "head.", "norm.")

# The ConvNeXt authors' names and torchvision's. Stage i of the former is features[2 i + 1] of the latter, the stem
# features[0], and the downsampling layer in front of stage i > 0 features[2 i].
_BLOCK_TO_TORCHVISION = {
    "dwconv.weight": "block.0.weight",
    "dwconv.bias": "block.0.bias",
    "norm.weight": "block.2.weight",
    "norm.bias": "block.2.bias",
    "pwconv1.weight": "block.3.weight",
    "pwconv1.bias": "block.3.bias",
    "pwconv2.weight": "block.5.weight",
    "pwconv2.bias": "block.5.bias",
    "gamma": "layer_scale",
}


def split_official_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Translates an official state dict.

    Args:
        state: of the whole network (`sparse_encoder.sp_cnn.*`, `dense_decoder.*`, ...), or of its encoder alone.

    Returns:
        The encoder under torchvision's names, and the rest under `SparK`'s; the rest is empty for an encoder alone.
    """
    state = {name: value for name, value in state.items() if name not in _NEVER_USED}
    whole = any(name.startswith(_ENCODER) for name in state)
    encoder = {n.removeprefix(_ENCODER): v for n, v in state.items() if not whole or n.startswith(_ENCODER)}
    rest = {n.replace("dense_decoder.", "decoder.", 1): v for n, v in state.items() if whole and not n.startswith(_ENCODER)}
    if any(name.startswith("downsample_layers.") for name in encoder):
        encoder = convnext_to_torchvision(encoder)
    return encoder, rest


def convnext_to_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ConvNeXt authors' names and shapes to torchvision's; the head is left out."""
    translated = {}
    for name, value in state.items():
        if name.startswith(_HEADS):
            continue
        if match := re.fullmatch(r"downsample_layers\.(\d)\.(.+)", name):
            translated[f"features.{2 * int(match[1])}.{match[2]}"] = value
        elif match := re.fullmatch(r"stages\.(\d)\.(\d+)\.(.+)", name):
            if match[3] not in _BLOCK_TO_TORCHVISION:
                raise ValueError(f"unknown ConvNeXt weight {name!r}")
            value = value.view(-1, 1, 1) if match[3] == "gamma" else value
            translated[f"features.{2 * int(match[1]) + 1}.{match[2]}.{_BLOCK_TO_TORCHVISION[match[3]]}"] = value
        else:
            raise ValueError(f"unknown ConvNeXt weight {name!r}")
    return translated
