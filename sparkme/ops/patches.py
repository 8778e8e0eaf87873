"""Copies between dense maps and rows of visible patches, and neighbour tables."""

import torch
from torch import Tensor

from sparkme.ops.library import check_channels, check_device, check_float, check_patches, check_sites, define

__all__ = ["densify", "densify_reference", "neighbour_table", "neighbour_table_reference", "voxelise", "voxelise_reference"]


@define()
def _neighbour_table(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int, dilation: int, transposed: bool
) -> Tensor:
    target = pixels if transposed else pixels // stride
    return slots.new_empty(patches.shape[0] * target**2, kernel_size[0] * kernel_size[1], dtype=torch.int32)


@define()
def _voxelise(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    return dense.new_empty(patches.shape[0] * pixels**2, dense.shape[1])


@define()
def _densify(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None) -> Tensor:
    batch, f_h, f_w = slots.shape
    return rows.new_empty(batch, f_h * pixels, f_w * pixels, rows.shape[1]).permute(0, 3, 1, 2)


def neighbour_table(
    slots: Tensor,
    patches: Tensor,
    pixels: int,
    kernel_size: tuple[int, int],
    *,
    stride: int = 1,
    dilation: int = 1,
    transposed: bool = False,
) -> Tensor:
    """The neighbours of every row.

    Args:
        slots, patches: the visible patches, see `sparkme.ops`.
        pixels: p, pixels along a patch of the convolution's INPUT.
        kernel_size: (kh, kw). An odd side is centred on the output pixel, an even one starts at it.
        stride: of the convolution.
        dilation: of the kernel.
        transposed: the inverse table, for gradients.

    Returns:
        (N, kh * kw) int32: for each output row and offset the input row, or -1 if hidden or outside the image. Transposed: for
        each input row and offset the output row, or -1.
    """
    check_sites(slots, patches)
    if pixels < 1 or stride < 1 or dilation < 1 or min(kernel_size) < 1:
        raise ValueError(f"pixels {pixels}, kernel_size {kernel_size}, stride {stride}, dilation {dilation} must be positive")
    if pixels % stride:
        raise ValueError(f"stride {stride} does not divide the patch of pixels={pixels}")
    return torch.ops.sparkme.neighbour_table(slots, patches, pixels, kernel_size, stride, dilation, transposed)


def voxelise(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    """Copies visible patches of a (B, C, f_h * pixels, f_w * pixels) map in any memory format to (P * pixels^2, C) rows."""
    check_sites(slots, patches)
    check_float("dense", dense)
    batch, f_h, f_w = slots.shape
    if pixels < 1 or dense.ndim != 4 or (dense.shape[0], *dense.shape[2:]) != (batch, f_h * pixels, f_w * pixels):
        raise ValueError(f"dense must be ({batch}, C, {f_h * pixels}, {f_w * pixels}), got {tuple(dense.shape)}")
    check_device("dense", dense, slots)
    return torch.ops.sparkme.voxelise(dense, slots, patches, pixels)


def densify(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None = None) -> Tensor:
    """Copies (P * pixels^2, C) rows to their patches of a map; hidden pixels get `fill`, (C,), or zero.

    Returns:
        (B, C, f_h * pixels, f_w * pixels) in channels_last memory.
    """
    check_patches(rows, slots, patches, pixels)
    check_channels("fill", fill, rows.shape[1], rows)
    return torch.ops.sparkme.densify(rows, slots, patches, pixels, fill)


def row_numbers(slots: Tensor, pixels: int) -> Tensor:
    """(B, f_h * p, f_w * p) int64: the row of every pixel; -1 if hidden."""
    inside = torch.arange(pixels, device=slots.device)
    first = slots.long().repeat_interleave(pixels, 1).repeat_interleave(pixels, 2) * pixels**2
    within = (inside.view(-1, 1) * pixels + inside).repeat(slots.shape[1], slots.shape[2])
    return torch.where(first >= 0, first + within, -1)


def gather(rows: Tensor, table: Tensor) -> Tensor:
    """(N, K, C): the neighbours of every row, zero if missing."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded[table.long()]  # -1 is the last row


def _offsets(size: int, dilation: int) -> list[int]:
    """Input pixels relative to an output, for a window of `size` offsets: centred if odd, else starting at the output."""
    start = -(size // 2) if size % 2 else 0
    return [(start + i) * dilation for i in range(size)]


def neighbour_table_reference(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int, dilation: int, transposed: bool
) -> Tensor:
    down, across = _offsets(kernel_size[0], dilation), _offsets(kernel_size[1], dilation)
    p_source, p_target = (pixels // stride, pixels) if transposed else (pixels, pixels // stride)
    source, target = row_numbers(slots, p_source), row_numbers(slots, p_target)
    (h, w), step = source.shape[1:], stride if transposed else 1
    y, x = torch.arange(target.shape[1], device=slots.device), torch.arange(target.shape[2], device=slots.device)
    columns = []
    for dx in across:  # the vertical offset runs fastest, as in MinkowskiEngine's kernels
        for dy in down:
            ys, xs = (y - dy, x - dx) if transposed else (y * stride + dy, x * stride + dx)
            fits_y, fits_x = (ys % step == 0) & (ys >= 0) & (ys < h * step), (xs % step == 0) & (xs >= 0) & (xs < w * step)
            found = source[:, (ys // step).clamp(0, h - 1)][:, :, (xs // step).clamp(0, w - 1)]
            columns.append(torch.where(fits_y.unsqueeze(1) & fits_x, found, -1))
    return voxelise_reference(torch.stack(columns, 1), slots, patches, p_target).int()


def voxelise_reference(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    numbers = row_numbers(slots, pixels).flatten()
    places = numbers.argsort()[len(numbers) - len(patches) * pixels**2 :]  # after the hidden pixels
    return dense.permute(0, 2, 3, 1).flatten(0, 2)[places]


def densify_reference(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None) -> Tensor:
    background = rows.new_zeros(1, rows.shape[1]) if fill is None else fill.to(rows.dtype).unsqueeze(0)
    return torch.cat([rows, background])[row_numbers(slots, pixels)].permute(0, 3, 1, 2)  # -1 is the last row


def patchify(dense: Tensor, p: int) -> Tensor:
    """Cuts a (B, C, H, W) map into patches of p x p pixels: (B, H / p * W / p, p * p, C), all orders row-major."""
    b, c, h, w = dense.shape
    return dense.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, h // p * (w // p), p * p, c)


def unpatchify(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Puts (B, f_h * f_w, p * p, C) patches together again: (B, C, f_h * p, f_w * p) in channels_last memory."""
    b, _, area, c = patches.shape
    f_h, f_w = size
    p = round(area**0.5)
    image = patches.view(b, f_h, f_w, p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(b, f_h * p, f_w * p, c)
    return image.permute(0, 3, 1, 2)


def take_patches(patches: Tensor, index: Tensor) -> Tensor:
    """Selects patches by number: (B, L, A, C) and (B, K) int64 give (B, K, A, C)."""
    sample = torch.arange(len(patches), device=patches.device).view(-1, 1)
    return patches[sample, index]
