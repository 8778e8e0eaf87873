"""Fuses a batch norm with a factor per sample (drop path), a residual, and a ReLU or ReLU6."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparkme.sparse.batch_norm import BATCH_NORM, apply_norm, normalises_batch, processes_of, statistics_of_batch
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.fusion.waiting import Unwritten, as_rows

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap


def begin(x: WorkingMap, bn: BATCH_NORM) -> Unwritten | None:
    if not can_wait(bn) or not x.engine.fuses_norms(x.dtype, x.device):
        return None
    return UnwrittenNorm(as_rows(x.flat), bn, recomputed=x.engine.fuses_products(x.dtype, x.device))


def can_wait(bn: BATCH_NORM) -> bool:
    """Whether it computes the same as torch's, perhaps over processes, and has no hooks."""
    return (type(bn).forward is BATCH_NORM.forward or processes_of(bn) > 1) and not bn._forward_hooks


class UnwrittenNorm(Unwritten):
    """A batch norm and the operations after it. Its statistics are computed at once.

    Args:
        source: the input.
        bn: the layer. In training its running statistics are updated now, over all processes that share them.
        recomputed: whether the result is recomputed for the gradient of its reader.
    """

    def __init__(self, source: RowFeatures, bn: BATCH_NORM, *, recomputed: bool) -> None:
        super().__init__(source, bn.num_features, source.dtype)
        self.bn = bn
        self.recomputed = recomputed
        self.training = normalises_batch(bn)
        with torch.no_grad():
            self.take_statistics(source.data.flatten(0, 1))

    def take_statistics(self, rows: Tensor) -> None:
        bn = self.bn
        if self.training:
            self.mean, self.deviation = statistics_of_batch(bn, rows)
        else:
            assert bn.running_mean is not None and bn.running_var is not None
            self.mean, self.deviation = bn.running_mean, (bn.running_var + bn.eps).rsqrt()

    def _write(self) -> RowFeatures:
        features = super()._write()
        if not self.recomputed or "residual" in self.follows or torch.compiler.is_compiling():
            return features
        features.again = self._again
        return features

    @torch.no_grad()
    def _again(self) -> Tensor:
        return self.compute(self.source.data.flatten(0, 1))

    def compute(self, rows: Tensor) -> Tensor:
        return apply_norm(self.bn, rows, self.mean, self.deviation, training=self.training, **self.follows)

    def clamp(self, ceiling: float) -> Unwritten | None:
        return None if "ceiling" in self.follows else self._with(ceiling=ceiling)

    def plus(self, other: Tensor) -> Unwritten | None:
        fits = not self.follows.keys() & {"ceiling", "residual"} and self.is_like(other)
        return self._with(residual=other) if fits else None

    def times(self, other: Tensor) -> Unwritten | None:
        return self._with(factor=other.flatten()) if not self.follows and self.is_for_samples(other) else None
