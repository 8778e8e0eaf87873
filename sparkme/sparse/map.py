"""The value that flows through a sparse network: features at the visible pixels of a batch.

The blocks of a dense network run unmodified on `SparseMap`s. Their layers have been replaced by sparse ones; what they
do in between (`out += identity`, `layer_scale * x`, `x.permute(0, 2, 3, 1)`, `F.relu(x)`) arrives here, through Python's
operators and torch's `__torch_function__` protocol, and is applied to the visible pixels only. A function that mixes
pixels and has no sparse form is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.grid import Grid

if TYPE_CHECKING:
    import MinkowskiEngine as ME

    from sparkme.sparse.engines.base import Engine

# Functions of one pixel at a time. The value says whether zero stays zero when there is no second tensor operand: others
# may turn what hidden pixels hold into infinity or NaN.
_POINTWISE = {
    "abs": True, "add": False, "celu": True, "clamp": False, "clone": True, "detach": True, "div": False, "dropout": True,
    "elu": True, "exp": False, "gelu": True, "hardsigmoid": False, "hardswish": True, "hardtanh": True,
    "leaky_relu": True, "mish": True, "mul": True, "neg": True, "pow": False, "relu": True, "relu6": True, "selu": True,
    "sigmoid": False, "silu": True, "softplus": False, "sub": False, "tanh": True, "truediv": False,
}  # fmt: skip
_SUMS = {"add", "sub"}  # of two maps: zero plus zero is zero
_NHWC, _NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def _spellings() -> dict[Callable[..., Any], tuple[str, Callable[..., Any]]]:
    """All of torch's functions that the table above means (`add`, `add_`, `__iadd__`, `F.relu_`, ...), with the name there
    and the function to call instead, which is never in place. Looked up as objects, since torch.compile cannot ask a
    function for its name."""
    found: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {}
    for name in _POINTWISE:
        for owner in (torch.Tensor, torch, F):
            for spelling in (name, f"__{name}__", f"__r{name}__"):
                if function := getattr(owner, spelling, None):
                    found[function] = name, function
        out_of_place = next(getattr(owner, name) for owner in (torch, F, operator) if hasattr(owner, name))
        for owner in (torch.Tensor, torch, F):
            for spelling in (f"{name}_", f"__i{name}__"):
                if function := getattr(owner, spelling, None):
                    found[function] = name, out_of_place
    return found


_FUNCTIONS = _spellings()
_PERMUTE = (torch.permute, torch.Tensor.permute)


class SparseMap:
    """Features at the visible pixels of a batch, at one stride.

    Args:
        data: what the engine computes on: (B, L, C) patch-major rows of each sample, or (B, C, H, W) for a dense engine.
        grid: the sites.
        stride: input pixels per pixel of this map.
        engine: the kernels that the layers use on it.
        taps: collects the encoder's outputs as this map and its descendants reach them.
        channels_last: whether the network sees it as (B, H, W, C), after a `permute(0, 2, 3, 1)`.
        clean: whether the hidden pixels of a dense engine's `data` are zero; else they hold what no visible pixel may read.

    Every operation is out of place, also `x += y` and `inplace=True`: MinkowskiEngine's layers keep a reference to
    their input for the backward pass, and would not notice that it has changed.
    """

    def __init__(
        self,
        data: Tensor,
        grid: Grid,
        stride: int,
        engine: Engine,
        taps: dict[int, SparseMap] | None = None,
        channels_last: bool = False,
        clean: bool = True,
    ) -> None:
        self.data = data
        self.grid = grid
        self.stride = stride
        self.engine = engine
        self.taps = taps
        self.channels_last = channels_last
        self.clean = clean

    def replace(self, data: Tensor, stride: int | None = None, *, clean: bool = True) -> SparseMap:
        """The same sites (or those of another stride) with other features."""
        return SparseMap(data, self.grid, stride or self.stride, self.engine, self.taps, self.channels_last, clean)

    # What users read.

    @property
    def rows(self) -> Tensor:
        """(N, C), one row per visible pixel, patch-major."""
        return self.engine.to_rows(self)

    @property
    def channels(self) -> int:
        return self.data.shape[1] if self.engine.dense else self.data.shape[2]

    def dense(self) -> Tensor:
        """(B, C, H / stride, W / stride), zero at hidden pixels."""
        return self.engine.to_dense(self)

    def minkowski(self) -> ME.SparseTensor:
        """The same features as a MinkowskiEngine sparse tensor, with coordinates (sample, y, x) in input pixels."""
        from sparkme.sparse.engines.minkowski import to_minkowski

        return to_minkowski(self)

    def with_rows(self, rows: Tensor) -> SparseMap:
        """The same sites with (N, C') rows, in whatever form the engine computes on."""
        return self.replace(self.engine.from_rows(rows, self.grid, self.stride))

    # What the code of dense networks asks of a tensor.

    @property
    def shape(self) -> torch.Size:
        h, w = self.grid.size(self.stride)
        sizes = (h, w, self.channels) if self.channels_last else (self.channels, h, w)
        return torch.Size((self.grid.batch, *sizes))

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return self.data.requires_grad

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> SparseMap:
        return self  # the memory layout is the engine's affair

    def permute(self, *dims: Any) -> SparseMap:
        order = tuple(d % 4 for d in (dims[0] if len(dims) == 1 else dims))
        wanted = _NCHW if self.channels_last else _NHWC
        if order != wanted:
            raise NotImplementedError(f"permute{order} of a sparse map: only {wanted} (channels moved) has a sparse form")
        return SparseMap(self.data, self.grid, self.stride, self.engine, self.taps, not self.channels_last, self.clean)

    def __repr__(self) -> str:
        return f"SparseMap(shape={tuple(self.shape)}, stride={self.stride}, rows={self.grid.num_rows(self.stride)})"

    def __add__(self, other: Any) -> SparseMap:
        return self._pointwise(torch.add, "add", (self, other))

    def __sub__(self, other: Any) -> SparseMap:
        return self._pointwise(torch.sub, "sub", (self, other))

    def __rsub__(self, other: Any) -> SparseMap:
        return -self + other

    def __mul__(self, other: Any) -> SparseMap:
        return self._pointwise(torch.mul, "mul", (self, other))

    def __truediv__(self, other: Any) -> SparseMap:
        return self._pointwise(torch.div, "div", (self, other))

    def __rtruediv__(self, other: Any) -> SparseMap:
        return self._pointwise(torch.div, "div", (other, self))

    def __pow__(self, exponent: Any) -> SparseMap:
        return self._pointwise(torch.pow, "pow", (self, exponent))

    def __neg__(self) -> SparseMap:
        return self._pointwise(torch.neg, "neg", (self,))

    __radd__ = __add__
    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(torch.Tensor, name, None)
        if function is None:
            raise AttributeError(f"a tensor has no attribute {name!r}")
        if name.endswith("_") and name.strip("_") in _POINTWISE:
            raise NotImplementedError(f"in-place {name!r} of a sparse map; write x = x.{name.rstrip('_')}(...)")
        return lambda *args, **kwargs: SparseMap.__torch_function__(function, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> SparseMap:
        kwargs = dict(kwargs or {})
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, SparseMap))
        if func in _PERMUTE:
            return first.permute(*args[1:], *kwargs.values())
        if func not in _FUNCTIONS:
            raise NotImplementedError(
                f"torch function {func.__name__!r} has no sparse form: it may mix visible and hidden pixels; "
                "put it into a module and give that module a sparse form (sparkme.sparse.sparsify.SPARSE_FORMS)"
            )
        kwargs.pop("inplace", None)
        name, function = _FUNCTIONS[func]
        return first._pointwise(function, name, args, kwargs)

    def _pointwise(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> SparseMap:
        named = {key: self._operand(value) for key, value in (kwargs or {}).items()}
        data = function(*(self._operand(a) for a in args), **named)
        keeps_zero = _POINTWISE[name] or (name in _SUMS and all(isinstance(a, SparseMap) for a in args))
        if self.engine.dense and not keeps_zero:
            return self.replace(torch.where(self.grid.mask(self.stride, torch.bool), data, 0.0))
        return self.replace(data, clean=all(a.clean for a in (*args, *(kwargs or {}).values()) if isinstance(a, SparseMap)))

    def _operand(self, value: Any) -> Any:
        """An argument as the engine's data: other maps as they are, parameters broadcast along pixels."""
        if isinstance(value, SparseMap):
            if value.grid is not self.grid or value.stride != self.stride or value.channels_last != self.channels_last:
                raise ValueError(f"{value!r} and {self!r} do not lie on the same sites")
            return value.data
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        b, h, w, c = (1,) * (4 - value.ndim) + tuple(value.shape)
        if not self.channels_last:
            h, w, c = w, c, h
        if (h, w) != (1, 1):
            raise NotImplementedError(f"operand of shape {tuple(value.shape)} varies along the pixels of {self!r}")
        return value.reshape(b, c, 1, 1) if self.engine.dense else value.reshape(b, 1, c)
