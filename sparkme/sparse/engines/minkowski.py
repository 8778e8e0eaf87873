"""The reference engine: MinkowskiEngine's own coordinate maps and kernels, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import NamedTuple

import MinkowskiEngine as ME
import torch
from MinkowskiEngineBackend._C import ConvolutionMode
from torch import Tensor

from sparkme.sparse.engines.base import RowEngine
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.grid import Grid
from sparkme.sparse.layout import block_diagonal, embed
from sparkme.sparse.window import Window


class Sites(NamedTuple):
    """MinkowskiEngine's coordinate map of one stride.

    `to_engine` and `from_engine` are permutations between this project's row order and the map's; None if both are the same.
    MinkowskiEngine keeps the order of inserted coordinates on the CPU. Its GPU map promises no order, so the order is checked.
    """

    key: ME.CoordinateMapKey
    to_engine: Tensor | None
    from_engine: Tensor | None


@contextmanager
def one_thread() -> Iterator[None]:
    """Builds kernel maps reproducibly: several threads would order their pairs at random, so that sums over pairs, such as the
    gradients of kernels, would differ in their last bits from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def manager_of(grid: Grid) -> ME.CoordinateManager:
    """The coordinate manager of a batch, cached on its grid."""

    def build() -> ME.CoordinateManager:
        on_gpu = grid.device.type == "cuda"
        if on_gpu and not ME.is_cuda_available():
            raise RuntimeError(
                "MinkowskiEngine was built without CUDA here: rebuild it with "
                "`python cuda_ext/minkowski/build.py --cuda --install`, or use the engine masked-dense"
            )
        kind = ME.CoordinateMapType.CUDA if on_gpu else ME.CoordinateMapType.CPU
        with one_thread():  # the manager sets the number of threads for the whole process
            return ME.CoordinateManager(D=2, num_threads=1, coordinate_map_type=kind)

    return grid.cached("manager", build)


def sites_of(grid: Grid, stride: int) -> Sites:
    """The coordinate map of one stride, inserted in patch-major order."""

    def build() -> Sites:
        coordinates = grid.coordinates(stride)
        key, (unique, _) = manager_of(grid).insert_and_map(coordinates, [stride, stride], "patch")
        unique = unique.long()
        if len(unique) in (0, len(coordinates)) and not _is_permuted(unique):
            return Sites(key, None, None)
        return Sites(key, unique, unique.argsort())

    return grid.cached(("sites", stride), build)


def _is_permuted(index: Tensor) -> bool:
    return not torch.equal(index, torch.arange(len(index), device=index.device))


def to_minkowski(x: RowFeatures) -> ME.SparseTensor:
    """(N, C) rows on MinkowskiEngine's coordinate map, in that map's order."""
    sites, rows = sites_of(x.grid, x.stride), x.data.flatten(0, 1)
    rows = rows if sites.to_engine is None else rows[sites.to_engine]
    return ME.SparseTensor(rows, coordinate_map_key=sites.key, coordinate_manager=manager_of(x.grid))


def from_minkowski(rows: Tensor, x: RowFeatures, stride: int) -> RowFeatures:
    """Rows on the map of `stride`, in that map's order, as features on the sites of `x`."""
    sites = sites_of(x.grid, stride)
    rows = rows if sites.from_engine is None else rows[sites.from_engine]
    return x.replace(rows.view(x.grid.batch, -1, rows.shape[1]), stride)


@lru_cache
def generator_of(window: Window) -> ME.KernelGenerator:
    """MinkowskiEngine's description of a plain window."""
    size, stride, dilation = list(window.kernel_size), window.stride, window.dilation
    return ME.KernelGenerator(kernel_size=size, stride=[stride] * 2, dilation=[dilation] * 2, dimension=2)


def kernel_map(grid: Grid, stride: int, window: Window, *, is_pool: bool = False) -> dict[int, Tensor]:
    """MinkowskiEngine's kernel map of a plain window: per offset the (2, M) pairs (input row, output row).

    One thread builds it. The manager caches it for layers with the same window.
    """
    generator = generator_of(window)
    source, target = sites_of(grid, stride).key, sites_of(grid, stride * window.stride).key
    geometry = generator.kernel_stride, generator.kernel_size, generator.kernel_dilation
    with one_thread():
        return manager_of(grid).kernel_map(source, target, *geometry, is_pool=is_pool)


def kernel_pairs(grid: Grid, stride: int, window: Window) -> dict[int, Tensor]:
    """The int64 pairs of each offset of any window, in the window's order. Cached on the grid."""

    def build() -> dict[int, Tensor]:
        around, offsets = window.enclosing()
        pairs = {k: pair.long().to(grid.device) for k, pair in kernel_map(grid, stride, around).items()}
        numbers = range(around.volume) if offsets is None else offsets
        return {k: pairs[number] for k, number in enumerate(numbers) if number in pairs}

    return grid.cached(("pairs", stride, window), build)


