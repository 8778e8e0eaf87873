"""The value that flows through a sparse network: features at the visible pixels of a batch.

The code of a dense network runs unmodified on `SparseMap`s. Its convolutions, norms and poolings have been replaced by sparse
layers; what it does in between (`out += identity`, `layer_scale * x`, `x.permute(0, 2, 3, 1)`, `x.mean((2, 3))`, `torch.cat`)
arrives here, through Python's operators and torch's `__torch_function__` protocol. `FUNCTIONS` says what each of torch's
functions does to a map; `sparkme.sparse.forms` fills it. A function that is not there may mix visible and hidden pixels, and
is refused by name.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.sparse.engines.base import Engine
from sparkme.sparse.engines.minkowski import to_minkowski
from sparkme.sparse.features import Features, RowFeatures
from sparkme.sparse.fusion.waiting import Unwritten
from sparkme.sparse.grid import Grid

if TYPE_CHECKING:
    import MinkowskiEngine as ME


class Padding(NamedTuple):
    """Pixels that `F.pad` put around a map, waiting for the convolution or pooling that reads them."""

    top: int
    bottom: int
    left: int
    right: int
    mode: str = "constant"
    value: float = 0.0


class Recorder:
    """Collects the maps of the hierarchy during one run of the encoder.

    Args:
        calls: for each map the number of the call of its module at which it is taken, from 1.
        compiled: whether parts of the network are compiled.
    """

    def __init__(self, calls: Sequence[int], *, compiled: bool = False) -> None:
        self.calls = calls
        self.compiled = compiled
        self.counts = [0] * len(calls)
        self.maps: dict[int, Any] = {}

    def reached(self, i: int, value: Any) -> bool:
        """Notes a call of the module of map i; true once all maps are there."""
        self.counts[i] += 1
        if self.counts[i] == self.calls[i]:
            with torch.enable_grad():  # what reads it may be frozen; the map is not
                self.maps[i] = value.snapshot() if type(value) is SparseMap else value.clone()
        return len(self.maps) == len(self.calls)


class Storage:
    """What a map and its views share, so that an operation in place on one is seen by the others, or refused.

    Args:
        features: what it holds; perhaps still to be written.
        root: the storage that it is a view of.
        span: the channels of the root that it shows, (first, one after the last); None for all, in whatever order.
    """

    def __init__(
        self, features: Features | Unwritten, root: Storage | None = None, span: tuple[int, int] | None = None
    ) -> None:
        self.held = features
        self.root = root
        self.span = span
        self.views = 0
        self.writes: list[tuple[int, tuple[int, int] | None]] = []  # in place: by which view (0 is the root), to which channels
        self.number = 0
        self.seen = 0
        if root is not None:
            root.views += 1
            self.number, self.seen = root.views, len(root.writes)

    @property
    def features(self) -> Features:
        if isinstance(self.held, Unwritten):
            self.held = self.held.write()
        return self.held

    @property
    def in_graph(self) -> bool:
        """Whether gradients may come to what it holds; without writing it."""
        return self.held.modes.grad if isinstance(self.held, Unwritten) else self.held.data.requires_grad

    def check(self) -> None:
        """Raises NotImplementedError where what is here is not what the network would find."""
        root = self if self.root is None else self.root
        for number, span in root.writes[self.seen :]:
            if number != self.number and _overlap(span, self.span):
                raise NotImplementedError(
                    "a map and a view of it (a slice, a chunk, a reshaped one), of which one was changed in place before the "
                    "other was used, have no sparse form; write x = x + y for x += y there, or inplace=False"
                )

    def read(self) -> Features:
        self.check()
        return self.features

    def write(self, features: Features | Unwritten) -> None:
        self.check()
        root = self if self.root is None else self.root
        if root.views:
            root.writes.append((self.number, self.span))
        self.held = features


def _with_graph_of(old: Features, new: Features) -> Features:
    """The new values with the old ones' graph: what torch makes of an operation in place that is called without gradients."""
    with torch.enable_grad():
        data = old.data.clone()
    data.copy_(new.data)  # called without gradients, so that the graph does not notice
    return new.replace(data)


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])


