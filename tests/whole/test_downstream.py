"""The documents' code for detection and segmentation, run as it is printed there, with exported weights."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from sparkme import export
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training.build import build_network
from sparkme.training.checkpoint import Checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the section's code blocks leave behind, in a folder with the files that they name."""
    folder = tmp_path_factory.mktemp("downstream")
    for model in ("resnet50", "convnext_tiny"):
        torch.manual_seed(0)
        config = {
            "recipe": "spark",
            "model": model,
            "drop_path": 0.0,
            "mask_ratio": 0.5,
            "decoder_width": 32,
            "patch": None,
            "input_size": [64, 64],
            "densify_norm": "auto",
        }
        network = build_network(from_config(PretrainSettings, config))
        with torch.no_grad():  # no value is what a library's own initialisation would make it
            for value in network.state_dict().values():
                if value.is_floating_point():
                    value.add_(0.01 * torch.rand_like(value))
        saved = Checkpoints(folder / model, 1).save({"model": network.state_dict(), "config": config}, 1)
        for target, suffix in (("torchvision", ""), ("timm", "-timm")):
            words = [str(saved), "--to", target, "--output", str(folder / f"{model}{suffix}.safetensors"), "--no-verify"]
            assert export.main(words) == 0
    section = PAGE.read_text().partition("\n## Detection and segmentation\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 4
    run = folder / "runs" / "mine" / "checkpoints"
    run.parent.mkdir(parents=True)
    run.symlink_to(folder / "resnet50", target_is_directory=True)
    names: dict[str, Any] = {"folder": folder, "images": torch.rand(1, 3, 64, 96)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(block, names)
    return names


def assert_taken(loaded: dict[str, torch.Tensor], path: Path, *, left: Iterable[str] = (), prefix: str = "") -> None:
    """Every tensor of a file is in a model, by its name and bit for bit, and the model has no others but `left`."""
    state = load_file(path)
    assert {name for name in loaded if not name.startswith(tuple(left))} == {prefix + name for name in state}
    assert all(torch.equal(loaded[prefix + name], value) for name, value in state.items())


def test_all_of_the_exported_weights_are_taken(names: dict[str, Any]) -> None:
    folder = names["folder"]
    body = names["detector"].backbone.body.state_dict()
    assert_taken(body, folder / "resnet50.safetensors")
    assert_taken(
        {f"features.{name}": value for name, value in names["pyramid"].body.state_dict().items()},
        folder / "convnext_tiny.safetensors",
    )
    assert_taken(names["segmenter"].backbone.state_dict(), folder / "resnet50.safetensors")
    assert_taken(names["backbone"].state_dict(), folder / "resnet50-timm.safetensors")
    assert_taken(names["getter"].state_dict(), folder / "convnext_tiny-timm.safetensors", prefix="model.")


def test_a_pyramid_is_the_exported_network(names: dict[str, Any]) -> None:
    assert_taken(names["body"].network.state_dict(), names["folder"] / "resnet50.safetensors")
    assert [value.shape[1:] for value in names["maps"].values()] == [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)]
    assert names["mine"].transform.image_mean == (0.485, 0.456, 0.406)
    assert names["features"].feature_info.channels() == [256, 512, 1024, 2048]
    assert names["encoder"].out_channels == [3, 0, 256, 512, 1024, 2048]


def test_frozen_batch_norm_takes_the_same_weights(names: dict[str, Any]) -> None:
    frozen = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    state = load_file(names["folder"] / "resnet50.safetensors")
    missing, unexpected = frozen.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["fc.weight", "fc.bias"]
    assert torch.equal(frozen.layer4[2].bn3.running_var, state["layer4.2.bn3.running_var"])


def test_mask_rcnn_trains(names: dict[str, Any]) -> None:
    """One step on two small images reaches every stage of the backbone. It normalises images by itself."""
    torch.manual_seed(0)
    detector = names["detector"].train()
    assert detector.transform.image_mean == [0.485, 0.456, 0.406]  # the run's, too
    detector.transform.min_size, detector.transform.max_size = (64,), 96
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 10:50, 20:70] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 70.0, 50.0]]), "labels": torch.tensor([1]), "masks": mask}
    losses = detector([torch.rand(3, 64, 96), torch.rand(3, 64, 96)], [target, target])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in detector.backbone.body.named_parameters()}
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer4.2.conv3.weight"):
        assert gradients[name] is not None and gradients[name].isfinite().all() and gradients[name].any(), name


def test_the_other_backbones_give_maps_of_their_strides(names: dict[str, Any]) -> None:
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        sizes = {name: tuple(x.shape[1:]) for name, x in names["pyramid"].eval()(images).items()}
        assert sizes == {"0": (256, 16, 24), "1": (256, 8, 12), "2": (256, 4, 6), "3": (256, 2, 3), "pool": (256, 1, 2)}
        for i, x in enumerate(names["pyramid"].body(images).values()):  # each at the end of its stage
            assert torch.equal(x, names["convnext"].features[: 2 * i + 2](images))
        assert names["segmenter"].eval()(images)["out"].shape == (1, 21, 64, 96)
        assert [x.shape[1] for x in names["backbone"].eval()(images)] == [64, 256, 512, 1024, 2048]
        assert [x.shape[1:] for x in names["getter"].eval()(images)] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
