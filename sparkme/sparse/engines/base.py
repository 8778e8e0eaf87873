"""What an engine does: the kernels behind the sparse layers. All engines give the same numbers.

An engine takes tensors and geometry and gives tensors: it knows neither layers nor the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.sparse.grid import Grid
from sparkme.sparse.window import Window


class Features(NamedTuple):
    """What the visible pixels of a batch hold, as an engine computes on it.

    Attributes:
        data: (B, L, C) patch-major rows of each sample, or (B, C, H, W) for a dense engine. Between layers there may be
            several channel axes in the place of C, or none.
        grid: the sites.
        stride: input pixels per pixel.
        clean: whether the hidden pixels of a dense engine's data are zero; else they hold what no visible pixel may read.
        again: computes the rows (B * L, C) once more from what is kept anyway, where that costs little.
    """

    data: Tensor
    grid: Grid
    stride: int
    clean: bool = True
    again: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def replace(self, data: Tensor, stride: int | None = None, *, clean: bool = True) -> Features:
        return Features(data, self.grid, stride or self.stride, clean)

    def kept(self) -> AbstractContextManager[Any]:
        """Within it, autograd keeps of these features how they are computed again, where there is a way, and not themselves.

        Whoever has hooks of their own for what autograd keeps, as torch.utils.checkpoint has, gets to see the features.
        """
        if torch.compiler.is_compiling() or self.again is None or type(self.data) is not Tensor:
            return nullcontext()
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return nullcontext()
        again, place, count = self.again, self.data.data_ptr(), self.data.numel()  # autograd keeps the functions, too
        return torch.autograd.graph.saved_tensors_hooks(
            lambda saved: again if saved.data_ptr() == place and saved.numel() == count else saved,
            lambda kept: kept() if kept is again else kept,
        )


class Engine(ABC):
    """The kernels behind the layers, and the form in which they keep features.

    `dense` says which: (B, C, H, W), or (B, L, C) patch-major rows. `bf16` says whether it follows autocast; the encoder
    of an engine that cannot stays in the precision of its weights.
    """

    name: str
    dense: bool
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
    def convolution(self, x: Features, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> Features:
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
    def max_pool(self, x: Features, window: Window) -> Features:
        """The maximum over the visible pixels of the window."""

    @abstractmethod
    def avg_pool(self, x: Features, window: Window) -> Features:
        """The sum over the visible pixels of the window, divided by the number of its taps."""

    @abstractmethod
    def linear(self, x: Features, weight: Tensor, bias: Tensor | None) -> Features:
        """The same for every pixel: (C_out, C_in) weight and (C_out,) bias."""

    @abstractmethod
    def layer_norm(self, x: Features, weight: Tensor | None, bias: Tensor | None, eps: float) -> Features:
        """Over the channels of every pixel."""

    def voxelise(self, images: Tensor, grid: Grid) -> Tensor:
        """The visible pixels of (B, C, H, W) images, in the form that the engine computes on."""
        return self.from_rows(grid.to_rows(images, 1), grid, 1)

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
        return F.conv2d(self.densify(rows, grid, stride, fill), weight, bias, padding=weight.shape[-1] // 2)

    @abstractmethod
    def to_dense(self, x: Features) -> Tensor:
        """(B, C, H, W), zero at hidden pixels."""

    @abstractmethod
    def to_rows(self, x: Features) -> Tensor:
        """(N, C) patch-major rows."""

    @abstractmethod
    def from_rows(self, rows: Tensor, grid: Grid, stride: int) -> Tensor:
        """(N, C) rows in the form that the engine computes on."""


class RowEngine(Engine):
    """An engine that computes on rows: linear layers and norms need nothing else."""

    dense = False

    def linear(self, x: Features, weight: Tensor, bias: Tensor | None) -> Features:
        return x.replace(F.linear(x.data, weight, bias))

    def layer_norm(self, x: Features, weight: Tensor | None, bias: Tensor | None, eps: float) -> Features:
        return x.replace(layer_norm(x.data, weight, bias, eps))

    def to_dense(self, x: Features) -> Tensor:
        return x.grid.to_dense(self.to_rows(x), x.stride)

    def to_rows(self, x: Features) -> Tensor:
        return x.data.flatten(0, 1)

    def from_rows(self, rows: Tensor, grid: Grid, stride: int) -> Tensor:
        return rows.view(grid.batch, -1, rows.shape[-1])

    def bordered_convolution(
        self, x: Features, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1
    ) -> Features:
        """A convolution whose window is reflected or repeated at the image's border, tap by tap, in plain torch.

        No network spends much of its time there: it is the fixed filter of anti-aliased downsampling.
        """
        rows = torch.cat([self.to_rows(x), x.data.new_zeros(1, x.data.shape[-1])])  # the last one is read as number -1
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
        return x.replace(self.from_rows(out, x.grid, x.stride * window.stride), x.stride * window.stride)


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
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)


def autocast(value: Tensor) -> Tensor:
    """The tensor in the precision that autocast asks for. torch does this for its own operators only."""
    kind = value.device.type
    if not torch.is_autocast_enabled(kind) or value.dtype == torch.float64:
        return value
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise ValueError("the engine cuda_ext has no float16: use torch.autocast(..., dtype=torch.bfloat16)")
    return value.to(dtype)
