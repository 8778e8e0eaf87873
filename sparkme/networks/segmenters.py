"""Semantic segmentation on a network's feature maps: a class for each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from sparkme.networks.pyramid import Pyramid

HEADS = ("unet", "fcn", "deeplabv3")

_MIN_WIDTH = 16  # of U-Net's blocks
_DEEPLAB_WIDTH = 256


def create_segmenter(pyramid: Pyramid, head: str, num_classes: int, *, channels: int = 256) -> Segmenter:
    """A network for semantic segmentation with a new head behind the pyramid.

    - `unet` (Ronneberger et al., MICCAI 2015) goes from the deepest map to the shallowest, and takes in each map on its way.
    - `fcn` joins all maps: a feature pyramid network (Lin et al., CVPR 2017), whose levels are enlarged to the shallowest
      stride and concatenated for torchvision's `FCNHead`. torchvision's own FCN reads a single map, at stride 8 of a dilated
      network.
    - `deeplabv3` (Chen et al., 2017) is torchvision's `DeepLabHead` on the deepest map. torchvision has it at stride 8 with
      dilations of 12, 24 and 36. Here the map is mostly at stride 32, and the dilations are as many pixels of the image: 3, 6
      and 9. Its outlines are the coarsest of the three. In training it needs two images a batch.

    Args:
        pyramid: the network; it becomes part of the segmenter.
        head: one of `HEADS`.
        num_classes: with the background, if that is a class.
        channels: of `unet`'s first block, halved in each of the next; of each level of `fcn`. `deeplabv3` always has 256.

    Raises:
        ValueError: no such head, or other channels than it has.
    """
    if head not in HEADS:
        raise ValueError(f"no segmentation head {head!r}; choose one of {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"a segmenter needs at least one class, not {num_classes}")
    classifier: nn.Module
    if head == "unet":
        classifier = UNet(pyramid.channels, num_classes, channels)
    elif head == "fcn":
        classifier = FCN(pyramid.channels, num_classes, channels)
    elif channels != _DEEPLAB_WIDTH:
        raise ValueError(f"deeplabv3 has {_DEEPLAB_WIDTH} channels, not {channels}; choose unet or fcn for others")
    else:
        rate = max(1, 96 // pyramid.strides[-1])
        classifier = DeepLabV3(pyramid.channels[-1], num_classes, (rate, 2 * rate, 3 * rate))
    return Segmenter(pyramid, classifier).train()


class Segmenter(nn.Module):
    """A pyramid and a head on its maps. Weights have the names of torchvision's segmentation models.

    Attributes:
        backbone: the network.
        classifier: the head: a list of maps, shallow to deep, to logits at the stride of one of them.
    """

    def __init__(self, pyramid: Pyramid, classifier: nn.Module) -> None:
        super().__init__()
        self._pyramid = (pyramid,)  # no submodule, so that weights are named after the network alone
        self.backbone, self.classifier = pyramid.network, classifier

    @property
    def pyramid(self) -> Pyramid:
        """The pyramid that was given."""
        return self._pyramid[0]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) of any sides to logits (B, classes, H, W)."""
        height, width = images.shape[2:]
        stride = self.pyramid.strides[-1]
        padded = F.pad(images, (0, -width % stride, 0, -height % stride))
        logits = _resized(self.classifier(self.pyramid.maps(padded)), padded)
        return logits[:, :, :height, :width]


class UNet(nn.Module):
    """For each map but the deepest: enlarges what comes from below to its size, concatenates both, and convolves twice."""

    def __init__(self, channels: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        widths = [channels[-1], *(max(_MIN_WIDTH, width >> i) for i in range(len(channels) - 1))]
        self.blocks = nn.ModuleList(
            nn.Sequential(Conv2dNormActivation(below + skipped, width, 3), Conv2dNormActivation(width, width, 3))
            for (below, width), skipped in zip(pairwise(widths), reversed(channels[:-1]))
        )
        self.scores = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, channels[i], ., .), shallow to deep, to logits (B, classes, ., .) of the shallowest's size."""
        *skipped, x = maps
        for block, skip in zip(self.blocks, reversed(skipped)):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], 1))
        logits: Tensor = self.scores(x)
        return logits


