"""The table of networks is held to the code: what it calls supported is, what it refuses is refused for that reason."""

import json

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

import sparkme
from benchmarks import networks
from sparkme.networks.create import create_dense, create_encoder
from sparkme.networks.names import model_names

TABLE = json.loads(networks.RESULTS.read_text())["networks"]
SUPPORTED = {name: result for name, result in TABLE.items() if result["supported"]}
# One for each kind of form; small ones.
SAMPLE = [
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "googlenet",
    "timm:convnextv2_atto",
    "timm:nf_resnet26",
    "timm:resnet50_gn",
    "timm:densenetblur121d",
    "timm:tf_efficientnet_b0",
    "timm:mambaout_femto",
    "timm:res2net50_26w_4s",
    "timm:resnest14d",
    "timm:skresnet18",
    "timm:tresnet_m",
    "timm:hrnet_w18_small",
    "timm:ghostnetv2_100",
    "timm:poolformer_s12",
    "timm:selecsls42b",
    "timm:gcresnext26ts",
    "timm:rdnet_tiny",
]


def test_the_table_holds_what_was_promised() -> None:
    assert set(TABLE) == set(networks.names()) and len(TABLE) >= 150
    of_torchvision = [name for name in SUPPORTED if not name.startswith("timm:")]
    assert len(of_torchvision) >= 60
    tried = [name for name in TABLE if name.startswith("timm:") and not networks.is_mixed(name)]
    families = {TABLE[name]["family"] for name in tried}
    missing = families - {result["family"] for name, result in SUPPORTED.items()}
    assert missing == {
        "timm convmixer",
        "timm inception_resnet_v2",
        "timm inception_v3",
        "timm inception_v4",
        "timm nasnet",
        "timm pnasnet",
        "timm xception",
    }
    assert sum(name in SUPPORTED for name in tried) >= 0.9 * len(tried)
    for result in SUPPORTED.values():
        limits = networks.LIMITS[getattr(torch, result["dtype"])]
        assert all(error <= limits[kind] for kind, error in result["errors"].items())
        assert 0 < result["gflop_sparse"] < 0.6 * result["gflop_dense"]


def test_the_packaged_names_and_the_readme_are_the_tables() -> None:
    assert model_names() == list(SUPPORTED)
    assert networks.markdown(TABLE) in networks.PAGE.read_text()


@pytest.mark.parametrize("name", SAMPLE)
def test_what_the_table_says_is_so(name: str) -> None:
    result = networks.examine(name)
    assert result["supported"], result["reason"]
    kept = ("strides", "channels", "parameters", "gflop_dense", "gflop_sparse", "feature_info")
    assert {key: json.loads(json.dumps(result[key])) for key in kept} == {key: TABLE[name][key] for key in kept}


@pytest.mark.parametrize("name", SAMPLE[::3])
def test_its_pyramid_gives_the_dense_networks_maps_and_carries_a_detector(name: str) -> None:
    torch.manual_seed(0)
    dense = create_dense(name).double().eval()
    pyramid = sparkme.pyramid(dense)
    assert (list(pyramid.strides), list(pyramid.channels)) == (TABLE[name]["strides"], TABLE[name]["channels"])
    seen: list[Tensor] = []
    for module in dense.modules():  # whatever passes between modules
        module.register_forward_hook(lambda _module, args, out: seen.extend(x.clone() for x in (*args, out) if is_map(x)))
    images = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    with torch.no_grad():
        dense(images)
        for found in pyramid.maps(images):
            assert any(torch.equal(found, x) or torch.equal(found.permute(0, 2, 3, 1), x) for x in seen)
    backbone = pyramid.float().with_fpn(8)
    detector = MaskRCNN(backbone, num_classes=2, min_size=128, max_size=192).train()
    masks, boxes = torch.ones(1, 128, 128, dtype=torch.uint8), torch.tensor([[8.0, 8.0, 90.0, 90.0]])
    losses = detector([torch.rand(3, 128, 128)] * 2, [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}] * 2)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in SAMPLE[::3]])
def test_the_other_pyramids_too(name: str) -> None:
    test_its_pyramid_gives_the_dense_networks_maps_and_carries_a_detector(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name, r in SUPPORTED.items() if r["parameters"] < 30e6 and name not in SAMPLE])
def test_the_other_small_networks_too(name: str) -> None:
    test_what_the_table_says_is_so(name)


@pytest.mark.parametrize("name", [n for n, r in TABLE.items() if not r["supported"] and "large" not in n and "base" not in n])
def test_what_is_refused_is_refused_at_once_by_name(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        create_encoder(name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(TABLE[name]["reason"][:60])
    assert "layer '" in str(caught.value) or "cannot be run as model(images)" in str(caught.value)
