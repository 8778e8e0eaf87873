"""Makes a sparse network from a dense one: the module tree and its names stay, the leaves become sparse.

One table, `SPARSE_FORMS`, says for each leaf class what replaces it; another family of networks needs new entries there
and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import Permute, StochasticDepth

from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.hierarchy import find_hierarchy
from sparkme.sparse.layers import (
    SparseAvgPool2d,
    SparseBatchNorm2d,
    SparseConv2d,
    SparseDepthwiseConv2d,
    SparseLayerNorm,
    SparseLinear,
    SparseMaxPool2d,
)


class UnsupportedLayerError(ValueError):
    """A layer of the dense network has no sparse form."""


def _convolution(conv: nn.Conv2d) -> nn.Module:
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
    return SparseDepthwiseConv2d(conv) if depthwise else SparseConv2d(conv)


def _unchanged(layer: nn.Module) -> nn.Module:
    """For layers that work pixel by pixel, or sample by sample: a `SparseMap` does what they ask for."""
    return layer


SPARSE_FORMS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: SparseBatchNorm2d,
    nn.LayerNorm: SparseLayerNorm,
    LayerNorm2d: SparseLayerNorm,
    nn.Linear: SparseLinear,
    nn.MaxPool2d: SparseMaxPool2d,
    nn.AvgPool2d: SparseAvgPool2d,
    Permute: _unchanged,
    StochasticDepth: _unchanged,
    nn.Dropout: _unchanged,
    nn.Identity: _unchanged,
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid,
         nn.Tanh),
        _unchanged,
    ),
}  # fmt: skip


def sparsify(model: nn.Module) -> SparseEncoder:
    """Makes a sparse encoder with the weights of a dense convolutional network.

    The dense model is left as it is. Layers after the deepest feature map (pooling, classifier) are dropped.

    Args:
        model: any convolutional network whose layers have a sparse form; called as `model(images)`.

    Returns:
        A `SparseEncoder`, on the model's device and in its dtype, with the engine that `auto` stands for there.

    Raises:
        UnsupportedLayerError: a layer has no sparse form; says which one and why.
        ValueError: the network is not hierarchical.
    """
    hierarchy = find_hierarchy(model)
    network = copy.deepcopy(model)
    network.train(model.training)
    done: dict[int, nn.Module] = {}
    for name, leaf in list(network.named_modules(remove_duplicate=False)):
        if next(leaf.children(), None) is not None and type(leaf) not in SPARSE_FORMS:
            continue  # a container: its own code runs unmodified
        if not name:
            raise UnsupportedLayerError(f"{type(leaf).__name__} is a single layer, not a network")
        if id(leaf) not in done:
            done[id(leaf)] = _sparse_form(name, leaf) if name in hierarchy.called else nn.Identity()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, done[id(leaf)])
    return SparseEncoder(network, hierarchy)


def _sparse_form(name: str, leaf: nn.Module) -> nn.Module:
    make = SPARSE_FORMS.get(type(leaf))
    if make is None:
        # A subclass that computes what its base computes (a torchvision FrozenX, a user's own init) has the same form.
        make = next(
            (f for base, f in SPARSE_FORMS.items() if isinstance(leaf, base) and type(leaf).forward is base.forward),
            None,
        )
    if make is None:
        raise UnsupportedLayerError(
            f"layer {name!r} ({type(leaf).__name__}) has no sparse form; replace it in the dense model, or add "
            f"an entry for {type(leaf).__name__} to sparkme.sparse.sparsify.SPARSE_FORMS"
        )
    try:
        return make(leaf)
    except ValueError as error:
        raise UnsupportedLayerError(f"layer {name!r} ({leaf}): {error}") from None
