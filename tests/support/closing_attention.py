"""A network that ends with attention, as detectors' backbones do."""

import torch
from torch import Tensor, nn


def trunk(in_channels: int = 3) -> list[nn.Module]:
    """Four convolutions: 32 channels at stride 16."""
    return [nn.Conv2d(a, b, 3, 2, 1) for a, b in [(in_channels, 8), (8, 16), (16, 24), (24, 32)]]


class Attention(nn.Module):
    """As at the end of a detector's backbone: half of the channels attend to all pixels, with convolutions around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.near = nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=width // 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = self.first(x).chunk(2, 1)
        pixels = x.flatten(2)
        mixed = pixels @ (pixels.transpose(1, 2) @ pixels).softmax(-1)
        return self.last(torch.cat([kept, x + mixed.view_as(x) + self.near(x)], 1))


def network(in_channels: int = 3) -> nn.Module:
    return nn.Sequential(*trunk(in_channels), Attention(32))
