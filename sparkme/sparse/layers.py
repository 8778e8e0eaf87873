"""The sparse form of each layer: MinkowskiEngine's layers, with the kernels chosen by the engine of the incoming map.

Each class is built from the dense layer it replaces, keeps MinkowskiEngine's parameters (`kernel`, `bias`, `bn.weight`,
`linear.weight`), and can tell its weights in the dense layout and take them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import MinkowskiEngine as ME
import torch
from torch import Tensor, nn

from sparkme.sparse.layout import (
    channelwise_kernel_to_weight,
    channelwise_weight_to_kernel,
    dense_order,
    kernel_to_weight,
    weight_to_kernel,
)

if TYPE_CHECKING:
    from sparkme.sparse.map import SparseMap


class SparseLayer(nn.Module):
    """What the sparse layers share: their weights in the dense layout, and that they can be copied.

    The default serves layers that hold a dense layer (`inner`) or are one.
    """

    inner: str | None = None  # the child that keeps the dense names, as MinkowskiEngine's wrappers have it

    def __getstate__(self) -> dict[str, Any]:
        # MinkowskiEngine keeps attributes in slots, which torch's modules do not copy.
        names = self._slots() - self._parameters.keys() - self._modules.keys()
        return {**self.__dict__, **{name: getattr(self, name) for name in names if hasattr(self, name)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        slots = self._slots()
        super().__setstate__({name: value for name, value in state.items() if name not in slots})
        for name in slots & state.keys():
            object.__setattr__(self, name, state[name])

    @classmethod
    def _slots(cls) -> set[str]:
        return {name for kind in cls.__mro__ for name in getattr(kind, "__slots__", ())}

    def dense_state(self) -> dict[str, Tensor]:
        """Parameters and buffers under the names and in the layout of the dense layer."""
        return dict((self.get_submodule(self.inner) if self.inner else self).state_dict())

    @torch.no_grad()
    def load_dense_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `dense_state` gives. Raises RuntimeError where names or shapes differ."""
        (self.get_submodule(self.inner) if self.inner else self).load_state_dict(state)


class _SparseConvolution(SparseLayer):
    """Geometry, and weights in the dense layout, of both kinds of convolution."""

    kernel: nn.Parameter
    bias: nn.Parameter | None
    kernel_size: tuple[int, int]
    stride: int
    dilation: int
    padding: tuple[int, int]
    groups: int
    kernel_generator: Any

    def _take(self, conv: nn.Conv2d) -> None:
        self.kernel_size = (conv.kernel_size[0], conv.kernel_size[1])
        self.stride, self.dilation, self.groups = conv.stride[0], conv.dilation[0], conv.groups
        self.padding = padding_of(conv)
        self.to(conv.weight.device, conv.weight.dtype)
        self.load_dense_state(dict(conv.state_dict()))
        self.train(conv.training)
        for name, parameter in conv.named_parameters():
            (self.kernel if name == "weight" else self.bias).requires_grad_(parameter.requires_grad)  # type: ignore[union-attr]

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias, from where torch keeps them.

        MinkowskiEngine declares slots of the same names, which stay empty; torch.compile looks there and no further.
        """
        return self._parameters["kernel"], self._parameters.get("bias")  # type: ignore[return-value]

    @property
    def dense_weight(self) -> Tensor:
        """(C_out, C_in / groups, kh, kw), a differentiable view of the kernel."""
        raise NotImplementedError

    def _to_kernel(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def arrange(self, *, dense: bool) -> None:
        """Orders the kernel in memory for a dense engine, or as MinkowskiEngine has it. Its shape and values stay."""
        self.kernel.data = dense_order(self.kernel.data) if dense else self.kernel.data.contiguous()

    def dense_state(self) -> dict[str, Tensor]:
        state = {"weight": self.dense_weight.detach().contiguous()}
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

    def forward(self, x: SparseMap) -> SparseMap:
        return x.engine.convolution(self, x)


class SparseConv2d(_SparseConvolution, ME.MinkowskiConvolution):
    """Convolution: hidden neighbours count as zero, outputs exist at visible pixels only.

    A grouped kernel is stored as (K, C_in / groups, C_out), since MinkowskiEngine has no groups.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        check_geometry(conv)
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
        self._take(conv)

    @property
    def dense_weight(self) -> Tensor:
        return kernel_to_weight(self.operands()[0], self.kernel_size)

    def _to_kernel(self, weight: Tensor) -> Tensor:
        return weight_to_kernel(weight, self.kernel.shape)


