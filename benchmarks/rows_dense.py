"""What plain PyTorch can do without kernels of its own: the fairest peer of sparse operators on the CPU.

Layers of one pixel (1x1 convolutions, linear layers, norms, activations) compute on the rows of visible pixels. Where
windows overlap, rows are copied into a dense map with zeros at hidden pixels, which an ordinary convolution takes, and
what is visible of its output is copied out again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from sparkme.sparse.engines.base import RowEngine
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.sparse.map import SparseMap

if TYPE_CHECKING:
    from sparkme.sparse.layers import SparseAvgPool2d, SparseLinear, SparseMaxPool2d, _SparseConvolution


class RowsDenseEngine(RowEngine):
    """Rows between layers; convolutions and pooling with windows on dense maps."""

    name = "rows-dense"
    bf16 = True

    def __init__(self) -> None:
        self.dense_engine = MaskedDenseEngine()

    def convolution(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap:
        if layer.kernel_size == (1, 1) and layer.stride == layer.groups == 1:
            bias = layer.operands()[1]
            return x.replace(_pointwise(x.data, layer.dense_weight, None if bias is None else bias.flatten()))
        return self._rows(self.dense_engine.convolution(layer, self._dense(x)))

    def max_pool(self, layer: SparseMaxPool2d, x: SparseMap) -> SparseMap:
        return self._rows(self.dense_engine.max_pool(layer, self._dense(x)))

    def avg_pool(self, layer: SparseAvgPool2d, x: SparseMap) -> SparseMap:
        return self._rows(self.dense_engine.avg_pool(layer, self._dense(x)))

    def linear(self, layer: SparseLinear, x: SparseMap) -> SparseMap:
        return x.replace(_pointwise(x.data, layer.linear.weight[:, :, None, None], layer.linear.bias))

    def _dense(self, x: SparseMap) -> SparseMap:
        return SparseMap(self.to_dense(x), x.grid, x.stride, self.dense_engine, x.taps, x.channels_last)

    def _rows(self, x: SparseMap) -> SparseMap:
        rows = self.from_rows(x.rows, x.grid, x.stride)
        return SparseMap(rows, x.grid, x.stride, self, x.taps, x.channels_last)


def _pointwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, C) times (C_out, C, 1, 1), as a convolution, for the reason given in the engine masked-dense."""
    return F.conv2d(rows.transpose(1, 2).unsqueeze(3), weight, bias).squeeze(3).transpose(1, 2)
