"""A map as the forms of layers and functions work on it: its axes, what it holds, and how the next map is made of it."""

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
    """Pixels that `F.pad` put around a map, waiting for the convolution or pooling that reads them."""

    top: int
    bottom: int
    left: int
    right: int
    mode: str = "constant"
    value: float = 0.0


class WorkingMap:
    """Features, with the axes that the network sees.

    Args:
        features: what the engine computes on, or what is still to be written.
        engine: the kernels that the layers use on it.
        recorder: collects the encoder's outputs as this map and its descendants reach them.
        dims: what the axes are to the network: B, C (the channel axes in their order, usually one), H and W, or P for both in
            one. `BCHW`, or `BHWC` after a `permute(0, 2, 3, 1)`, or `BCCHW` after channels were split into groups.
        padding: around it, after `F.pad`.

    An operation in place replaces what the map holds, so that everyone who has the map sees it; the tensor itself stays as it
    was, since MinkowskiEngine's layers keep a reference to their input for the backward pass.
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
        """Raises NotImplementedError after `F.pad`."""
        if self.padding is not None:
            raise NotImplementedError("only a convolution or a pooling can follow F.pad of a map; pad right before it")
        return self.storage

    @property
    def features(self) -> Features:
        """What the engine computes on."""
        return self.unpadded.read()

    @property
    def unwritten(self) -> Unwritten | None:
        """What is still to be computed of it, and what is called now may become part of."""
        if not isinstance(self.storage.held, Unwritten) or not self.storage.held.is_current:
            return None
        self.unpadded.check()
        return self.storage.held

    @property
    def values(self) -> Tensor:
        """The tensor in it, in the engine's form."""
        return self.features.data

    @property
    def flat(self) -> Features:
        """`features`, with one channel axis.

        Raises:
            NotImplementedError: the channels are split into groups, or there are none.
        """
        if self.dims.count("C") != 1:
            raise NotImplementedError(f"a map with axes {self.dims} has no sparse form here, only one with one channel axis")
        return self.features

    @property
    def channel_shape(self) -> torch.Size:
        return self.storage.held.channel_shape

    @property
    def channel_axis(self) -> int:
        """The first channel axis of the engine's data."""
        return self.engine.layout.channel_axis

    def channel(self, dim: int) -> int:
        """Which of the channel axes an axis of the map is.

        Raises:
            NotImplementedError: it is no channel axis.
        """
        dim = self.axis(dim)
        if self.dims[dim] != "C":
            raise NotImplementedError(
                f"axis {dim} ({self.dims[dim]}) of a map {self.dims}: this can be done along channels only, pixels stay apart"
            )
        return self.dims[:dim].count("C")

    def axis(self, dim: int) -> int:
        if not -self.ndim <= dim < self.ndim:
            raise IndexError(f"a map {self.dims} has no axis {dim}")
        return dim % self.ndim

    @property
    def row_axes(self) -> Tensor:
        """(B, L, channels...), whatever the engine computes on."""
        return self.features.by_sample()

    def operand(self, value: Any) -> Any:
        """An argument in the engine's layout: of other maps their features, tensors spread over the pixels.

        A tensor may be a number for each channel (and sample), or a whole map, of which only what is visible is taken. Under
        autocast it takes the map's type, as the weights of convolutions do: else a parameter in float32, such as ConvNeXt's
        layer scale, would make all that follows float32, to be cast back before every product.
        """
        if is_map(value):
            if value.grid is not self.grid or value.stride != self.stride:
                raise ValueError(
                    f"maps of shape {tuple(value.shape)} and {tuple(self.shape)} do not lie on the same sites: one has another "
                    "stride, or was kept from an earlier call; keep no maps between calls"
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
            raise NotImplementedError(f"a tensor of shape {tuple(value.shape)} has more axes than the map {self.dims} it meets")
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
        """A map with other features, otherwise like this one."""
        return type(self)(features, self.engine, self.recorder, dims or self.dims)

    def with_values(self, data: Tensor, dims: str | None = None) -> Self:
        """The same sites with other data in the engine's form, whose hidden pixels are zero where this map's are."""
        return self.replace(self.features.replace(data), dims)

    def with_rows(self, rows: Tensor, dims: str | None = None) -> Self:
        """The same sites with (N, C') or (B, L, channels...) rows, in whatever form the engine computes on."""
        is_flat = rows.ndim == 2 and (dims or self.dims).count("C") == 1
        layout, grid, stride = self.engine.layout, self.grid, self.stride
        return self.replace((layout.of_rows if is_flat else layout.of_samples)(rows, grid, stride), dims)

    def view_of(self, data: Tensor, dims: str | None = None, span: tuple[int, int] | None = None) -> Self:
        """A map that shares its memory with this one, as the network sees it."""
        features, storage = self.features, self.storage
        if storage.root is not None:  # a view of a view
            first = None if storage.span is None or span is None else storage.span[0]
            span = None if first is None or span is None else (first + span[0], first + span[1])
            storage = storage.root
        shared = Storage(features.replace(data), storage, span)
        return type(self)(shared.features, self.engine, self.recorder, dims or self.dims, storage=shared)

    def same_storage(self, dims: str) -> Self:
        """The same map with its axes in another order: a change of one in place is a change of the other."""
        self.unpadded.check()
        return type(self)(self.storage.held, self.engine, self.recorder, dims, storage=self.storage)

    def padded(self, padding: Padding) -> Self:
        return type(self)(self.features, self.engine, self.recorder, self.dims, padding, self.storage)

    def without_padding(self) -> Self:
        features = self.storage.read()
        return type(self)(features, self.engine, self.recorder, self.dims, storage=self.storage)

    def write(self, new: Self) -> Self:
        """Replaces what this map holds, for operations in place."""
        if not torch.is_grad_enabled() and self.storage.in_graph:
            new = new.replace(_with_graph_of(self.features, new.features))
        self.storage.write(new.storage.held)
        return self

    def snapshot(self) -> Self:
        """The map as it is now, (B, C, H, W); what happens to this one in place later does not reach it."""
        if sorted(self.dims) != sorted("BCHW"):
            raise NotImplementedError(f"a map {self.dims} cannot be an output of the encoder")
        return type(self)(self.features, self.engine, None, "BCHW")


def _with_graph_of(old: Features, new: Features) -> Features:
    """The new values with the old ones' graph: what torch makes of an operation in place that is called without gradients."""
    with torch.enable_grad():
        data = old.data.clone()
    data.copy_(new.data)  # called without gradients, so that the graph does not notice
    return new.replace(data)


def is_map(value: Any) -> TypeGuard[WorkingMap]:
    return issubclass(type(value), WorkingMap)


def first_map(values: Sequence[Any]) -> WorkingMap:
    return next(value for value in values if is_map(value))
