"""Dense convolutions times the mask, as the official code emulates sparsity. The baseline for speed, and a cross-check.

Every layer computes on whole maps, hidden pixels included, except BatchNorm, whose statistics need the visible ones.
It is as fast as plain PyTorch gets: it applies the mask only where a window reaches across patches, not after every layer,
since pixelwise layers may leave any values at hidden pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.sparse.engines.base import Engine, layer_norm
from sparkme.sparse.features import DenseFeatures
from sparkme.sparse.layout import channelwise_kernel_to_weight, dense_order, kernel_to_weight
from sparkme.sparse.window import Window

# In torch 2.14, oneDNN on CPUs with AVX2 writes out of bounds in the gradient of a strided channels_last 1x1 convolution with
# few channels (4 and 6, not 8 or 12). Selecting its pixels first gives the same result.
NARROW = 16


class MaskedDenseEngine(Engine[DenseFeatures]):
    """Maps stay dense, (B, C, H, W); norms see the visible pixels only.

    Args:
        memory_format: of convolutions, `torch.channels_last` or `torch.contiguous_format`; pixelwise layers always use the
            former.
    """

    name = "masked-dense"
    layout = DenseFeatures
    bf16 = True

    def __init__(self, memory_format: torch.memory_format = torch.channels_last) -> None:
        self.memory_format = memory_format

    def convolution(
        self, x: DenseFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1
    ) -> DenseFeatures:
        bias = None if bias is None else bias.flatten()
        data = x.data if window.within_patch else x.dense()
        channelwise = kernel.ndim == 2 and groups > 1
        weight = (channelwise_kernel_to_weight if channelwise else kernel_to_weight)(kernel, window.kernel_size)
        if self.memory_format == torch.contiguous_format:  # a 1x1 weight may pass for channels_last, and so would the output
            weight = weight.clone(memory_format=self.memory_format)
        elif 1 in window.kernel_size and window.kernel_size != (1, 1):
            weight = weight.contiguous()  # torch cannot differentiate a channels_last kernel that is one pixel wide
        data, padding = _padded(data, x, window)
        stride = window.stride
        if data.device.type == "cpu" and window.kernel_size == (1, 1) and padding == (0, 0) and data.shape[1] < NARROW:
            data, stride = data[:, :, ::stride, ::stride], 1
        data = data.contiguous(memory_format=self.memory_format)
        out = F.conv2d(data, weight, bias, stride, padding, window.dilation, groups)
        return x.replace(out, x.stride * window.stride, clean=x.clean and window.within_patch and bias is None)

    def max_pool(self, x: DenseFeatures, window: Window) -> DenseFeatures:
        stride = x.stride * window.stride
        lowest = torch.where(x.grid.mask(x.stride, torch.bool), x.data, float("-inf"))
        lowest, padding = _padded(lowest, x, window, float("-inf"))
        if any(p > k // 2 for p, k in zip(padding, window.kernel_size, strict=True)):  # torch's pooling cannot pad more
            across, down = padding[1], padding[0]
            lowest, padding = F.pad(lowest, (across, across, down, down), value=float("-inf")), (0, 0)
        out = F.max_pool2d(lowest, window.kernel_size, window.stride, padding, window.dilation)
        return x.replace(torch.where(x.grid.mask(stride, torch.bool), out, 0.0), stride, clean=True)

    def avg_pool(self, x: DenseFeatures, window: Window) -> DenseFeatures:
        data, padding = _padded(x.dense(), x, window)
        if any(p > k // 2 for p, k in zip(padding, window.kernel_size, strict=True)):
            data, padding = F.pad(data, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
        out = F.avg_pool2d(data, window.kernel_size, window.stride, padding)
        return x.replace(out, x.stride * window.stride, clean=window.within_patch)

    def linear(self, x: DenseFeatures, weight: Tensor, bias: Tensor | None) -> DenseFeatures:
        # A convolution, since oneDNN's is faster than the BLAS matrix product on many CPUs.
        return x.replace(F.conv2d(x.data, weight[:, :, None, None], bias), clean=x.clean and bias is None)

    def layer_norm(self, x: DenseFeatures, weight: Tensor | None, bias: Tensor | None, eps: float) -> DenseFeatures:
        """At every pixel, which is cheaper than gathering the visible ones."""
        pixels = x.data.permute(0, 2, 3, 1)
        out = layer_norm(pixels, weight, bias, eps)
        return x.replace(out.permute(0, 3, 1, 2), clean=x.clean and bias is None)

    def arranged(self, kernel: Tensor) -> Tensor:
        return dense_order(kernel)


def _padded(data: Tensor, x: DenseFeatures, window: Window, value: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """The map, padded where torch's symmetric padding does not fit, and the symmetric padding that remains."""
    sizes = x.grid.size(x.stride)
    behind = [
        (n // window.stride - 1) * window.stride + window.dilation * (k - 1) + 1 - n - before
        for n, k, before in zip(sizes, window.kernel_size, window.padding, strict=True)
    ]
    # Padding after may be up to the stride less than before without changing the number of outputs.
    symmetric = all(after <= before < after + window.stride for before, after in zip(window.padding, behind, strict=True))
    if symmetric and window.border == "zeros":
        return data, window.padding
    around = (window.padding[1], behind[1], window.padding[0], behind[0])
    if window.border == "zeros":
        return F.pad(data, around, value=value), (0, 0)
    return F.pad(data, tuple(max(0, side) for side in around), mode=window.border), (0, 0)
