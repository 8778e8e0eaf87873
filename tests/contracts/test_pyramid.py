"""A pyramid gives the dense network's own maps, and is an ordinary module: for detectors, segmenters and compilers."""

import copy
import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from commands import SMALL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import sparkme
from sparkme import pretrain
from sparkme.errors import UserError
from sparkme.networks.pyramid import Pyramid


def images(height: int = 96, width: int = 128) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def randomised(model: nn.Module) -> nn.Module:
    """With weights and statistics that no map is zero or one for."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    return model.double().eval()


def equal(maps: list[Tensor], expected: list[Tensor]) -> bool:
    return len(maps) == len(expected) and all(torch.equal(a, b) for a, b in zip(maps, expected))


@pytest.mark.parametrize(
    ("make", "nodes"),
    [
        (torchvision.models.resnet18, ["layer1", "layer2", "layer3", "layer4"]),
        (torchvision.models.regnet_y_400mf, [f"trunk_output.block{i}" for i in (1, 2, 3, 4)]),
        (torchvision.models.efficientnet_b0, [f"features.{i}" for i in (2, 3, 5, 8)]),
    ],
    ids=["resnet18", "regnet_y_400mf", "efficientnet_b0"],
)
@pytest.mark.parametrize("size", [(96, 128), (75, 110)], ids=["aligned", "any size"])
def test_maps_are_those_that_torchvision_extracts(
    make: Callable[[], nn.Module], nodes: list[str], size: tuple[int, int]
) -> None:
    model = randomised(make())
    pyramid = sparkme.pyramid(model)
    extractor = create_feature_extractor(model, dict(zip(nodes, "0123")))
    with torch.no_grad():
        maps, expected = pyramid(images(*size)), extractor(images(*size))
    assert [*maps] == ["0", "1", "2", "3"] and pyramid.strides == (4, 8, 16, 32)
    assert equal([*maps.values()], [expected[name] for name in "0123"])
    assert pyramid.channels == tuple(value.shape[1] for value in maps.values()) and not pyramid.training


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18d"])
def test_maps_are_those_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model(name))
    theirs = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1)).double().eval()
    own = model.state_dict()
    theirs.load_state_dict({key: own[key if key in own else key.replace("_", ".", 1)] for key in theirs.state_dict()})
    pyramid = sparkme.pyramid(model)
    as_timm = pyramid.as_timm()
    with torch.no_grad():
        maps, expected = as_timm(images()), theirs(images())
    assert as_timm.feature_info.channels() == theirs.feature_info.channels() == [*pyramid.channels]
    assert as_timm.feature_info.reduction() == theirs.feature_info.reduction() == [*pyramid.strides]
    assert equal(maps, expected)


class ChangesInPlace(nn.Module):
    """The map of stride 4 is changed by what comes next, and the one of stride 8 has its channels last."""

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 6, 4, 4), nn.ReLU(inplace=True)
        self.down, self.last = nn.Conv2d(6, 9, 2, 2), self.Last()
        self.deep = nn.Conv2d(9, 12, 2, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.last(self.down(self.relu(self.stem(x)))).permute(0, 3, 1, 2))
        return self.fc(x.mean((2, 3)))


def test_maps_that_change_in_place_are_kept_and_channels_come_first() -> None:
    model = ChangesInPlace().double()
    pyramid = sparkme.pyramid(model, taps=["stem", "last", "deep"])
    with torch.no_grad():
        stem = model.stem(images())
        middle = model.down(stem.relu())
        assert equal(pyramid.maps(images()), [stem, middle, model.deep(middle)]) and stem.min() < 0
    assert [name for name, _ in pyramid.network.named_parameters()] == [
        name for name, _ in model.named_parameters() if not name.startswith("fc.")
    ]
    assert model.fc.weight.requires_grad  # the network that was given is left as it was


def test_it_is_copied_pickled_and_called_by_several_threads() -> None:
    pyramid = sparkme.pyramid(randomised(torchvision.models.resnet18()))
    x = images(64, 64)
    with torch.no_grad():
        expected = pyramid.maps(x)
        assert equal(copy.deepcopy(pyramid).maps(x), expected)
        assert equal(pickle.loads(pickle.dumps(pyramid)).maps(x), expected)
        with ThreadPoolExecutor(4) as pool:  # each thread has maps of its own
            sizes = [(32 * n, 64) for n in range(1, 9)]
            for found, size in zip(pool.map(lambda size: pyramid.maps(images(*size)), sizes), sizes):
                assert equal(found, pyramid.maps(images(*size)))


def test_blocks_that_are_computed_again_for_their_gradient_give_no_maps() -> None:
    pyramid = sparkme.pyramid(timm.create_model("test_resnet")).train()
    for block in (
        module for name, module in pyramid.network.named_modules() if name.startswith("layer") and name.count(".") == 1
    ):
        forward = block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]
    total = sum(value.sum() for value in pyramid(images(64, 64).float()).values())
    with ThreadPoolExecutor(1) as pool:  # as on a GPU, whose backward pass has a thread of its own
        pool.submit(total.backward).result()
    assert all(p.grad is not None for p in pyramid.parameters() if p.requires_grad)
    assert pyramid.network(images(64, 64).float()).ndim == 4  # by itself it runs to its end, the head left out


@pytest.mark.parametrize("name", ["resnet18", "timm:convnext_atto", "timm:efficientnet_b0"])
def test_mask_rcnn_learns_on_it_and_every_weight_gets_a_gradient(name: str) -> None:
    body = sparkme.pyramid(name)
    assert not any(module.training for module in body.modules())
    backbone = body.with_fpn(16)
    sizes = {"min_size": 64, "max_size": 96, "image_mean": body.mean, "image_std": body.std}
    detector = torchvision.models.detection.MaskRCNN(backbone, num_classes=3, **sizes).train()
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 80, dtype=torch.uint8),
    }
    losses = detector([torch.rand(3, 64, 80)] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert len(losses) == 5 and all(value.isfinite() for value in losses.values())
    missing = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing  # else DistributedDataParallel would wait for them


def test_convention_of_segmentation_models() -> None:
    pyramid = sparkme.pyramid(torchvision.models.resnet18().eval(), num_scales=4)
    encoder = pyramid.as_smp()
    x = images().float()
    maps = encoder(x)
    assert encoder.out_channels == [3, 0, 64, 128, 256, 512] == [value.shape[1] for value in maps]
    assert [x.shape[2] // value.shape[2] for value in maps] == [1, 2, 4, 8, 16, 32]
    assert maps[0] is x and (encoder.output_stride, encoder.depth, encoder.in_channels) == (32, 5, 3)
    with_stem = sparkme.pyramid(torchvision.models.resnet18(), num_scales=5).as_smp()
    assert with_stem.out_channels == [3, 64, 64, 128, 256, 512]


def test_a_checkpoint_gives_its_weights_and_statistics_and_wrong_ones_are_named(tmp_path: Path) -> None:
    words = [
        *SMALL,
        "--model",
        "timm:test_resnet",
        "--drop-path",
        "0",
        "--epochs",
        "1",
        "--panel-epochs",
        "0",
        "--output",
        str(tmp_path / "run"),
    ]
    assert pretrain.main(words) == 0
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    pyramid, encoder = sparkme.pyramid(path), sparkme.load_encoder(path)
    assert isinstance(pyramid, Pyramid) and len(pyramid.mean) == len(pyramid.std) == 3
    own = pyramid.network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in encoder.dense_state_dict().items())
    x = images(64, 64).float()
    with torch.no_grad():
        sparse = encoder(x, torch.ones(2, 1, 64 // encoder.patch, 64 // encoder.patch, dtype=torch.bool))
        for dense, expected in zip(pyramid.eval().maps(x), sparse):
            torch.testing.assert_close(dense, expected.dense(), rtol=1e-4, atol=1e-4)
    refused = {
        str(tmp_path / "none.pt"): "no file",
        "resnet81": "did you mean resnet",
        "timm:vit_tiny_patch16_224": "cannot be run as model",
    }
    for bad, reason in refused.items():
        with pytest.raises((UserError, ValueError), match=reason):
            sparkme.pyramid(bad)
