"""Segmenters compute what torchvision's pieces and plain loops compute, for images of any size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_resnet import resnet
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork

import sparkme
from sparkme.networks.pyramid import Pyramid
from sparkme.networks.segmenters import HEADS, Segmenter, create_segmenter, predict_tiled

CLASSES, WIDTHS = 5, [8, 12, 16, 24]


def images(height: int, width: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def own(head: str, make: Callable[[], Pyramid] = lambda: sparkme.pyramid(resnet())) -> Segmenter:
    torch.manual_seed(0)
    return create_segmenter(make(), head, CLASSES, channels=256 if head == "deeplabv3" else 32)


def trained(segmenter: Segmenter) -> Segmenter:
    """With statistics of batches, in eval mode."""
    with torch.no_grad():
        segmenter(images(64, 96))
    return segmenter.eval()


def test_deeplabv3_is_that_of_torchvision() -> None:
    segmenter = trained(own("deeplabv3"))
    backbone = IntermediateLayerGetter(resnet(), {"layer4": "out"})
    plain = DeepLabV3(backbone, DeepLabHead(24, CLASSES, (3, 6, 9))).eval()
    plain.load_state_dict(segmenter.state_dict())
    large = images(352, 384)  # so that the farthest dilation reaches into the map
    with torch.no_grad():
        assert torch.equal(segmenter(large), plain(large)["out"])


def test_fcn_is_torchvisions_head_on_all_levels_of_its_feature_pyramid_network() -> None:
    segmenter = trained(own("fcn"))
    body = IntermediateLayerGetter(resnet(), {f"layer{i + 1}": str(i) for i in range(4)}).eval()
    fpn, head = FeaturePyramidNetwork(WIDTHS, 32, norm_layer=nn.BatchNorm2d).eval(), FCNHead(4 * 32, CLASSES).eval()
    body.load_state_dict(segmenter.backbone.state_dict())
    fpn.load_state_dict(segmenter.classifier.fpn.state_dict())
    head.load_state_dict(segmenter.classifier.head.state_dict())
    with torch.no_grad():
        levels = fpn(body(images(64, 96)))
        joined = torch.cat([F.interpolate(level, (16, 24), mode="bilinear") for level in levels.values()], 1)
        expected = F.interpolate(head(joined), (64, 96), mode="bilinear")
        assert torch.equal(segmenter(images(64, 96)), expected)


def test_unet_takes_in_each_map_from_the_deepest_to_the_shallowest() -> None:
    segmenter = trained(own("unet"))
    blocks = segmenter.classifier.blocks
    assert [block[0][0].in_channels for block in blocks] == [24 + 16, 32 + 12, 16 + 8]
    assert [block[1][0].out_channels for block in blocks] == [32, 16, 16]
    one, two, three, x = segmenter.pyramid.maps(images(64, 96))
    for block, skipped in zip(blocks, (three, two, one)):
        x = torch.cat([x.repeat_interleave(2, 2).repeat_interleave(2, 3), skipped], 1)
        for convolution, norm, _ in block:
            x = norm(F.conv2d(x, convolution.weight, padding=1)).clamp(min=0)
    expected = F.interpolate(segmenter.classifier.scores(x), (64, 96), mode="bilinear")
    torch.testing.assert_close(segmenter(images(64, 96)), expected)


PYRAMIDS = [
    lambda: sparkme.pyramid("timm:convnext_atto"),
    lambda: sparkme.pyramid(torchvision.models.resnet18()),
    lambda: sparkme.pyramid(resnet(), num_scales=3),
    lambda: sparkme.pyramid("timm:mobilenetv3_small_050", num_scales=5),
    lambda: sparkme.pyramid(resnet(), taps=["layer1", "layer3"]),
]


@pytest.mark.parametrize("make", PYRAMIDS, ids=["convnext", "resnet", "3 scales", "5 scales", "leaps"])
@pytest.mark.parametrize("head", HEADS)
def test_every_weight_learns_from_images_of_odd_sides(head: str, make: Callable[[], Pyramid]) -> None:
    segmenter = own(head, make)
    logits = segmenter(images(53, 75))
    assert logits.shape == (2, CLASSES, 53, 75)
    F.cross_entropy(logits, torch.randint(0, CLASSES, (2, 53, 75))).backward()
    assert [n for n, p in segmenter.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in segmenter.parameters() if p.grad is not None)
    assert segmenter.eval()(images(7, 40, batch=1)).shape == (1, CLASSES, 7, 40)


@pytest.mark.parametrize("head", HEADS)
def test_odd_images_are_padded_at_right_and_bottom(head: str) -> None:
    segmenter = trained(own(head))
    padded = F.pad(images(40, 70), (0, 26, 0, 24))
    with torch.no_grad():
        assert torch.equal(segmenter(images(40, 70)), segmenter(padded)[:, :, :40, :70])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("head", HEADS)
def test_images_of_any_number_of_channels(head: str, channels: int) -> None:
    segmenter = own(head, lambda: sparkme.pyramid(resnet(channels)))
    assert segmenter(images(32, 64, channels=channels)).shape == (2, CLASSES, 32, 64)


@pytest.mark.parametrize("head", HEADS)
def test_it_learns_what_lies_where(head: str) -> None:
    segmenter = own(head)
    pictures = torch.zeros(4, 3, 64, 64)
    classes = torch.zeros(4, 64, 64, dtype=torch.int64)
    for i, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        pictures[i, i % 3, top : top + 32, left : left + 32] = 2
        classes[i, top : top + 32, left : left + 32] = 1 + i % 3
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(segmenter(pictures), classes).backward()
        optimizer.step()
    right = (segmenter(pictures).argmax(1) == classes).float().mean()
    assert right > 0.9  # the background alone is 0.75


def plain_tiles(segmenter: Callable[[Tensor], Tensor], x: Tensor, tops: list[int], lefts: list[int], side: int) -> Tensor:
    total, number = torch.zeros(x.shape[0], CLASSES, *x.shape[2:]), torch.zeros(x.shape[2:])
    for top in tops:
        for left in lefts:
            total[..., top : top + side, left : left + side] += segmenter(x[..., top : top + side, left : left + side])
            number[top : top + side, left : left + side] += 1
    assert number.min() > 0
    return total / number


@pytest.mark.parametrize(
    ("overlap", "tops", "lefts"),
    [(0.5, [0, 32, 64, 80], [0, 32, 36]), (0.0, [0, 64, 80], [0, 36]), (0.75, [*range(0, 80, 16), 80], [0, 16, 32, 36])],
)
@torch.no_grad()
def test_tiles_are_averaged_where_they_overlap(overlap: float, tops: list[int], lefts: list[int]) -> None:
    segmenter, x = trained(own("unet")), images(144, 100)
    strips = [*predict_tiled(segmenter, x, 64, overlap)]
    assert [strip.shape[2] for strip in strips] == [b - a for a, b in zip(tops, [*tops[1:], 144])]
    torch.testing.assert_close(torch.cat(strips, 2), plain_tiles(segmenter, x, tops, lefts, 64))
    assert not torch.allclose(torch.cat(strips, 2), segmenter(x), atol=1e-3)


@torch.no_grad()
def test_an_image_that_fits_the_window_is_one_tile() -> None:
    segmenter = trained(own("fcn"))
    (strip,) = predict_tiled(segmenter, images(50, 64), 64)
    assert torch.equal(strip, segmenter(images(50, 64)))
    wide = torch.cat([*predict_tiled(segmenter, images(50, 100), 64)], 2)  # only one side is longer
    assert wide.shape == (2, CLASSES, 50, 100)
    torch.testing.assert_close(wide[..., :32], segmenter(images(50, 100)[..., :64])[..., :32])


def test_a_copy_is_independent_and_a_pickle_is_whole() -> None:
    segmenter = trained(own("unet"))
    with torch.no_grad():
        expected = segmenter(images(32, 32))
        copied, pickled = copy.deepcopy(segmenter), pickle.loads(pickle.dumps(segmenter))
        for parameter in segmenter.parameters():
            parameter.zero_()
        assert torch.equal(copied(images(32, 32)), expected) and torch.equal(pickled(images(32, 32)), expected)
        assert not segmenter(images(32, 32)).any()


def test_what_does_not_fit_is_refused() -> None:
    pyramid = sparkme.pyramid(resnet())
    with pytest.raises(ValueError, match="choose one of unet, fcn, deeplabv3"):
        create_segmenter(pyramid, "segformer", 2)
    with pytest.raises(ValueError, match="at least one class, not 0"):
        create_segmenter(pyramid, "unet", 0)
    with pytest.raises(ValueError, match="deeplabv3 has 256 channels, not 128"):
        create_segmenter(pyramid, "deeplabv3", 2, channels=128)
    segmenter = own("unet")
    with pytest.raises(ValueError, match="training mode"):
        next(predict_tiled(segmenter, images(64, 64), 32))
    with pytest.raises(ValueError, match=r"overlap of 1.0: it must be in \[0, 1\)"):
        next(predict_tiled(segmenter.eval(), images(64, 64), 32, 1.0))
