"""The operators of the engine `cuda_ext`: sparse layers over patch-major rows, on the CPU and on CUDA.

Two small tables per batch say where everything is:

    slots    (B, f_h, f_w) int32: the number of each patch among the visible ones, or -1 where it is hidden
    patches  (P,) int32: where each visible patch lies in the flattened `slots`; P = B * keep

Rows are sorted by (visible patch, y, x), so a pixel's row is `patch * p * p + y * p + x`, and its neighbours follow from
`slots` without hashing. Kernels have MinkowskiEngine's layout: tap k = y + kh * x.

Every operator takes float64, float32 and bfloat16 (which accumulates in float32), any memory layout, and no rows at all;
can be differentiated once, and has a plain reference in `sparkme.ops.reference`. A wrong argument is a ValueError that names
it. What tables, slots and patches hold is checked on the CPU; on CUDA that would mean waiting for the device, so there it
is trusted: make them with `sparkme.Grid` and `neighbour_table`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import sparkme.ops.library
import sparkme.ops.triton_conv  # noqa: F401  (registers CUDA's convolution)

try:
    from sparkme import _C  # type: ignore[attr-defined]  # noqa: F401  (registers their kernels)

    _LOAD_ERROR = ""
except ImportError as _error:
    _LOAD_ERROR = str(_error)

Pooling = Callable[[Tensor, Tensor, Tensor], Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


def unavailable(*, on_gpu: bool) -> str:
    """Why the operators cannot run on the CPU or on a GPU; empty where they can."""
    if _LOAD_ERROR:
        return f"the extension sparkme._C was not built or does not load ({_LOAD_ERROR})"
    if on_gpu and not torch._C._dispatch_has_kernel_for_dispatch_key("sparkme::voxelise", "CUDA"):
        return "the extension sparkme._C was built without CUDA"
    return ""


def neighbour_table(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: tuple[int, int], *, stride: int = 1, dilation: int = 1,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Where the neighbours of every row are.

    Args:
        slots, patches: the visible patches, see the module.
        pixels: p, pixels along a patch of the convolution's INPUT.
        kernel_size: (kh, kw). An odd side is centred on the output pixel, an even one starts at it.
        stride: of the convolution.
        dilation: of the kernel.
        transposed: the inverse question, asked by gradients: which output a given input contributes to through a tap.

    Returns:
        (N, kh * kw) int32: for each output row and tap the input row, or -1 where it is hidden or outside of the image.
        Transposed, for each input row and tap the output row, or -1.
    """
    _check_sites(slots, patches)
    if pixels < 1 or stride < 1 or dilation < 1 or min(kernel_size) < 1:
        raise ValueError(f"pixels {pixels}, kernel_size {kernel_size}, stride {stride}, dilation {dilation} must be positive")
    if pixels % stride:
        raise ValueError(f"stride {stride} does not divide the patch of pixels={pixels}")
    return torch.ops.sparkme.neighbour_table(slots, patches, pixels, kernel_size, stride, dilation, transposed)


def sparse_conv(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int = 1) -> Tensor:
    """Convolution over a neighbour table; a missing neighbour counts as zero.

    Args:
        rows: (N_in, C_in).
        kernel: (K, C_in / groups, C_out).
        table, inverse: (N_out, K) and (N_in, K) int32, from `neighbour_table`, plain and transposed. The inverse is for
            the gradient of the rows, and may be None where that is not asked for.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        (N_out, C_out).
    """
    _check_rows("rows", rows)
    _check_tables(rows, table, inverse)
    if kernel.ndim != 3 or kernel.shape[0] != table.shape[1] or kernel.shape[1] * groups != rows.shape[1]:
        raise ValueError(
            f"kernel must be ({table.shape[1]}, {rows.shape[1]} / groups={groups}, C_out), got {tuple(kernel.shape)}"
        )
    if inverse is None and rows.requires_grad and torch.is_grad_enabled():
        raise ValueError("inverse is None, and the gradient of the rows needs it")
    if groups < 1 or kernel.shape[2] % groups:
        raise ValueError(f"groups={groups} must divide the kernel's {kernel.shape[2]} output channels")
    _check_same("kernel", kernel, rows)
    return torch.ops.sparkme.sparse_conv(rows, kernel, table, inverse, groups)


