"""Neighbour tables: where the neighbours of every row are, for a convolution or a pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from sparkme.ops.library import check_sites, define
from sparkme.ops.patches import row_numbers, voxelise_reference

__all__ = ["neighbour_table", "neighbour_table_reference"]


@define()
def _neighbour_table(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int, dilation: int, transposed: bool
) -> Tensor:
    target = pixels if transposed else pixels // stride
    return slots.new_empty(patches.shape[0] * target**2, kernel_size[0] * kernel_size[1], dtype=torch.int32)


def neighbour_table(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: tuple[int, int], *, stride: int = 1, dilation: int = 1,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Where the neighbours of every row are.

    Args:
        slots, patches: the visible patches, see `sparkme.ops`.
        pixels: p, pixels along a patch of the convolution's INPUT.
        kernel_size: (kh, kw). An odd side is centred on the output pixel, an even one starts at it.
        stride: of the convolution.
        dilation: of the kernel.
        transposed: the inverse question, asked by gradients: which output a given input contributes to through a tap.

    Returns:
        (N, kh * kw) int32: for each output row and tap the input row, or -1 where it is hidden or outside of the image.
        Transposed, for each input row and tap the output row, or -1.
    """
    check_sites(slots, patches)
    if pixels < 1 or stride < 1 or dilation < 1 or min(kernel_size) < 1:
        raise ValueError(f"pixels {pixels}, kernel_size {kernel_size}, stride {stride}, dilation {dilation} must be positive")
    if pixels % stride:
        raise ValueError(f"stride {stride} does not divide the patch of pixels={pixels}")
    return torch.ops.sparkme.neighbour_table(slots, patches, pixels, kernel_size, stride, dilation, transposed)


def neighbour_table_reference(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int, dilation: int, transposed: bool
) -> Tensor:
    down, across = _offsets(kernel_size[0], dilation), _offsets(kernel_size[1], dilation)
    p_source, p_target = (pixels // stride, pixels) if transposed else (pixels, pixels // stride)
    source, target = row_numbers(slots, p_source), row_numbers(slots, p_target)
    y, x = torch.arange(target.shape[1], device=slots.device), torch.arange(target.shape[2], device=slots.device)
    columns = []
    for dx in across:  # the vertical offset runs fastest, as in MinkowskiEngine's kernels
        for dy in down:
            ys, xs = (y - dy, x - dx) if transposed else (y * stride + dy, x * stride + dx)
            fits = ((ys % stride == 0).view(-1, 1) & (xs % stride == 0)) if transposed else torch.ones_like(target[0]) > 0
            ys, xs = (ys // stride, xs // stride) if transposed else (ys, xs)
            h, w = source.shape[1:]
            fits = fits & ((ys >= 0) & (ys < h)).view(-1, 1) & ((xs >= 0) & (xs < w))
            columns.append(torch.where(fits, source[:, ys.clamp(0, h - 1)][:, :, xs.clamp(0, w - 1)], -1))
    return voxelise_reference(torch.stack(columns, 1), slots, patches, p_target).int()


def _offsets(size: int, dilation: int) -> list[int]:
    """Pixels from an output to the inputs of a window of `size` taps: centred if odd, else starting at the output."""
    start = -(size // 2) if size % 2 else 0
    return [(start + i) * dilation for i in range(size)]


def gather(rows: Tensor, table: Tensor) -> Tensor:
    """(N, K, C): the neighbours of every row, zero where there is none."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded[table.long()]  # -1 is the last row
