"""Convolutions and linear layers: a hidden neighbour counts as zero, and outputs exist at visible pixels only.

`nn.Conv2d` and `nn.Linear` become MinkowskiEngine's layers. Modules that call `F.conv2d` or `F.linear` with weights computed in
every step (standardised, scaled, normalised) run their own code and arrive at the functions here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import MinkowskiEngine as ME
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.sparse.forms.functions import Functions
from sparkme.sparse.forms.layer import SparseLayer, take_state
from sparkme.sparse.fusion import fused
from sparkme.sparse.layout import (
    channelwise_kernel_to_weight,
    channelwise_weight_to_kernel,
    kernel_to_weight,
    weight_to_kernel,
)
from sparkme.sparse.window import Window, pair
from sparkme.sparse.working_map import Padding, is_map
from sparkme.state_dict import state_dict_of

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap

FUNCTIONS = Functions()


class SparseConvolution(SparseLayer):
    """Geometry and weight layout of both kinds of convolution."""

    kernel: nn.Parameter
    bias: nn.Parameter | None
    window: Window | None
    kernel_size: tuple[int, int]
    stride: int
    dilation: int
    padding: tuple[int, int]
    groups: int

    def reset_parameters(self, is_transpose: bool = False) -> None:
        """Does nothing, since the dense layer's weights come next."""

    def _take(self, conv: nn.Conv2d) -> None:
        self.dense_geometry: Any = conv.stride, conv.padding, conv.dilation
        self.groups = conv.groups
        self.to(conv.weight.device, conv.weight.dtype)
        self.load_dense_state(dict(state_dict_of(conv)))
        self.train(conv.training)
        for name, parameter in conv.named_parameters():
            (self.kernel if name == "weight" else self.bias).requires_grad_(parameter.requires_grad)  # type: ignore[union-attr]

    def _take_geometry(self, conv: nn.Conv2d) -> Window | None:
        """Its window, or None if it needs `F.pad` to align to the grid."""
        size, stride, dilation = pair(conv.kernel_size), pair(conv.stride), pair(conv.dilation)
        self.kernel_size, self.stride, self.dilation = size, stride[0], dilation[0]
        try:
            window = Window.of(size, stride, _hashable(conv.padding), dilation)
        except ValueError:
            self.padding = (0, 0)
            return None
        self.padding = window.padding
        return window

    def holder(self, name: str) -> tuple[nn.Module, str]:
        return self, "kernel" if name == "weight" else name

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias from torch's dictionary. MinkowskiEngine declares empty slots of the same names, and torch.compile
        looks only there."""
        return self._parameters["kernel"], self._parameters.get("bias")  # type: ignore[return-value]

    @property
    def dense_weight(self) -> Tensor:
        """(C_out, C_in / groups, kh, kw), a differentiable view of the kernel."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, for code that asks a layer for its weight."""
        return self.dense_weight

    def _to_kernel(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def dense_views(self) -> dict[str, Tensor]:
        state = {"weight": self.dense_weight.detach()}
        if self.bias is not None:
            state["bias"] = self.bias.detach().flatten()
        return state

    @torch.no_grad()
    def load_dense_state(self, state: dict[str, Tensor]) -> None:
        expected = {"weight": self.dense_weight.shape}
        if self.bias is not None:
            expected["bias"] = self.bias.flatten().shape
        if {k: v.shape for k, v in state.items()} != expected:
            got = {name: tuple(value.shape) for name, value in state.items()}
            raise RuntimeError(f"expected {dict(expected)}, got {got}")
        self.kernel.copy_(self._to_kernel(state["weight"]))
        if self.bias is not None:
            self.bias.copy_(state["bias"].view_as(self.bias))

    def forward(self, input: Any) -> Any:
        x, (kernel, bias) = input, self.operands()
        if not is_map(x):
            bias = None if bias is None else bias.flatten()
            stride, padding, dilation = self.dense_geometry
            return F.conv2d(x, self.dense_weight, bias, stride, padding, dilation, self.groups)
        window = self.window
        if window is None or x.padding is not None:
            _check_padding(x)
            stride, padding, dilation = self.dense_geometry
            x, window = padded_window(x, self.kernel_size, stride, padding, dilation)
        _check_channels(x)
        if (waiting := fused(x, "convolution", kernel, bias, window, self.groups)) is not None:
            return waiting
        return x.replace(x.engine.convolution(x.flat, kernel, bias, window, self.groups))


class SparseConv2d(SparseConvolution, ME.MinkowskiConvolution):
    """Convolution. A grouped kernel is stored as (K, C_in / groups, C_out), since MinkowskiEngine has no groups."""

    def __init__(self, conv: nn.Conv2d) -> None:
        ME.MinkowskiConvolution.__init__(
            self,
            conv.in_channels,
            conv.out_channels,
            kernel_size=list(conv.kernel_size),
            stride=list(conv.stride),
            dilation=list(conv.dilation),
            bias=conv.bias is not None,
            dimension=2,
        )
        if conv.groups > 1:
            volume = conv.kernel_size[0] * conv.kernel_size[1]
            self.kernel = nn.Parameter(torch.empty(volume, conv.in_channels // conv.groups, conv.out_channels))
            self.use_mm = False
        self.window = self._take_geometry(conv)
        self._take(conv)

    @property
    def dense_weight(self) -> Tensor:
        return kernel_to_weight(self.operands()[0], self.kernel_size)

    def _to_kernel(self, weight: Tensor) -> Tensor:
        return weight_to_kernel(weight, self.kernel.shape)


class SparseDepthwiseConv2d(SparseConvolution, ME.MinkowskiChannelwiseConvolution):
    """Convolution with one filter per channel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        ME.MinkowskiChannelwiseConvolution.__init__(
            self,
            conv.in_channels,
            kernel_size=list(conv.kernel_size),
            stride=list(conv.stride),
            dilation=list(conv.dilation),
            bias=conv.bias is not None,
            dimension=2,
        )
        self.window = self._take_geometry(conv)
        self._take(conv)

    @property
    def dense_weight(self) -> Tensor:
        return channelwise_kernel_to_weight(self.operands()[0], self.kernel_size)

    def _to_kernel(self, weight: Tensor) -> Tensor:
        return channelwise_weight_to_kernel(weight, self.kernel.shape)


class SparseLinear(SparseLayer, ME.MinkowskiLinear):
    """Linear layer along the channels of a channels-last map."""

    inner = "linear"
    linear: nn.Linear

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # MinkowskiEngine's own would draw random weights, and the dense layer's come next
        self.linear = nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features, linear.bias is not None)
        take_state(self.linear, linear)

    def forward(self, input: Any) -> Any:
        return F.linear(input, self.linear.weight, self.linear.bias)


def convolution_form(conv: nn.Conv2d) -> nn.Module:
    """MinkowskiEngine's convolution, or its channelwise one for a depthwise convolution."""
    if conv.padding_mode != "zeros":
        return conv  # its own code pads
    return (SparseDepthwiseConv2d if is_depthwise(conv.weight, conv.groups) else SparseConv2d)(conv)


def is_depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1


def padded_window(
    x: WorkingMap, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1, *, ceil_mode: bool = False
) -> tuple[WorkingMap, Window]:
    """The map without its padding from `F.pad`, and the layer's window with that padding."""
    if x.padding is None:
        return x, Window.of(
            _hashable(kernel_size), _hashable(stride), _hashable(padding), _hashable(dilation), ceil_mode=ceil_mode
        )
    around = x.padding
    if padding != "valid" and (isinstance(padding, str) or any(pair(padding))):
        raise NotImplementedError("a layer with padding after F.pad has no sparse form; pad in one of the two")
    border = "zeros" if around.mode == "constant" else around.mode
    sides = around.top, around.bottom, around.left, around.right
    window = Window.of(
        _hashable(kernel_size), _hashable(stride), sides, _hashable(dilation), ceil_mode=ceil_mode, border=border
    )
    return x.without_padding(), window


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_padding(x: WorkingMap) -> None:
    if x.padding is not None and x.padding.value != 0:
        raise NotImplementedError(f"a convolution after F.pad with {x.padding.value:g} has no sparse form, only with zero")


def _check_channels(x: WorkingMap) -> None:
    if x.dims != "BCHW":
        raise NotImplementedError(f"a convolution of a map with axes {x.dims} has no sparse form, only of BCHW")


@FUNCTIONS.form_of("conv2d")
def conv2d(
    x: Any, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> WorkingMap:
    """Convolution with a (C_out, C_in / groups, kh, kw) weight that the network computed."""
    if not is_map(x):
        raise NotImplementedError("conv2d with a map as its weight has no sparse form")
    _check_channels(x)
    _check_padding(x)
    bare, window = padded_window(x, tuple(weight.shape[2:]), stride, padding, dilation)
    if is_depthwise(weight, groups):
        kernel = channelwise_weight_to_kernel(weight, (window.volume, len(weight)))
    else:
        kernel = weight_to_kernel(weight, (window.volume, weight.shape[1], len(weight)))
    return bare.replace(bare.engine.convolution(bare.flat, kernel, bias, window, groups))


@FUNCTIONS.form_of("linear")
def linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> WorkingMap:
    """Along the channels, the last axis."""
    if not is_map(x):
        raise NotImplementedError("a linear layer with a map as its weight has no sparse form")
    if not x.dims.endswith("C"):
        raise NotImplementedError(
            f"a linear layer along the last axis of a map {x.dims} mixes visible and hidden pixels; permute it to channels-last"
        )
    if (waiting := fused(x, "linear", weight, bias)) is not None:
        return waiting
    return x.replace(x.engine.linear(x.flat, weight, bias))


@FUNCTIONS.form_of("pad")
def pad(x: WorkingMap, pad: Any, mode: str = "constant", value: float | None = None) -> WorkingMap:
    """Padding of pixels waits for the layer that reads it; padding of channels happens at once."""
    sides: list[int] = [*pad, *[0] * (4 - len(pad))]
    (left, right, top, bottom), rest = sides[:4], sides[4:]
    if any(side < 0 for side in pad):
        raise NotImplementedError(f"pad{tuple(pad)} has no sparse form: padding must not be negative")
    if x.dims != "BCHW":
        raise NotImplementedError(f"pad{tuple(pad)} of a map {x.dims} has no sparse form, only of BCHW")
    if mode not in ("constant", "reflect", "replicate"):
        raise NotImplementedError(f"padding with mode={mode!r} has no sparse form; use constant, reflect or replicate")
    if any(rest):
        if any((left, right, top, bottom)) or mode != "constant" or any(rest[2:]):
            raise NotImplementedError(f"pad{tuple(pad)} has no sparse form: pad pixels and channels in two calls")
        before, after = (x.values.new_full((1, n, 1, 1), value or 0.0) for n in rest[:2])
        joined: Any = [before, x, after]
        return torch.cat(joined, 1)  # type: ignore[return-value]
    if not any((left, right, top, bottom)):
        return x
    new = Padding(top, bottom, left, right, mode, value or 0.0)
    if (old := x.padding) is not None:
        if (old.mode, old.value) != (new.mode, new.value) or mode != "constant":
            raise NotImplementedError("two calls of F.pad with different modes or values have no sparse form; pad once")
        top, bottom, left, right = (a + b for a, b in zip(old[:4], new[:4], strict=True))
        new = Padding(top, bottom, left, right, mode, new.value)
    return x.padded(new)
