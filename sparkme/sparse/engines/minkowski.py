"""The reference engine: MinkowskiEngine's own coordinate maps and kernels, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import MinkowskiEngine as ME
import torch
from torch import Tensor

from sparkme.grid import Grid
from sparkme.sparse.engines.base import RowEngine
from sparkme.sparse.layout import block_diagonal
from sparkme.sparse.map import SparseMap

if TYPE_CHECKING:
    from sparkme.sparse.layers import SparseAvgPool2d, SparseMaxPool2d, _SparseConvolution


class Sites(NamedTuple):
    """MinkowskiEngine's coordinate map of one stride.

    `to_engine` and `from_engine` are permutations between this project's row order and the map's, or None where both
    are the same. MinkowskiEngine keeps the order of inserted coordinates on the CPU; its GPU map is another
    implementation that promises nothing, so the order is looked at and not assumed.
    """

    key: ME.CoordinateMapKey
    to_engine: Tensor | None
    from_engine: Tensor | None


@contextmanager
def one_thread() -> Iterator[None]:
    """Several threads put the pairs of a kernel map into an order of chance, and sums over them, such as the gradients of
    kernels, then differ in their last bits from run to run. So maps are built by one thread, and used by all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def manager_of(grid: Grid) -> ME.CoordinateManager:
    """The coordinate manager of a batch, made once and kept on its grid."""
    if "manager" not in grid._cache:
        on_gpu = grid.device.type == "cuda"
        if on_gpu and not ME.is_cuda_available():
            raise RuntimeError(
                "MinkowskiEngine was built without CUDA here: rebuild it with "
                "`python cuda_ext/minkowski/build.py --cuda --install`, or take the engine masked-dense"
            )
        kind = ME.CoordinateMapType.CUDA if on_gpu else ME.CoordinateMapType.CPU
        with one_thread():  # the manager sets the number of threads for the whole process
            grid._cache["manager"] = ME.CoordinateManager(D=2, num_threads=1, coordinate_map_type=kind)
    return grid._cache["manager"]


def sites_of(grid: Grid, stride: int) -> Sites:
    """The coordinate map of one stride, inserted in patch-major order."""
    cache_key = "sites", stride
    if cache_key not in grid._cache:
        coordinates = grid.coordinates(stride)
        key, (unique, _) = manager_of(grid).insert_and_map(coordinates, [stride, stride], "patch")
        unique = unique.long()
        if len(unique) in (0, len(coordinates)) and not _is_permuted(unique):
            sites = Sites(key, None, None)
        else:
            sites = Sites(key, unique, unique.argsort())
        grid._cache[cache_key] = sites
    return grid._cache[cache_key]


def _is_permuted(index: Tensor) -> bool:
    return not torch.equal(index, torch.arange(len(index), device=index.device))


def to_minkowski(x: SparseMap) -> ME.SparseTensor:
    """(N, C) rows on MinkowskiEngine's coordinate map, in that map's order."""
    sites = sites_of(x.grid, x.stride)
    rows = x.rows if sites.to_engine is None else x.rows[sites.to_engine]
    return ME.SparseTensor(rows, coordinate_map_key=sites.key, coordinate_manager=manager_of(x.grid))


def from_minkowski(features: Tensor, x: SparseMap, stride: int) -> SparseMap:
    """Features on the map of `stride`, in that map's order, as a map like `x`."""
    sites = sites_of(x.grid, stride)
    rows = features if sites.from_engine is None else features[sites.from_engine]
    return x.replace(rows.view(x.grid.batch, -1, rows.shape[1]), stride)


def kernel_pairs(grid: Grid, stride: int, layer: _SparseConvolution | SparseAvgPool2d) -> dict[int, Tensor]:
    """MinkowskiEngine's kernel map of a layer: per kernel offset the int64 (2, M) pairs (input row, output row).

    Kept on the grid, since all blocks of a stage share it.
    """
    generator: Any = layer.kernel_generator
    geometry = (generator.kernel_stride, generator.kernel_size, generator.kernel_dilation)
    cache_key = "pairs", stride, tuple(tuple(part) for part in geometry)
    if cache_key not in grid._cache:
        source, target = sites_of(grid, stride).key, sites_of(grid, stride * layer.stride).key
        with one_thread():
            pairs = manager_of(grid).kernel_map(source, target, *geometry)
        grid._cache[cache_key] = {k: pair.long().to(grid.device) for k, pair in pairs.items()}
    return grid._cache[cache_key]


