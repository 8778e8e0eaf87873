"""torchvision's detectors on a network's feature maps.

A detector is torchvision's own module, so its weights load into torchvision's code. Its transform takes images of any number of
channels, as bytes or as values from 0 to 1. It does not resize them: what loads images does that before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from sparkme.networks.pyramid import Pyramid

HEADS = ("mask-rcnn", "faster-rcnn", "retinanet", "fcos")

_RATIOS = (0.5, 1.0, 2.0)  # height to width of anchors
_GROUPS = 32  # of torchvision's group norms


class Found(NamedTuple):
    """The objects that a detector found in one image, the surest first.

    Attributes:
        boxes: (N, 4) float32: left, top, right, bottom in pixels of the image at its `size`.
        scores: (N,) float32, from 0 to 1.
        labels: (N,) int64, from 0.
        probabilities: (N, 28, 28) float32: of each pixel of the mask in its box; None if the detector has no masks.
        size: height and width.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    probabilities: Tensor | None
    size: tuple[int, int]

    def masks(self) -> Iterator[Tensor]:
        """The mask of each object, (height, width) bool. One at a time, since a hundred of a photograph take gigabytes."""
        if self.probabilities is not None:
            for box, probability in zip(self.boxes, self.probabilities):
                yield paste_masks_in_image(probability[None, None], box[None], self.size)[0, 0] > 0.5


