"""The depthwise convolution, patch by patch with its halo."""

import torch
from torch import Tensor

from sparkme.ops.library import check_channels, check_patches, check_same, define
from sparkme.ops.patches import gather, neighbour_table_reference

__all__ = ["depthwise_conv", "depthwise_conv_reference"]


@define()
def _depthwise_conv(
    rows: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    patches: Tensor,
    pixels: int,
    kernel_size: list[int],
    stride: int,
    dilation: int,
) -> Tensor:
    return rows.new_empty(patches.shape[0] * (pixels // stride) ** 2, rows.shape[1])


@define()
def _depthwise_conv_grad_rows(
    grad: Tensor,
    kernel: Tensor,
    slots: Tensor,
    patches: Tensor,
    pixels: int,
    kernel_size: list[int],
    stride: int,
    dilation: int,
) -> Tensor:
    return grad.new_empty(patches.shape[0] * pixels**2, grad.shape[1])


@define()
def _depthwise_conv_grad_kernel(
    rows: Tensor,
    grad: Tensor,
    slots: Tensor,
    patches: Tensor,
    pixels: int,
    kernel_size: list[int],
    stride: int,
    dilation: int,
) -> Tensor:
    return rows.new_empty(kernel_size[0] * kernel_size[1], rows.shape[1])


def depthwise_conv(
    rows: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    patches: Tensor,
    pixels: int,
    kernel_size: tuple[int, int],
    *,
    stride: int = 1,
    dilation: int = 1,
) -> Tensor:
    """Convolution with one odd-sized filter per channel, patch by patch with its halo.

    Args:
        rows: (P * pixels^2, C).
        kernel: (kh * kw, C).
        bias: (C,) or None.
        slots, patches, pixels, kernel_size, stride, dilation: as for `neighbour_table`.

    Returns:
        (P * (pixels / stride)^2, C).
    """
    check_patches(rows, slots, patches, pixels)
    if min(kernel_size) < 1 or kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
        raise ValueError(f"kernel_size {tuple(kernel_size)} must be odd and positive")
    if kernel.shape != (kernel_size[0] * kernel_size[1], rows.shape[1]):
        raise ValueError(f"kernel must be {(kernel_size[0] * kernel_size[1], rows.shape[1])}, got {tuple(kernel.shape)}")
    if stride < 1 or dilation < 1 or pixels % stride:
        raise ValueError(f"stride {stride} must divide pixels={pixels}, and dilation {dilation} be positive")
    check_same("kernel", kernel, rows)
    check_channels("bias", bias, rows.shape[1], rows, same=True)
    return torch.ops.sparkme.depthwise_conv(rows, kernel, bias, slots, patches, pixels, kernel_size, stride, dilation)


def depthwise_conv_reference(
    rows: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    patches: Tensor,
    pixels: int,
    kernel_size: list[int],
    stride: int,
    dilation: int,
) -> Tensor:
    table = neighbour_table_reference(slots, patches, pixels, kernel_size, stride, dilation, False)
    out = torch.einsum("nkc,kc->nc", gather(rows, table), kernel)
    return out if bias is None else out + bias
