"""SparK's light UNet decoder, a dense network (decoder.py:17-74 of the official code).

Parameter names equal the official ones (`dec.<i>.up_sample`, `dec.<i>.conv.<j>`, `proj`), so official weights load unchanged.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparkme.sparse.batch_norm import BatchNorm

MAX_WIDTH = 8192  # 2.6 billion weights; the paper's width is 768


class UNetBlock(nn.Module):
    """Doubles the resolution: (B, in, H, W) -> (B, out, 2 H, 2 W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(in_channels, in_channels, kernel_size=4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, bias=False),
            BatchNorm(in_channels, ceiling=6.0),
            nn.Identity(),  # where the official network has its ReLU6
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            BatchNorm(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.up_sample(x))
        return out


class Decoder(nn.Module):
    """Decodes densified maps, deepest first, into an image.

    Args:
        stride: total stride of the encoder, a power of two; the decoder has log2(stride) blocks.
        width: channels of the deepest densified map, halved by every block.
        out_channels: channels of the image.

    Raises:
        ValueError: the stride is not a power of two, or the width is too large or cannot be halved that often.
    """

    def __init__(self, stride: int, width: int, out_channels: int = 3) -> None:
        super().__init__()
        num_blocks = int(math.log2(stride))
        if 2**num_blocks != stride:
            raise ValueError(f"the decoder doubles the resolution, so stride {stride} must be a power of two")
        if width <= 0 or width % stride:
            raise ValueError(f"decoder width {width} is not a multiple of {stride}, and is halved {num_blocks} times")
        if width > MAX_WIDTH:
            raise ValueError(
                f"decoder width {width} makes a decoder of about {39 * width**2 / 1e9:,.0f} billion weights; use at most "
                f"{MAX_WIDTH}"
            )
        widths = [width >> i for i in range(num_blocks + 1)]
        self.dec = nn.ModuleList(UNetBlock(a, b) for a, b in pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], out_channels, kernel_size=1)
        self.apply(_initialise)

    def forward(self, maps: dict[int, Tensor]) -> Tensor:
        """Maps (B, width / 2^i, f_h 2^i, f_w 2^i) by i to (B, out_channels, H, W). Map 0 is required; block i adds map i to its
        input."""
        x = maps[0]
        for i, block in enumerate(self.dec):
            if i and i in maps:
                x = x + maps[i]
            x = block(x)
        image: Tensor = self.proj(x)
        return image


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Initial values of the official decoder (decoder.py, `initialize`); norms already start at one and zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
