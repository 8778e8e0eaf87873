"""The sparse form of each layer and each function of a dense network.

`SPARSE_FORMS` lists layers. Any other layer runs its own code on maps, and the torch functions that it calls have the forms
below. Hidden pixels are never read. On a whole image everything equals the dense network.

| in the dense network | sparse form | where |
|---|---|---|
| Conv2d, depthwise, grouped, dilated | a hidden neighbour counts as zero | convolution |
| conv2d with weights computed in every step (StdConv2d, ScaledStdConv2d, spectral norm) | the same | convolution |
| asymmetric and `same` padding, `F.pad` | part of the window; zero, reflect or replicate outside the image | convolution |
| Linear, matmul with a matrix | along the channels | convolution |
| BatchNorm2d, BatchNormAct2d | statistics over the visible pixels of the batch; then the activation | norm |
| LayerNorm, LayerNorm2d, RMSNorm | over the channels of each pixel | norm |
| GroupNorm, InstanceNorm | over the visible pixels of each sample | norm |
| LocalResponseNorm | over neighbouring channels of each pixel | norm |
| GRN | norm over each sample's visible pixels; ConvNeXt V2's own sparse code takes it over the batch | norm |
| MaxPool2d, also with ceil_mode | maximum over the visible pixels | pooling |
| AvgPool2d | hidden pixels count as zero; the divisor is the dense layer's | pooling |
| global pooling, squeeze-excite, ECA and other gates | over each sample's visible pixels; then a dense vector | pooling |
| reductions and softmax over channels | pixel by pixel | pooling |
| sums over H and W | over each sample's visible pixels, even if the network divides by H times W itself | pooling |
| nearest upsampling | within a patch | pooling |
| BlurPool2d | a convolution with fixed weights, reflected at the image's border | convolution |
| cat, stack, split, chunk, slices, channel shuffle, permute to channels-last and back | channels only | shape |
| SpaceToDepth, pixel_unshuffle, `x[..., ::2, ::2]` | within a patch | shape |
| activations, arithmetic, LayerScale, affine, gates times maps | pixel by pixel | pointwise |
| DropPath, StochasticDepth, Dropout2d, DropBlock2d | per sample, by their own code | pointwise |
| attention, FFT, bilinear resizing, other slices of H or W, unpadded strided windows | refused | |
| torch.autograd.Function, checkpoints with use_reentrant=True, compiled parts, hooks on gradients | refused | |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sparkme.sparse.forms import convolution, norm, pointwise, pooling, shape
from sparkme.sparse.forms.convolution import SparseConv2d, SparseDepthwiseConv2d, SparseLinear, convolution_form
from sparkme.sparse.forms.layer import SparseLayer
from sparkme.sparse.forms.norm import SparseBatchNorm2d, SparseBatchNormAct2d, SparseGlobalResponseNorm
from sparkme.sparse.forms.pooling import SparseAvgPool2d, SparseMaxPool2d

# By class. timm's are named, since importing timm takes half a second.
SPARSE_FORMS: dict[type[nn.Module] | str, Callable[..., nn.Module]] = {
    nn.Conv2d: convolution_form,
    nn.Linear: SparseLinear,
    nn.BatchNorm2d: SparseBatchNorm2d,
    nn.SyncBatchNorm: SparseBatchNorm2d,
    "timm.layers.norm_act.BatchNormAct2d": SparseBatchNormAct2d,
    "timm.layers.norm_act.SyncBatchNormAct": SparseBatchNormAct2d,
    "timm.layers.grn.GlobalResponseNorm": SparseGlobalResponseNorm,
    nn.MaxPool2d: SparseMaxPool2d,
    nn.AvgPool2d: SparseAvgPool2d,
}

# By torch's function.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **convolution.FUNCTIONS,
    **norm.FUNCTIONS,
    **pointwise.FUNCTIONS,
    **pooling.FUNCTIONS,
    **shape.FUNCTIONS,
}

__all__ = [
    "FUNCTIONS",
    "SPARSE_FORMS",
    "SparseAvgPool2d",
    "SparseBatchNorm2d",
    "SparseBatchNormAct2d",
    "SparseConv2d",
    "SparseDepthwiseConv2d",
    "SparseGlobalResponseNorm",
    "SparseLayer",
    "SparseLinear",
    "SparseMaxPool2d",
    "sparse_form",
]

# A subclass with only these attributes computes what its base computes.
_HARMLESS = {
    "__init__",
    "__module__",
    "__doc__",
    "__annotations__",
    "__constants__",
    "__qualname__",
    "__firstlineno__",
    "__static_attributes__",
    "__parameters__",
    "reset_parameters",
    "extra_repr",
    "__repr__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
}


def sparse_form(layer: nn.Module) -> nn.Module | None:
    """The sparse layer in place of a dense one, or None if the layer's own code runs on maps.

    A subclass that computes the same as its base has the base's form. A layer with hooks or parametrizations runs its own code.
    Raises ValueError, which says why, for a layer without a sparse form.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "parametrizations") or "forward" in vars(layer):
        return None
    for base in type(layer).__mro__:
        create = SPARSE_FORMS.get(base) or SPARSE_FORMS.get(f"{base.__module__}.{base.__qualname__}")
        if create is not None:
            form = create(layer)
            return None if form is layer else form
        if set(vars(base)) - _HARMLESS:
            return None
    return None
