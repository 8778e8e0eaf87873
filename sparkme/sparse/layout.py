"""Converts kernels between MinkowskiEngine's layout and torch's (C_out, C_in / groups, kh, kw).

With coordinates (sample, y, x) the first spatial axis, y, runs fastest in MinkowskiEngine's kernel index k = y + kh * x
(measured). A transposed kernel has the right shape and trains well, so the tests use asymmetric kernels.
"""

import torch
from torch import Tensor


def kernel_to_weight(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """A view of (kh * kw, C_in, C_out) or, for 1x1, (C_in, C_out), as (C_out, C_in, kh, kw)."""
    kh, kw = size
    channels_in, channels_out = kernel.shape[-2:]
    # Channels move before offsets split, so that the gradient has the kernel's own memory order.
    return kernel.view(-1, channels_in, channels_out).permute(2, 0, 1).unflatten(1, (kw, kh)).permute(0, 3, 2, 1)


def dense_order(kernel: Tensor) -> Tensor:
    """The same kernel with memory order (C_out, kh * kw, C_in), which is fast to copy to a channels_last weight."""
    return kernel.movedim(-1, 0).contiguous().movedim(0, -1)


def weight_to_kernel(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `kernel_to_weight`, in the kernel's own `shape`."""
    return weight.permute(3, 2, 1, 0).reshape(shape)


def channelwise_kernel_to_weight(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Depthwise (kh * kw, C) to (C, 1, kh, kw); a view."""
    kh, kw = size
    return kernel.reshape(kw, kh, kernel.shape[1]).permute(2, 1, 0).unsqueeze(1)


def channelwise_weight_to_kernel(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    return weight.squeeze(1).permute(2, 1, 0).reshape(shape)


def block_diagonal(kernel: Tensor, groups: int) -> Tensor:
    """A grouped kernel (K, C_in / groups, C_out) as an ungrouped one (K, C_in, C_out), zero across groups."""
    volume, width, out_channels = kernel.shape
    blocks = kernel.view(volume, width, groups, out_channels // groups)
    full = kernel.new_zeros(volume, groups, width, groups, out_channels // groups)
    group = torch.arange(groups, device=kernel.device)
    full[:, group, :, group, :] = blocks.permute(2, 0, 1, 3)
    return full.view(volume, groups * width, out_channels)


def embed(kernel: Tensor, offsets: list[int], volume: int) -> Tensor:
    """A kernel (K, ...) at the given offsets of a larger one (volume, ...) that is zero elsewhere."""
    return kernel.new_zeros(volume, *kernel.shape[1:]).index_copy(0, torch.tensor(offsets, device=kernel.device), kernel)
