"""Fuses a wide 1x1 convolution with its batch norm, so that its result is never stored: the statistics follow from those of the
rows, and the gradient from rows and kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparkme import ops
from sparkme.sparse.batch_norm import BATCH_NORM, move_running_statistics, normalises_batch, processes_of
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.fusion.norm import UnwrittenNorm, can_wait
from sparkme.sparse.fusion.waiting import Unwritten, as_rows
from sparkme.sparse.window import Window

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap

ROWS_PER_CHANNEL = 8  # at least, so that products of weights alone cost little


def begin(x: WorkingMap, kernel: Tensor, bias: Tensor | None, window: Window, groups: int) -> Unwritten | None:
    """For a 1x1 convolution to at least twice as many channels, with enough pixels and exact sums."""
    if bias is not None or groups != 1 or window.kernel_size != (1, 1) or window.stride != 1 or not window.is_plain:
        return None
    inside, outside = kernel.shape[-2:]
    if outside < 2 * inside or x.grid.num_rows(x.stride) < ROWS_PER_CHANNEL * inside:
        return None
    exact = x.dtype != torch.bfloat16 and not torch.is_autocast_enabled(x.device.type)  # sums of rounded products are not exact
    if not exact or not torch.is_grad_enabled() or not x.engine.fuses_products(x.dtype, x.device):
        return None
    return UnwrittenProduct(as_rows(x.flat), kernel.flatten(0, -2))


class UnwrittenProduct(Unwritten):
    """A 1x1 convolution without bias, (C_in, C_out) kernel."""

    def __init__(self, source: RowFeatures, kernel: Tensor) -> None:
        super().__init__(source, kernel.shape[1], source.dtype)
        self.kernel = kernel

    def compute(self, rows: Tensor) -> Tensor:
        with self.source.kept():
            return ops.linear(rows, self.kernel)

    def batch_norm(self, bn: BATCH_NORM) -> Unwritten | None:
        fits = can_wait(bn) and normalises_batch(bn) and processes_of(bn) == 1
        return UnwrittenProductNorm(self, bn) if fits else None


class UnwrittenProductNorm(UnwrittenNorm):
    """The batch norm of a product, in training mode."""

    def __init__(self, product: UnwrittenProduct, bn: BATCH_NORM) -> None:
        self.kernel = product.kernel
        super().__init__(product.source, bn, recomputed=False)

    def take_statistics(self, rows: Tensor) -> None:
        self.product = ops.product_statistics(rows, self.kernel)
        move_running_statistics(self.bn, self.product.mean, self.product.variance, len(rows))

    def compute(self, rows: Tensor) -> Tensor:
        bn = self.bn
        with self.source.kept():
            return ops.linear_batch_norm(rows, self.kernel, self.product, bn.eps, bn.weight, bn.bias, **self.follows)
