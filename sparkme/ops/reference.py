"""What every operator computes, in plain PyTorch: slow, differentiable, on any device. The tests hold the kernels to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.ops.patches import patchify, unpatchify


def offsets(size: int, dilation: int) -> list[int]:
    """Pixels from an output to the inputs of a window of `size` taps: centred if odd, else starting at the output."""
    start = -(size // 2) if size % 2 else 0
    return [(start + i) * dilation for i in range(size)]


def row_numbers(slots: Tensor, pixels: int) -> Tensor:
    """(B, f_h * p, f_w * p) int64: the row of every pixel, -1 where it is hidden."""
    inside = torch.arange(pixels, device=slots.device)
    first = slots.long().repeat_interleave(pixels, 1).repeat_interleave(pixels, 2) * pixels**2
    within = (inside.view(-1, 1) * pixels + inside).repeat(slots.shape[1], slots.shape[2])
    return torch.where(first >= 0, first + within, -1)


def neighbour_table(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int, dilation: int, transposed: bool
) -> Tensor:
    down, across = offsets(kernel_size[0], dilation), offsets(kernel_size[1], dilation)
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
    dense = torch.stack(columns, 1)
    rows = patchify(dense, p_target).flatten(0, 1)[patches.long()]
    return rows.reshape(-1, len(columns)).int()


def gather(rows: Tensor, table: Tensor) -> Tensor:
    """(N, K, C): the neighbours of every row, zero where there is none."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded[table.long()]  # -1 is the last row


def sparse_conv(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int) -> Tensor:
    taps, width, out_channels = kernel.shape
    neighbours = gather(rows, table).view(-1, taps, groups, width)
    kernels = kernel.view(taps, width, groups, out_channels // groups)
    return torch.einsum("nkgi,kigo->ngo", neighbours, kernels).reshape(-1, out_channels)


def depthwise_conv(
    rows: Tensor, kernel: Tensor, bias: Tensor | None, slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int],
    stride: int, dilation: int,
) -> Tensor:  # fmt: skip
    table = neighbour_table(slots, patches, pixels, kernel_size, stride, dilation, False)
    out = torch.einsum("nkc,kc->nc", gather(rows, table), kernel)
    return out if bias is None else out + bias


def max_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return gather(rows, table).masked_fill((table < 0).unsqueeze(2), float("-inf")).max(1).values


def avg_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return gather(rows, table).sum(1) / table.shape[1]


def voxelise(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    return patchify(dense, pixels).flatten(0, 1)[patches.long()].flatten(0, 1)


def densify(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None) -> Tensor:
    batch, f_h, f_w = slots.shape
    area, channels = pixels**2, rows.shape[1]
    background = rows.new_zeros(channels) if fill is None else fill.to(rows.dtype)
    every = torch.cat([rows.view(-1, area, channels), background.expand(1, area, channels)])[slots.long()]
    return unpatchify(every.view(batch, f_h * f_w, area, channels), (f_h, f_w))


def linear(rows: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ kernel if bias is None else rows @ kernel + bias


def batch_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.var(0, correction=0)


def norm_statistics(
    rows: Tensor, epsilon: float, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    mean, variance = batch_statistics(rows)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
    if running_var is not None:
        running_var.lerp_(variance * len(rows) / max(1, len(rows) - 1), momentum)
    return mean, (variance + epsilon).rsqrt()


def batch_norm(
    rows: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Tensor | None,
    residual: Tensor | None, ceiling: float | None, training: bool,
) -> Tensor:  # fmt: skip
    if training:  # the same values, with a gradient; the epsilon is what is left
        own_mean, own_variance = batch_statistics(rows)
        epsilon = inverse_deviation**-2 - own_variance.detach()
        mean, inverse_deviation = own_mean, (own_variance + epsilon).rsqrt()
    out = (rows - mean) * inverse_deviation
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    out = _follow(out, factor, residual)
    return out if ceiling is None else out.clamp(0, ceiling)


def product_statistics(rows: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
    mean = rows.mean(0)
    return mean, (rows - mean).t() @ (rows - mean), *batch_statistics(rows @ kernel)


def linear_batch_norm(
    rows: Tensor, kernel: Tensor, row_mean: Tensor, gram: Tensor, mean: Tensor, inverse_deviation: Tensor,
    weight: Tensor | None, bias: Tensor | None, factor: Tensor | None, residual: Tensor | None, ceiling: float | None,
) -> Tensor:  # fmt: skip
    return batch_norm(rows @ kernel, mean, inverse_deviation, weight, bias, factor, residual, ceiling, True)


def layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    deviation = (variance + epsilon).rsqrt()
    out = (rows - mean) * deviation
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, torch.cat([mean, deviation], 1)


def mlp(
    rows: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, scale: Tensor | None,
    factor: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden = F.linear(rows, weight1, bias1)
    out = F.linear(F.gelu(hidden), weight2, bias2)
    return _follow(out if scale is None else out * scale, factor, residual), hidden


def _follow(out: Tensor, factor: Tensor | None, residual: Tensor | None) -> Tensor:
    out = out if factor is None else out * factor.repeat_interleave(len(out) // len(factor)).unsqueeze(1)
    return out if residual is None else out + residual.flatten(0, -2)