def create_detector(
    pyramid: Pyramid,
    head: str,
    num_classes: int,
    *,
    channels: int = 256,
    norm: bool = False,
    proposals: int = 2000,
    score_threshold: float = 0.05,
    max_detections: int = 100,
) -> nn.Module:
    """A detector of torchvision with new weights behind the pyramid.

    The R-CNNs use all maps and one more, pooled from the deepest. RetinaNet and FCOS use the maps from stride 8 on and two
    more, P6 and P7. Anchors have torchvision's sizes for these strides. Under autocast, anchors and the outputs of heads are
    float32, since bfloat16 rounds coordinates above 256.

    Args:
        pyramid: the network with its images' mean and standard deviation; it becomes part of the detector.
        head: one of `HEADS`.
        num_classes: without the background.
        channels: of each level of the feature pyramid network and of the heads' convolutions; torchvision's linear layers of
            1,024 features are four times as wide.
        norm: adds batch norms to the feature pyramid network. The R-CNNs get the heads of torchvision's
            `maskrcnn_resnet50_fpn_v2`: batch norms in box and mask head, four convolutions in the box head, two in that of the
            region proposals. RetinaNet's head gets group norms, as in `retinanet_resnet50_fpn_v2`. FCOS's always has them.
        proposals: the best regions that an R-CNN keeps of each level in training, before overlapping ones are removed, and of
            the image after that; half as many in prediction. 2,000 is torchvision's. Fewer save time on a CPU.
        score_threshold: objects with a lower score are left out.
        max_detections: objects per image at most.

    Returns:
        torchvision's MaskRCNN, FasterRCNN, RetinaNet or FCOS in training mode, where it takes a list of images (C, H, W) and a
        list of targets, and returns losses. In eval mode `detect` calls it. Labels are from 1, since 0 is the background, so
        its weights have `num_classes` + 1 classes. They load into the same detector on torchvision's `BackboneWithFPN`.

    Raises:
        ValueError: no such head, or the pyramid or channels do not fit it.
    """
    if head not in HEADS:
        raise ValueError(f"no detector {head!r}; choose one of {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"a detector needs at least one class, not {num_classes}")
    if len(pyramid.mean) != pyramid.in_channels or len(pyramid.std) != pyramid.in_channels:
        raise ValueError(
            f"the pyramid has mean and standard deviation of {len(pyramid.mean)} channels, and its images have "
            f"{pyramid.in_channels}; set its attributes `mean` and `std`"
        )
    detector: nn.Module
    if head in ("mask-rcnn", "faster-rcnn"):
        detector = _rcnn(pyramid, head, num_classes, channels, norm, proposals, score_threshold, max_detections)
    else:
        detector = _one_stage(pyramid, head, num_classes, channels, norm, score_threshold, max_detections)
    detector.transform = Transform(pyramid)
    for name, module in detector.named_modules():
        if name in ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
            module.register_forward_hook(_in_float32)
    return detector.train()


@torch.no_grad()
def detect(detector: nn.Module, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Found]:
    """The objects in each image. What is found does not depend on which other images are given.

    Args:
        detector: of `create_detector`, in eval mode.
        images: each (C, H, W) on the detector's device, uint8 or float from 0 to 1, at the size that the detector works with.
        sizes: height and width of each image before it was resized; results are in its pixels.
    """
    if detector.training:
        raise ValueError("the detector is in training mode; call its eval()")
    alike: dict[tuple[int, int], list[int]] = {}
    for number, image in enumerate(images):
        alike.setdefault((image.shape[-2], image.shape[-1]), []).append(number)
    found: dict[int, Found] = {}
    for numbers in alike.values():  # padding of images to one size would change what is found near their edges
        for number, output in zip(numbers, detector([images[i] for i in numbers])):
            found[number] = _found(output, images[number].shape[-2:], sizes[number])
    return [found[number] for number in range(len(images))]


def _found(output: dict[str, Tensor], seen: Sequence[int], size: tuple[int, int]) -> Found:
    """What a detector found in an image of (height, width) `seen`, in pixels of its original size."""
    objects = output["labels"] > 0  # RetinaNet and FCOS have a score for the background too
    boxes = resize_boxes(output["boxes"][objects].float(), seen, size)
    masks = output["masks"][objects, 0].float() if "masks" in output else None
    return Found(boxes, output["scores"][objects].float(), output["labels"][objects] - 1, masks, size)


def set_score_threshold(detector: nn.Module, score: float) -> None:
    """Leaves out objects with a lower score from now on."""
    (getattr(detector, "roi_heads", None) or detector).score_thresh = score


def loss_of(losses: dict[str, Tensor]) -> Tensor:
    """The sum of a detector's losses, as in torchvision's references."""
    return torch.stack([*losses.values()]).sum()


class Backbone(nn.Module):
    """A pyramid's maps from a stride on, and a feature pyramid network. Weights have the names of `BackboneWithFPN`.

    Attributes:
        body: the network.
        fpn: the feature pyramid network.
        out_channels: channels of each level.
        strides: of the pyramid's maps that are used.
    """

    def __init__(self, pyramid: Pyramid, channels: int, extra: ExtraFPNBlock, *, norm: bool, min_stride: int = 1) -> None:
        super().__init__()
        self._pyramid = (pyramid,)  # no submodule, so that weights are named after the network alone
        self._first = sum(stride < min_stride for stride in pyramid.strides)
        self.strides = pyramid.strides[self._first :]
        if not self.strides:
            raise ValueError(f"no map of the network has a stride of {min_stride} or more: its strides are {pyramid.strides}")
        self.body = pyramid.network
        norm_layer = nn.BatchNorm2d if norm else None
        self.fpn = FeaturePyramidNetwork([*pyramid.channels[self._first :]], channels, extra, norm_layer)
        self.out_channels = channels

    @property
    def pyramid(self) -> Pyramid:
        """The pyramid that was given."""
        return self._pyramid[0]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) to maps (B, out_channels, ., .) by name, shallow to deep."""
        maps = self.pyramid.maps(images)[self._first :]
        levels: dict[str, Tensor] = self.fpn({str(i): value for i, value in enumerate(maps)})
        return levels


class Transform(GeneralizedRCNNTransform):
    """Normalises images and pads them to a batch. It resizes nothing, and leaves results in pixels of the images given.

    Padded sides are multiples of 32 and of the deepest stride. Masks stay the head's probabilities, (N, 1, 28, 28).
    """

    def __init__(self, pyramid: Pyramid) -> None:
        multiple = math.lcm(32, pyramid.strides[-1])
        super().__init__(0, 0, [*pyramid.mean], [*pyramid.std], size_divisible=multiple)

    def normalize(self, image: Tensor) -> Tensor:
        """(C, H, W) of uint8, or float from 0 to 1."""
        normalised: Tensor = super().normalize(image.float() / 255 if image.dtype == torch.uint8 else image)
        return normalised

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: Any) -> list[dict[str, Tensor]]:
        return result


class Anchors(AnchorGenerator):
    """Anchors in float32 where the maps have less precision."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


