"""Fuses factors per channel (layer scale) with factors per sample (drop path) and a residual.

Where the preceding linear layer is fused, it takes them instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparkme import ops
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.fusion.waiting import Unwritten, as_rows

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap


def begin(x: WorkingMap, *others: Any, **kwargs: Any) -> Unwritten | None:
    """If the only other argument is a number per channel."""
    engine, where = x.engine, (x.dtype, x.device)
    if len(others) != 1 or kwargs or type(others[0]) is type(x) or not isinstance(others[0], Tensor) or others[0].ndim == 0:
        return None
    if (x.dims[-1] != "C" and x.dims != "BCHW") or not engine.fuses_norms(*where) or engine.fuses_products(*where):
        return None
    scale = x.operand(others[0])
    fits = scale.shape == (1, 1, x.channels) and scale.dtype == x.dtype
    return UnwrittenScale(as_rows(x.flat), scale.flatten()) if fits else None


class UnwrittenScale(Unwritten):
    """Rows times a factor per channel, optionally one per sample, plus a residual: a batch norm without statistics."""

    def __init__(self, source: RowFeatures, scale: Tensor) -> None:
        super().__init__(source, source.shape[-1], source.dtype)
        self.scale = scale

    def compute(self, rows: Tensor) -> Tensor:
        zero, one = rows.new_zeros(self.shape[2]), rows.new_ones(self.shape[2])
        return ops.batch_norm(rows, zero, one, self.scale, training=False, **self.follows)

    def times(self, other: Tensor) -> Unwritten | None:
        return self._with(factor=other.flatten()) if not self.follows and self.is_for_samples(other) else None

    def plus(self, other: Tensor) -> Unwritten | None:
        return self._with(residual=other) if "residual" not in self.follows and self.is_like(other) else None
