"""Dense maps to rows and back, patch by patch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparkme.ops.library import check_channels, check_device, check_float, check_patches, check_sites, define

__all__ = ["densify", "densify_reference", "voxelise", "voxelise_reference"]


@define()
def _voxelise(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    return dense.new_empty(patches.shape[0] * pixels**2, dense.shape[1])


@define()
def _densify(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None) -> Tensor:
    batch, f_h, f_w = slots.shape
    return rows.new_empty(batch, f_h * pixels, f_w * pixels, rows.shape[1]).permute(0, 3, 1, 2)


def voxelise(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    """Copies the visible patches of a (B, C, f_h * pixels, f_w * pixels) map, of any memory format, to (P * pixels^2, C)
    rows."""
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
    """(B, f_h * p, f_w * p) int64: the row of every pixel, -1 where it is hidden."""
    inside = torch.arange(pixels, device=slots.device)
    first = slots.long().repeat_interleave(pixels, 1).repeat_interleave(pixels, 2) * pixels**2
    within = (inside.view(-1, 1) * pixels + inside).repeat(slots.shape[1], slots.shape[2])
    return torch.where(first >= 0, first + within, -1)


def voxelise_reference(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    numbers = row_numbers(slots, pixels).flatten()
    places = numbers.argsort()[len(numbers) - len(patches) * pixels**2 :]  # of the rows, behind those of hidden pixels
    return dense.permute(0, 2, 3, 1).flatten(0, 2)[places]


def densify_reference(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None) -> Tensor:
    background = rows.new_zeros(1, rows.shape[1]) if fill is None else fill.to(rows.dtype).unsqueeze(0)
    return torch.cat([rows, background])[row_numbers(slots, pixels)].permute(0, 3, 1, 2)  # -1 is the last row
