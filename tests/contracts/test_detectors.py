"""Detectors compute what plain torchvision code computes, on any pyramid, and learn from any image."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from small_resnet import resnet
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import sparkme
from sparkme.networks.detectors import HEADS, create_detector, detect, loss_of
from sparkme.networks.pyramid import Pyramid

CHANNELS, CLASSES = 64, 2
MOST = {head: 12 if "rcnn" in head else 100 for head in HEADS}  # objects; masks take their time


def images(*sizes: tuple[int, int], channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(channels, *size, generator=generator) for size in sizes]


def target(height: int, width: int, *boxes: tuple[float, float, float, float]) -> dict[str, Tensor]:
    """Objects of classes 1, 2, 1, ... that fill their boxes; few enough for one class where there is one box."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    labels = torch.tensor([1 + i % 2 for i in range(len(boxes))], dtype=torch.int64)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels, "masks": masks}


TARGETS = [target(64, 96, (4, 6, 40, 50), (30, 10, 90, 60)), target(64, 96, (10, 20, 35, 44))]


def of_torchvision(head: str, norm: bool, score_threshold: float, size: int = 64, channels: int = CHANNELS) -> nn.Module:
    """A detector as torchvision's own functions build it; images whose shorter side is `size` keep their size."""
    first = 0 if "rcnn" in head else 1
    layers = {f"layer{i + 1}": str(i) for i in range(first, 4)}
    body = resnet()
    extra = None if first == 0 else LastLevelP6P7(channels, channels)
    layer = nn.BatchNorm2d if norm else None
    backbone = BackboneWithFPN(body, layers, [8, 12, 16, 24][first:], channels, extra, layer)
    sizes: dict[str, Any] = {"min_size": size, "max_size": 10**6, "_skip_resize": True}  # in training; it draws sizes else
    if head in ("mask-rcnn", "faster-rcnn"):
        parts: dict[str, Any] = {"box_score_thresh": score_threshold, "box_detections_per_img": MOST[head]}
        if channels == 256 and not norm:  # what torchvision makes by itself
            return (MaskRCNN if head == "mask-rcnn" else FasterRCNN)(backbone, CLASSES + 1, **sizes, **parts)
        if head == "mask-rcnn":
            parts["mask_head"] = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=layer)
            parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, CLASSES + 1)
        parts["rpn_head"] = RPNHead(channels, 3, conv_depth=2 if norm else 1)
        parts["box_head"] = (
            FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm_layer=layer)
            if norm
            else TwoMLPHead(channels * 49, 4 * channels)
        )
        parts["box_predictor"] = FastRCNNPredictor(4 * channels, CLASSES + 1)
        return (MaskRCNN if head == "mask-rcnn" else FasterRCNN)(backbone, **sizes, **parts)
    if head == "fcos":
        return FCOS(backbone, CLASSES + 1, **sizes, score_thresh=score_threshold, detections_per_img=MOST[head])
    with_norm = {}
    if norm:
        with_norm["head"] = RetinaNetHead(channels, 9, CLASSES + 1, norm_layer=lambda width: nn.GroupNorm(32, width))
    return RetinaNet(backbone, CLASSES + 1, **sizes, **with_norm, score_thresh=score_threshold, detections_per_img=MOST[head])


def own(head: str, norm: bool = False, score_threshold: float = 0.05, channels: int = CHANNELS) -> nn.Module:
    pyramid = sparkme.pyramid(resnet())
    options = {"channels": channels, "norm": norm, "score_threshold": score_threshold, "max_detections": MOST[head]}
    return create_detector(pyramid, head, CLASSES, **options)  # type: ignore[arg-type]


