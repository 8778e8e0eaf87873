"""Pooling and gates: over windows, over the whole map, over the channels.

Operations over the whole map (global pooling, squeeze-excite and its relatives, the norm in GRN) use the visible pixels of each
sample. A mean over H and W gives a dense tensor, and later operations on it are plain torch, up to the product with a map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import MinkowskiEngine as ME
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.errors import MixedPixelsError
from sparkme.sparse.engines.base import offset_rows
from sparkme.sparse.forms.convolution import linear, padded_window
from sparkme.sparse.forms.functions import Functions
from sparkme.sparse.forms.layer import SparseLayer
from sparkme.sparse.grid import Grid
from sparkme.sparse.window import Window, pair
from sparkme.sparse.working_map import is_map

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap

FUNCTIONS = Functions()


class SparseMaxPool2d(SparseLayer, ME.MinkowskiMaxPooling):
    """Maximum over the visible pixels of the window.

    The official code treats hidden pixels as zeros, which is the same on non-negative maps, where networks pool.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        _minkowski_pooling(ME.MinkowskiMaxPooling, self, pool)
        self.options = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices

    def forward(self, input: Any) -> Any:
        size, stride, padding, dilation, ceil_mode, return_indices = self.options
        return F.max_pool2d(input, size, stride, padding, dilation, ceil_mode, return_indices)  # type: ignore[call-overload]


class SparseAvgPool2d(SparseLayer, ME.MinkowskiAvgPooling):
    """Mean over the window, in which hidden pixels count as zeros, as in the official code."""

    def __init__(self, pool: nn.AvgPool2d) -> None:
        _minkowski_pooling(ME.MinkowskiAvgPooling, self, pool)
        self.options = (
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
        )

    def forward(self, input: Any) -> Any:
        return F.avg_pool2d(input, *self.options)


def _minkowski_pooling(kind: Any, layer: Any, pool: nn.MaxPool2d | nn.AvgPool2d) -> None:
    dilation = list(pair(getattr(pool, "dilation", 1)))
    stride = list(pair(pool.stride))
    kind.__init__(layer, kernel_size=list(pair(pool.kernel_size)), stride=stride, dilation=dilation, dimension=2)


