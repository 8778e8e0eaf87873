"""The interface of an engine: the kernels behind the sparse layers. All engines give the same numbers.

An engine takes features, weights and geometry and returns features. It knows neither layers nor the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sparkme.sparse.features import Features, RowFeatures
from sparkme.sparse.grid import Grid
from sparkme.sparse.window import Window

F = TypeVar("F", bound=Features)


class Engine(ABC, Generic[F]):
    """The kernels behind the layers, and the features that they compute on.

    Attributes:
        layout: the class of its features.
        bf16: whether it follows autocast; otherwise the encoder stays in the precision of its weights.
    """

    name: str
    layout: type[F]
    bf16: bool

    def precision(self, device_type: str) -> AbstractContextManager[None]:
        """The context in which the encoder runs."""
        return nullcontext() if self.bf16 else torch.autocast(device_type, enabled=False)

    def fuses_norms(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether batch norms are fused with later operations, see `sparkme.sparse.fusion`."""
        return False

    def fuses_products(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether matrix products are fused, too, and cheap results are recomputed in the backward pass."""
        return False

    @abstractmethod
    def convolution(self, x: F, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> F:
        """A hidden neighbour counts as zero.

        Args:
            x: (B, L, C_in) or (B, C_in, H, W).
            kernel: (K, C_in / groups, C_out) with K offsets in MinkowskiEngine's order, or (C_in, C_out) for a single offset;
                (K, C) for a depthwise convolution.
            bias: (C_out,), or (1, C_out).
            window: the offsets.
            groups: as in torch.nn.Conv2d.
        """

    @abstractmethod
    def max_pool(self, x: F, window: Window) -> F:
        """The maximum over the visible pixels of the window."""

    @abstractmethod
    def avg_pool(self, x: F, window: Window) -> F:
        """The sum over the visible pixels of the window, divided by its number of offsets."""

    @abstractmethod
    def linear(self, x: F, weight: Tensor, bias: Tensor | None) -> F:
        """A linear layer at every pixel: (C_out, C_in) weight and (C_out,) bias."""

    @abstractmethod
    def layer_norm(self, x: F, weight: Tensor | None, bias: Tensor | None, eps: float) -> F:
        """Over the channels of every pixel."""

    def arranged(self, kernel: Tensor) -> Tensor:
        """A kernel in the memory order that the engine reads; shape and values stay."""
        return kernel.contiguous()

    def voxelise(self, images: Tensor, grid: Grid) -> F:
        """The visible pixels of (B, C, H, W) images."""
        return self.layout.of_rows(grid.to_rows(images, 1), grid, 1)

    def densify(self, rows: Tensor, grid: Grid, stride: int, fill: Tensor) -> Tensor:
        """(N, C) rows as a (B, C, H / stride, W / stride) map, with `fill`, (C,), at hidden pixels."""
        return grid.to_dense(rows, stride, fill)

    def densify_convolution(
        self, rows: Tensor, grid: Grid, stride: int, fill: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """`densify` and a convolution that keeps the size, (B, C_out, H / stride, W / stride).

        Args:
            rows, grid, stride, fill: as for `densify`.
            weight: (C_out, C, k, k) with an odd k; bias: (C_out,).
        """
        return functional.conv2d(self.densify(rows, grid, stride, fill), weight, bias, padding=weight.shape[-1] // 2)


class RowEngine(Engine[RowFeatures]):
    """An engine that computes on rows."""

    layout = RowFeatures

    def linear(self, x: RowFeatures, weight: Tensor, bias: Tensor | None) -> RowFeatures:
        return x.replace(functional.linear(x.data, weight, bias))

    def layer_norm(self, x: RowFeatures, weight: Tensor | None, bias: Tensor | None, eps: float) -> RowFeatures:
        return x.replace(layer_norm(x.data, weight, bias, eps))

    def bordered_convolution(
        self, x: RowFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1
    ) -> RowFeatures:
        """A convolution with reflected or replicated borders, offset by offset, in plain torch.

        Networks use it for the fixed filter of anti-aliased downsampling, where they spend little time.
        """
        rows = torch.cat([x.rows(), x.data.new_zeros(1, x.data.shape[-1])])  # index -1 reads the last row
        kernels = kernel.view(-1, *kernel.shape[-2:]) if kernel.ndim != 2 or groups == 1 else kernel
        out: Tensor | None = None
        for k, source in enumerate(offset_rows(x.grid, x.stride, window)):
            taken = rows[source]
            if kernels.ndim == 2:
                part = taken * kernels[k]
            else:
                width, channels = kernels.shape[1:]
                weight = kernels[k].view(width, groups, channels // groups)
                part = torch.einsum("ngi,igo->ngo", taken.view(-1, groups, width), weight).flatten(1)
            out = part if out is None else out + part
        assert out is not None
        out = out if bias is None else out + bias
        return RowFeatures.of_rows(out, x.grid, x.stride * window.stride)


def offset_rows(grid: Grid, stride: int, window: Window) -> list[Tensor]:
    """For each offset the row that each output row reads, (N_out,) int64; -1 for hidden pixels and outside the image.

    Cached on the grid. Works for any border.
    """

    def build() -> list[Tensor]:
        numbers = grid.row_numbers(stride)
        h, w = grid.size(stride)
        down, across = (torch.arange(0, n, window.stride, device=grid.device) for n in (h, w))
        found = []
        for dy, dx in window:
            (y, y_inside), (x, x_inside) = _at(down + dy, h, window.border), _at(across + dx, w, window.border)
            taken = torch.where(y_inside.view(-1, 1) & x_inside, numbers[:, y][:, :, x], -1)
            found.append(grid.to_rows(taken.unsqueeze(1), stride * window.stride).flatten())
        return found

    return grid.cached(("offsets", stride, window.key), build)


def _at(position: Tensor, size: int, border: str) -> tuple[Tensor, Tensor]:
    """The pixel that a position refers to, clamped to the image, and whether it exists."""
    inside = (position >= 0) & (position < size)
    if border == "reflect":
        position = (size - 1) - ((size - 1) - position.abs()).abs()
    if border != "zeros":
        inside = torch.ones_like(inside)
    return position.clamp(0, size - 1), inside


def layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis, in the rows' dtype, with float32 sums. Autocast on CUDA would make this result and all
    later ones float32."""
    if rows.device.type == "cuda":  # needs parameters of the rows' dtype
        weight, bias = (None if value is None else value.to(rows.dtype) for value in (weight, bias))
    with torch.autocast(rows.device.type, enabled=False):
        return functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)


def autocast(value: Tensor) -> Tensor:
    """The tensor in autocast's precision. torch casts for its own operators only."""
    kind = value.device.type
    if not torch.is_autocast_enabled(kind) or value.dtype == torch.float64:
        return value
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise ValueError("the engine cuda_ext does not support float16; use torch.autocast(..., dtype=torch.bfloat16)")
    return value.to(dtype)
