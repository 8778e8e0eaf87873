"""A result that is not computed yet: its inputs, and the operations that may join it.

It is computed under the torch modes (gradients, inference, autocast) of the network's call, and only operations under the same
modes join it. So its graph does not depend on when or how often it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparkme.sparse.batch_norm import BATCH_NORM
from sparkme.sparse.features import Features, RowFeatures
from sparkme.sparse.grid import in_inference_mode


class Modes(NamedTuple):
    """The torch modes on which an operation's result and graph depend."""

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


def as_rows(features: Features) -> RowFeatures:
    """All engines that fuse operations compute on rows."""
    assert isinstance(features, RowFeatures)
    return features


class Unwritten:
    """RowFeatures before they are computed.

    Args:
        source: the input, (B, L, C).
        channels: number of output channels.
        dtype: output type.

    Attributes:
        follows: joined operations as arguments of `ops.batch_norm`: `factor` (B,), `residual` like the rows, `ceiling`.
    """

    def __init__(self, source: RowFeatures, channels: int, dtype: torch.dtype) -> None:
        self.source = source
        self.grid, self.stride, self.device, self.dtype = source.grid, source.stride, source.device, dtype
        self.modes = Modes.now(source.device)
        self.shape = torch.Size((*source.shape[:2], channels))
        self.follows: dict[str, Any] = {}

    @property
    def channel_shape(self) -> torch.Size:
        return self.shape[2:]

    @property
    def is_current(self) -> bool:
        """Whether the current torch modes are those of this call."""
        return self.modes == Modes.now(self.device)

    def write(self) -> RowFeatures:
        if self.is_current:
            return self._write()
        with self.modes.restored():
            return self._write()

    def _write(self) -> RowFeatures:
        return self.source.replace(self.compute(self.source.data.flatten(0, 1)).view(self.shape))

    def compute(self, rows: Tensor) -> Tensor:
        """Computes (N, channels) from the source's (N, C) rows."""
        raise NotImplementedError

    # Each returns the result with one more operation appended, or None if it does not fit.

    def clamp(self, ceiling: float) -> Unwritten | None:
        """Clamps to [0, ceiling]: a ReLU if that is infinite, a ReLU6 if it is 6."""
        return None

    def gelu(self) -> Unwritten | None:
        return None

    def plus(self, other: Tensor) -> Unwritten | None:
        """`other` is (B, L, channels)."""
        return None

    def times(self, other: Tensor) -> Unwritten | None:
        """`other` broadcasts, such as (B, 1, 1) or (1, 1, channels)."""
        return None

    def linear(self, weight: Tensor, bias: Tensor | None) -> Unwritten | None:
        """`weight` is (C_out, channels)."""
        return None

    def batch_norm(self, bn: BATCH_NORM) -> Unwritten | None:
        return None

    def _with(self, **more: Any) -> Unwritten:
        out = copy(self)
        out.follows = self.follows | more
        return out

    def is_like(self, other: Tensor) -> bool:
        return other.shape == self.shape and other.dtype == self.dtype

    def is_for_samples(self, other: Tensor) -> bool:
        """Whether it is a constant factor per sample, (B, 1, 1), such as drop path's."""
        return other.shape == (self.shape[0], 1, 1) and not other.requires_grad and other.dtype == self.dtype