@FUNCTIONS.form_of("max_pool2d", "max_pool2d_with_indices")
def max_pool2d(
    x: WorkingMap,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> WorkingMap:
    """Maximum over the visible pixels of the window."""
    if return_indices:
        raise NotImplementedError("max_pool2d with return_indices has no sparse form, only without")
    if _is_global(x, kernel_size, padding) and dilation in (1, (1, 1)):
        return amax(x, (2, 3), keepdim=True)
    bare, window = padded_window(x, kernel_size, stride or kernel_size, padding, dilation, ceil_mode=ceil_mode)
    out = bare.replace(bare.engine.max_pool(bare.flat, _bounded(bare, window)))
    if x.padding is None or x.padding.value == -float("inf") or window.border != "zeros":
        return out
    # Values from F.pad count, unlike the padding of the pooling itself.
    outside, rows = _reaches_out(bare.grid, bare.stride, window), out.features.rows()
    return out.with_rows(torch.where(outside, rows.clamp(min=x.padding.value), rows))


def _is_global(x: WorkingMap, kernel_size: Any, padding: Any) -> bool:
    """Whether the window is the whole map, and that has more than one pixel."""
    size = pair(kernel_size)
    return x.padding is None and size == tuple(x.grid.size(x.stride)) and not any(pair(padding)) and size != (1, 1)


def _bounded(x: WorkingMap, window: Window) -> Window:
    if window.border != "zeros":
        raise NotImplementedError(f"pooling after F.pad with mode={window.border!r} has no sparse form, only with 'constant'")
    return window


def _reaches_out(grid: Grid, stride: int, window: Window) -> Tensor:
    """(N, 1) bool: whether the window of an output row reaches outside the image."""

    def build() -> Tensor:
        whole = Grid(torch.ones_like(grid.active), grid.patch, grid.f_h * grid.f_w)
        missing = torch.stack(offset_rows(whole, stride, window)).min(0).values < 0
        out = stride * window.stride
        return grid.to_rows(whole.to_dense(missing.view(-1, 1), out), out)

    return grid.cached(("reaches out", stride, window.key), build)


@FUNCTIONS.form_of("avg_pool2d")
def avg_pool2d(
    x: WorkingMap,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> WorkingMap:
    """Sum over the window, where hidden pixels count as zeros, divided by torch's divisor for a whole image."""
    size = pair(kernel_size)
    if _is_global(x, size, padding):
        return mean(x, (2, 3), keepdim=True)
    if x.padding is not None and x.padding.value != 0:
        raise NotImplementedError("avg_pool2d after F.pad with a value other than zero has no sparse form")
    bare, window = padded_window(x, size, stride or kernel_size, padding, ceil_mode=ceil_mode)
    out = bare.replace(bare.engine.avg_pool(bare.flat, _bounded(bare, window)))
    if divisor_override is not None:
        return out.with_values(out.values * (window.volume / divisor_override))
    if x.padding is not None or (not ceil_mode and (count_include_pad or window.padding == (0, 0))):
        return out

    def divisor() -> Tensor:  # from torch's pooling of ones
        ones = torch.ones(1, 1, *x.grid.size(x.stride), dtype=torch.float64, device=x.device)
        options = size, pair(stride or kernel_size), pair(padding), ceil_mode
        means, sums = F.avg_pool2d(ones, *options, count_include_pad), F.avg_pool2d(ones, *options, divisor_override=1)
        return window.volume * means / sums

    factor: Any = x.grid.cached(("divisor", x.stride, window.key, ceil_mode, count_include_pad), divisor)
    return out * factor.to(out.dtype)


@FUNCTIONS.form_of("adaptive_avg_pool2d")
def adaptive_avg_pool2d(x: WorkingMap, output_size: Any) -> Any:
    """Global mean over the visible pixels of each sample."""
    return _adaptive(x, output_size, mean)


@FUNCTIONS.form_of("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices")
def adaptive_max_pool2d(x: WorkingMap, output_size: Any, return_indices: bool = False) -> Any:
    """Global maximum over the visible pixels of each sample."""
    if return_indices:
        raise NotImplementedError("adaptive_max_pool2d with return_indices has no sparse form, only without")
    return _adaptive(x, output_size, amax)


def _adaptive(x: WorkingMap, output_size: Any, pool: Callable[..., Any]) -> Any:
    sizes = (output_size, output_size) if output_size is None or isinstance(output_size, int) else tuple(output_size)
    if sizes != (1, 1):
        raise NotImplementedError(f"adaptive pooling to {sizes} pixels mixes patches; only 1 has a sparse form")
    return pool(x, (-2, -1), keepdim=True)


def reduce(function: Callable[[Tensor, tuple[int, ...]], Tensor], x: WorkingMap, dim: Any, keepdim: bool) -> Any:
    """Applies a reduction `function(values, axes)`, which keeps the axes, over visible pixels, channels or both.

    Returns:
        A dense tensor if pixels were reduced, else a map.
    """
    if dim is None or (isinstance(dim, tuple | list) and not len(dim)):
        raise NotImplementedError(
            "a reduction over all axes mixes samples; only channels, or H and W together, have a sparse form"
        )
    axes = sorted({x.axis(d) for d in ((dim,) if isinstance(dim, int) else dim)})
    labels = {x.dims[a] for a in axes}
    if "P" in labels:
        labels |= {"H", "W"}
    if len(labels & {"H", "W"}) == 1 or ("B" in labels and "H" not in labels):
        raise NotImplementedError(
            f"a reduction over {' and '.join(label for label in 'BCHW' if label in labels)} alone mixes visible and hidden "
            "pixels; only channels, or H and W together, have a sparse form"
        )
    channels = [x.channel(a) for a in axes if x.dims[a] == "C"]
    rows = x.row_axes
    if "H" not in labels:
        out = function(rows, tuple(2 + c for c in channels))
        if keepdim:
            return x.with_rows(out)
        for c in reversed(channels):
            out = out.squeeze(2 + c)
        return x.with_rows(out, "".join(label for a, label in enumerate(x.dims) if a not in axes))
    # A reduction over the batch, too, is a handwritten batch norm.
    out = function(rows, (*([0] if "B" in labels else []), 1, *(2 + c for c in channels)))
    sizes = iter(out.shape[2:])  # of the channel axes
    shape = [out.shape[0] if label == "B" else next(sizes) if label == "C" else 1 for label in x.dims]
    return out.reshape(shape if keepdim else [n for a, n in enumerate(shape) if a not in axes])


@FUNCTIONS.form_of("mean")
def mean(x: WorkingMap, dim: Any = None, keepdim: bool = False, *more: Any, dtype: Any = None) -> Any:
    return reduce(lambda v, axes: v.mean(axes, keepdim=True, dtype=dtype), x, dim, keepdim)


@FUNCTIONS.form_of("sum")
def sum_(x: WorkingMap, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return reduce(lambda v, axes: v.sum(axes, keepdim=True, dtype=dtype), x, dim, keepdim)


@FUNCTIONS.form_of("amax")
def amax(x: WorkingMap, dim: Any = (), keepdim: bool = False) -> Any:
    return reduce(lambda v, axes: v.amax(axes, keepdim=True), x, dim, keepdim)


@FUNCTIONS.form_of("amin")
def amin(x: WorkingMap, dim: Any = (), keepdim: bool = False) -> Any:
    return reduce(lambda v, axes: v.amin(axes, keepdim=True), x, dim, keepdim)


@FUNCTIONS.form_of("var")
def var(x: WorkingMap, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: int = 1) -> Any:
    """The variance over the visible pixels."""
    correction = correction if unbiased is None else int(unbiased)
    return reduce(lambda v, axes: v.var(axes, correction=correction, keepdim=True), x, dim, keepdim)


@FUNCTIONS.form_of("std")
def std(x: WorkingMap, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: int = 1) -> Any:
    correction = correction if unbiased is None else int(unbiased)
    return reduce(lambda v, axes: v.std(axes, correction=correction, keepdim=True), x, dim, keepdim)


@FUNCTIONS.form_of("var_mean")
def var_mean(x: WorkingMap, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: int = 1) -> Any:
    return var(x, dim, unbiased, keepdim, correction=correction), mean(x, dim, keepdim)


@FUNCTIONS.form_of("max")
def max_(x: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    """Over one channel axis, with the indices; or of two maps, pixel by pixel."""
    return _extreme(x, dim if other is None else other, keepdim, "max", torch.maximum)


@FUNCTIONS.form_of("min")
def min_(x: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    return _extreme(x, dim if other is None else other, keepdim, "min", torch.minimum)


class Extreme(NamedTuple):
    """The result of torch.max and torch.min along an axis."""

    values: WorkingMap
    indices: WorkingMap


def _extreme(x: Any, dim: Any, keepdim: bool, name: str, of_two: Callable[..., Any]) -> Any:
    if is_map(dim) or isinstance(dim, Tensor):
        return of_two(x, dim)
    if not isinstance(dim, int) or x.dims[x.axis(dim)] != "C":
        of_all = "all axes" if dim is None else f"axis {dim}"
        raise NotImplementedError(f"{name} of a map over {of_all}: use it over channels, or a{name} over H and W together")
    values, indices = getattr(x.row_axes, name)(2 + x.channel(dim), keepdim=keepdim)
    dims = x.dims if keepdim else x.dims[: x.axis(dim)] + x.dims[x.axis(dim) + 1 :]
    return Extreme(x.with_rows(values, dims), x.with_rows(indices, dims))


@FUNCTIONS.form_of("norm", "vector_norm")
def norm(
    x: WorkingMap, p: Any = 2, dim: Any = None, keepdim: bool = False, out: None = None, dtype: Any = None, *, ord: Any = None
) -> Any:
    """The norm over the visible pixels of each sample (GRN), or over channels."""
    order = ord if ord is not None else 2 if p in (None, "fro") else p
    return reduce(lambda v, axes: torch.linalg.vector_norm(v, order, axes, keepdim=True, dtype=dtype), x, dim, keepdim)


@FUNCTIONS.form_of("softmax")
def softmax(x: WorkingMap, dim: int | None = None, *args: Any, **kwargs: Any) -> WorkingMap:
    """Over a channel axis, as between the branches of selective kernels, or over all visible pixels of a sample."""
    if dim is None or x.dims[x.axis(dim)] not in "CP":
        raise MixedPixelsError(
            f"softmax over axis {dim} of a map {x.dims} mixes visible and hidden pixels; only softmax over channels, or over H "
            "and W flattened into one axis, has a sparse form"
        )
    return x.with_rows(torch.softmax(x.row_axes, 1 if x.dims[x.axis(dim)] == "P" else 2 + x.channel(dim)))


@FUNCTIONS.form_of("matmul", "__matmul__")
def matmul(x: Any, other: Any) -> Any:
    """A map times a (C_in, C_out) matrix, along the channels; or a weighted sum of all visible pixels."""
    if is_map(x) and not is_map(other) and other.ndim == 2:
        return linear(x, other.t())
    if is_map(x) and is_map(other) and x.dims.endswith("CP") and other.dims == x.dims[:-2] + "PC" and other.shape[-1] == 1:
        return (x.row_axes * other.row_axes).sum(1).unsqueeze(-1)
    if is_map(x) and is_map(other):
        raise MixedPixelsError("matmul of maps, as in attention, mixes visible and hidden pixels")
    raise NotImplementedError(
        f"matmul of shapes {tuple(x.shape)} and {tuple(other.shape)} has no sparse form; use a channels-last map times a "
        "(C_in, C_out) matrix, or a 1x1 convolution"
    )


@FUNCTIONS.form_of("interpolate", "upsample")
def interpolate(
    x: WorkingMap, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *args: Any, **kwargs: Any
) -> Any:
    """Nearest upsampling by an integer factor: each pixel is repeated within its patch."""
    h, w = x.shape[-2:]
    if scale_factor is not None:
        factors = tuple(scale_factor) if isinstance(scale_factor, tuple | list) else (scale_factor, scale_factor)
    else:
        wanted = (size, size) if isinstance(size, int) else tuple(size)
        factors = (wanted[0] / h, wanted[1] / w)
    factor = int(factors[0])
    if factors == (1, 1):
        return x
    if mode not in ("nearest", "nearest-exact") or factors != (factor, factor) or factor < 1 or x.stride % factor:
        raise NotImplementedError(
            f"interpolate with mode={mode!r} by {factors} has no sparse form; use mode='nearest' by an integer factor that "
            f"divides the stride {x.stride}"
        )
    return x.replace(x.flat.repeated(factor))
