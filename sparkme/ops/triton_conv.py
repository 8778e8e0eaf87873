"""CUDA's sparse convolution, and its gradients, through Triton.

bfloat16 and float32 run as an implicit GEMM over the neighbour table (`sparkme.ops.triton_kernels`), float32 in TF32 if
`torch.backends.cudnn.allow_tf32` allows it for dense convolutions. For few input channels, as in images, columns are written to
memory and multiplied by torch. For float64, or without Triton, neighbours are gathered for a part of the rows at a time and
multiplied by torch.

Block sizes follow fixed rules instead of autotuning. So results repeat between processes, the first call only compiles, and a
layer that has run once can be captured in a CUDA graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = 16  # below so many input channels, columns (offsets x channels) are written to memory
GATHERED_BYTES = 1 << 28  # of gathered neighbours at a time, without Triton
PARTIAL_BYTES = 1 << 26  # of partial sums of a kernel's gradient
# Rows this far apart agree on whether x and y are even, for patches of up to 32 pixels a side, if that is a power of two.
APART = 64


def sparse_conv(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int) -> Tensor:
    _check(rows, kernel, table, groups, channels=kernel.shape[1] * groups)
    if not (_on_tensor_cores(rows) and len(table) and rows.numel() and kernel.numel()):
        return _gathered_conv(rows, kernel, table, groups)
    out = rows.new_empty(len(table), kernel.shape[2])
    _convolve(out, rows.contiguous(), kernel, table.contiguous(), groups)
    return out


def sparse_conv_grad_rows(grad: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor, groups: int) -> Tensor:
    _check(grad, kernel, inverse, groups, channels=kernel.shape[2])
    # The convolution over the inverse table, with input and output channels of the kernel exchanged.
    if not (_on_tensor_cores(grad) and len(inverse) and grad.numel() and kernel.numel()):
        return _gathered_conv(grad, _exchange(kernel, groups), inverse, groups)
    out = grad.new_empty(len(inverse), kernel.shape[1] * groups)
    _convolve(out, grad.contiguous(), kernel, inverse.contiguous(), groups, exchange=True, skip=len(inverse) > len(table))
    return out


def sparse_conv_grad_kernel(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    if rows.ndim != 2 or grad.ndim != 2 or table.ndim != 2 or len(grad) != len(table) or table.dtype != torch.int32:
        raise ValueError(f"rows {tuple(rows.shape)}, grad {tuple(grad.shape)}, table {tuple(table.shape)} do not fit together")
    if groups < 1 or rows.shape[1] % groups or grad.shape[1] % groups or rows.dtype != grad.dtype:
        raise ValueError(f"rows {tuple(rows.shape)} {rows.dtype}, grad {tuple(grad.shape)} {grad.dtype}, groups={groups}")
    if not (_on_tensor_cores(rows) and len(table) and rows.numel() and grad.numel()):
        return _gathered_grad_kernel(rows, grad, table, groups)
    return _correlate(rows.contiguous(), grad.contiguous(), table.contiguous(), groups)


def _check(rows: Tensor, kernel: Tensor, table: Tensor, groups: int, *, channels: int) -> None:
    """Checks all that keeps kernels within their arrays, except the contents of the table."""
    if kernel.ndim != 3 or groups < 1 or kernel.shape[2] % groups:
        raise ValueError(f"kernel must be (K, C_in / groups, C_out), got {tuple(kernel.shape)} with groups={groups}")
    if table.dtype != torch.int32 or table.ndim != 2 or table.shape[1] != kernel.shape[0]:
        raise ValueError(f"table must be (N, {kernel.shape[0]}) int32, got {tuple(table.shape)} {table.dtype}")
    if rows.ndim != 2 or rows.shape[1] != channels or rows.dtype != kernel.dtype:
        raise ValueError(f"rows must be (N, {channels}) {kernel.dtype}, got {tuple(rows.shape)} {rows.dtype}")
    if not rows.device == kernel.device == table.device:
        raise ValueError(f"rows are on {rows.device}, the kernel on {kernel.device}, the table on {table.device}")


# Through Triton.


@cache
def _kernels() -> Any:
    """The Triton kernels, or None without Triton. Imported at the first use, since that takes a while."""
    try:
        import sparkme.ops.triton_kernels as kernels  # noqa: PLC0415  (Triton, which may not load)
    except ImportError as error:
        warnings.warn(
            f"Triton does not load ({error}): sparse convolutions on CUDA gather their neighbours in memory instead, which is"
            " several times slower. Install the triton that belongs to this torch.",
            stacklevel=2,
        )
        return None
    return kernels


def _on_tensor_cores(rows: Tensor) -> bool:
    return rows.dtype in (torch.bfloat16, torch.float32) and _kernels() is not None


def _precision(dtype: torch.dtype) -> str:
    """The precision of products; for float32 that of cuDNN's convolutions in the dense network."""
    if dtype == torch.bfloat16:
        return "tf32"  # unused
    cudnn = torch.backends.cudnn
    conv = getattr(cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is None:
        return "tf32" if cudnn.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


@dataclass(frozen=True)
class Blocks:
    """The block of a product that one program computes; in a kernel's gradient, `rows` is the reduction."""

    rows: int
    channels_in: int
    channels_out: int
    warps: int
    stages: int = 4  # one is for the table's entries, which must arrive before the rows

    def options(self) -> dict[str, int]:
        return {
            "BLOCK": self.rows,
            "BLOCK_IN": self.channels_in,
            "BLOCK_OUT": self.channels_out,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _fit(size: int, most: int) -> int:
    """The smallest power of two that covers `size`, between 16 (what a tensor core takes) and `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def convolution_blocks(width: int, out_width: int, dtype: torch.dtype, precision: str, few: bool = False) -> Blocks:
    """With `few` rows, larger blocks would leave multiprocessors idle."""
    if dtype == torch.float32 and precision == "ieee":  # without tensor cores, registers are scarce
        return Blocks(64, _fit(width, 16), _fit(out_width, 64), warps=4, stages=2)
    channels_in, channels_out = _fit(width, 64 if dtype == torch.bfloat16 else 32), _fit(out_width, 128)
    if channels_out <= 64:
        return Blocks(128, channels_in, channels_out, warps=4)
    return Blocks(*((64, channels_in, channels_out, 4) if few else (128, channels_in, channels_out, 8)), stages=5)


def correlation_blocks(width: int, out_width: int, dtype: torch.dtype, precision: str) -> Blocks:
    if dtype == torch.float32 and precision == "ieee":
        return Blocks(16, _fit(width, 64), _fit(out_width, 64), warps=4, stages=2)
    channels_in, channels_out = _fit(width, 128), _fit(out_width, 128)
    small, half = channels_in * channels_out <= 64 * 64, dtype == torch.bfloat16
    if small:  # longer pieces of rows keep a program busy
        return Blocks(128 if half else 64, channels_in, channels_out, warps=4, stages=3)
    return Blocks(64 if half else 32, channels_in, channels_out, warps=4 if half else 8, stages=5)


def _wide(*tensors: Tensor) -> bool:
    return any(tensor.numel() >= 2**31 for tensor in tensors)


def _guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device. Its interpreter, in the tests, runs on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _convolve(
    out: Tensor, rows: Tensor, kernel: Tensor, table: Tensor, groups: int, *, exchange: bool = False, skip: bool = False
) -> None:
    """Writes `out`. With `exchange` the kernel is read as (K, C_out, C_in), for the gradient of the rows.

    `skip` is for the gradient of a strided convolution. In a 3x3 window with stride 2, a row has 1, 2, 2 or 4 offsets,
    depending on whether its x and y are even. A block of adjacent rows has all offsets, and 3/4 of its products would be zero.
    So a block takes every 64th row, which agree on x and y, and skips offsets that none of its rows has. Blocks whose rows do
    not agree are merely slower, and the order of reading rows costs nothing.
    """
    kernels, precision = _kernels(), _precision(rows.dtype)
    groups, kernel = _merge_groups(kernel.contiguous(), groups)
    taps, width, out_channels = kernel.shape
    out_width = out_channels // groups
    wide = _wide(out, rows, table)
    tap_stride, in_stride, out_stride, group_stride = width * out_channels, out_channels, 1, out_width
    with _guard(rows):
        if not exchange and groups == 1 and width < NARROW:
            weights = kernel.flatten(0, 1)
            weights = F.pad(weights, (0, 0, 0, _span(taps * width) - taps * width))
            for part, columns in _columns(rows, table):
                torch.mm(columns, weights, out=out[part])
            return
        if exchange:
            width, out_width, in_stride, out_stride = out_width, width, out_stride, in_stride
        programs = _ceil_div(len(out), 128) * groups * _ceil_div(out_width, 128)
        few = not skip and programs < 3 * _multiprocessors(rows.device)
        blocks = convolution_blocks(width, out_width, rows.dtype, precision, few)
        if skip:  # its inner loop has the entries of the table already
            blocks = replace(blocks, stages=1) if blocks.stages < 4 else replace(blocks, warps=4, stages=3)
        apart = APART if skip else 1
        while apart > 1 and apart * blocks.rows > len(out):
            apart //= 2
        row_blocks = apart * _ceil_div(_ceil_div(len(out), apart), blocks.rows)
        kernels.convolve[(row_blocks * groups * _ceil_div(out_width, blocks.channels_out),)](
            out,
            rows,
            kernel,
            table,
            len(out),
            taps,
            groups,
            width,
            out_width,
            tap_stride,
            in_stride,
            out_stride,
            group_stride,
            APART=apart,
            SKIP=skip,
            WIDE=wide,
            PRECISION=precision,
            **blocks.options(),
        )


def _span(columns: int) -> int:
    """`columns` rounded up so that a row is a multiple of 16 bytes, for tensor cores."""
    return _ceil_div(columns, 8) * 8


def _columns(rows: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The neighbours of a part of the rows at a time, (n, span), with offsets and channels side by side."""
    kernels, taps, width = _kernels(), table.shape[1], rows.shape[1]
    span, block = _span(taps * width), 1024
    with _guard(rows):
        for part in _parts(len(table), span * rows.element_size()):
            own = table[part]
            columns = rows.new_empty(len(own), span)
            kernels.gather_columns[(_ceil_div(own.numel(), block),)](
                columns,
                rows,
                own,
                own.numel(),
                TAPS=taps,
                WIDTH=width,
                SPAN=span,
                WIDE=_wide(rows),
                BLOCK=block,
                num_warps=4,
                num_stages=2,
            )
            yield part, columns


def _correlate(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    """The gradient of the kernel. Parts of the rows are summed separately, and then added in a fixed order."""
    kernels, precision = _kernels(), _precision(rows.dtype)
    merged = _group_merge(groups, rows.shape[1] // groups)
    groups //= merged
    taps, width, out_width = table.shape[1], rows.shape[1] // groups, grad.shape[1] // groups
    if groups == 1 and width < NARROW:
        products = (columns.t() @ grad[part] for part, columns in _columns(rows, table))
        total = next(products).float()
        for product in products:
            total += product
        return _split_groups(total[: taps * width].view(taps, width, out_width).to(rows.dtype), groups, merged)
    blocks = correlation_blocks(width, out_width, rows.dtype, precision)
    tiles = groups * _ceil_div(width, blocks.channels_in) * _ceil_div(out_width, blocks.channels_out)
    programs = tiles * taps
    size = taps * width * grad.shape[1]
    splits = min(
        _ceil_div(2 * _multiprocessors(rows.device), programs),
        PARTIAL_BYTES // (4 * size),
        _ceil_div(len(table), 4 * blocks.rows),
    )
    splits = max(1, splits)
    chunk = _ceil_div(_ceil_div(len(table), splits), blocks.rows) * blocks.rows
    splits = _ceil_div(len(table), chunk)
    partial = rows.new_empty(splits, taps, width, grad.shape[1], dtype=torch.float32)
    wide = _wide(rows, grad, table)
    with _guard(rows):
        kernels.correlate[(tiles, taps, splits)](
            partial,
            rows,
            grad,
            table,
            len(table),
            taps,
            groups,
            width,
            out_width,
            chunk,
            WIDE=wide,
            PRECISION=precision,
            **blocks.options(),
        )
    total = (partial.sum(0) if splits > 1 else partial[0]).to(rows.dtype)
    return _split_groups(total, groups, merged)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _group_merge(groups: int, width: int) -> int:
    """How many adjacent groups to merge into one, with zeros between them, to fill a tensor core's tile."""
    return next(m for m in range(1, groups + 1) if groups % m == 0 and (m * width >= 32 or m == groups))


def _merge_groups(kernel: Tensor, groups: int) -> tuple[int, Tensor]:
    """The number of merged groups, and the kernel for them."""
    taps, width, out_channels = kernel.shape
    merged = _group_merge(groups, width)
    if merged == 1:
        return groups, kernel
    groups //= merged
    each = out_channels // (groups * merged)
    wide = kernel.new_zeros(taps, merged, width, groups, merged, each)
    wide.diagonal(0, 1, 4).copy_(kernel.view(taps, width, groups, merged, each).transpose(3, 4))
    return groups, wide.view(taps, merged * width, out_channels)


def _split_groups(kernel: Tensor, groups: int, merged: int) -> Tensor:
    """The inverse of `_merge_groups`."""
    if merged == 1:
        return kernel
    taps, width, out_channels = kernel.shape
    parts = kernel.view(taps, merged, width // merged, groups, merged, out_channels // (groups * merged))
    return parts.diagonal(0, 1, 4).transpose(3, 4).reshape(taps, width // merged, out_channels).contiguous()


# Through memory.


def _parts(num_rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, GATHERED_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # the row of a table's entry -1


def _gather(padded: Tensor, table: Tensor, groups: int) -> Tensor:
    """(groups, N, K * width)"""
    neighbours = padded[table.long()].view(*table.shape, groups, padded.shape[1] // groups)
    return neighbours.permute(2, 0, 1, 3).reshape(groups, len(table), -1)


def _gathered_conv(rows: Tensor, kernel: Tensor, table: Tensor, groups: int) -> Tensor:
    taps, width, out_channels = kernel.shape
    weights = kernel.reshape(taps, width, groups, out_channels // groups).permute(2, 0, 1, 3).flatten(1, 2)
    padded = _with_zero_row(rows)
    out = rows.new_empty(len(table), out_channels)
    for part in _parts(len(table), taps * rows.shape[1] * rows.element_size()):
        product = torch.bmm(_gather(padded, table[part], groups), weights)
        out[part].view(-1, groups, out_channels // groups).copy_(product.transpose(0, 1))
    return out


def _gathered_grad_kernel(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    taps, width, out_width = table.shape[1], rows.shape[1] // groups, grad.shape[1] // groups
    padded = _with_zero_row(rows)
    total = rows.new_zeros(groups, taps * width, out_width, dtype=torch.promote_types(rows.dtype, torch.float32))
    for part in _parts(len(table), taps * rows.shape[1] * rows.element_size()):
        grads = grad[part].reshape(-1, groups, out_width).transpose(0, 1)
        total += torch.bmm(_gather(padded, table[part], groups).transpose(1, 2), grads)
    parts = total.view(groups, taps, width, out_width).permute(1, 2, 0, 3)
    return parts.reshape(taps, width, groups * out_width).to(rows.dtype).contiguous()


def _exchange(kernel: Tensor, groups: int) -> Tensor:
    """(K, C_in / groups, C_out) to (K, C_out / groups, C_in)."""
    taps, width, out_channels = kernel.shape
    parts = kernel.reshape(taps, width, groups, out_channels // groups)
    return parts.permute(0, 3, 2, 1).reshape(taps, out_channels // groups, groups * width)
