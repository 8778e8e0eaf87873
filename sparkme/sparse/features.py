"""Features at the visible pixels of a batch, in the two layouts that engines compute on: rows and dense maps.

Engines take and return features. Pixelwise and channelwise operations between layers happen here, so that no other code asks
for the layout. Between layers there may be several channel axes in place of C, or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, Self

import torch
from torch import Tensor

from sparkme.sparse.grid import Grid


class Hidden(Enum):
    """The result of a pixelwise function at hidden pixels, which were zero."""

    ZERO = "zero again, whatever the other arguments"
    SUM = "zero again, if all arguments are maps"
    PRODUCT = "zero again, if no other argument is infinite"
    NUMBER = "some number, if no other argument is infinite"
    INFINITY = "perhaps infinity or NaN, which a product with the mask would not remove"


class Features(ABC):
    """Features in one layout.

    Attributes:
        data: the values.
        grid: the sites.
        stride: input pixels per pixel.
        channel_axis: the first channel axis of the data.
    """

    data: Tensor
    grid: Grid
    stride: int
    channel_axis: int

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    @abstractmethod
    def channel_shape(self) -> torch.Size:
        """The sizes of the channel axes."""

    @abstractmethod
    def replace(self, data: Tensor, stride: int | None = None) -> Self:
        """A copy with other data that is zero wherever this data is: values that were moved, selected or dropped."""

    def rows(self) -> Tensor:
        """(N, C) patch-major rows; needs one channel axis."""
        return self.by_sample().flatten(0, 1)

    @abstractmethod
    def by_sample(self) -> Tensor:
        """(B, L, channels...) patch-major rows of each sample."""

    @abstractmethod
    def dense(self) -> Tensor:
        """(B, C, H, W), zero at hidden pixels."""

    @classmethod
    def of_rows(cls, rows: Tensor, grid: Grid, stride: int) -> Self:
        """Takes (N, C) patch-major rows."""
        return cls.of_samples(rows.view(grid.batch, -1, rows.shape[-1]), grid, stride)

    @classmethod
    @abstractmethod
    def of_samples(cls, rows: Tensor, grid: Grid, stride: int) -> Self:
        """Takes (B, L, channels...) patch-major rows."""

    @staticmethod
    @abstractmethod
    def spread(value: Tensor, grid: Grid, stride: int) -> Tensor:
        """Makes (B or 1, channels..., 1, 1) or (B, channels..., H, W) broadcast with data."""

    @abstractmethod
    def apply(self, function: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any], hidden: Hidden) -> Self:
        """Applies a pixelwise function.

        Args:
            function: takes tensors.
            args, kwargs: features on the same sites, including this one; spread tensors; anything else.
            hidden: its result at hidden pixels.
        """

    @abstractmethod
    def blocks(self, r: int, down: int, across: int) -> Self:
        """Turns the pixels of r x r blocks into channels: two new channel axes for the position in a block, before the channel
        axes number `down` and `across`."""

    @abstractmethod
    def repeated(self, factor: int) -> Self:
        """Each pixel as a block of factor x factor pixels."""


class RowFeatures(Features):
    """(B, L, C) patch-major rows of each sample.

    Args:
        again: recomputes the rows (B * L, C) cheaply from tensors that are stored anyway.
    """

    channel_axis = 2

    def __init__(self, data: Tensor, grid: Grid, stride: int, again: Callable[[], Tensor] | None = None) -> None:
        self.data, self.grid, self.stride, self.again = data, grid, stride, again

    @property
    def channel_shape(self) -> torch.Size:
        return self.data.shape[2:]

    def replace(self, data: Tensor, stride: int | None = None) -> Self:
        return type(self)(data, self.grid, stride or self.stride)

    def by_sample(self) -> Tensor:
        return self.data

    def dense(self) -> Tensor:
        return self.grid.to_dense(self.rows(), self.stride)

    @classmethod
    def of_rows(cls, rows: Tensor, grid: Grid, stride: int) -> Self:
        return cls(rows.view(grid.batch, -1, rows.shape[-1]), grid, stride)

    @classmethod
    def of_samples(cls, rows: Tensor, grid: Grid, stride: int) -> Self:
        return cls(rows.contiguous(), grid, stride)

    @staticmethod
    def spread(value: Tensor, grid: Grid, stride: int) -> Tensor:
        if value.shape[-2:] == (1, 1):
            return value.flatten(-2).movedim(-1, 1)
        rows = grid.to_rows(value.flatten(1, -3), stride)
        return rows.view(grid.batch, -1, *value.shape[1:-2])

    def apply(self, function: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any], hidden: Hidden) -> Self:
        return self.replace(function(*map(_data, args), **{key: _data(value) for key, value in kwargs.items()}))

    def blocks(self, r: int, down: int, across: int) -> Self:
        p, channels = self.grid.pixels(self.stride), self.channel_shape
        data = self.data.reshape(self.grid.batch, -1, p // r, r, p // r, r, *channels)
        old = range(6, 6 + len(channels))
        axes = [*old[:down], 3, *old[down:across], 5, *old[across:]]
        return self.replace(data.permute(0, 1, 2, 4, *axes).flatten(1, 3), self.stride * r)

    def repeated(self, factor: int) -> Self:
        p, (b, _, c) = self.grid.pixels(self.stride), self.data.shape
        patches = self.data.view(b, -1, p, p, c)
        data = patches.repeat_interleave(factor, 2).repeat_interleave(factor, 3).reshape(b, -1, c)
        return self.replace(data, self.stride // factor)

    def kept(self) -> AbstractContextManager[Any]:
        """Within it, autograd stores `again`, if there is one, instead of these features.

        Saved-tensor hooks of others, such as torch.utils.checkpoint's, see the features themselves.
        """
        if torch.compiler.is_compiling() or self.again is None or type(self.data) is not Tensor:
            return nullcontext()
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return nullcontext()
        again, place, count = self.again, self.data.data_ptr(), self.data.numel()  # autograd keeps the lambdas, too
        return torch.autograd.graph.saved_tensors_hooks(
            lambda saved: again if saved.data_ptr() == place and saved.numel() == count else saved,
            lambda kept: kept() if kept is again else kept,
        )


class DenseFeatures(Features):
    """(B, C, H, W) maps. No visible pixel may read the values at hidden ones.

    Args:
        clean: whether hidden pixels are zero.
    """

    channel_axis = 1

    def __init__(self, data: Tensor, grid: Grid, stride: int, *, clean: bool = True) -> None:
        self.data, self.grid, self.stride, self.clean = data, grid, stride, clean

    @property
    def channel_shape(self) -> torch.Size:
        return self.data.shape[1:-2]

    def replace(self, data: Tensor, stride: int | None = None, *, clean: bool | None = None) -> Self:
        return type(self)(data, self.grid, stride or self.stride, clean=self.clean if clean is None else clean)

    def by_sample(self) -> Tensor:
        data = self.data if self.data.ndim == 4 else self.data.reshape(len(self.data), -1, *self.data.shape[-2:])
        return self.grid.to_rows(data, self.stride).view(self.grid.batch, -1, *self.channel_shape)

    def dense(self) -> Tensor:
        return self.data if self.clean else self.data * self.grid.mask(self.stride, self.dtype)

    @classmethod
    def of_samples(cls, rows: Tensor, grid: Grid, stride: int) -> Self:
        channels = rows.shape[2:]
        data = grid.to_dense(rows.reshape(-1, channels.numel()), stride)
        return cls(data.reshape(grid.batch, *channels, *data.shape[2:]), grid, stride)

    @staticmethod
    def spread(value: Tensor, grid: Grid, stride: int) -> Tensor:
        return value

    def apply(self, function: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any], hidden: Hidden) -> Self:
        values = (*args, *kwargs.values())
        maps = [value for value in values if isinstance(value, DenseFeatures)]
        infinite = any(isinstance(value, float) and not abs(value) < float("inf") for value in values)
        keeps_zero = (
            hidden is Hidden.ZERO
            or (hidden is Hidden.SUM and len(maps) == len(values))
            or (hidden is Hidden.PRODUCT and not infinite)
        )
        if not keeps_zero and (infinite or hidden is Hidden.INFINITY):
            # All these functions and derivatives are finite at one; an infinite derivative times zero would not be zero.
            args, kwargs = [self._hide(a, 1) for a in args], {key: self._hide(value, 1) for key, value in kwargs.items()}
            return self.replace(self._hide(self.replace(function(*args, **kwargs)), 0), clean=True)
        data = function(*map(_data, args), **{key: _data(value) for key, value in kwargs.items()})
        return self.replace(data, clean=keeps_zero and all(value.clean for value in maps))

    def _hide(self, value: Any, number: int) -> Any:
        """The data of features with `number` at hidden pixels."""
        if not isinstance(value, DenseFeatures):
            return value
        data, mask = value.data, self.grid.mask(self.stride, torch.bool)
        mask = mask.view(*mask.shape[:1], *(1,) * (data.ndim - 3), *mask.shape[2:])
        return torch.where(mask, data, torch.full((), number, dtype=data.dtype, device=data.device))

    def blocks(self, r: int, down: int, across: int) -> Self:
        *front, h, w = self.data.shape
        data, n = self.data.reshape(*front, h // r, r, w // r, r), len(front)
        axes = [*range(1, 1 + down), n + 1, *range(1 + down, 1 + across), n + 3, *range(1 + across, n)]
        return self.replace(data.permute(0, *axes, n, n + 2), self.stride * r)

    def repeated(self, factor: int) -> Self:
        data = self.data.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return self.replace(data, self.stride // factor)


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Features) else value
