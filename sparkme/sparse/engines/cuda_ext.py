"""The fast engine: this project's own operators (the extension in cuda_ext/) on patch-major rows, on the CPU and on CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme import ops
from sparkme.sparse.engines.base import RowEngine, autocast
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.grid import Grid
from sparkme.sparse.layout import embed
from sparkme.sparse.window import Window


class CudaExtEngine(RowEngine):
    """Neighbours come from the table of patch slots: no hashing, no host synchronisation, and static sizes.

    Under autocast the rows are bf16, and sums are float32.
    """

    name = "cuda_ext"
    bf16 = True

    def fuses_norms(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype in ops.FLOATS

    def fuses_products(self, dtype: torch.dtype, device: torch.device) -> bool:
        """On the CPU only; on CUDA, products and layer norms are torch's own."""
        return device.type == "cpu" and dtype in ops.FLOATS

    def convolution(self, x: RowFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> RowFeatures:
        grid, stride = x.grid, x.stride * window.stride
        rows, kernel = autocast(x.data.flatten(0, 1)), autocast(kernel)
        bias = None if bias is None else autocast(bias).flatten()
        if window.border != "zeros":
            return self.bordered_convolution(RowFeatures.of_rows(rows, grid, x.stride), kernel, bias, window, groups)
        with x.kept():
            if window.kernel_size == (1, 1) and groups == 1 and window.is_plain:
                if window.stride > 1:
                    rows = every_nth_pixel(rows, grid.pixels(x.stride), window.stride)
                out, bias = ops.linear(rows, kernel.flatten(0, -2), bias), None
            elif kernel.ndim == 2 and groups > 1:
                around, offsets = window.enclosing()
                if around.kernel_size[0] % 2 == around.kernel_size[1] % 2 == 1:
                    sites, options = (grid.slots, grid.patches, grid.pixels(x.stride)), (around.stride, around.dilation)
                    kernel = kernel if offsets is None else embed(kernel, offsets, around.volume)
                    out = ops.depthwise_conv(
                        rows, kernel, bias, *sites, around.kernel_size, stride=options[0], dilation=options[1]
                    )
                    bias = None
                else:
                    out = self._by_table(rows, kernel.unsqueeze(1), x, window, groups)
            else:
                out = self._by_table(rows, kernel.view(-1, *kernel.shape[-2:]), x, window, groups)
        out = out if bias is None else out + bias
        return RowFeatures.of_rows(out, grid, stride)

    def _by_table(self, rows: Tensor, kernel: Tensor, x: RowFeatures, window: Window, groups: int) -> Tensor:
        inverse = table(window, x, transposed=True) if rows.requires_grad else None
        return ops.sparse_conv(rows, kernel, table(window, x), inverse, groups)

    def max_pool(self, x: RowFeatures, window: Window) -> RowFeatures:
        return self._pool(ops.max_pool, x, window)

    def avg_pool(self, x: RowFeatures, window: Window) -> RowFeatures:
        return self._pool(ops.avg_pool, x, window)

    def _pool(self, function: ops.Pooling, x: RowFeatures, window: Window) -> RowFeatures:
        out = function(x.data.flatten(0, 1), table(window, x), table(window, x, transposed=True))
        return RowFeatures.of_rows(out, x.grid, x.stride * window.stride)

    def linear(self, x: RowFeatures, weight: Tensor, bias: Tensor | None) -> RowFeatures:
        out = ops.linear(autocast(x.data.flatten(0, 1)), autocast(weight).t(), None if bias is None else autocast(bias))
        return RowFeatures.of_rows(out, x.grid, x.stride)

    def layer_norm(self, x: RowFeatures, weight: Tensor | None, bias: Tensor | None, eps: float) -> RowFeatures:
        if not self.fuses_products(x.dtype, x.device):
            return super().layer_norm(x, weight, bias, eps)
        return x.replace(ops.layer_norm(x.data.flatten(0, 1), weight, bias, eps).view(x.shape))

    def voxelise(self, images: Tensor, grid: Grid) -> RowFeatures:
        return RowFeatures.of_rows(ops.voxelise(images, grid.slots, grid.patches, grid.patch), grid, 1)

    def densify(self, rows: Tensor, grid: Grid, stride: int, fill: Tensor) -> Tensor:
        return ops.densify(rows, grid.slots, grid.patches, grid.pixels(stride), fill)

    def densify_convolution(
        self, rows: Tensor, grid: Grid, stride: int, fill: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Skips products with mask tokens, which fill most of a map: every hidden pixel adds one of k^2 constant vectors."""
        table, inverse, hidden = around(grid, stride, weight.shape[-1])
        rows, kernel = autocast(rows), autocast(weight.permute(2, 3, 1, 0).flatten(0, 1))
        out = ops.sparse_conv(rows, kernel, table, inverse)
        constants = autocast(fill).to(kernel.dtype) @ kernel
        if bias is not None:
            constants = torch.cat([constants, autocast(bias).unsqueeze(0)])
            hidden = F.pad(hidden, (0, 1), value=1.0)
        out = torch.addmm(out, hidden.to(out.dtype), constants)
        return out.view(grid.batch, *grid.size(stride), -1).permute(0, 3, 1, 2)


def table(window: Window, x: RowFeatures, *, transposed: bool = False) -> Tensor:
    """The neighbour table of a window, cached on the grid, since all blocks of a stage share it.

    The operator knows plain windows only; any other table is a selection of columns of the enclosing plain window's.
    """

    def build() -> Tensor:
        around, offsets = window.enclosing()
        found = ops.neighbour_table(
            x.grid.slots,
            x.grid.patches,
            x.grid.pixels(x.stride),
            around.kernel_size,
            stride=around.stride,
            dilation=around.dilation,
            transposed=transposed,
        )
        return found if offsets is None else found[:, offsets].contiguous()

    return x.grid.cached(("table", x.stride, window.key, transposed), build)


def around(grid: Grid, stride: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of a `side` x `side` convolution over whole maps with `same` padding, cached on the grid.

    Returns:
        table (B * H * W, side^2) int32: the row that a pixel reads at each offset; -1 if there is none.
        inverse (N, side^2) int32: the pixel that reads a row at each offset; -1 outside the image.
        hidden (B * H * W, side^2) float32: 1 where an offset meets a hidden pixel.
    """

    def windows(numbers: Tensor, outside: int) -> Tensor:
        padded = F.pad(numbers, [side // 2] * 4, value=outside)
        return padded.unfold(1, side, 1).unfold(2, side, 1)

    def build() -> tuple[Tensor, Tensor, Tensor]:
        numbers = grid.row_numbers(stride)
        read = windows(numbers, -2).flatten(3).flatten(0, 2)
        pixels = torch.arange(numbers.numel(), device=numbers.device).view_as(numbers)
        reading = windows(pixels, -1).flip(3, 4).flatten(3).permute(0, 3, 1, 2)
        return read.clamp_min(-1).int(), grid.to_rows(reading, stride).int(), (read == -1).float()

    return grid.cached(("around", stride, side), build)


def every_nth_pixel(rows: Tensor, pixels: int, stride: int) -> Tensor:
    """The rows that a 1x1 convolution with a stride reads: every stride-th pixel down and across each patch."""
    return rows.view(-1, pixels, pixels, rows.shape[1])[:, ::stride, ::stride].reshape(-1, rows.shape[1])
