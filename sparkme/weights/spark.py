"""State-dict names of the official SparK code, whose encoders are timm's ResNets and the ConvNeXt authors' networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparkme.weights import convnext, timm
from sparkme.weights.format import Format
from sparkme.weights.torchvision import CONVNEXT

if TYPE_CHECKING:
    from torch import Tensor

ENCODER = "sparse_encoder.sp_cnn."
_BESIDE = ("decoder.", "densify_norms.", "densify_projs.", "mask_tokens.")  # `SparK`'s parts except the encoder
_NEVER_USED = ("imn_m", "imn_s", "norm_black", "config")  # buffers that the official code keeps for old checkpoints


def is_official(names: list[str]) -> bool:
    return any(name.startswith(ENCODER) for name in names)


def split_official_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Translates an official state dict.

    Args:
        state: the whole network's (`sparse_encoder.sp_cnn.*`, `dense_decoder.*`, ...), or its encoder's.

    Returns:
        The encoder with torchvision's names, and the rest with `SparK`'s names, empty for an encoder alone.
    """
    state = {name: value for name, value in state.items() if name not in _NEVER_USED}
    whole = is_official(list(state))
    encoder = {n.removeprefix(ENCODER): v for n, v in state.items() if not whole or n.startswith(ENCODER)}
    rest = {_own_name(n): v for n, v in state.items() if whole and not n.startswith(ENCODER)}
    if any(name.startswith("downsample_layers.") for name in encoder):
        hub = {name: value for name, value in encoder.items() if not name.startswith(CONVNEXT.ignored)}
        encoder = CONVNEXT.from_hub(hub)
    return encoder, rest


def beside_encoder(names: Iterable[str], prefix: str) -> dict[str, str]:
    """`SparK`'s names for a file's tensors outside the encoder at `prefix`, by the file's names; {} for other code's files."""
    if not prefix.endswith(ENCODER):
        return {}
    root = prefix.removesuffix(ENCODER)
    return {n: _own_name(n.removeprefix(root)) for n in names if n.startswith(root) and not n.startswith(prefix)}


def _own_name(name: str) -> str:
    return name.replace("dense_decoder.", "decoder.", 1)


def join_official_state(encoder: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: the official names for an encoder and the other parts of `SparK`.

    Args:
        encoder: with the names of the library that the official code uses.
        model: all trained weights by their names in `SparK`; for another method only the encoder is kept.
    """
    out = {ENCODER + name: value for name, value in encoder.items()}
    rest = {name: value for name, value in model.items() if not name.startswith("encoder.")}
    if not all(name.startswith(_BESIDE) for name in rest):
        return out
    return out | {name.replace("decoder.", "dense_decoder.", 1): value for name, value in rest.items()}


class OfficialSparK(Format):
    def state(self, encoder: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        return join_official_state(encoder, trained)


FORMAT = OfficialSparK(
    "the official SparK code",
    {"resnet": timm.RESNET, "convnext": convnext.CONVNEXT},
    suffixes=(".pth", ".pt", ".safetensors"),
    is_read=False,  # its files are recognised by the prefix, which other libraries' names follow
)
