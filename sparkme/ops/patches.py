"""Images and maps cut into patches, put together again, and chosen from."""

from __future__ import annotations

import torch
from torch import Tensor


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
