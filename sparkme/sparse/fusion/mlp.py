"""Fuses ConvNeXt's MLP: linear, GELU, linear, factors and a residual. GELU is recomputed in the backward pass."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme import ops
from sparkme.sparse.engines.base import autocast
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.fusion.waiting import Unwritten, as_rows

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap


def begin(x: WorkingMap, weight: Tensor, bias: Tensor | None) -> Unwritten | None:
    if not x.engine.fuses_products(x.dtype, x.device):
        return None
    features = as_rows(x.flat)
    return UnwrittenLinear(features.replace(autocast(features.data)), weight, bias)


class UnwrittenLinear(Unwritten):
    """A linear layer, then optionally GELU, another linear layer, factors per channel and sample, and a residual."""

    def __init__(self, source: RowFeatures, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(source, len(weight), source.dtype)
        self.first = weight, bias
        self.second: tuple[Tensor, Tensor | None] | None = None
        self.activated = False
        self.scale: Tensor | None = None

    def compute(self, rows: Tensor) -> Tensor:
        weight, bias = (None if value is None else value.to(rows.dtype) for value in self.first)
        assert weight is not None
        if self.second is None:
            out = ops.linear(rows, weight.t(), bias)
            return F.gelu(out) if self.activated else out
        last, last_bias = (None if value is None else value.to(rows.dtype) for value in self.second)
        assert last is not None
        return ops.mlp(rows, weight, bias, last, last_bias, self.scale, **self.follows).to(self.dtype)

    def gelu(self) -> Unwritten | None:
        return None if self.activated else self._as(activated=True)

    def plus(self, other: Tensor) -> Unwritten | None:
        fits = self.second is not None and "residual" not in self.follows and self.is_like(other)
        if not fits or self.dtype != self.source.dtype:  # under autocast they may differ
            return None
        return self._with(residual=other)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Unwritten | None:
        if not self.activated or self.second is not None:
            return None
        return self._as(second=(weight, bias), shape=torch.Size((*self.shape[:2], len(weight))))

    def times(self, other: Tensor) -> Unwritten | None:
        if self.second is None or "residual" in self.follows:
            return None
        if not self.follows and self.is_for_samples(other):
            return self._with(factor=other.flatten())
        if self.scale is not None or other.shape != (1, 1, self.shape[2]):
            return None
        return self._as(scale=other.flatten(), dtype=torch.promote_types(self.dtype, other.dtype))

    def _as(self, **changes: Any) -> Unwritten:
        out = copy(self)
        vars(out).update(changes)
        return out
