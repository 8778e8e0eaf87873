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

import torch
from torch import Tensor

import sparkme.ops.library
import sparkme.ops.triton_conv  # noqa: F401  (registers CUDA's convolution)

try:
    from sparkme import _C  # noqa: F401  (registers their kernels)

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
    rows: Tensor, kernel: Tensor, slots: Tensor, patches: Tensor, pixels: int, kernel_size: tuple[int, int], *,
    stride: int = 1, dilation: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution with one odd-sized filter per channel, patch by patch with its halo.

    Args:
        rows: (P * pixels^2, C).
        kernel: (kh * kw, C).
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
    return torch.ops.sparkme.depthwise_conv(rows, kernel, slots, patches, pixels, kernel_size, stride, dilation)


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
    if kernel.ndim != 2 or kernel.shape[0] != rows.shape[1]:
        raise ValueError(f"kernel must be ({rows.shape[1]}, C_out), got {tuple(kernel.shape)}")
    _check_same("kernel", kernel, rows)
    if bias is not None:
        if bias.shape != kernel.shape[1:]:
            raise ValueError(f"bias must be ({kernel.shape[1]},), got {tuple(bias.shape)}")
        _check_same("bias", bias, rows)
    return torch.ops.sparkme.linear(rows, kernel, bias)


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
