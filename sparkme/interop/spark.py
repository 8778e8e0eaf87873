"""State-dict names of the official SparK code, whose encoders are timm's ResNets and the ConvNeXt authors' networks."""

from __future__ import annotations

from torch import Tensor

from sparkme.interop.torchvision import CONVNEXT

ENCODER = "sparse_encoder.sp_cnn."
_NEVER_USED = ("imn_m", "imn_s", "norm_black", "config")  # buffers the official code keeps for old checkpoints


def is_official(names: list[str]) -> bool:
    return any(name.startswith(ENCODER) for name in names)


def split_official_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Translates an official state dict.

    Args:
        state: of the whole network (`sparse_encoder.sp_cnn.*`, `dense_decoder.*`, ...), or of its encoder alone.

    Returns:
        The encoder under torchvision's names, and the rest under `SparK`'s; the rest is empty for an encoder alone.
    """
    state = {name: value for name, value in state.items() if name not in _NEVER_USED}
    whole = is_official(list(state))
    encoder = {n.removeprefix(ENCODER): v for n, v in state.items() if not whole or n.startswith(ENCODER)}
    rest = {n.replace("dense_decoder.", "decoder.", 1): v for n, v in state.items() if whole and not n.startswith(ENCODER)}
    if any(name.startswith("downsample_layers.") for name in encoder):
        hub = {name: value for name, value in encoder.items() if not name.startswith(CONVNEXT.ignored)}
        encoder = CONVNEXT.from_hub(hub)
    return encoder, rest


def join_official_state(encoder: dict[str, Tensor], rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: an encoder under the names that the official code's network has, and what else `SparK` trains."""
    out = {ENCODER + name: value for name, value in encoder.items()}
    return out | {name.replace("decoder.", "dense_decoder.", 1): value for name, value in rest.items()}