def build_kernel_map(grid: Grid, stride: int, window: Window, *, is_pool: bool = False) -> None:
    """Makes the manager build a kernel map with one thread, unless it has it."""
    if grid.device.type == "cpu":
        grid.cached(("built", stride, window, is_pool), lambda: kernel_map(grid, stride, window, is_pool=is_pool))


class MinkowskiEngine(RowEngine):
    """MinkowskiEngine's own functions on given output coordinates; float32 and float64 only."""

    name = "minkowski"
    bf16 = False  # under autocast a 1x1 convolution would return bf16, which the next 3x3 would refuse

    def precision(self, device_type: str) -> AbstractContextManager[None]:
        """Raises ValueError on any CUDA stream but the default, on which MinkowskiEngine builds its maps."""
        if device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("the engine minkowski cannot be captured into a CUDA graph; use cuda_ext")
        if device_type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
            raise ValueError("the engine minkowski works on CUDA's default stream only; use that stream, or use cuda_ext")
        return super().precision(device_type)

    def convolution(self, x: RowFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> RowFeatures:
        if window.border != "zeros":
            return self.bordered_convolution(x, kernel, bias, window, groups)
        stride = x.stride * window.stride
        source, key = to_minkowski(x), sites_of(x.grid, stride).key
        if kernel.ndim == 2 and groups > 1:
            # MinkowskiEngine's own layer is the same loop, but its coordinate manager chooses the output sites.
            out = ChannelwiseConvolution.apply(
                source.F, kernel, kernel_pairs(x.grid, x.stride, window), x.grid.num_rows(stride)
            )
        elif kernel.ndim == 2:
            out = source.F.mm(kernel)
        else:
            around, offsets = window.enclosing()  # MinkowskiEngine's regions start at the output pixel or are centred on it
            kernel = kernel if offsets is None else embed(kernel, offsets, around.volume)
            build_kernel_map(x.grid, x.stride, around)
            out = ME.MinkowskiConvolutionFunction.apply(
                source.F,
                kernel.contiguous() if groups == 1 else block_diagonal(kernel, groups),
                generator_of(around),
                ConvolutionMode.DEFAULT,
                source.coordinate_map_key,
                key,
                source.coordinate_manager,
            )
        return from_minkowski(out if bias is None else out + bias, x, stride)

    def max_pool(self, x: RowFeatures, window: Window) -> RowFeatures:
        stride = x.stride * window.stride
        if not window.is_plain:
            return from_minkowski(self._gathered_maximum(x, window), x, stride)
        # MinkowskiEngine's pooling looks for a value above the lowest number. If there is none, as among NaN, its backward pass
        # writes out of bounds. So NaN goes through as infinity.
        lowest = torch.finfo(x.data.dtype).min / 2
        source = to_minkowski(x.replace(torch.nan_to_num(x.data, nan=torch.inf, posinf=torch.inf, neginf=lowest)))
        build_kernel_map(x.grid, x.stride, window, is_pool=True)
        key, manager = sites_of(x.grid, stride).key, source.coordinate_manager
        out = ME.MinkowskiLocalPoolingFunction.apply(
            source.F, ME.PoolingMode.LOCAL_MAX_POOLING, generator_of(window), source.coordinate_map_key, key, manager
        )
        return from_minkowski(out, x, stride)

    def _gathered_maximum(self, x: RowFeatures, window: Window) -> Tensor:
        """Pooling over the pairs of the kernel map: MinkowskiEngine has none over an off-centre region."""
        rows = to_minkowski(x).F
        shape = x.grid.num_rows(x.stride * window.stride), rows.shape[1]
        pairs = kernel_pairs(x.grid, x.stride, window)
        taken = [rows.new_full(shape, -torch.inf).index_copy(0, target, rows[source]) for source, target in pairs.values()]
        return torch.stack(taken).max(0).values

    def avg_pool(self, x: RowFeatures, window: Window) -> RowFeatures:
        """A depthwise convolution with constant weights: MinkowskiEngine's own pooling divides by the visible pixels."""
        kernel = x.data.new_full((window.volume, x.data.shape[-1]), 1 / window.volume)
        stride = x.stride * window.stride
        pairs = kernel_pairs(x.grid, x.stride, window)
        out = ChannelwiseConvolution.apply(to_minkowski(x).F, kernel, pairs, x.grid.num_rows(stride))
        return from_minkowski(out, x, stride)


class ChannelwiseConvolution(torch.autograd.Function):
    """Depthwise convolution over a kernel map, offset by offset, which saves its two operands only.

    Autograd would keep a gathered copy of the rows per offset: 49 of them for a 7x7 kernel.
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
