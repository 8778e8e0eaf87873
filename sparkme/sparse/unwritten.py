"""What is computed together: layers, and the pointwise functions behind them.

A layer hands out a map that is still to be written. What the network does with it next becomes part of it, as long as it fits,
and the first one who reads the map has it written. Blocks run their own code and notice nothing:

| in the network | what runs | what is saved |
|---|---|---|
| batch norm, perhaps a factor for each sample (drop path), `+` another map, ReLU(6) | `ops.batch_norm` | passes over rows |
| a 1x1 convolution to at least twice as many channels, then the same | `ops.linear_batch_norm` | the convolution's result |
| linear, GELU, linear, perhaps factors for channels (layer scale) and samples, `+` another map | `ops.mlp` | GELU's result |

On the CPU a batch norm's result is not kept for the gradient of the convolution that reads it, but computed again from the
norm's rows. On CUDA it is, since that is short of bandwidth sooner than of memory; and of the table only batch norms wait, and
factors for channels, which take those for samples and another map along.

In the middle there may be a dropout that drops nothing. Everything else, and whatever stands in another order, runs as it is.
A batch norm's statistics are taken at once, so they do not depend on when or how often a map is written. Nor does its graph:
what waits is computed under the modes of torch (gradients, inference, autocast) that held where the network called it, and
joins only what is called under the same ones. Engines say with `Engine.fuses` and `Engine.fuses_all` whether they take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme import ops
from sparkme.sparse.batch_norm import BATCH_NORM, move_running_statistics, normalise, processes_of, statistics_of_batch
from sparkme.sparse.engines.base import Features
from sparkme.sparse.grid import in_inference_mode


class Modes(NamedTuple):
    """What torch is set to where an operation is called, as far as its result and its graph depend on it."""

    device_type: str
    grad: bool
    inference: bool
    autocast: torch.dtype | None

    @staticmethod
    def now(device: torch.device) -> Modes:
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Modes(kind, torch.is_grad_enabled(), in_inference_mode(), autocast)

    @contextmanager
    def restored(self) -> Iterator[None]:
        inference = torch.inference_mode(self.inference) if self.inference != in_inference_mode() else nullcontext()
        autocast = torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None)
        with inference, torch.set_grad_enabled(self.grad), autocast:
            yield


class Unwritten:
    """Features before they are computed: where they lie, and what may become part of them.

    Args:
        source: what they are computed from, (B, L, C).
        channels: that they will have.
        dtype: and their type.
    """

    def __init__(self, source: Features, channels: int, dtype: torch.dtype) -> None:
        self.source = source
        self.grid, self.stride, self.device, self.dtype = source.grid, source.stride, source.device, dtype
        self.modes = Modes.now(source.device)
        self.shape = torch.Size((*source.shape[:2], channels))

    @property
    def is_current(self) -> bool:
        """Whether an operation that is called now would be computed as this one is."""
        return self.modes == Modes.now(self.device)

    def write(self) -> Features:
        if self.is_current:
            return self._write()
        with self.modes.restored():
            return self._write()

    def _write(self) -> Features:
        return self.source.replace(self.compute(self.source.data.flatten(0, 1)).view(self.shape))

    def compute(self, rows: Tensor) -> Tensor:
        """(N, C) of the source to (N, channels)."""
        raise NotImplementedError

    # The same with one more function at the end; None where it does not fit.

    def clamp(self, ceiling: float) -> Unwritten | None:
        """To [0, ceiling]: a ReLU if that is infinite, a ReLU6 if it is 6."""
        return None

    def gelu(self) -> Unwritten | None:
        return None

    def plus(self, other: Tensor) -> Unwritten | None:
        """`other` is like the rows, (B, L, channels)."""
        return None

    def times(self, other: Tensor) -> Unwritten | None:
        """`other` is spread over them, such as (B, 1, 1) or (1, 1, channels)."""
        return None

    def linear(self, weight: Tensor, bias: Tensor | None) -> Unwritten | None:
        """`weight` is (channels after it, channels)."""
        return None


class UnwrittenProduct(Unwritten):
    """A 1x1 convolution without bias, (C_in, C_out) kernel, for a batch norm."""

    def __init__(self, source: Features, kernel: Tensor) -> None:
        super().__init__(source, kernel.shape[1], source.dtype)
        self.kernel = kernel

    def compute(self, rows: Tensor) -> Tensor:
        with self.source.kept():
            return ops.linear(rows, self.kernel)


class UnwrittenNorm(Unwritten):
    """A batch norm with what is to follow it.

    Args:
        source: what is normalised.
        bn: its layer. Where it trains, its running statistics move now, and processes that share them meet.
        recomputed: whether the result is to be computed again for the gradient of what reads it.
        follows: `factor` (B,), `residual` like the rows, `ceiling`: as of `ops.batch_norm`.
    """

    def __init__(self, source: Features | UnwrittenProduct, bn: BATCH_NORM, *, recomputed: bool) -> None:
        self.recomputed = recomputed
        self.follows: dict[str, Any] = {}
        self.bn = bn
        self.kernel: Tensor | None = None
        self.training = bn.training or bn.running_mean is None or bn.running_var is None
        if isinstance(source, UnwrittenProduct) and self.training and processes_of(bn) == 1:
            super().__init__(source.source, source.shape[-1], source.dtype)
            self.kernel = source.kernel
        else:
            features = source.write() if isinstance(source, UnwrittenProduct) else source
            super().__init__(features, features.shape[-1], features.dtype)
        with torch.no_grad():
            rows = self.source.data.flatten(0, 1)
            if self.kernel is not None:
                self.product = ops.product_statistics(rows, self.kernel)
                move_running_statistics(bn, self.product.mean, self.product.variance, len(rows))
            elif self.training:
                self.mean, self.deviation = statistics_of_batch(bn, rows)
            else:
                assert bn.running_mean is not None and bn.running_var is not None
                self.mean, self.deviation = bn.running_mean, (bn.running_var + bn.eps).rsqrt()

    def _write(self) -> Features:
        features = super()._write()
        known = self.recomputed and self.kernel is None and "residual" not in self.follows
        if not known or torch.compiler.is_compiling():
            return features
        return features._replace(again=self._again)

    @torch.no_grad()
    def _again(self) -> Tensor:
        return self.compute(self.source.data.flatten(0, 1))

    def compute(self, rows: Tensor) -> Tensor:
        if self.kernel is not None:
            with self.source.kept():
                return ops.linear_batch_norm(
                    rows, self.kernel, self.product, self.bn.eps, self.bn.weight, self.bn.bias, **self.follows
                )
        return normalise(self.bn, rows, self.mean, self.deviation, training=self.training, **self.follows)

    def clamp(self, ceiling: float) -> Unwritten | None:
        return None if "ceiling" in self.follows else self._with(ceiling=ceiling)

    def plus(self, other: Tensor) -> Unwritten | None:
        fits = not self.follows.keys() & {"ceiling", "residual"} and other.shape == self.shape and other.dtype == self.dtype
        return self._with(residual=other) if fits else None

    def times(self, other: Tensor) -> Unwritten | None:
        fits = not self.follows and not other.requires_grad and other.dtype == self.dtype
        return self._with(factor=other.flatten()) if fits and other.shape == (self.shape[0], 1, 1) else None

    def _with(self, **more: Any) -> Unwritten:
        out = copy(self)
        out.follows = self.follows | more
        return out


class UnwrittenScale(Unwritten):
    """Rows times a number for each channel, perhaps one for each sample, and a residual: a batch norm without statistics."""

    def __init__(self, source: Features, scale: Tensor) -> None:
        super().__init__(source, source.shape[-1], source.dtype)
        self.scale = scale
        self.follows: dict[str, Any] = {}

    def compute(self, rows: Tensor) -> Tensor:
        zero, one = rows.new_zeros(self.shape[2]), rows.new_ones(self.shape[2])
        return ops.batch_norm(rows, zero, one, self.scale, training=False, **self.follows)

    def times(self, other: Tensor) -> Unwritten | None:
        fits = not self.follows and not other.requires_grad and other.dtype == self.dtype
        return self._with(factor=other.flatten()) if fits and other.shape == (self.shape[0], 1, 1) else None

    def plus(self, other: Tensor) -> Unwritten | None:
        fits = "residual" not in self.follows and other.shape == self.shape and other.dtype == self.dtype
        return self._with(residual=other) if fits else None

    def _with(self, **more: Tensor) -> Unwritten:
        out = copy(self)
        out.follows = self.follows | more
        return out


class UnwrittenLinear(Unwritten):
    """A linear layer, perhaps GELU, perhaps another linear layer, perhaps factors for channels and samples, and a residual."""

    def __init__(self, source: Features, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(source, len(weight), source.dtype)
        self.first = weight, bias
        self.second: tuple[Tensor, Tensor | None] | None = None
        self.activated = False
        self.scale: Tensor | None = None
        self.follows: dict[str, Tensor] = {}

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
        return None if self.activated else self._with(activated=True)

    def plus(self, other: Tensor) -> Unwritten | None:
        fits = self.second is not None and "residual" not in self.follows and other.shape == self.shape
        if not fits or not other.dtype == self.dtype == self.source.dtype:  # under autocast they differ
            return None
        return self._with(follows=self.follows | {"residual": other})

    def linear(self, weight: Tensor, bias: Tensor | None) -> Unwritten | None:
        if not self.activated or self.second is not None:
            return None
        return self._with(second=(weight, bias), shape=torch.Size((*self.shape[:2], len(weight))))

    def times(self, other: Tensor) -> Unwritten | None:
        if self.second is None or "residual" in self.follows:
            return None
        if not self.follows and other.shape == (self.shape[0], 1, 1) and not other.requires_grad and other.dtype == self.dtype:
            return self._with(follows={"factor": other.flatten()})
        if self.scale is not None or other.shape != (1, 1, self.shape[2]):
            return None
        return self._with(scale=other.flatten(), dtype=torch.promote_types(self.dtype, other.dtype))

    def _with(self, **changes: Any) -> Unwritten:
        out = copy(self)
        vars(out).update(changes)
        return out
