"""Makes a map behave like a tensor, so that the code of dense networks runs on it unmodified.

Sparse layers replace convolutions, norms and poolings. The operations in between (`out += identity`, `layer_scale * x`,
`x.permute(0, 2, 3, 1)`, `x.mean((2, 3))`, `torch.cat`) arrive here, through Python's operators and torch's
`__torch_function__` protocol. A function without a sparse form may mix visible and hidden pixels, so it is refused by name.

Why `__class__` reads its caller's frame: a wrapper subclass of torch.Tensor would pass `isinstance` by itself, at the same cost
to the host (measured). But torch.compile cannot trace `Tensor._make_wrapper_subclass`, so each layer would break the graph. And
torch's C++ would take a map for a tensor, so that `torch.as_tensor`, refused today, would go through.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any, Self

import torch
from torch import Tensor

from sparkme.errors import MixedPixelsError
from sparkme.sparse.forms import FUNCTIONS
from sparkme.sparse.working_map import WorkingMap

_SPELLINGS = {"axis": "dim", "keepdims": "keepdim"}  # torch accepts numpy's names, too


class TensorLike(WorkingMap):
    """A map with the interface of a tensor."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """torch.Tensor for a network's `isinstance` and `is_tensor`, which tell one map from a list of maps. Torch's own code,
        C++ (custom and scripted autograd functions) and torch.compile get SparseMap, since they would look for a tensor's
        memory. `type(x)` is always SparseMap."""
        if self.recorder is None or self.recorder.compiled:
            return type(self)
        asking = sys._getframe(1)
        is_torch = asking.f_globals.get("__name__", "").startswith("torch.")  # torch.is_tensor itself is in `torch`
        return Tensor if not is_torch and _calls_isinstance(asking.f_code, asking.f_lasti) else type(self)

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
        return True  # the engine decides the memory layout

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Self:
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        raise NotImplementedError("the truth value of a map depends on hidden pixels; write `x is None` for `x == None`")

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError("a loop over the samples of a map has no sparse form; process the whole batch at once")

    def __repr__(self) -> str:
        rows = self.grid.num_rows(self.stride)
        return f"SparseMap(shape={tuple(self.shape)}, dims={self.dims}, stride={self.stride}, rows={rows})"

    def __getitem__(self, index: Any) -> Self:
        return TensorLike.__torch_function__(torch.Tensor.__getitem__, (), (self, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError(
            "assigning to a part of a map has no sparse form; join channels with torch.cat, or select with torch.where"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(torch.Tensor, name, None)
        if function is None:
            raise AttributeError(f"a tensor has no attribute {name!r}")
        if not callable(function):  # a property, such as x.T
            raise NotImplementedError(f"torch.Tensor.{name} has no sparse form")
        return lambda *args, **kwargs: TensorLike.__torch_function__(function, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in FUNCTIONS:
            raise MixedPixelsError(
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
    """Whether the call at this instruction is of `isinstance`: a call starts at the position of the called name.

    Other functions ask for the class, too, such as torch.as_tensor, which would look for a tensor's memory.
    """
    starts = [(line, column) for line, _, column, _ in code.co_positions()]
    loads = (i for i in dis.get_instructions(code) if i.argval == "isinstance")
    return any(starts[i.offset // 2] == starts[at // 2] for i in loads)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)
    return lambda self, *args: TensorLike.__torch_function__(function, (), (self, *args))


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "pow",
    "radd",
    "rsub",
    "rmul",
    "rtruediv",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "neg",
    "abs",
    "gt",
    "ge",
    "lt",
    "le",
    "eq",
    "ne",
    "matmul",
    "pos",
    "invert",
    "and",
    "or",
    "xor",
    "rpow",
    "ipow",
):
    setattr(TensorLike, f"__{_name}__", _operator(f"__{_name}__"))
TensorLike.__hash__ = object.__hash__  # type: ignore[method-assign]
