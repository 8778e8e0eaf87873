"""Dense convolutions times the mask: how the official code emulates sparsity. The peer to beat, and a cross-check.

Every layer computes on whole maps, hidden pixels included, except BatchNorm, whose statistics need the visible ones.
Beyond that it is made as fast as plain PyTorch gets: the mask is applied only where a window reaches across patches, and
not after every layer, since layers of one pixel may hold anything at hidden ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.grid import Grid
from sparkme.sparse.engines.base import Engine
from sparkme.sparse.map import SparseMap

if TYPE_CHECKING:
    from sparkme.sparse.layers import (
        SparseAvgPool2d,
        SparseLayerNorm,
        SparseLinear,
        SparseMaxPool2d,
        _SparseConvolution,
    )


class MaskedDenseEngine(Engine):
    """Maps stay dense, (B, C, H, W); norms see the visible pixels only.

    Args:
        memory_format: in which convolutions compute, `torch.channels_last` or `torch.contiguous_format`; layers of one
            pixel use the former in any case.
    """

    name = "masked-dense"
    dense = True
    bf16 = True

    def __init__(self, memory_format: torch.memory_format = torch.channels_last) -> None:
        self.memory_format = memory_format

    def convolution(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap:
        # Without padding a window is one pixel or tiles the map, so it stays within a patch.
        within_patch = layer.padding == (0, 0)
        bias = layer.operands()[1]
        bias = None if bias is None else bias.flatten()
        data = (x.data if within_patch else self.to_dense(x)).contiguous(memory_format=self.memory_format)
        weight = layer.dense_weight
        if self.memory_format == torch.contiguous_format:  # a 1x1 weight may pass for channels_last, and so would the output
            weight = weight.clone(memory_format=self.memory_format)
        out = F.conv2d(data, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return x.replace(out, x.stride * layer.stride, clean=x.clean and within_patch and bias is None)

    def max_pool(self, layer: SparseMaxPool2d, x: SparseMap) -> SparseMap:
        stride = x.stride * layer.stride
        lowest = torch.where(x.grid.mask(x.stride, torch.bool), x.data, float("-inf"))
        out = F.max_pool2d(lowest, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return x.replace(torch.where(x.grid.mask(stride, torch.bool), out, 0.0), stride)

    def avg_pool(self, layer: SparseAvgPool2d, x: SparseMap) -> SparseMap:
        stride = x.stride * layer.stride
        out = F.avg_pool2d(self.to_dense(x), layer.kernel_size, layer.stride, layer.padding)
        return x.replace(out, stride, clean=layer.padding == (0, 0))

    def linear(self, layer: SparseLinear, x: SparseMap) -> SparseMap:
        # As a convolution, since oneDNN's is faster than the matrix product of torch's BLAS library on many CPUs.
        weight = layer.linear.weight[:, :, None, None]
        return x.replace(F.conv2d(x.data, weight, layer.linear.bias), clean=x.clean and layer.linear.bias is None)

    def layer_norm(self, layer: SparseLayerNorm, x: SparseMap) -> SparseMap:
        """Of every pixel: cheaper than taking the visible ones out and putting them back."""
        pixels = x.data.permute(0, 2, 3, 1)
        out = F.layer_norm(pixels, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
        return x.replace(out.permute(0, 3, 1, 2), clean=x.clean and layer.bias is None)

    def to_dense(self, x: SparseMap) -> Tensor:
        return x.data if x.clean else x.data * x.grid.mask(x.stride, x.dtype)

    def to_rows(self, x: SparseMap) -> Tensor:
        return x.grid.to_rows(x.data, x.stride)

    def from_rows(self, rows: Tensor, grid: Grid, stride: int) -> Tensor:
        return grid.to_dense(rows, stride)