class SparseDepthwiseConv2d(_SparseConvolution, ME.MinkowskiChannelwiseConvolution):
    """Convolution with one filter per channel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        check_geometry(conv)
        ME.MinkowskiChannelwiseConvolution.__init__(
            self,
            conv.in_channels,
            kernel_size=list(conv.kernel_size),
            stride=list(conv.stride),
            dilation=list(conv.dilation),
            bias=conv.bias is not None,
            dimension=2,
        )
        self._take(conv)

    @property
    def dense_weight(self) -> Tensor:
        return channelwise_kernel_to_weight(self.operands()[0], self.kernel_size)

    def _to_kernel(self, weight: Tensor) -> Tensor:
        return channelwise_weight_to_kernel(weight, self.kernel.shape)


class SparseMaxPool2d(SparseLayer, ME.MinkowskiMaxPooling):
    """Maximum over the visible pixels of the window.

    The official code takes hidden pixels for zeros, which is the same on non-negative maps, where networks pool.
    """

    kernel_size: tuple[int, int]

    def __init__(self, pool: nn.MaxPool2d) -> None:
        if pool.ceil_mode or pool.return_indices:
            raise ValueError("ceil_mode and return_indices have no sparse form")
        window = nn.Conv2d(1, 1, pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        check_geometry(window)
        ME.MinkowskiMaxPooling.__init__(
            self,
            kernel_size=list(window.kernel_size),
            stride=list(window.stride),
            dilation=list(window.dilation),
            dimension=2,
        )
        self.kernel_size = window.kernel_size[0], window.kernel_size[1]
        self.stride, self.dilation = window.stride[0], window.dilation[0]
        self.padding = padding_of(window)

    def forward(self, x: SparseMap) -> SparseMap:
        return x.engine.max_pool(self, x)


class SparseAvgPool2d(SparseLayer, ME.MinkowskiAvgPooling):
    """Mean over the window, in which hidden pixels count as zeros, as in the official code."""

    kernel_size: tuple[int, int]

    def __init__(self, pool: nn.AvgPool2d) -> None:
        window = nn.Conv2d(1, 1, pool.kernel_size, pool.stride, pool.padding)
        check_geometry(window)
        padded = padding_of(window) != (0, 0)
        if (pool.ceil_mode and padded) or (padded and not pool.count_include_pad) or pool.divisor_override is not None:
            raise ValueError("ceil_mode, count_include_pad=False and divisor_override have no sparse form")
        ME.MinkowskiAvgPooling.__init__(
            self, kernel_size=list(window.kernel_size), stride=list(window.stride), dilation=1, dimension=2
        )
        self.kernel_size = window.kernel_size[0], window.kernel_size[1]
        self.stride, self.dilation = window.stride[0], 1
        self.padding = padding_of(window)

    def forward(self, x: SparseMap) -> SparseMap:
        return x.engine.avg_pool(self, x)


class SparseBatchNorm2d(SparseLayer, ME.MinkowskiBatchNorm):
    """Batch normalisation with statistics over the visible pixels of the batch."""

    inner = "bn"
    bn: nn.Module

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        ME.MinkowskiBatchNorm.__init__(self, norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        take_state(self.bn, norm)

    def forward(self, x: SparseMap) -> SparseMap:
        return x.with_rows(self.bn(x.rows))


class SparseLayerNorm(SparseLayer, nn.LayerNorm):
    """Layer normalisation over the channels of each visible pixel; of either memory order."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"normalises over {norm.normalized_shape}: only over the channels has a sparse form")
        nn.LayerNorm.__init__(self, norm.normalized_shape, norm.eps, norm.elementwise_affine, norm.bias is not None)
        take_state(self, norm)

    def forward(self, x: SparseMap) -> SparseMap:  # type: ignore[override]
        return x.engine.layer_norm(self, x)


class SparseLinear(SparseLayer, ME.MinkowskiLinear):
    """Linear layer along the channels of a channels-last map."""

    inner = "linear"
    linear: nn.Linear

    def __init__(self, linear: nn.Linear) -> None:
        ME.MinkowskiLinear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None)
        take_state(self.linear, linear)

    def forward(self, x: SparseMap) -> SparseMap:
        if not x.channels_last:
            raise NotImplementedError("a linear layer along the width of a map mixes visible and hidden pixels")
        return x.engine.linear(self, x)


def take_state(layer: nn.Module, dense: nn.Module) -> None:
    """Makes `layer` equal to the dense layer: weights, dtype, device, mode, what is trained."""
    tensors = [*dense.parameters(), *dense.buffers()]
    if tensors:
        layer.to(tensors[0].device, tensors[0].dtype)
    layer.load_state_dict(dense.state_dict())
    layer.train(dense.training)
    for ours, theirs in zip(layer.parameters(), dense.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Padding in pixels, down and across; `same` and `valid` resolved."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return total[0] // 2, total[1] // 2
    return int(conv.padding[0]), int(conv.padding[1])


def check_geometry(conv: nn.Conv2d) -> None:
    """Refuses windows whose outputs are not the visible pixels at the new stride.

    An odd window has to be centred (padding = dilation * (k - 1) / 2) and an even one has to tile the image (stride = k,
    no padding): MinkowskiEngine's offsets are -k/2..k/2 for odd k and 0..k-1 for even k.

    Raises:
        ValueError: says what is allowed.
    """
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r} has no sparse form, only 'zeros'")
    if conv.stride[0] != conv.stride[1] or conv.dilation[0] != conv.dilation[1]:
        raise ValueError(f"stride {conv.stride} and dilation {conv.dilation} must be the same down and across")
    for k, s, d, p in zip(conv.kernel_size, conv.stride, conv.dilation, padding_of(conv), strict=True):
        centred = k % 2 == 1 and p == d * (k - 1) // 2
        tiling = k % 2 == 0 and k == s and p == 0 and d == 1
        if not centred and not tiling:
            raise ValueError(
                f"kernel {k}, stride {s}, padding {p}, dilation {d} has no sparse form: an odd kernel needs padding "
                f"dilation * (kernel - 1) / 2, an even one stride = kernel and padding 0"
            )
