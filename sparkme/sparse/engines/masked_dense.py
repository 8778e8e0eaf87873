"""Dense convolutions times the mask: how the official code emulates sparsity. The peer to beat, and a cross-check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.grid import Grid
from sparkme.sparse.engines.base import Engine
from sparkme.sparse.map import SparseMap

if TYPE_CHECKING:
    from sparkme.sparse.layers import SparseAvgPool2d, SparseLinear, SparseMaxPool2d, _SparseConvolution


class MaskedDenseEngine(Engine):
    """Maps stay dense, in channels_last memory, with hidden pixels at zero; norms see the visible pixels only."""

    name = "masked-dense"
    dense = True
    bf16 = True

    def convolution(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap:
        stride = x.stride * layer.stride
        bias = None if layer.bias is None else layer.bias.flatten()
        out = F.conv2d(x.data, layer.dense_weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return x.replace(out * x.grid.mask(stride, out.dtype), stride)

    def max_pool(self, layer: SparseMaxPool2d, x: SparseMap) -> SparseMap:
        stride = x.stride * layer.stride
        visible = x.grid.mask(x.stride, torch.bool)
        lowest = x.data.masked_fill(~visible, float("-inf"))
        out = F.max_pool2d(lowest, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return x.replace(out.masked_fill(~x.grid.mask(stride, torch.bool), 0.0), stride)

    def avg_pool(self, layer: SparseAvgPool2d, x: SparseMap) -> SparseMap:
        stride = x.stride * layer.stride
        out = F.avg_pool2d(x.data, layer.kernel_size, layer.stride, layer.padding)
        return x.replace(out * x.grid.mask(stride, out.dtype), stride)

    def linear(self, layer: SparseLinear, x: SparseMap) -> SparseMap:
        out = layer.linear(x.data.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x.replace(out * x.grid.mask(x.stride, out.dtype))

    def to_rows(self, x: SparseMap) -> Tensor:
        return x.grid.to_rows(x.data, x.stride)

    def from_rows(self, rows: Tensor, grid: Grid, stride: int) -> Tensor:
        return grid.to_dense(rows, stride)
