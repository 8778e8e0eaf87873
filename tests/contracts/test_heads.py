"""Where the encoder of a network that predicts maps ends: before its head or decoder, or refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from closing_attention import Attention, network, trunk
from commands import QUICKEST
from networks import ENGINES
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter

import sparkme
from sparkme import export, pretrain
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


# --- attention at the end ---------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A block of a transformer, with linear layers, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 48, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def conv(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())


class Stage(nn.Module):
    """Runs its blocks one after the other, and has a name of its own for the last of them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        *first, self.last = blocks
        self.first = nn.ModuleList(first)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = block(x)
        return self.last(x)


CLOSING: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "a layer of its own": (lambda: nn.Sequential(*trunk(), Attention(32)), "4", ("4",)),
    "with a classifier behind it": (
        lambda: nn.Sequential(*trunk(), Attention(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
        "4",
        ("4", "5", "6", "7"),
    ),
    "twice": (lambda: nn.Sequential(*trunk(), Attention(32), Attention(32), nn.BatchNorm2d(32)), "4", ("4", "5", "6")),
    "of linear layers": (lambda: nn.Sequential(*trunk(), Tokens(32), Tokens(32)), "4", ("4", "5")),
    "in the last stage": (lambda: nn.Sequential(*trunk(), Stage(conv(32), conv(32), Tokens(32))), "4.last", ("4.last",)),
    "in nested stages": (
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(*trunk()), nn.Sequential(conv(32), Attention(32), Attention(32)))),
        "0.1.1",
        ("0.1.1", "0.1.2"),
    ),
    "of a stage that cannot be divided": (
        lambda: nn.Sequential(OrderedDict(body=nn.Sequential(*trunk()), last=Tokens(32), norm=nn.BatchNorm2d(32))),
        "last",
        ("last", "norm"),
    ),
}


@pytest.mark.parametrize("name", CLOSING)
def test_attention_behind_the_last_convolution_is_left_dense(name: str) -> None:
    make, untrained, head = CLOSING[name]
    network = make().double()
    encoder = sparkme.sparsify(network)
    assert encoder.untrained == untrained and encoder.head == head and encoder.channels == (8, 16, 24, 32)
    again = sparkme.sparsify(network, proof=encoder.proof)
    assert again.untrained == untrained and not again.tried_because
    inputs: list[Tensor] = []
    network.get_submodule(untrained).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    network.eval()(images)
    for engine in ENGINES:
        maps = encoder.eval().set_engine(engine)(images, torch.ones(2, 1, 2, 3, dtype=torch.bool))
        torch.testing.assert_close(maps[-1].dense(), inputs[0], rtol=1e-10, atol=1e-10)
    own = network.state_dict()
    kept = {key for key in own if not key.startswith(tuple(f"{part}." for part in head))}
    assert encoder.dense_state_dict().keys() == kept < own.keys()


AMIDST: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]], str]] = {
    "between strides": (
        lambda: nn.Sequential(*trunk()[:3], Attention(24), *trunk()[3:]),
        {},
        "'3' .Attention. .*matmul of maps",
    ),
    "at two strides": (
        lambda: nn.Sequential(*trunk()[:3], Tokens(24), *trunk()[3:], Tokens(32)),
        {},
        "'3.layer.self_attn' .*moves pixels",
    ),
    "before a convolution": (lambda: nn.Sequential(*trunk(), Attention(32), conv(32)), {}, "'4' .Attention. .*matmul of maps"),
    "before another, with a convolution between": (
        lambda: nn.Sequential(*trunk(), Attention(32), conv(32), Attention(32)),
        {},
        "'4' .Attention. .*matmul of maps",
    ),
    "where a map is asked for": (
        lambda: nn.Sequential(*trunk(), Attention(32)),
        {"taps": ["2", "4"]},
        "'4' .Attention. .*matmul of maps",
    ),
}


@pytest.mark.parametrize("name", AMIDST)
def test_attention_elsewhere_is_refused(name: str) -> None:
    make, options, text = AMIDST[name]
    with pytest.raises(sparkme.UnsupportedLayerError, match=f"^layer {text}"):
        sparkme.sparsify(make(), **options)


def test_what_has_no_sparse_form_for_another_reason_is_refused_at_the_end_too() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")

    with pytest.raises(sparkme.UnsupportedLayerError, match=r"layer '4' \(Last\) .*mode='bilinear'"):
        sparkme.sparsify(nn.Sequential(*trunk(), Last()))


def test_a_run_says_what_it_leaves_untrained_and_its_weights_are_those_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICKEST, "--model", "closing_attention:network", "--drop-path", "0", "--epochs", "1", "--panel-epochs", "0"]
    assert pretrain.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert "attention 4 and what follows it stay dense and untrained: attention has no sparse form\n" in capsys.readouterr().out
    last, output = tmp_path / "run" / "checkpoints" / "last.pt", tmp_path / "weights.safetensors"
    assert export.main([str(last), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "note: 4 and what follows it are not pretrained: attention has no sparse form\n" in printed
    assert printed.count("dense and sparse features differ by") == 4
    state, twin = load_file(output), network()
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and missing and all(name.startswith("4.") for name in missing)
    x = torch.randn(2, 3, 64, 64)
    encoder, pyramid = sparkme.load_encoder(output).eval(), sparkme.pyramid(last)
    with torch.no_grad():
        (*_, deepest), expected = pyramid.maps(x), encoder(x, torch.ones(2, 1, 4, 4, dtype=torch.bool))[-1].dense()
        torch.testing.assert_close(twin.eval()[:4](x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deepest, expected, rtol=1e-4, atol=1e-5)
    assert [name for name in pyramid.state_dict() if "network.4." in name] == []