def depthwise_conv(
    rows: Tensor, kernel: Tensor, bias: Tensor | None, slots: Tensor, patches: Tensor, pixels: int,
    kernel_size: tuple[int, int], *, stride: int = 1, dilation: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution with one odd-sized filter per channel, patch by patch with its halo.

    Args:
        rows: (P * pixels^2, C).
        kernel: (kh * kw, C).
        bias: (C,) or None.
        slots, patches, pixels, kernel_size, stride, dilation: as for `neighbour_table`.

    Returns:
        (P * (pixels / stride)^2, C).
    """
    _check_rows("rows", rows)
    _check_sites(slots, patches)
    _check_device("slots", slots, rows)
    if pixels < 1 or len(rows) != len(patches) * pixels**2:
        raise ValueError(f"rows must be {len(patches)} patches x {pixels}^2 pixels, got {len(rows)}")
    if min(kernel_size) < 1 or kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
        raise ValueError(f"kernel_size {tuple(kernel_size)} must be odd and positive")
    if kernel.shape != (kernel_size[0] * kernel_size[1], rows.shape[1]):
        raise ValueError(f"kernel must be {(kernel_size[0] * kernel_size[1], rows.shape[1])}, got {tuple(kernel.shape)}")
    if stride < 1 or dilation < 1 or pixels % stride:
        raise ValueError(f"stride {stride} must divide pixels={pixels}, and dilation {dilation} be positive")
    _check_same("kernel", kernel, rows)
    if bias is not None:
        if bias.shape != rows.shape[1:]:
            raise ValueError(f"bias must be ({rows.shape[1]},), got {tuple(bias.shape)}")
        _check_same("bias", bias, rows)
    return torch.ops.sparkme.depthwise_conv(rows, kernel, bias, slots, patches, pixels, kernel_size, stride, dilation)


def max_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """Maximum over the visible neighbours, (N_out, C); tables as for `sparse_conv`. NaN is larger than everything."""
    _check_rows("rows", rows)
    _check_tables(rows, table, inverse)
    if table.shape[1] > 255:
        raise ValueError(f"table has {table.shape[1]} taps, at most 255 can be pooled")
    return torch.ops.sparkme.max_pool(rows, table, inverse)[0]


def avg_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """Sum over the visible neighbours divided by the number of taps, (N_out, C): a hidden neighbour counts as zero, as in
    the masked dense pooling. Tables as for `sparse_conv`."""
    _check_rows("rows", rows)
    _check_tables(rows, table, inverse)
    return torch.ops.sparkme.avg_pool(rows, table, inverse)


def voxelise(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    """Copies the visible patches of a (B, C, f_h * pixels, f_w * pixels) map, of any memory format, to (P * pixels^2, C)
    rows."""
    _check_sites(slots, patches)
    _check_float("dense", dense)
    batch, f_h, f_w = slots.shape
    if pixels < 1 or dense.ndim != 4 or (dense.shape[0], *dense.shape[2:]) != (batch, f_h * pixels, f_w * pixels):
        raise ValueError(f"dense must be ({batch}, C, {f_h * pixels}, {f_w * pixels}), got {tuple(dense.shape)}")
    _check_device("dense", dense, slots)
    return torch.ops.sparkme.voxelise(dense, slots, patches, pixels)


def densify(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None = None) -> Tensor:
    """Copies (P * pixels^2, C) rows to their patches of a map; hidden pixels get `fill`, (C,), or zero.

    Returns:
        (B, C, f_h * pixels, f_w * pixels) in channels_last memory.
    """
    _check_rows("rows", rows)
    _check_sites(slots, patches)
    if pixels < 1 or len(rows) != len(patches) * pixels**2:
        raise ValueError(f"rows must be {len(patches)} patches x {pixels}^2 pixels, got {len(rows)}")
    if fill is not None:
        if fill.shape != rows.shape[1:]:
            raise ValueError(f"fill must be ({rows.shape[1]},), got {tuple(fill.shape)}")
        _check_device("fill", fill, rows)
    _check_device("slots", slots, rows)
    return torch.ops.sparkme.densify(rows, slots, patches, pixels, fill)


def linear(rows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, C_in) rows times a (C_in, C_out) kernel, plus (C_out,): the 1x1 convolution, by the device's fastest GEMM."""
    _check_rows("rows", rows)
    _check_kernel(rows, kernel)
    if bias is not None:
        if bias.shape != kernel.shape[1:]:
            raise ValueError(f"bias must be ({kernel.shape[1]},), got {tuple(bias.shape)}")
        _check_same("bias", bias, rows)
    return torch.ops.sparkme.linear(rows, kernel, bias)


def batch_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of (N, C) rows: two (C,), float32 or, for float64 rows, float64. For use in
    `batch_norm`, which knows that they depend on the rows; they have no gradient of their own."""
    _check_rows("rows", rows)
    mean, variance = torch.ops.sparkme.batch_statistics(rows.detach())
    return mean, variance


def norm_statistics(
    rows: Tensor, epsilon: float, running_mean: Tensor | None = None, running_var: Tensor | None = None, momentum: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `batch_norm` takes, mean and 1 / sqrt(variance + epsilon) of (N, C) rows, as `batch_statistics`; of no rows zeros.

    Args:
        rows: (N, C).
        epsilon: added to the (biased) variance.
        running_mean, running_var: (C,), moved in place towards the mean and the unbiased variance, by `momentum`; None: not.
        momentum: in [0, 1].
    """
    _check_rows("rows", rows)
    mean, deviation = torch.ops.sparkme.norm_statistics(rows.detach(), epsilon, running_mean, running_var, momentum)
    return mean, deviation


def batch_norm(
    rows: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
    training: bool, factor: Tensor | None = None, residual: Tensor | None = None, ceiling: float | None = None,
) -> Tensor:  # fmt: skip
    """Batch norm with what follows it in a residual block: factor * (weight * (rows - mean) * inverse_deviation + bias) +
    residual, clamped to [0, ceiling]. Only the rows are kept for the gradient, and with ceiling and residual the result.

    Args:
        rows: (N, C).
        mean, inverse_deviation, weight, bias: (C,), of any floating type.
        training: whether mean and deviation are `batch_statistics` of these rows, so that the gradient goes through them.
        factor: (B,), for each sample; N is a multiple of B, and a sample's rows lie next to each other. No gradient.
        residual: (N, C) or (..., C), as many rows, of the rows' type.
        ceiling: above zero, or None for no clamp: infinity makes a ReLU of it, 6 a ReLU6.

    Returns:
        (N, C).
    """
    _check_rows("rows", rows)
    numbers = {"mean": mean, "inverse_deviation": inverse_deviation, "weight": weight, "bias": bias}
    _check_norm(rows, rows.shape[1], numbers, factor, residual)
    return torch.ops.sparkme.batch_norm(rows, mean, inverse_deviation, weight, bias, factor, residual, ceiling, training)


class ProductStatistics(NamedTuple):
    """Of x = rows @ kernel, without computing it; see `product_statistics`."""

    row_mean: Tensor
    gram: Tensor
    mean: Tensor
    variance: Tensor


def product_statistics(rows: Tensor, kernel: Tensor) -> ProductStatistics:
    """Mean and (biased) variance of each channel of x = rows @ kernel, from the rows' means and Gram matrix.

    Args:
        rows: (N, K).
        kernel: (K, C).

    Returns:
        The rows' mean (K,) and Gram matrix (K, K), the sum of (row - mean)' (row - mean), and x's mean and variance (C,), all
        float32 or, for float64 rows, float64. For use in `linear_batch_norm`; they have no gradient of their own.
    """
    _check_rows("rows", rows)
    if rows.dtype == torch.bfloat16:
        raise ValueError("rows must be float64 or float32: of products rounded to bfloat16 there are no statistics")
    _check_kernel(rows, kernel)
    return ProductStatistics(*torch.ops.sparkme.product_statistics(rows.detach(), kernel.detach()))


def linear_batch_norm(
    rows: Tensor, kernel: Tensor, statistics: ProductStatistics, epsilon: float, weight: Tensor | None = None,
    bias: Tensor | None = None, *, factor: Tensor | None = None, residual: Tensor | None = None, ceiling: float | None = None,
) -> Tensor:  # fmt: skip
    """`batch_norm` of rows @ kernel in training mode, which is neither kept nor ever whole; for kernels with more columns than
    rows. Kept for the gradient are the rows and, with ceiling, the result.

    Args:
        rows: (N, K).
        kernel: (K, C).
        statistics: `product_statistics` of both.
        epsilon: of the variance.
        weight, bias, factor, residual, ceiling: as for `batch_norm`.

    Returns:
        (N, C).
    """
    _check_rows("rows", rows)
    _check_kernel(rows, kernel)
    row_mean, gram, mean, variance = statistics
    _check_norm(rows, kernel.shape[1], {"mean": mean, "weight": weight, "bias": bias}, factor, residual)
    deviation = (variance + epsilon).rsqrt()
    return torch.ops.sparkme.linear_batch_norm(
        rows, kernel, row_mean, gram, mean, deviation, weight, bias, factor, residual, ceiling
    )


def layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer norm of every row, as torch.nn.functional.layer_norm computes it. Statistics are float32 or, for float64 rows,
    float64.

    Args:
        rows: (N, C).
        weight, bias: (C,) or None, of any floating type.
        epsilon: of the variance.

    Returns:
        (N, C).
    """
    _check_rows("rows", rows)
    _check_norm(rows, rows.shape[1], {"weight": weight, "bias": bias}, None, None)
    return torch.ops.sparkme.layer_norm(rows, weight, bias, epsilon)[0]


def mlp(
    rows: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, scale: Tensor | None = None,
    *, factor: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """factor * scale * (gelu(rows @ weight1' + bias1) @ weight2' + bias2) + residual. Of what is between the layers only the
    first one's result is kept.

    Args:
        rows: (N, C).
        weight1, bias1: (H, C) and (H,) or None, as in torch.nn.Linear.
        weight2, bias2: (C_out, H) and (C_out,) or None.
        scale: (C_out,) or None, of any floating type.
        factor, residual: as for `batch_norm`.

    Returns:
        (N, C_out).
    """
    _check_rows("rows", rows)
    for name, weight, inside in (("weight1", weight1, rows.shape[1]), ("weight2", weight2, len(weight1))):
        if weight.ndim != 2 or weight.shape[1] != inside:
            raise ValueError(f"{name} must be (channels, {inside}), got {tuple(weight.shape)}")
        _check_same(name, weight, rows)
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None:
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"{name} must be ({len(weight)},), got {tuple(bias.shape)}")
            _check_same(name, bias, rows)
    _check_norm(rows, len(weight2), {"scale": scale}, factor, residual)
    return torch.ops.sparkme.mlp(rows, weight1, bias1, weight2, bias2, scale, factor, residual)[0]


def _check_kernel(rows: Tensor, kernel: Tensor) -> None:
    if kernel.ndim != 2 or kernel.shape[0] != rows.shape[1]:
        raise ValueError(f"kernel must be ({rows.shape[1]}, C_out), got {tuple(kernel.shape)}")
    _check_same("kernel", kernel, rows)


def _check_norm(
    rows: Tensor, channels: int, numbers: dict[str, Tensor | None], factor: Tensor | None, residual: Tensor | None
) -> None:
    for name, value in numbers.items():
        if value is not None:
            if value.shape != (channels,):
                raise ValueError(f"{name} must be ({channels},), got {tuple(value.shape)}")
            _check_device(name, value, rows)
    if factor is not None:
        if factor.ndim != 1 or not len(factor) or len(rows) % len(factor):
            raise ValueError(f"factor must be a number for each sample of {len(rows)} rows, got {tuple(factor.shape)}")
        if factor.requires_grad and torch.is_grad_enabled():
            raise ValueError("factor has no gradient, and requires one")
        _check_device("factor", factor, rows)
    if residual is not None:
        if residual.ndim < 2 or residual.shape[-1] != channels or residual.numel() != len(rows) * channels:
            raise ValueError(f"residual must be {(len(rows), channels)}, got {tuple(residual.shape)}")
        _check_same("residual", residual, rows)


def _check_float(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32 or bfloat16, got {value.dtype}")


def _check_rows(name: str, value: Tensor) -> None:
    _check_float(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name} must be (N, C), got {tuple(value.shape)}")


def _check_device(name: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, the rest on {other.device}")


def _check_same(name: str, value: Tensor, rows: Tensor) -> None:
    if value.dtype != rows.dtype:
        raise ValueError(f"{name} is {value.dtype}, rows are {rows.dtype}")
    _check_device(name, value, rows)


def _check_sites(slots: Tensor, patches: Tensor) -> None:
    for name, value, ndim in (("slots", slots, 3), ("patches", patches, 1)):
        if value.dtype != torch.int32 or value.ndim != ndim:
            raise ValueError(f"{name} must be int32 with {ndim} dimensions, got {value.dtype} {tuple(value.shape)}")
    _check_device("patches", patches, slots)


def _check_tables(rows: Tensor, table: Tensor, inverse: Tensor | None) -> None:
    for name, value in (("table", table), ("inverse", inverse)):
        if value is None:
            continue
        if value.dtype != torch.int32 or value.ndim != 2:
            raise ValueError(f"{name} must be (N, K) int32, got {value.dtype} {tuple(value.shape)}")
        _check_device(name, value, rows)
    if inverse is not None and inverse.shape != (len(rows), table.shape[1]):
        raise ValueError(f"inverse must be ({len(rows)}, {table.shape[1]}), got {tuple(inverse.shape)}")
