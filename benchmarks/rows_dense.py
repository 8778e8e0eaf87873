"""A sparse engine in plain PyTorch, without own kernels: the fairest comparison for sparse operators on the CPU.

Pointwise layers (1x1 convolutions, linear layers, norms, activations) compute on the rows of visible pixels. For layers with
overlapping windows, rows are copied into a dense map with zeros at hidden pixels, an ordinary convolution runs on it, and the
visible part of its output is copied back.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparkme.sparse.engines.base import RowEngine
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.sparse.features import DenseFeatures, RowFeatures
from sparkme.sparse.layout import kernel_to_weight
from sparkme.sparse.window import Window


class RowsDenseEngine(RowEngine):
    """The engine: rows between layers, dense maps for convolutions and pooling with windows."""

    name = "rows-dense"
    bf16 = True

    def __init__(self) -> None:
        self.dense_engine = MaskedDenseEngine()

    def convolution(self, x: RowFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> RowFeatures:
        if window.kernel_size == (1, 1) and window.stride == groups == 1:
            weight = kernel_to_weight(kernel, (1, 1))
            return x.replace(_pointwise(x.data, weight, None if bias is None else bias.flatten()))
        return self._rows(self.dense_engine.convolution(self._dense(x), kernel, bias, window, groups))

    def max_pool(self, x: RowFeatures, window: Window) -> RowFeatures:
        return self._rows(self.dense_engine.max_pool(self._dense(x), window))

    def avg_pool(self, x: RowFeatures, window: Window) -> RowFeatures:
        return self._rows(self.dense_engine.avg_pool(self._dense(x), window))

    def linear(self, x: RowFeatures, weight: Tensor, bias: Tensor | None) -> RowFeatures:
        return x.replace(_pointwise(x.data, weight[:, :, None, None], bias))

    def _dense(self, x: RowFeatures) -> DenseFeatures:
        return DenseFeatures(x.dense(), x.grid, x.stride)

    def _rows(self, x: DenseFeatures) -> RowFeatures:
        return RowFeatures.of_rows(x.rows(), x.grid, x.stride)


def _pointwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, C) times (C_out, C, 1, 1), as a convolution, for the reason in the engine masked-dense."""
    return F.conv2d(rows.transpose(1, 2).unsqueeze(3), weight, bias).squeeze(3).transpose(1, 2)