def losses_of_training(detector: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    """Trains as torchvision's references do, on two images."""
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 8  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    torch.manual_seed(1)
    history = []
    for _ in range(steps):
        losses = detector.train()(images((64, 96), (64, 96)), TARGETS)
        optimizer.zero_grad()
        loss_of(losses).backward()
        optimizer.step()
        history.append({name: value.detach() for name, value in losses.items()})
    return history


@pytest.mark.parametrize(("norm", "channels"), [(False, 256), (False, CHANNELS), (True, CHANNELS)])
@pytest.mark.parametrize("head", HEADS)
def test_seed_and_recipe_give_the_losses_of_plain_torchvision(head: str, norm: bool, channels: int) -> None:
    torch.manual_seed(0)
    plain = of_torchvision(head, norm, 0.05, channels=channels)
    torch.manual_seed(0)
    detector = own(head, norm, channels=channels)
    weights, expected = detector.state_dict(), plain.state_dict()
    assert [*weights] == [*expected]
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    steps = {256: 2}.get(channels, 20 if "rcnn" in head and not norm else 5)
    found, wanted = losses_of_training(detector, steps), losses_of_training(plain, steps)
    assert steps < 5 or sum(wanted[-1].values()) < sum(wanted[0].values())  # it learns
    for losses, references in zip(found, wanted, strict=True):
        assert [*losses] == [*references]
        for name, reference in references.items():
            torch.testing.assert_close(losses[name], reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", HEADS)
def test_it_finds_what_plain_torchvision_finds(head: str) -> None:
    threshold = {"retinanet": 0.0098, "fcos": 0.05}.get(head, 0.3)
    torch.manual_seed(0)
    detector = own(head, score_threshold=threshold).eval()
    plain = of_torchvision(head, False, threshold).eval()
    plain.load_state_dict(detector.state_dict())
    detect(detector, images((20, 20)), [(20, 20)])  # padding is larger than the image, which must not change what comes
    photographs = images((64, 100), (64, 75))
    with torch.no_grad():
        expected = [plain([photograph])[0] for photograph in photographs]  # each on its own: a batch would be padded
    found = detect(detector, photographs, [(64, 100), (64, 75)])
    for objects, reference in zip(found, expected, strict=True):
        if head in ("retinanet", "fcos"):  # untrained, they find the background as well
            kept = reference["labels"] > 0
            assert not kept.all()
            reference = {name: value[kept] for name, value in reference.items()}
        assert len(objects.labels) > 3
        torch.testing.assert_close(objects.boxes, reference["boxes"])
        torch.testing.assert_close(objects.scores, reference["scores"])
        assert torch.equal(objects.labels, reference["labels"] - 1)
        masks = [*objects.masks()]
        if head == "mask-rcnn":
            assert torch.equal(torch.stack(masks), reference["masks"][:, 0] > 0.5) and masks[0].dtype == torch.bool
        else:
            assert not masks and objects.probabilities is None


def test_boxes_and_masks_are_in_pixels_of_the_image_before_it_was_resized() -> None:
    torch.manual_seed(0)
    detector = own("mask-rcnn", score_threshold=0.3).eval()
    small, large = detect(detector, images((64, 96), (64, 96))[:1] * 2, [(64, 96), (128, 288)])
    torch.testing.assert_close(large.boxes, small.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    first, *_ = large.masks()
    assert first.shape == (128, 288) and len([*large.masks()]) == len(large.boxes) > 3
    assert large.probabilities is not None and large.probabilities.shape == (len(large.boxes), 28, 28)
    inside = torch.stack([*large.masks()]).any(0)
    assert inside.any() and not inside.all()


@pytest.mark.parametrize("training", [True, False])
def test_images_are_normalised_and_padded_but_not_resized(training: bool) -> None:
    pyramid = sparkme.pyramid(resnet())
    transform = create_detector(pyramid, "fcos", 1, channels=64).transform.train(training)
    numbers = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(30, 70), (45, 20)]]
    batch, targets = transform(numbers, [target(30, 70, (0, 1, 2, 3)), target(45, 20)])
    assert batch.tensors.shape == (2, 3, 64, 96) and batch.image_sizes == [(30, 70), (45, 20)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pyramid.mean, pyramid.std))
    torch.testing.assert_close(batch.tensors[0, :, :30, :70], (numbers[0] / 255 - mean) / std)
    assert not batch.tensors[0, :, 30:].any() and not batch.tensors[1, :, :, 20:].any()
    assert torch.equal(targets[0]["boxes"], torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    assert torch.equal(transform([n / 255 for n in numbers])[0].tensors, batch.tensors)


def three_scales() -> Pyramid:
    return sparkme.pyramid(resnet(), num_scales=3)


def five_scales() -> Pyramid:
    return sparkme.pyramid("timm:mobilenetv3_small_050", num_scales=5)


PYRAMIDS = [
    lambda: sparkme.pyramid("timm:convnext_atto"),
    lambda: sparkme.pyramid(torchvision.models.resnet18()),
    three_scales,
    five_scales,
]


@pytest.mark.parametrize("make", PYRAMIDS, ids=["convnext", "resnet", "3 scales", "5 scales"])
@pytest.mark.parametrize("head", HEADS)
def test_every_weight_learns_on_any_pyramid(head: str, make: Callable[[], Pyramid]) -> None:
    torch.manual_seed(0)
    detector = create_detector(make(), head, CLASSES, channels=CHANNELS, max_detections=5)
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 8
    losses = detector(images((64, 96), (64, 96)), TARGETS)
    loss_of(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
    (found,) = detect(detector.eval(), images((70, 90)), [(70, 90)])
    assert found.boxes.shape == (len(found.scores), 4)


def test_anchors_grow_with_the_stride_and_every_map_is_used() -> None:
    detector = create_detector(five_scales(), "faster-rcnn", 1, channels=8)
    assert detector.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,), (512,))
    assert detector.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert create_detector(five_scales(), "fcos", 1, channels=64).anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects_leave_it_sound(head: str, norm: bool) -> None:
    torch.manual_seed(0)
    detector = own(head, norm)
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 8  # type: ignore[union-attr]
    losses = detector(images((64, 64), (64, 64)), [target(64, 64)] * 2)
    loss_of(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(value.isfinite().all() for value in detector.state_dict().values())
    detector(images((64, 64), (64, 64)), [target(64, 64), target(64, 64, (5, 5, 30, 30))])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("head", HEADS)
def test_one_class_and_images_of_any_number_of_channels(head: str, channels: int) -> None:
    torch.manual_seed(0)
    pyramid = sparkme.pyramid(resnet(channels))
    with pytest.raises(ValueError, match=f"of 0 channels, and its images have {channels}; set its attributes"):
        create_detector(pyramid, head, 1)
    pyramid.mean, pyramid.std = (0.4,) * channels, (0.2,) * channels
    detector = create_detector(pyramid, head, 1, channels=CHANNELS, score_threshold=0.0, max_detections=200)
    given = images((64, 64), channels=channels)
    loss_of(detector(given, [target(64, 64, (5, 5, 40, 40))])).backward()
    (found,) = detect(detector.eval(), given, [(64, 64)])
    assert len(found.labels) > 0 and not found.labels.any()


@pytest.mark.parametrize("head", HEADS)
def test_coordinates_are_exact_under_autocast(head: str) -> None:
    torch.manual_seed(0)
    detector = own(head, score_threshold=0.0)
    wide = images((32, 640))
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 8  # type: ignore[union-attr]
    anchors: list[Tensor] = []
    generator = next(module for module in detector.modules() if isinstance(module, AnchorGenerator))
    generator.register_forward_hook(lambda module, args, output: anchors.extend(output))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(wide, [target(32, 640, (401, 2, 463, 27))])
        (found,) = detect(detector.eval(), wide, [(32, 640)])
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    detect(detector, wide, [(32, 640)])
    assert torch.equal(anchors[0], anchors[-1]) and anchors[0].dtype == torch.float32
    edges = found.boxes[found.boxes > 256]
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert len(edges) > 1 and not torch.equal(edges, edges.bfloat16().float())


def test_a_copy_is_independent_and_a_pickle_is_whole() -> None:
    torch.manual_seed(0)
    detector = own("faster-rcnn").eval()
    given = images((64, 64))
    (expected,) = detect(detector, given, [(64, 64)])
    copied, pickled = copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.zero_()
    for twin in (copied, pickled):
        (found,) = detect(twin, given, [(64, 64)])
        assert torch.equal(found.boxes, expected.boxes) and len(found.boxes) > 3
    assert not torch.equal(detect(detector, given, [(64, 64)])[0].scores, expected.scores)


def test_proposals() -> None:
    torch.manual_seed(0)
    detector: Any = create_detector(sparkme.pyramid(resnet()), "faster-rcnn", CLASSES, channels=CHANNELS, proposals=12)
    counts: list[int] = []
    detector.rpn.register_forward_hook(lambda module, args, output: counts.extend(len(boxes) for boxes in output[0]))
    given = images((128, 128))
    detector.eval()(given)
    assert counts == [6]
    detector.train()(given, [target(128, 128, (5, 5, 30, 30))])
    assert 6 < counts[-1] <= 12
    standard: Any = create_detector(sparkme.pyramid(resnet()), "faster-rcnn", CLASSES, channels=CHANNELS)
    plain: Any = of_torchvision("faster-rcnn", norm=False, score_threshold=0.05)
    for name in ("_pre_nms_top_n", "_post_nms_top_n"):
        assert getattr(standard.rpn, name) == getattr(plain.rpn, name)


def test_what_does_not_fit_is_refused() -> None:
    pyramid = sparkme.pyramid(resnet())
    with pytest.raises(ValueError, match="choose one of mask-rcnn, faster-rcnn, retinanet, fcos"):
        create_detector(pyramid, "yolo", 1)
    with pytest.raises(ValueError, match="at least one class, not 0"):
        create_detector(pyramid, "fcos", 0)
    with pytest.raises(ValueError, match=r"choose 64, 96, 128, \.\.\. channels, not 32"):
        create_detector(pyramid, "fcos", 1, channels=32)
    leaps = sparkme.pyramid(resnet(), taps=["layer1", "layer3"])
    with pytest.raises(ValueError, match=r"strides double, not \(4, 16\); choose retinanet or fcos"):
        create_detector(leaps, "mask-rcnn", 1)
    assert create_detector(leaps, "retinanet", 1).backbone.strides == (16,)
    with pytest.raises(ValueError, match=r"stride of 8 or more: its strides are \(4,\)"):
        create_detector(sparkme.pyramid(resnet(), taps=["layer1"]), "fcos", 1)
    with pytest.raises(ValueError, match="training mode"):
        detect(create_detector(pyramid, "fcos", 1), images((32, 32)), [(32, 32)])