def _rcnn(
    pyramid: Pyramid,
    head: str,
    num_classes: int,
    channels: int,
    norm: bool,
    proposals: int,
    threshold: float,
    max_detections: int,
) -> nn.Module:
    if any(deeper != 2 * stride for stride, deeper in pairwise(pyramid.strides)):
        raise ValueError(f"{head} needs maps whose strides double, not {pyramid.strides}; choose retinanet or fcos")
    backbone = Backbone(pyramid, channels, LastLevelMaxPool(), norm=norm)
    strides = (*backbone.strides, 2 * backbone.strides[-1])
    anchors = Anchors(tuple((8 * stride,) for stride in strides), (_RATIOS,) * len(strides))
    # In torchvision's own order, so that a seed gives the same weights.
    detector, parts = FasterRCNN, dict[str, Any]()
    norm_layer = nn.BatchNorm2d if norm else None
    if head == "mask-rcnn":
        detector = MaskRCNN
        parts["mask_roi_pool"] = _roi_pool(backbone.strides, 14)
        parts["mask_head"] = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm_layer)
        parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes + 1)
    parts["rpn_head"] = RPNHead(channels, len(_RATIOS), conv_depth=2 if norm else 1)
    parts["box_roi_pool"] = _roi_pool(backbone.strides, 7)
    if norm:
        box_head: nn.Module = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm_layer=norm_layer)
    else:
        box_head = TwoMLPHead(channels * 7 * 7, 4 * channels)
    parts |= {"box_head": box_head, "box_predictor": FastRCNNPredictor(4 * channels, num_classes + 1)}
    made: nn.Module = detector(
        backbone,
        rpn_anchor_generator=anchors,
        **{f"rpn_{when}_nms_top_n_train": proposals for when in ("pre", "post")},
        **{f"rpn_{when}_nms_top_n_test": proposals // 2 for when in ("pre", "post")},
        box_score_thresh=threshold,
        box_detections_per_img=max_detections,
        **parts,
    )
    return made


def _one_stage(
    pyramid: Pyramid, head: str, num_classes: int, channels: int, norm: bool, threshold: float, max_detections: int
) -> nn.Module:
    if (head == "fcos" or norm) and (channels % _GROUPS or channels == _GROUPS):  # a group needs two values, P7 may be 1x1
        raise ValueError(f"{head} has group norms of {_GROUPS} groups: choose 64, 96, 128, ... channels, not {channels}")
    backbone = Backbone(pyramid, channels, LastLevelP6P7(channels, channels), norm=norm, min_stride=8)
    strides = (*backbone.strides, 2 * backbone.strides[-1], 4 * backbone.strides[-1])
    options: dict[str, Any] = {"score_thresh": threshold, "detections_per_img": max_detections}
    made: nn.Module
    if head == "fcos":
        anchors = Anchors(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        made = FCOS(backbone, num_classes + 1, anchor_generator=anchors, **options)
    else:
        octave = [2 ** (i / 3) for i in range(3)]
        anchors = Anchors(tuple(tuple(int(4 * s * scale) for scale in octave) for s in strides), (_RATIOS,) * len(strides))
        if norm:
            group_norm = partial(nn.GroupNorm, _GROUPS)
            options["head"] = RetinaNetHead(channels, len(_RATIOS) * 3, num_classes + 1, norm_layer=group_norm)
        made = RetinaNet(backbone, num_classes + 1, anchor_generator=anchors, **options)
    return made


def _roi_pool(strides: tuple[int, ...], size: int) -> MultiScaleRoIAlign:
    """Pools from all maps of the pyramid.

    Strides are set, since torchvision guesses them from the first batch, and wrongly if its images are much smaller than their
    padding.
    """
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    levels = [stride.bit_length() - 1 for stride in strides]
    pool.map_levels = initLevelMapper(levels[0], levels[-1], pool.canonical_scale, pool.canonical_level)
    return pool


def _in_float32(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: what autocast computed in 16 bits is handed on in 32."""
    return tree_map(lambda value: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value, output)