class FCN(nn.Module):
    """A feature pyramid network, whose levels are enlarged and concatenated for a convolution and the scores."""

    def __init__(self, channels: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork([*channels], width, norm_layer=nn.BatchNorm2d)
        self.head = FCNHead(len(channels) * width, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """As `UNet`."""
        first, *deeper = self.fpn({str(i): value for i, value in enumerate(maps)}).values()
        logits: Tensor = self.head(torch.cat([first, *(_resized(level, first) for level in deeper)], 1))
        return logits


class DeepLabV3(DeepLabHead):
    """torchvision's head on the deepest of the maps."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps to logits of the deepest's size."""
        logits: Tensor = super().forward(maps[-1])
        return logits


@torch.no_grad()
def predict_tiled(segmenter: nn.Module, images: Tensor, window: int, overlap: float = 0.5) -> Iterator[Tensor]:
    """Logits of large images, computed window by window and averaged where windows overlap.

    They come in strips from top to bottom, as those of a whole photograph may take gigabytes. The classes of its pixels are
    `torch.cat([strip.argmax(1) for strip in predict_tiled(segmenter, images, 512)], 1)`.

    Args:
        segmenter: of `create_segmenter`, in eval mode; or any function from images to logits of their size.
        images: (B, C, H, W), normalised.
        window: side of the square windows. Sides of images may be smaller; if both are, there is one strip, equal to what
            the segmenter returns.
        overlap: of neighbouring windows, as a share of their side, from 0 to less than 1.

    Yields:
        (B, classes, rows, W) float32, whose rows add up to H.
    """
    if window < 1 or not 0 <= overlap < 1:
        raise ValueError(f"a window of {window} pixels with an overlap of {overlap}: it must be in [0, 1)")
    if getattr(segmenter, "training", False):
        raise ValueError("the segmenter is in training mode; call its eval()")
    height, width = (min(window, side) for side in images.shape[2:])
    tops, lefts = (_starts(size, side, overlap) for size, side in zip(images.shape[2:], (height, width)))
    num_above, num_beside = (
        _num_windows(starts, side, size, images.device)
        for starts, side, size in zip((tops, lefts), (height, width), images.shape[2:])
    )
    total: Tensor | None = None  # of the rows of this row of windows
    for top, following in pairwise([*tops, images.shape[2]]):
        for left in lefts:
            logits = segmenter(images[:, :, top : top + height, left : left + width]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, images.shape[3])
            total[:, :, :, left : left + width] += logits
        assert total is not None
        rows = following - top
        yield total[:, :, :rows] / (num_above[top:following, None] * num_beside)
        total = F.pad(total[:, :, rows:], (0, 0, 0, rows))


def predict_labels(network: nn.Module, images: Tensor, window: int, size: Sequence[int]) -> Tensor:
    """The class of each pixel.

    Args:
        network: a segmenter in eval mode.
        images: (1, C, H, W), normalised; larger ones are predicted in windows.
        window: their side.
        size: height and width of the result, to which the scores are interpolated.

    Returns:
        (height, width) uint8.
    """
    scores = torch.cat([*predict_tiled(network, images, window)], 2)
    if [*scores.shape[2:]] == [*size]:
        return scores[0].argmax(0).to(torch.uint8)
    # A class at a time: the scores of all classes of a large photograph would take gigabytes.
    highest = scores.new_full((1, 1, *size), -torch.inf)
    labels = torch.zeros_like(highest, dtype=torch.uint8)
    for number, each in enumerate(scores.split(1, 1)):
        enlarged = F.interpolate(each, (size[0], size[1]), mode="bilinear", align_corners=False)
        labels[enlarged > highest] = number
        highest = torch.maximum(highest, enlarged)
    return labels[0, 0]


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin, so that they cover a side; the last ends with it."""
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, size - window, step), size - window]


def _num_windows(starts: list[int], window: int, size: int, device: torch.device) -> Tensor:
    """(size,): how many windows each pixel of a side lies in."""
    numbers = torch.zeros(size, device=device)
    for start in starts:
        numbers[start : start + window] += 1
    return numbers


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=False)
