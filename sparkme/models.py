"""The networks that can be pretrained by name, and their drop path."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.map import SparseMap
from sparkme.sparse.sparsify import sparsify

_FAMILIES = re.compile(r"(resnet|wide_resnet|resnext|convnext)\d*_?.*")

# Drop path of the paper (models/__init__.py:34 of the official code); other networks train without.
PAPER_DROP_PATH = {
    "resnet50": 0.05, "resnet101": 0.08, "resnet152": 0.10,
    "convnext_small": 0.2, "convnext_base": 0.3, "convnext_large": 0.4,
}  # fmt: skip


def model_names() -> list[str]:
    """Names of the supported torchvision models."""
    return [name for name in torchvision.models.list_models(torchvision.models) if _FAMILIES.fullmatch(name)]


def create_dense(name: str, **kwargs: Any) -> nn.Module:
    """A torchvision model with random weights.

    Raises:
        ValueError: an unknown name; says which are close.
    """
    if name not in model_names():
        close = difflib.get_close_matches(name, model_names(), 3, 0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(model_names())}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    model: nn.Module = torchvision.models.get_model(name, weights=None, **kwargs)
    return model


def create_encoder(name: str, *, drop_path: float | None = None) -> SparseEncoder:
    """A sparse encoder with random weights.

    Args:
        name: one of `model_names()`.
        drop_path: probability of the deepest block to be left out, growing linearly from 0 at the first; the paper's
            for this network if None.

    Raises:
        ValueError: an unknown name, or a probability outside [0, 1).
    """
    rate = PAPER_DROP_PATH.get(name, 0.0) if drop_path is None else drop_path
    if not 0 <= rate < 1:
        raise ValueError(f"drop path {rate} is outside [0, 1)")
    if name.startswith("convnext"):
        return sparsify(create_dense(name, stochastic_depth_prob=rate))
    # Residual branches start at zero, as in timm's ResNets, which the official code trains.
    encoder = sparsify(create_dense(name, zero_init_residual=True))
    add_drop_path(encoder, rate)
    return encoder


def add_drop_path(encoder: SparseEncoder, rate: float) -> None:
    """Gives the residual branches of a torchvision ResNet, which has none, a drop path of linearly growing probability.

    The branch ends at the last batch norm of its block, so the drop is applied to that layer's output, as timm does.
    """
    blocks = [m for m in encoder.network.modules() if isinstance(m, BasicBlock | Bottleneck)]
    for i, block in enumerate(blocks):
        probability = rate * i / max(1, len(blocks) - 1)
        if probability > 0:
            norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            norm.register_forward_hook(_DropBranch(probability))


class _DropBranch:
    """Forward hook: leaves out the branch of each sample with a probability, in training mode."""

    def __init__(self, probability: float) -> None:
        self.drop = StochasticDepth(probability, "row")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: SparseMap) -> SparseMap:
        dropped: SparseMap = self.drop.train(module.training)(out)
        return dropped