class SparseMap:
    """Features at the visible pixels of a batch, at one stride.

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

    # What users read.

    @property
    def grid(self) -> Grid:
        return self.storage.held.grid

    @property
    def stride(self) -> int:
        """Input pixels per pixel of this map."""
        return self.storage.held.stride

    @property
    def rows(self) -> Tensor:
        """(N, C), one row per visible pixel, patch-major."""
        return self.features.rows()

    @property
    def channels(self) -> int:
        return self.channel_shape.numel()

    def dense(self) -> Tensor:
        """(B, C, H / stride, W / stride), zero at hidden pixels."""
        return self.features.dense()

    def minkowski(self) -> ME.SparseTensor:
        """The same features as a MinkowskiEngine sparse tensor, with coordinates (sample, y, x) in input pixels."""
        return to_minkowski(RowFeatures.of_rows(self.rows, self.grid, self.stride))

    # What the forms use.

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

    def replace(self, features: Features | Unwritten, dims: str | None = None) -> SparseMap:
        """A map with other features, otherwise like this one."""
        return SparseMap(features, self.engine, self.recorder, dims or self.dims)

    def with_values(self, data: Tensor, dims: str | None = None) -> SparseMap:
        """The same sites with other data in the engine's form, whose hidden pixels are zero where this map's are."""
        return self.replace(self.features.replace(data), dims)

    def with_rows(self, rows: Tensor, dims: str | None = None) -> SparseMap:
        """The same sites with (N, C') or (B, L, channels...) rows, in whatever form the engine computes on."""
        is_flat = rows.ndim == 2 and (dims or self.dims).count("C") == 1
        layout, grid, stride = self.engine.layout, self.grid, self.stride
        return self.replace((layout.of_rows if is_flat else layout.of_samples)(rows, grid, stride), dims)

    def view_of(self, data: Tensor, dims: str | None = None, span: tuple[int, int] | None = None) -> SparseMap:
        """A map that shares its memory with this one, as the network sees it."""
        features, storage = self.features, self.storage
        if storage.root is not None:  # a view of a view
            first = None if storage.span is None or span is None else storage.span[0]
            span = None if first is None or span is None else (first + span[0], first + span[1])
            storage = storage.root
        shared = Storage(features.replace(data), storage, span)
        return SparseMap(shared.features, self.engine, self.recorder, dims or self.dims, storage=shared)

    def same_storage(self, dims: str) -> SparseMap:
        """The same map with its axes in another order: a change of one in place is a change of the other."""
        self.unpadded.check()
        return SparseMap(self.storage.held, self.engine, self.recorder, dims, storage=self.storage)

    def padded(self, padding: Padding) -> SparseMap:
        return SparseMap(self.features, self.engine, self.recorder, self.dims, padding, self.storage)

    def without_padding(self) -> SparseMap:
        features = self.storage.read()
        return SparseMap(features, self.engine, self.recorder, self.dims, storage=self.storage)

    def write(self, new: SparseMap) -> SparseMap:
        """Replaces what this map holds, for operations in place."""
        if not torch.is_grad_enabled() and self.storage.in_graph:
            new = new.replace(_with_graph_of(self.features, new.features))
        self.storage.write(new.storage.held)
        return self

    def snapshot(self) -> SparseMap:
        """The map as it is now, (B, C, H, W); what happens to this one in place later does not reach it."""
        if sorted(self.dims) != sorted("BCHW"):
            raise NotImplementedError(f"a map {self.dims} cannot be an output of the encoder")
        return SparseMap(self.features, self.engine, None, "BCHW")

    # What the code of dense networks asks of a tensor.

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Networks ask `isinstance(x, torch.Tensor)` to tell one map from a list of them, so it is true of a map on its way
        through a network, where code that says `isinstance` or `is_tensor` asks. Torch's own code gets the truth, also in
        C++ (custom autograd functions, scripted ones) and under torch.compile: it would go on to look for a tensor's memory.
        `type(x)` is SparseMap."""
        if self.recorder is None or self.recorder.compiled:
            return SparseMap
        asking = sys._getframe(1)
        is_torch = asking.f_globals.get("__name__", "").startswith("torch.")  # torch.is_tensor itself is in `torch`
        return Tensor if not is_torch and _calls_isinstance(asking.f_code, asking.f_lasti) else SparseMap

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
    def requires_grad(self) -> bool:
        return self.storage.features.data.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    is_sparse = is_quantized = is_nested = is_mkldnn = is_meta = is_leaf = False
    layout = torch.strided

    def dim(self) -> int:
        return self.ndim

    ndimension = dim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def get_device(self) -> int:
        return self.device.index if self.is_cuda else -1

    def is_floating_point(self) -> bool:
        return True

    def is_complex(self) -> bool:
        return False

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return True  # the memory layout is the engine's affair

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> SparseMap:
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        raise NotImplementedError("the truth value of a map depends on hidden pixels; write `x is None` for `x == None`")

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError("a map cannot be taken apart by sample; let the code take the whole batch")

    def __repr__(self) -> str:
        rows = self.grid.num_rows(self.stride)
        return f"SparseMap(shape={tuple(self.shape)}, dims={self.dims}, stride={self.stride}, rows={rows})"

    def __getitem__(self, index: Any) -> SparseMap:
        return SparseMap.__torch_function__(torch.Tensor.__getitem__, (), (self, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError(
            "assigning to a part of a map has no sparse form; put channels together with torch.cat, choose with torch.where"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(torch.Tensor, name, None)
        if function is None:
            raise AttributeError(f"a tensor has no attribute {name!r}")
        if not callable(function):  # a property, such as x.T
            raise NotImplementedError(f"torch.Tensor.{name} has no sparse form")
        return lambda *args, **kwargs: SparseMap.__torch_function__(function, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in FUNCTIONS:
            raise NotImplementedError(
                f"torch function {getattr(func, '__name__', func)!r} has no sparse form: it may mix visible and "
                "hidden pixels, as attention does"
            )
        named = {_SPELLINGS.get(name, name): value for name, value in (kwargs or {}).items()}
        if "input" in named:
            args = (named.pop("input"), *args)
        if "dims" in named:
            args = (*args, named.pop("dims"))
        return FUNCTIONS[func](*args, **named)


@lru_cache(maxsize=1024)
def _calls_isinstance(code: CodeType, at: int) -> bool:
    """Whether it is `isinstance` that is called at this instruction: a call begins where the name of what it calls does.

    Others ask, too, such as torch.as_tensor, which would take a map for the memory of a tensor.
    """
    starts = [(line, column) for line, _, column, _ in code.co_positions()]
    loads = (i for i in dis.get_instructions(code) if i.argval == "isinstance")
    return any(starts[i.offset // 2] == starts[at // 2] for i in loads)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)
    return lambda self, *args: SparseMap.__torch_function__(function, (), (self, *args))


for _name in (
    "add", "sub", "mul", "truediv", "pow", "radd", "rsub", "rmul", "rtruediv", "iadd", "isub", "imul", "itruediv", "neg", "abs",
    "gt", "ge", "lt", "le", "eq", "ne", "matmul", "pos", "invert", "and", "or", "xor", "rpow", "ipow",
):  # fmt: skip
    setattr(SparseMap, f"__{_name}__", _operator(f"__{_name}__"))
SparseMap.__hash__ = object.__hash__  # type: ignore[method-assign]


_SPELLINGS = {"axis": "dim", "keepdims": "keepdim"}  # numpy's, which torch takes, too

# What torch's functions do to maps, by the function object, since torch.compile cannot ask a function for its name.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
_OWNERS = (torch.Tensor, torch, F, torch._C._nn, torch.linalg, torch.special)


def sparse_function(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what all of torch's functions of these names do when one of their arguments is a map.

    `mean` stands for torch.mean, Tensor.mean and whatever else has that name in torch's namespaces.
    """

    def register(form: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            found = [function for owner in _OWNERS if (function := getattr(owner, name, None)) is not None]
            if not found:
                raise ValueError(f"torch has no function {name!r}")
            FUNCTIONS.update(dict.fromkeys(found, form))
        return form

    return register


def is_map(value: Any) -> bool:
    return type(value) is SparseMap


def first_map(values: Sequence[Any]) -> SparseMap:
    return next(value for value in values if type(value) is SparseMap)
