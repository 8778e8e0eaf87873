"""What an engine does: the kernels behind the sparse layers. All engines give the same numbers.

An engine takes tensors and geometry and gives tensors: it knows neither layers nor the network.
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
        layout: the kind of features.
        bf16: whether it follows autocast; the encoder of an engine that cannot stays in the precision of its weights.
    """

    name: str
    layout: type[F]
    bf16: bool

    def precision(self, device_type: str) -> AbstractContextManager[None]:
        """The context in which the encoder runs."""
        return nullcontext() if self.bf16 else torch.autocast(device_type, enabled=False)

    def fuses_norms(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether batch norms wait for what follows them, see `sparkme.sparse.fusion`."""
        return False

    def fuses_products(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether products wait as well, and what is cheap to compute again is not kept for gradients."""
        return False

    @abstractmethod
    def convolution(self, x: F, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> F:
        """A hidden neighbour counts as zero.

        Args:
            x: (B, L, C_in) or (B, C_in, H, W).
            kernel: (taps, C_in / groups, C_out) in MinkowskiEngine's order of taps, or (C_in, C_out) where there is one; of a
                depthwise convolution (taps, C).
            bias: (C_out,), or (1, C_out).
            window: where the taps are.
            groups: as in torch.nn.Conv2d.
        """

    @abstractmethod
    def max_pool(self, x: F, window: Window) -> F:
        """The maximum over the visible pixels of the window."""

    @abstractmethod
    def avg_pool(self, x: F, window: Window) -> F:
        """The sum over the visible pixels of the window, divided by the number of its taps."""

    @abstractmethod
    def linear(self, x: F, weight: Tensor, bias: Tensor | None) -> F:
        """The same for every pixel: (C_out, C_in) weight and (C_out,) bias."""

    @abstractmethod
    def layer_norm(self, x: F, weight: Tensor | None, bias: Tensor | None, eps: float) -> F:
        """Over the channels of every pixel."""

    def arranged(self, kernel: Tensor) -> Tensor:
        """A kernel in the order in memory that it is read in; shape and values stay."""
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
    """An engine that computes on rows: linear layers and norms need nothing else."""

    layout = RowFeatures

    def linear(self, x: RowFeatures, weight: Tensor, bias: Tensor | None) -> RowFeatures:
        return x.replace(functional.linear(x.data, weight, bias))

    def layer_norm(self, x: RowFeatures, weight: Tensor | None, bias: Tensor | None, eps: float) -> RowFeatures:
        return x.replace(layer_norm(x.data, weight, bias, eps))

    def bordered_convolution(
        self, x: RowFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1
    ) -> RowFeatures:
        """A convolution whose window is reflected or repeated at the image's border, tap by tap, in plain torch.

        No network spends much of its time there: it is the fixed filter of anti-aliased downsampling.
        """
        rows = torch.cat([x.rows(), x.data.new_zeros(1, x.data.shape[-1])])  # the last one is read as number -1
        kernels = kernel.view(-1, *kernel.shape[-2:]) if kernel.ndim != 2 or groups == 1 else kernel
        out: Tensor | None = None
        for k, source in enumerate(tap_rows(x.grid, x.stride, window)):
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


def tap_rows(grid: Grid, stride: int, window: Window) -> list[Tensor]:
    """For each tap the row that each output row reads, (N_out,) int64, or -1 where it is hidden or outside of the image.

    Kept on the grid. Works for any border.
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

    return grid.cached(("taps", stride, window.key), build)


def _at(position: Tensor, size: int, border: str) -> tuple[Tensor, Tensor]:
    """The pixel that a position stands for, in range, and whether there is one."""
    inside = (position >= 0) & (position < size)
    if border == "reflect":
        position = (size - 1) - ((size - 1) - position.abs()).abs()
    if border != "zeros":
        inside = torch.ones_like(inside)
    return position.clamp(0, size - 1), inside


def layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last axis, in the rows' type. Autocast on CUDA would give float32, and with it all that follows, to be cast back
    before every product; sums are float32 nevertheless."""
    if rows.device.type == "cuda":  # takes parameters of the rows' type alone
        weight, bias = (None if value is None else value.to(rows.dtype) for value in (weight, bias))
    with torch.autocast(rows.device.type, enabled=False):
        return functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)


def autocast(value: Tensor) -> Tensor:
    """The tensor in the precision that autocast asks for. torch does this for its own operators only."""
    kind = value.device.type
    if not torch.is_autocast_enabled(kind) or value.dtype == torch.float64:
        return value
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise ValueError("the engine cuda_ext has no float16: use torch.autocast(..., dtype=torch.bfloat16)")
    return value.to(dtype)
