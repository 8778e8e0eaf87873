"""The light UNet decoder, an ordinary dense network (decoder.py:17-74 of the official code).

Parameter names equal the official ones (`dec.<i>.up_sample`, `dec.<i>.conv.<j>`, `proj`), so its weights load as they are.
"""

import math
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn

from sparkme.sparse.batch_norm import normalise, processes_of, statistics_of_batch

MAX_WIDTH = 8192  # which has 2.6 billion weights; the paper's is 768


class UNetBlock(nn.Module):
    """Doubles the resolution: (B, in, H, W) -> (B, out, 2 H, 2 W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(in_channels, in_channels, kernel_size=4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor, fuses: bool = False) -> Tensor:
        """`fuses`: norm and ReLU6 run as one operator of `sparkme.ops`, where the layers allow it."""
        x = self.up_sample(x)
        conv, norm, _, last, last_norm = self.conv
        if not (fuses and can_fuse(norm, x) and can_fuse(last_norm, x)):
            out: Tensor = self.conv(x)
            return out
        return _batch_norm(last_norm, last(_batch_norm(norm, conv(x), ceiling=6.0)))


class Decoder(nn.Module):
    """From densified maps, deepest first, to an image.

    Args:
        stride: total stride of the encoder, a power of two; there are log2(stride) blocks.
        width: channels of the deepest densified map, halved by every block.
        out_channels: channels of the image.

    Raises:
        ValueError: the stride is no power of two, or the width cannot be halved that often, or is absurd.
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

    def forward(self, maps: dict[int, Tensor], fuses: bool = False) -> Tensor:
        """Takes maps (B, width / 2^i, f_h 2^i, f_w 2^i) by i, of which the first, i = 0, must be there; returns
        (B, out_channels, H, W). The others are added where the resolution is theirs. `fuses` is as of UNetBlock."""
        x = maps[0]
        for i, block in enumerate(self.dec):
            if i and i in maps:
                x = x + maps[i]
            x = block(x, fuses)
        image: Tensor = self.proj(x)
        return image


def can_fuse(norm: nn.Module, x: Tensor) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a batch norm of (B, C, H, W) maps is one of their rows, and nobody listens to it."""
    listens = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    in_rows = x.is_contiguous(memory_format=torch.channels_last)
    known = type(norm) is nn.BatchNorm2d or processes_of(norm) > 1
    return known and norm.training and in_rows and not listens and not torch.compiler.is_compiling()


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor, ceiling: float | None = None) -> Tensor:
    """In training mode, and clamped to [0, ceiling]."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    out = normalise(norm, rows, *statistics_of_batch(norm, rows), training=True, ceiling=ceiling)
    return out.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


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
