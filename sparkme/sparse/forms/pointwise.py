"""Pixelwise functions: arithmetic and activations, applied directly to the features."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.sparse.features import Hidden
from sparkme.sparse.forms.functions import Functions
from sparkme.sparse.fusion import fused
from sparkme.sparse.working_map import first_map, is_map

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap

FUNCTIONS = Functions()

_POINTWISE = {
    name: hidden
    for hidden, names in {
        Hidden.ZERO: (
            "abs asinh atan celu clone detach dropout elu erf gelu hardshrink hardswish leaky_relu mish "
            "nan_to_num neg negative pos positive relu relu6 round rrelu selu sign silu sin softshrink softsign "
            "square tanh tanhshrink"
        ),
        Hidden.SUM: "add sub subtract rsub",
        Hidden.PRODUCT: "mul multiply",
        Hidden.NUMBER: (
            "alpha_dropout clamp clamp_max clamp_min clip cos hardsigmoid hardtanh lerp logsigmoid maximum "
            "minimum sigmoid softplus threshold eq ne gt ge lt le logical_and logical_not logical_or and invert "
            "or xor zeros_like ones_like full_like rand_like randn_like"
        ),
        Hidden.INFINITY: (
            "addcdiv addcmul div divide exp expm1 log log1p log2 masked_fill pow reciprocal rsqrt sqrt "
            "true_divide truediv where"
        ),
    }.items()
    for name in names.split()
}


def _out_of_place(name: str) -> Callable[..., Any]:
    found = next((getattr(owner, name) for owner in (torch, F) if hasattr(owner, name)), None)
    return found or getattr(operator, f"__{name}__")


def _register() -> None:
    for name in _POINTWISE:
        for owner in (torch.Tensor, torch, F, torch._C._nn, torch.special):
            for spelling in (name, f"__{name}__"):
                if function := getattr(owner, spelling, None):
                    FUNCTIONS[function] = _Pointwise(name, function)
            # For a tensor on the left of a map, torch calls __radd__ with the map first.
            if function := getattr(owner, f"__r{name}__", None):
                FUNCTIONS[function] = _Pointwise(name, function)
            for spelling in (f"{name}_", f"__i{name}__"):
                if function := getattr(owner, spelling, None):
                    FUNCTIONS[function] = _Pointwise(name, _out_of_place(name), in_place=True)


class _Pointwise:
    """One of torch's functions as a function of maps.

    Args:
        name: its name in the tables above.
        function: the out-of-place function.
        in_place: whether the first argument is to change.
    """

    def __init__(self, name: str, function: Callable[..., Any], *, in_place: bool = False) -> None:
        self.name = name
        self.function = function
        self.in_place = in_place
        self.hidden = _POINTWISE[name]

    def __call__(self, *args: Any, inplace: bool = False, **kwargs: Any) -> WorkingMap:
        if self._returns_its_input(args, kwargs):
            same: WorkingMap = args[0]
            return same
        values = (*args, *kwargs.values())
        first = first_map(values)
        for i, x in enumerate(args):
            if is_map(x) and (waiting := fused(x, self.name, *args[:i], *args[i + 1 :], **kwargs)) is not None:
                return self._result(waiting, args, inplace=inplace)
        operands, named = [first.operand(a) for a in args], {key: first.operand(value) for key, value in kwargs.items()}
        out = first.replace(first.features.apply(self.function, operands, named, self.hidden))
        return self._result(out, args or (first,), inplace=inplace)

    def _returns_its_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether torch returns the input itself, so that later in-place operations change both."""
        if self.name in ("pos", "positive"):
            return True
        return self.name in ("dropout", "alpha_dropout") and _drops_nothing(*args[1:], **kwargs)

    def _result(self, out: WorkingMap, args: tuple[Any, ...], *, inplace: bool) -> WorkingMap:
        if not (inplace or self.in_place):
            return out
        if not is_map(args[0]):
            raise NotImplementedError("changing a tensor in place with a map has no sparse form; write x = x + y for x += y")
        if self.name == "detach":
            args[0].storage.write(out.features)
            return args[0]
        return args[0].write(out)


def _drops_nothing(p: float = 0.5, training: bool = True) -> bool:
    return p == 0 or not training


@FUNCTIONS.form_of("prelu")
def prelu(x: WorkingMap, weight: Tensor) -> WorkingMap:
    """One slope per channel (axis 1)."""
    shape = [1] * x.ndim
    shape[1] = weight.numel()
    slope = x.operand(weight.view(shape))
    return x.with_values(torch.where(x.values >= 0, x.values, x.values * slope))


@FUNCTIONS.form_of("glu")
def glu(x: WorkingMap, dim: int = -1) -> WorkingMap:
    """Half of the channels times the sigmoid of the other half."""
    return x.with_values(F.glu(x.values, x.channel(dim) + x.channel_axis))


@FUNCTIONS.form_of("dropout2d", "feature_dropout")
def dropout2d(x: WorkingMap, p: float = 0.5, training: bool = True, inplace: bool = False) -> WorkingMap:
    """Whole channels of each sample."""
    if _drops_nothing(p, training):
        return x
    noise: Any = F.dropout(torch.ones(*x.shape[:2], *(1,) * (x.ndim - 2), dtype=x.dtype, device=x.device), p, training)
    out: WorkingMap = x * noise
    return x.write(out) if inplace else out


def _converted(method: str) -> Callable[..., Any]:
    def convert(x: Any, *args: Any, **kwargs: Any) -> Any:
        """Changes the dtype; a map stays on the device of its batch."""
        kwargs.pop("memory_format", None)  # the engine decides it
        if not args and not kwargs and method == "to":
            return x
        args = tuple(a.values if is_map(a) else a for a in args)
        if not is_map(x):  # a tensor to the type of a map
            return getattr(x, method)(*args, **kwargs)
        data = getattr(x.values, method)(*args, **kwargs)
        return x if data is x.values else x.with_values(data)

    return convert


def _created(method: str) -> Callable[..., Tensor]:
    def create(x: WorkingMap, *args: Any, **kwargs: Any) -> Tensor:
        """A dense tensor with the map's dtype and device, such as drop path's noise."""
        made: Tensor = getattr(torch.empty(0, dtype=x.dtype, device=x.device), method)(*args, **kwargs)
        return made

    return create


_register()
for _method in ("to", "type", "type_as", "float", "double", "half", "bfloat16"):
    FUNCTIONS[getattr(torch.Tensor, _method)] = _converted(_method)
for _method in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
    FUNCTIONS[getattr(torch.Tensor, _method)] = _created(_method)
