"""A map as sparse forms use it: its axes, its features, and ways to make the next map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor

from sparkme.sparse.engines.base import Engine
from sparkme.sparse.features import Features
from sparkme.sparse.fusion.waiting import Unwritten
from sparkme.sparse.grid import Grid
from sparkme.sparse.storage import Storage

if TYPE_CHECKING:
    from sparkme.sparse.recorder import Recorder


class Padding(NamedTuple):
    """Padding that `F.pad` put around a map, for the next convolution or pooling."""

    top: int
    bottom: int
    left: int
    right: int
    mode: str = "constant"
    value: float = 0.0


class WorkingMap:
    """Features with the axes that the network sees.

    Args:
        features: computed, or waiting to be computed.
        engine: the kernels that layers use on it.
        recorder: collects the encoder's outputs as this map and its descendants reach them.
        dims: the axes as the network sees them: B, C (one or more channel axes), H and W, or P for both in one. `BCHW`; `BHWC`
            after `permute(0, 2, 3, 1)`; `BCCHW` after channels were split into groups.
        padding: padding from `F.pad`.

    An in-place operation replaces the features in the storage, so that every holder of the map sees it. The tensor itself does
    not change, since MinkowskiEngine's layers keep a reference to their input for the backward pass.
    """

    def __init__(
        self,
        features: Features | Unwritten,
        engine: Engine,
        recorder: Recorder | None = None,
        dims: str = "BCHW",
        padding: Padding | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.storage = Storage(features) if storage is None else storage
        self.engine = engine
        self.recorder = recorder
        self.dims = dims
        self.padding = padding

    @property
    def grid(self) -> Grid:
        return self.storage.held.grid

    @property
    def stride(self) -> int:
        """Input pixels per pixel of this map."""
        return self.storage.held.stride

    @property
    def channels(self) -> int:
        return self.channel_shape.numel()

    @property
    def shape(self) -> torch.Size:
        features, channels = self.storage.held, iter(self.channel_shape)
        h, w = features.grid.size(features.stride)
        if self.padding is not None:
            h, w = h + self.padding.top + self.padding.bottom, w + self.padding.left + self.padding.right
        sizes = {"B": features.grid.batch, "H": h, "W": w, "P": h * w}
        return torch.Size(next(channels) if label == "C" else sizes[label] for label in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.held.dtype

    @property
    def device(self) -> torch.device:
        return self.storage.held.device

    @property
    def unpadded(self) -> Storage:
        """The storage; raises NotImplementedError after `F.pad`."""
        if self.padding is not None:
            raise NotImplementedError("only a convolution or a pooling can follow F.pad of a map; pad right before it")
        return self.storage

    @property
    def features(self) -> Features:
        return self.unpadded.read()

    @property
    def unwritten(self) -> Unwritten | None:
        """The waiting features, if a function called now may be fused with them."""
        if not isinstance(self.storage.held, Unwritten) or not self.storage.held.is_current:
            return None
        self.unpadded.check()
        return self.storage.held

    @property
    def values(self) -> Tensor:
        """The features' tensor, in the engine's layout."""
        return self.features.data

    @property
    def flat(self) -> Features:
        """`features`; raises NotImplementedError unless there is exactly one channel axis."""
        if self.dims.count("C") != 1:
            raise NotImplementedError(f"a map with axes {self.dims} has no sparse form here, only a map with one channel axis")
        return self.features

    @property
    def channel_shape(self) -> torch.Size:
        return self.storage.held.channel_shape

    @property
    def channel_axis(self) -> int:
        """The first channel axis of the engine's data."""
        return self.engine.layout.channel_axis

    def channel(self, dim: int) -> int:
        """The number of an axis among the channel axes; raises NotImplementedError for any other axis."""
        dim = self.axis(dim)
        if self.dims[dim] != "C":
            raise NotImplementedError(
                f"axis {dim} ({self.dims[dim]}) of a map {self.dims}: this works along channels only, since it would mix pixels"
            )
        return self.dims[:dim].count("C")

    def axis(self, dim: int) -> int:
        if not -self.ndim <= dim < self.ndim:
            raise IndexError(f"a map {self.dims} has no axis {dim}")
        return dim % self.ndim

    @property
    def row_axes(self) -> Tensor:
        """(B, L, channels...) rows, for any layout."""
        return self.features.by_sample()

    def operand(self, value: Any) -> Any:
        """An argument in the engine's layout: the features of another map, or a tensor spread over the pixels.

        A tensor may have a number per channel (and sample), or be a whole map, whose visible pixels count. Under autocast it
        takes the map's dtype, as weights of convolutions do. Otherwise a float32 parameter, such as ConvNeXt's layer scale,
        would make all later maps float32.
        """
        if is_map(value):
            if value.grid is not self.grid or value.stride != self.stride:
                raise ValueError(
                    f"maps of shape {tuple(value.shape)} and {tuple(self.shape)} lie on different sites: their strides differ, "
                    "or one is from an earlier call; keep no maps between calls"
                )
            if value.dims != self.dims:
                raise NotImplementedError(
                    f"maps with axes {value.dims} and {self.dims} cannot be combined; give both the same axes"
                )
            return value.features
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.dtype == torch.float32 and self.dtype == torch.bfloat16 and torch.is_autocast_enabled(self.device.type):
            value = value.to(self.dtype)
        if value.ndim > self.ndim:
            raise NotImplementedError(
                f"a tensor of shape {tuple(value.shape)} has more axes than the other operand, a map {self.dims}"
            )
        value = value.view(*(1,) * (self.ndim - value.ndim), *value.shape)
        channels = [i for i, label in enumerate(self.dims) if label == "C"]
        pixels = [i for i, label in enumerate(self.dims) if label in "HWP"]
        value = value.permute(self.dims.index("B"), *channels, *pixels)
        if len(pixels) == 1:
            value = value.unsqueeze(-1)
        if value.shape[-2:] != (1, 1):
            value = value.expand(self.grid.batch, *value.shape[1:-2], *self.grid.size(self.stride))
        return self.engine.layout.spread(value, self.grid, self.stride)

    def replace(self, features: Features | Unwritten, dims: str | None = None) -> Self:
        """A map like this one with other features."""
        return type(self)(features, self.engine, self.recorder, dims or self.dims)

    def with_values(self, data: Tensor, dims: str | None = None) -> Self:
        """The same sites with other data in the engine's layout. Hidden pixels must be zero if this map's are."""
        return self.replace(self.features.replace(data), dims)

    def with_rows(self, rows: Tensor, dims: str | None = None) -> Self:
        """The same sites with (N, C') or (B, L, channels...) rows, for any layout."""
        is_flat = rows.ndim == 2 and (dims or self.dims).count("C") == 1
        layout, grid, stride = self.engine.layout, self.grid, self.stride
        return self.replace((layout.of_rows if is_flat else layout.of_samples)(rows, grid, stride), dims)

    def view_of(self, data: Tensor, dims: str | None = None, span: tuple[int, int] | None = None) -> Self:
        """A map that the network sees as a view of this one."""
        features, storage = self.features, self.storage
        if storage.root is not None:  # a view of a view
            first = None if storage.span is None or span is None else storage.span[0]
            span = None if first is None or span is None else (first + span[0], first + span[1])
            storage = storage.root
        shared = Storage(features.replace(data), storage, span)
        return type(self)(shared.features, self.engine, self.recorder, dims or self.dims, storage=shared)

    def same_storage(self, dims: str) -> Self:
        """The same map with its axes in another order; an in-place change affects both."""
        self.unpadded.check()
        return type(self)(self.storage.held, self.engine, self.recorder, dims, storage=self.storage)

    def padded(self, padding: Padding) -> Self:
        return type(self)(self.features, self.engine, self.recorder, self.dims, padding, self.storage)

    def without_padding(self) -> Self:
        features = self.storage.read()
        return type(self)(features, self.engine, self.recorder, self.dims, storage=self.storage)

    def write(self, new: Self) -> Self:
        """Replaces this map's features, for in-place operations."""
        if not torch.is_grad_enabled() and self.storage.in_graph:
            new = new.replace(_with_graph_of(self.features, new.features))
        self.storage.write(new.storage.held)
        return self

    def snapshot(self) -> Self:
        """The map as it is now, (B, C, H, W), safe from later in-place changes."""
        if sorted(self.dims) != sorted("BCHW"):
            raise NotImplementedError(f"a map {self.dims} cannot be an output of the encoder")
        return type(self)(self.features, self.engine, None, "BCHW")


def _with_graph_of(old: Features, new: Features) -> Features:
    """The new values with the graph of the old ones, as torch does for in-place operations without gradients."""
    with torch.enable_grad():
        data = old.data.clone()
    data.copy_(new.data)  # without gradients, so that the graph stays
    return new.replace(data)


def is_map(value: Any) -> TypeGuard[WorkingMap]:
    return issubclass(type(value), WorkingMap)


def first_map(values: Sequence[Any]) -> WorkingMap:
    return next(value for value in values if is_map(value))