def build_kernel_map(grid: Grid, stride: int, layer: _SparseConvolution | SparseMaxPool2d) -> None:
    """Has the manager build the kernel map of a layer, which its forward pass then finds, by one thread."""
    generator: Any = layer.kernel_generator
    is_pool = isinstance(layer, ME.MinkowskiMaxPooling)
    geometry = (generator.kernel_stride, generator.kernel_size, generator.kernel_dilation)
    cache_key = "built", stride, is_pool, tuple(tuple(part) for part in geometry)
    if grid.device.type == "cpu" and cache_key not in grid._cache:
        source, target = sites_of(grid, stride).key, sites_of(grid, stride * layer.stride).key
        with one_thread():
            manager_of(grid).kernel_map(source, target, *geometry, is_pool=is_pool)
        grid._cache[cache_key] = True


class MinkowskiEngine(RowEngine):
    """Stock MinkowskiEngine layers on given output coordinates; float32 and float64 only."""

    name = "minkowski"
    bf16 = False  # under autocast a 1x1 convolution would come out in bf16, and the next 3x3 would refuse it

    def convolution(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap:
        if isinstance(layer, ME.MinkowskiChannelwiseConvolution):
            return self._depthwise(layer, x)
        stride = x.stride * layer.stride
        build_kernel_map(x.grid, x.stride, layer)
        source, key = to_minkowski(x), sites_of(x.grid, stride).key
        if layer.groups == 1:
            out = ME.MinkowskiConvolution.forward(layer, source, coordinates=key).F
        else:
            out = ME.MinkowskiConvolutionFunction.apply(
                source.F,
                block_diagonal(layer.kernel, layer.groups),
                layer.kernel_generator,
                layer.convolution_mode,
                source.coordinate_map_key,
                key,
                source.coordinate_manager,
            )
            out = out if layer.bias is None else out + layer.bias
        return from_minkowski(out, x, stride)

    def _depthwise(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap:
        """One multiply-add per kernel offset over MinkowskiEngine's kernel map.

        MinkowskiEngine's own layer is this loop too, but lets the coordinate manager choose the output sites.
        """
        stride = x.stride * layer.stride
        pairs = kernel_pairs(x.grid, x.stride, layer)
        out = ChannelwiseConvolution.apply(to_minkowski(x).F, layer.kernel, pairs, x.grid.num_rows(stride))
        return from_minkowski(out if layer.bias is None else out + layer.bias, x, stride)

    def max_pool(self, layer: SparseMaxPool2d, x: SparseMap) -> SparseMap:
        # MinkowskiEngine's pooling looks for a value above the lowest number. Where it finds none, as among NaN, it passes
        # no index to its backward pass, which then writes out of bounds. So NaN goes through as infinity.
        finite = torch.finfo(x.dtype)
        source = x.replace(torch.nan_to_num(x.data, nan=torch.inf, posinf=torch.inf, neginf=finite.min / 2))
        stride = x.stride * layer.stride
        build_kernel_map(x.grid, x.stride, layer)
        out = ME.MinkowskiMaxPooling.forward(layer, to_minkowski(source), coordinates=sites_of(x.grid, stride).key)
        return from_minkowski(out.F, x, stride)

    def avg_pool(self, layer: SparseAvgPool2d, x: SparseMap) -> SparseMap:
        """A depthwise convolution by one over the window: MinkowskiEngine's own pooling divides by the visible pixels."""
        stride = x.stride * layer.stride
        taps = layer.kernel_size[0] * layer.kernel_size[1]
        rows = to_minkowski(x).F
        kernel = rows.new_full((taps, rows.shape[1]), 1 / taps)
        out = ChannelwiseConvolution.apply(rows, kernel, kernel_pairs(x.grid, x.stride, layer), x.grid.num_rows(stride))
        return from_minkowski(out, x, stride)


class ChannelwiseConvolution(torch.autograd.Function):
    """Depthwise convolution over a kernel map, offset by offset, saving nothing but its two operands.

    Left to autograd, the loop would keep a gathered copy of the rows for each of the kernel's offsets: 49 of them for a
    7x7 kernel.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, kernel: Tensor, pairs: dict[int, Tensor], num_rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        """(N, C) rows, (K, C) kernel, and per offset the int64 (2, M) pairs (input row, output row)."""
        ctx.save_for_backward(rows, kernel)
        ctx.pairs = pairs
        out = rows.new_zeros(num_rows, rows.shape[1])
        for k, (source, target) in pairs.items():
            out.index_add_(0, target, rows[source] * kernel[k])
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        rows, kernel = ctx.saved_tensors
        grad_rows, grad_kernel = torch.zeros_like(rows), torch.zeros_like(kernel)
        for k, (source, target) in ctx.pairs.items():
            grad = grad_out[target]
            grad_rows.index_add_(0, source, grad * kernel[k])
            grad_kernel[k] = (grad * rows[source]).sum(0)
        return grad_rows, grad_kernel, None, None
