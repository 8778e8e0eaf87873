"""Where the encoder of a network that predicts maps ends: before its head or decoder, or refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter

import sparkme
from sparkme.sparse.hierarchy import find_hierarchy


def body() -> nn.Sequential:
    """A ResNet-18 without pooling and classifier: 512 channels at stride 32."""
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])


def deepest(network: nn.Module) -> tuple[int, int]:
    tap = find_hierarchy(network).taps[-1]
    return tap.stride, tap.channels


@pytest.mark.parametrize("name", torchvision.models.list_models(module=segmentation))
def test_segmentation_models_of_torchvision_end_with_their_backbone(name: str) -> None:
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, **auxiliary).eval()
    assert isinstance(network.backbone, IntermediateLayerGetter)
    with torch.no_grad():
        *_, last = network.backbone(torch.zeros(1, 3, 64, 96)).values()
    hierarchy = find_hierarchy(network)
    assert (hierarchy.taps[-1].stride, hierarchy.taps[-1].channels) == (64 // last.shape[2], last.shape[1])
    assert "classifier" in hierarchy.left_out and not any(n.startswith("backbone") for n in hierarchy.left_out)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "hrnet_w18_small"])
def test_backbones_of_timm_end_as_their_feature_info_says(name: str) -> None:
    network = timm.create_model(name, features_only=True)
    assert deepest(network) == (network.feature_info.reduction()[-1], network.feature_info.channels()[-1])


class Pyramid(nn.Module):
    """Maps of all strides to the same width, resized and added, then scores: the decoder of many transformers' code."""

    def __init__(self) -> None:
        super().__init__()
        children = dict(torchvision.models.resnet18().named_children())
        self.stem = nn.Sequential(*[children[name] for name in ("conv1", "bn1", "relu", "maxpool")])
        self.stages = nn.ModuleList(children[f"layer{i}"] for i in range(1, 5))
        self.narrow = nn.ModuleList(nn.Conv2d(width, 64, 1) for width in (64, 128, 256, 512))
        self.scores = nn.Conv2d(64, 7, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x), []
        for stage, narrow in zip(self.stages, self.narrow, strict=True):
            x = stage(x)
            maps.append(narrow(x))
        size = maps[0].shape[2:]
        return {"out": self.scores(torch.stack([F.interpolate(m, size=size) for m in maps]).sum(0))}


class UNet(nn.Module):
    """The deepest map goes through `centre` and is enlarged; the decoder is one module, or the layers of the network itself."""

    def __init__(self, centre: nn.Module, width: int, *, flat: bool) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        self.up, self.out = nn.ConvTranspose2d(width, 64, 8, 8), nn.Conv2d(128, 2, 1)
        self.decoder = None if flat else Decoder(centre, self.up, self.out)
        self.centre = centre

    def forward(self, x: Tensor) -> Tensor:
        e, maps = self.encoder, []
        x = e.maxpool(e.relu(e.bn1(e.conv1(x))))
        for layer in (e.layer1, e.layer2, e.layer3, e.layer4):
            x = layer(x)
            maps.append(x)
        if self.decoder is not None:
            return self.decoder(maps)
        return self.out(torch.cat([self.up(self.centre(maps[-1])), maps[0]], 1))


class Decoder(nn.Module):
    def __init__(self, centre: nn.Module, up: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.centre, self.up, self.out = centre, up, out

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.out(torch.cat([self.up(self.centre(maps[-1])), maps[0]], 1))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "a convolution": lambda: nn.Sequential(body(), nn.Conv2d(512, 21, 1)),
    "as many classes as COCO-Stuff": lambda: nn.Sequential(body(), nn.Conv2d(512, 171, 1)),
    "layers in a row": lambda: nn.Sequential(
        *body(),
        nn.Conv2d(512, 128, 3, padding=1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(128, 5, 1),
        nn.Sigmoid(),
    ),
    "enlarged scores": lambda: nn.Sequential(body(), nn.Conv2d(512, 21, 1), nn.Upsample(scale_factor=32)),
    "enlarged features": lambda: nn.Sequential(
        body(), nn.Conv2d(512, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Upsample(scale_factor=32), nn.Conv2d(64, 3, 1)
    ),
    "wrapped": lambda: nn.Sequential(OrderedDict(model=nn.Sequential(body(), nn.Conv2d(512, 21, 1)))),
    "a pyramid": Pyramid,
    "a decoder that begins with an identity": lambda: UNet(nn.Identity(), 512, flat=False),
    "a decoder in the network itself": lambda: UNet(nn.Identity(), 512, flat=True),
    "a decoder that narrows first": lambda: UNet(nn.Conv2d(512, 96, 1), 96, flat=False),
}


@pytest.mark.parametrize("head", HEADS)
def test_own_heads_and_decoders_are_left_out(head: str) -> None:
    assert deepest(HEADS[head]()) == (32, 512)


def test_what_may_be_a_head_is_refused_until_taps_are_named() -> None:
    network = nn.Sequential(*body(), nn.Conv2d(512, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU())
    with pytest.raises(ValueError, match=r"narrow from 512 channels \('7'\) to 128 \('10'\), .*taps=\["):
        find_hierarchy(network)
    assert [tap.channels for tap in find_hierarchy(network, taps=["4", "5", "6", "7"]).taps] == [64, 128, 256, 512]


@pytest.mark.parametrize("last", [nn.Identity(), nn.Sequential(nn.Conv2d(512, 512, 1), nn.ReLU()), nn.Conv2d(512, 1024, 1)])
def test_what_does_not_narrow_belongs_to_the_encoder(last: nn.Module) -> None:
    width = 1024 if isinstance(last, nn.Conv2d) else 512
    assert deepest(nn.Sequential(body(), last)) == (32, width)


def test_a_segmentation_network_is_pretrained_without_its_head() -> None:
    encoder = sparkme.sparsify(segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None))
    assert encoder.channels == (16, 24, 40, 960) and encoder.strides == (2, 4, 8, 16)
    assert encoder.head == ("classifier",)
    assert not any(name.startswith("classifier") for name in encoder.dense_state_dict())


def test_a_stride_along_one_axis_is_named() -> None:
    network = nn.Sequential(*body())
    network[0] = nn.Conv2d(3, 64, 7, (2, 1), 3)
    with pytest.raises(ValueError, match=r"layer '0' returns 64x192; its stride is \(2, 1\), but height and width"):
        find_hierarchy(network)
