"""The fast engine: this project's own operators over patch-major rows, on the CPU and on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparkme import ops
from sparkme.grid import Grid
from sparkme.sparse.engines.base import RowEngine
from sparkme.sparse.map import SparseMap

if TYPE_CHECKING:
    from sparkme.sparse.layers import SparseAvgPool2d, SparseLinear, SparseMaxPool2d, _SparseConvolution


class CudaExtEngine(RowEngine):
    """Neighbours come from the table of patch slots, so there is no hashing, no host synchronisation, and counts are static.

    Under autocast the rows are bf16, and sums are float32.
    """

    name = "cuda_ext"
    bf16 = True

    def convolution(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap:
        grid, pixels, stride = x.grid, x.grid.pixels(x.stride), layer.stride
        rows = autocast(x.data.flatten(0, 1))
        kernel, bias = layer.operands()
        kernel, bias = autocast(kernel), None if bias is None else autocast(bias).flatten()
        odd = layer.kernel_size[0] % 2 == layer.kernel_size[1] % 2 == 1
        if layer.kernel_size == (1, 1) and layer.groups == 1:
            if stride > 1:
                rows = every_nth_pixel(rows, pixels, stride)
            out, bias = ops.linear(rows, kernel.flatten(0, -2), bias), None
        elif kernel.ndim == 2 and odd:
            sites = grid.slots, grid.patches, pixels
            out = ops.depthwise_conv(rows, kernel, *sites, layer.kernel_size, stride=stride, dilation=layer.dilation)
        else:
            inverse = table(layer, x, transposed=True) if rows.requires_grad else None
            kernel = kernel.unsqueeze(1) if kernel.ndim == 2 else kernel
            out = ops.sparse_conv(rows, kernel, table(layer, x), inverse, layer.groups)
        out = out if bias is None else out + bias
        return x.replace(self.from_rows(out, grid, x.stride * stride), x.stride * stride)

    def max_pool(self, layer: SparseMaxPool2d, x: SparseMap) -> SparseMap:
        return self._pool(ops.max_pool, layer, x)

    def avg_pool(self, layer: SparseAvgPool2d, x: SparseMap) -> SparseMap:
        return self._pool(ops.avg_pool, layer, x)

    def _pool(self, function: ops.Pooling, layer: SparseMaxPool2d | SparseAvgPool2d, x: SparseMap) -> SparseMap:
        out = function(x.data.flatten(0, 1), table(layer, x), table(layer, x, transposed=True))
        return x.replace(self.from_rows(out, x.grid, x.stride * layer.stride), x.stride * layer.stride)

    def linear(self, layer: SparseLinear, x: SparseMap) -> SparseMap:
        weight, bias = layer.linear.weight, layer.linear.bias
        out = ops.linear(autocast(x.data.flatten(0, 1)), autocast(weight).t(), None if bias is None else autocast(bias))
        return x.replace(self.from_rows(out, x.grid, x.stride))

    def voxelise(self, images: Tensor, grid: Grid) -> Tensor:
        return self.from_rows(ops.voxelise(images, grid.slots, grid.patches, grid.patch), grid, 1)

    def densify(self, rows: Tensor, grid: Grid, stride: int, fill: Tensor) -> Tensor:
        return ops.densify(rows, grid.slots, grid.patches, grid.pixels(stride), fill)


def autocast(value: Tensor) -> Tensor:
    """The tensor in the precision that autocast asks for. torch does this for its own operators only."""
    kind = value.device.type
    if not torch.is_autocast_enabled(kind) or value.dtype == torch.float64:
        return value
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise ValueError("the engine cuda_ext has no float16: use torch.autocast(..., dtype=torch.bfloat16)")
    return value.to(dtype)


def table(layer: _SparseConvolution | SparseMaxPool2d | SparseAvgPool2d, x: SparseMap, *, transposed: bool = False) -> Tensor:
    """The neighbour table of a layer's geometry, kept on the grid, since all blocks of a stage share it."""
    key = "table", x.stride, tuple(layer.kernel_size), layer.stride, layer.dilation, transposed
    cache = x.grid._cache
    if key not in cache:
        cache[key] = ops.neighbour_table(
            x.grid.slots, x.grid.patches, x.grid.pixels(x.stride), layer.kernel_size, stride=layer.stride,
            dilation=layer.dilation, transposed=transposed,
        )  # fmt: skip
    return cache[key]


def every_nth_pixel(rows: Tensor, pixels: int, stride: int) -> Tensor:
    """The rows that a 1x1 convolution with a stride reads: every stride-th pixel down and across each patch."""
    return rows.view(-1, pixels, pixels, rows.shape[1])[:, ::stride, ::stride].reshape(-1, rows.shape[1])
