"""A network with checkpoints of some hundred kilobytes: three strided convolutions with batch norm."""

from itertools import pairwise

from torch import Tensor, nn

WIDTHS = (4, 8, 16)  # of the maps at strides 2, 4 and 8


class Tiny(nn.Module):
    """Images (B, C, H, W) to scores (B, classes)."""

    def __init__(self, in_chans: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        widths = (in_chans, *WIDTHS)
        self.stages = nn.Sequential(*(self._stage(a, b) for a, b in pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(x)).flatten(1))


def tiny(in_chans: int = 3, num_classes: int = 10) -> Tiny:
    return Tiny(in_chans, num_classes)
