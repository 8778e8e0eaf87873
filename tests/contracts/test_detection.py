"""`python -m sparkme.finetune --task detection` as its users run it, tiny, and against a plain torchvision training loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from annotated import change_coco, create, make_coco, make_masks, run_steps, save_weights
from commands import QUICKEST, losses, records
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_resnet import resnet
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import sparkme
from sparkme import pretrain
from sparkme.data.dataset import EpochSampler
from sparkme.finetune import finetune, main
from sparkme.seeds import seed_step
from sparkme.settings.detection import _PAPER_CONVNEXT, _PAPER_RESNET, SMALL
from sparkme.training import metrics
from sparkme.training.loop import Loop
from sparkme.training.optimizer import pyramid_layers
from sparkme.weights.finetuned import read_finetuned
from sparkme.weights.pretrained import read_pretrained

BASE = ["--task", "detection", "--device", "cpu", "--workers", "0", "--log-steps", "1", "--batch-size", "4"]
SMALLEST = [*BASE, "--fpn-channels", "16", "--regions", "16", "--short-side", "64", "--epochs", "2", "--eval-epochs", "1"]
TINY = [*SMALLEST, "--head", "retinanet"]  # the head that takes the least time


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"), 8, 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def learnt(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learnt")
    words = [*SMALLEST, "--head", "faster-rcnn", "--epochs", "20", "--eval-epochs", "10", "--base-lr", "0.1"]
    words += ["--fpn-channels", "32", "--layer-decay", "1", "--batch-norm", "frozen"]
    assert main([str(weights), "--data", str(data), *words, "--output", str(folder)]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must end with exit code 2 and one line; returns that line."""
    try:
        code = main([*map(str, arguments)])
    except SystemExit as error:  # of the parser
        code = error.code  # type: ignore[assignment]
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_run_learns_and_leaves_what_it_promises(learnt: Path) -> None:
    found = {str(p.relative_to(learnt)) for p in learnt.rglob("*") if p.is_file()}
    pictures = {"loss.png", *(f"predictions-{name}.png" for name in ("best", "worst", "sample"))}
    assert {*pictures, "config.json", "metrics.jsonl", "results.json", "best.safetensors", "checkpoints/last.pt"} <= found
    measured = [record for record in records(learnt) if "val_box_ap" in record]
    assert [record["epoch"] for record in measured] == [10, 20]
    assert losses(learnt)[-1] < 0.3 * losses(learnt)[0]
    results = results_of(learnt)
    assert results["best"]["box_ap"] == max(record["val_box_ap"] for record in measured) > 0.3
    assert results["num_train"] == 8 and results["num_val"] == 4
    assert set(results["of_each_class"]) == {"red", "blue"} and min(results["of_each_class"].values()) > 0.1
    assert results["box"]["ap_large"] is None and "mask" not in results
    config = config_of(learnt)
    assert config["task"] == "detection" and config["recipe"] == "small" and config["batch_norm"] == "frozen"


def test_the_best_weights_give_the_same_figures_again(learnt: Path, data: Path) -> None:
    """Measured by pycocotools on the file's own annotations and torchvision's own results."""
    found = read_finetuned(learnt)
    assert found.task == "detection" and found.classes == ["red", "blue"] and not found.network.training
    truth = COCO(str(data / "annotations" / "instances_val.json"))
    entries = []
    for image_id, about in truth.imgs.items():
        image = torch.from_numpy(np.array(Image.open(data / "val" / about["file_name"]))).permute(2, 0, 1) / 255
        with torch.no_grad():
            output = found.network([image])[0]
        for (left, top, right, bottom), score, label in zip(
            output["boxes"].double().tolist(), output["scores"].double().tolist(), output["labels"].tolist()
        ):
            if label:
                box = [left, top, right - left, bottom - top]
                category = found.settings["category_ids"][label - 1]
                entries.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    evaluation = COCOeval(truth, truth.loadRes(entries), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert results_of(learnt)["best"]["box_ap"] == pytest.approx(evaluation.stats[0], abs=1e-6)


def test_masks_are_learnt_where_every_object_has_one(weights: Path, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data", 2, 1, per_image=1)
    words = [str(weights), "--data", str(data), *SMALLEST, "--regions", "4", "--epochs", "1", "--batch-size", "2"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    assert config_of(tmp_path / "run")["head"] == "mask-rcnn"
    results = results_of(tmp_path / "run")
    assert "mask" in results and "box" in results and "mask_ap" in results["best"]
    assert {"val_mask_ap", "val_box_ap"} <= records(tmp_path / "run")[-1].keys()
    change_coco(data, "train", lambda content: content["annotations"][0].pop("segmentation"))
    assert create(*words, "--output", tmp_path / "other").settings.head == "faster-rcnn"


EVERYTHING = [
    "--head",
    "faster-rcnn",
    "--accumulate",
    "2",
    "--decay-epochs",
    "1",
    "--batch-norm",
    "trained",
    "--ema-decay",
    "0.9",
]
EVERYTHING += ["--random-crop", "0.5", "--short-side", "48", "64", "--drop-path", "0.2"]


def test_resuming_equals_a_straight_run_bit_for_bit(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle of the second epoch, and continued with other processes that load images."""
    words = [str(weights), "--data", str(data), *SMALLEST, *EVERYTHING, "--output"]
    assert main([*words, str(tmp_path / "straight")]) == 0
    stopped = create(*words, tmp_path / "again")
    run_steps(stopped, 3)
    stopped.folder.checkpoints.save(stopped.state(), stopped.step)
    capsys.readouterr()
    assert main([*words, str(tmp_path / "again"), "--workers", "2"]) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("again", "straight")
    )
    for part in ("model", "average"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert losses(tmp_path / "again") == losses(tmp_path / "straight")[3:]
    assert records(tmp_path / "again")[-1] == records(tmp_path / "straight")[-1]
    assert main([*words, str(tmp_path / "again")]) == 0
    assert "nothing left to do" in capsys.readouterr().out


def of_torchvision(head: str, width: int, weights: Path, mean: list[float], std: list[float]) -> nn.Module:
    """As torchvision's own code builds it on a plain ResNet."""
    first = 0 if head != "retinanet" else 1
    body = resnet()
    missing, _ = body.load_state_dict(safetensors_of(weights), strict=False)
    assert not missing
    layers = {f"layer{i + 1}": str(i) for i in range(first, 4)}
    extra = LastLevelP6P7(width, width) if first else None
    backbone = BackboneWithFPN(body, layers, [8, 12, 16, 24][first:], width, extra)
    options: dict[str, Any] = {"image_mean": mean, "image_std": std, "min_size": 64, "max_size": 999, "_skip_resize": True}
    if head == "retinanet":
        return RetinaNet(backbone, 3, **options)
    kind = MaskRCNN if head == "mask-rcnn" else FasterRCNN
    made = kind(backbone, 3, box_batch_size_per_image=16, **options)
    made.roi_heads.box_roi_pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    return made


def safetensors_of(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def plain_batches(data: Path, steps: int) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """What is drawn, from the files: no crops, one size, and no mirroring."""
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    samples = []
    for image in content["images"]:
        pixels = torch.from_numpy(np.array(Image.open(data / "train" / image["file_name"]))).permute(2, 0, 1) / 255
        boxes, labels, masks = [], [], []
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                left, top, width, height = entry["bbox"]
                boxes.append([left, top, left + width, top + height])
                labels.append(entry["category_id"] // 10)
                masks.append(torch.zeros(64, 64, dtype=torch.uint8))
                masks[-1][top : top + height, left : left + width] = 1
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "masks": torch.stack(masks)}
        samples.append((pixels, target))
    numbers = [[draw % 8 for _, draw in draws] for draws in EpochSampler(8, 8, 4, 0, range(steps))]
    return [([samples[i][0] for i in batch], [samples[i][1] for i in batch]) for batch in numbers]


@pytest.mark.parametrize(("head", "steps"), [("retinanet", 20), ("faster-rcnn", 4), ("mask-rcnn", 2)])
def test_training_is_a_plain_loop_of_torchvision(head: str, steps: int, weights: Path, data: Path, tmp_path: Path) -> None:
    """The same weights, batches, random numbers and rates: the losses of each step are equal."""
    width = 16 if head == "retinanet" else 256  # of torchvision's R-CNNs
    words = [*SMALLEST, "--head", head, "--no-flip", "--batch-norm", "trained", "--layer-decay", "0.5", "--clip-grad", "0"]
    words += ["--fpn-channels", str(width), "--proposals", "2000"]
    words += ["--epochs", "10", "--warmup-epochs", "1", "--decay-epochs", "4", "8", "--decay-factor", "0.5", "--base-lr", "0.1"]
    training = create(weights, "--data", data, *words, "--weight-decay", "0.1", "--output", tmp_path)
    found = [run_steps(training, step + 1)[0] for step in range(steps)]

    settings = training.settings
    plain = of_torchvision(head, width, weights, list(settings.mean), list(settings.std))
    start = create(weights, "--data", data, *words, "--weight-decay", "0.1", "--output", tmp_path / "b").network.state_dict()
    missing, unexpected = plain.load_state_dict(start, strict=False)
    assert not unexpected and all("body.fc" in name for name in missing)
    groups = []
    for name, parameter in plain.named_parameters():
        place = next((i for i in range(4, 0, -1) if f"body.layer{i}." in name), 0 if "backbone.body" in name else 5)
        decay = 0.0 if parameter.ndim < 2 else 0.1
        groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": 0.5 ** (5 - place)})
    optimizer = torch.optim.AdamW(groups)
    plain.train()
    for step, (images, targets) in enumerate(plain_batches(data, steps)):
        factor = 0.01 + 0.99 * step / 2 if step < 2 else 0.5 ** ((step >= 8) + (step >= 16))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 4 / 256 * factor * group["lr_scale"]
        seed_step(0, 0, step, torch.device("cpu"))
        loss = sum(plain(images, targets).values())
        assert float(loss.detach()) == pytest.approx(found[step], rel=1e-5), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def settings_of(model: str, data: Path, tmp_path: Path, *words: object) -> Any:
    start = ["--from-scratch", "--model", model, "--data", data, *BASE[:-2]]
    return create(*start, *words, "--output", tmp_path / "run").settings


def test_recipes(weights: Path, data: Path, tmp_path: Path) -> None:
    words = [weights, "--data", data, *BASE, "--head", "faster-rcnn"]
    small = create(*words, "--output", tmp_path / "a").settings
    for name in ("base_lr", "weight_decay", "layer_decay", "random_crop", "fpn_channels", "batch_norm", "regions", "head_norm"):
        assert getattr(small, name) == SMALL[name], name
    assert small.recipe == "small" and small.epochs == 300 and small.warmup_epochs == 30 and small.eval_epochs == 15
    assert small.short_side == (64,) * 5 and small.val_side == 64 and small.decay_epochs == () and small.drop_path == 0
    assert create(*words, "--short-side", "96", "64", "80", "--output", tmp_path / "a").settings.val_side == 80
    scratch = settings_of("small_resnet:resnet", data, tmp_path, "--head", "retinanet")
    assert scratch.layer_decay == 1 and scratch.batch_norm == "trained" and scratch.base_lr == SMALL["base_lr"]


def test_it_starts_from_a_pretraining_run_or_random_weights_with_the_same_head(data: Path, tmp_path: Path) -> None:
    assert pretrain.main([*QUICKEST, "--epochs", "1", "--output", str(tmp_path / "pre")]) == 0
    checkpoint = tmp_path / "pre" / "checkpoints" / "last.pt"
    words = [checkpoint, "--data", data, *TINY, "--batch-norm", "trained", "--output", tmp_path / "run"]
    training = create(*words)
    kept = read_pretrained(checkpoint).state
    assert (
        kept is not None
        and training.settings.mean == (0.485, 0.456, 0.406)
        and training.settings.model == "small_resnet:resnet"
    )
    own, random = training.network.state_dict(), create(*words, "--from-scratch").network.state_dict()
    for name, value in own.items():
        if "body" in name:
            assert torch.equal(value, kept[name.removeprefix("backbone.body.")])
        else:
            assert torch.equal(value, random[name])
    assert not torch.equal(own["backbone.body.conv1.weight"], random["backbone.body.conv1.weight"])


@pytest.mark.parametrize(
    ("model", "paper", "rate", "decays", "sides"),
    [
        ("small_resnet:resnet", _PAPER_RESNET, 2.5e-4, (8, 10.67), range(480, 897, 32)),
        ("timm:test_convnext", _PAPER_CONVNEXT, 2e-4, (27, 33), range(480, 801, 32)),
    ],
)
def test_paper_recipes(
    model: str, paper: dict[str, Any], rate: float, decays: tuple[float, ...], sides: range, data: Path, tmp_path: Path
) -> None:
    """The official code's for 16 images: AdamW's rates, by what they are multiplied, and after which of how many epochs."""
    words = ["--recipe", "paper", "--head", "retinanet", "--layer-decay", str(paper["layer_decay"])]
    found = settings_of(model, data, tmp_path, *words, "--batch-norm", "trained")
    skipped = ("batch_size", "ema_decay", "ema_warmup")
    assert all(getattr(found, name) == value for name, value in paper.items() if name not in skipped)
    assert found.peak_rate * 16 / found.batch_size == pytest.approx(rate) and paper["batch_size"] == 16
    assert found.decay_epochs == pytest.approx(decays) and found.short_side == tuple(sides) and found.long_side == 1333
    assert found.epochs == {2.5e-4: 12, 2e-4: 36}[rate] and found.decay_factor == {2.5e-4: 0.25, 2e-4: 0.2}[rate]
    assert found.layer_decay == {2.5e-4: 0.6, 2e-4: 0.65}[rate] and found.weight_decay == {2.5e-4: 1e-4, 2e-4: 0.05}[rate]
    assert found.warmup_epochs == pytest.approx(1000 * 16 / 117266, rel=0.01)
    half = settings_of(model, data, tmp_path, *words, "--epochs", str(found.epochs // 2))
    assert half.decay_epochs == pytest.approx([epoch / 2 for epoch in decays])
    own = settings_of(model, data, tmp_path, *words, "--epochs", "5", "--decay-epochs", "3")
    assert own.decay_epochs == (3,)


def test_the_rate_rises_and_falls_as_in_the_official_code(data: Path, tmp_path: Path) -> None:
    words = ["--from-scratch", "--model", "small_resnet:resnet", "--data", data, *TINY, "--recipe", "paper"]
    words += ["--epochs", "12", "--fpn-channels", "64"]
    training = create(*words, "--output", tmp_path)
    training.steps_per_epoch = 7330  # COCO's
    rates = {step: training.rates(step)["learning_rate"] / training.settings.peak_rate for step in (0, 500, 999, 10_000)}
    assert rates[0] == pytest.approx(0.01) and rates[500] == pytest.approx(0.01 + 0.99 * 0.5, rel=0.01)
    assert rates[999] == pytest.approx(1, rel=0.01) and rates[10_000] == 1
    falls = [training.rates(round(share * 7330 * 12))["learning_rate"] for share in (0.66, 0.67, 0.88, 0.895, 1)]
    assert [fall / training.settings.peak_rate for fall in falls] == pytest.approx([1, 0.25, 0.25, 0.0625, 0.0625])
    assert training.rates(5)["weight_decay"] == 1e-4


def layers_of(network: nn.Module) -> dict[str, int]:
    pyramid = sparkme.pyramid(network)
    return pyramid_layers(pyramid.with_fpn(16), pyramid)


def test_layers_are_those_of_the_official_detectors() -> None:
    """downstream_d2/lr_decay.py: stem 0, stages 1 and 2, three blocks of stage 3 a layer, stage 4, and the rest."""
    found = layers_of(torchvision.models.resnet50())
    expected = {
        0: "conv1.weight bn1.bias",
        1: "layer1.0.conv1.weight layer1.2.bn3.weight",
        2: "layer2.0.downsample.0.weight layer2.3.conv3.weight",
        3: "layer3.0.conv1.weight layer3.2.conv3.weight",
        4: "layer3.3.conv1.weight layer3.5.conv1.weight",
        5: "layer4.0.downsample.0.weight layer4.2.conv1.weight",
    }
    for number, names in expected.items():
        assert [found[f"body.network.{name}"] for name in names.split()] == [number] * len(names.split())
    assert {number for name, number in found.items() if "fpn" in name} == {6} and max(found.values()) == 6


def test_layers_of_convnexts_are_twelve_and_those_of_others_their_scales() -> None:
    """downstream_mmdet: stage 3 of ConvNeXt-B has 27 blocks, and with it there are 12 layers before the rest."""
    found = layers_of(torchvision.models.convnext_small())
    body = {name.removeprefix("body.network."): number for name, number in found.items() if "body" in name}
    expected = {
        0: "features.0.0.weight",
        1: "features.1.2.layer_scale",
        2: "features.2.0.weight",
        3: "features.5.2.layer_scale",
    }
    assert all(body[name] == number for number, name in expected.items())
    assert body["features.5.26.layer_scale"] == 11 and body["features.7.2.layer_scale"] == 12 and max(found.values()) == 13
    other = layers_of(torchvision.models.regnet_y_400mf())
    numbers = [number for name, number in other.items() if "body" in name]
    assert numbers == sorted(numbers) and {*numbers} == {0, 1, 2, 3} and max(other.values()) == 4


def test_each_layer_learns_at_its_rate(weights: Path, data: Path, tmp_path: Path) -> None:
    training = create(weights, "--data", data, *TINY, "--layer-decay", "0.5", "--output", tmp_path)
    run_steps(training, 1)
    rate, body = training.rates(0)["learning_rate"], training.network.backbone.body
    groups = {id(p): group for group in training.optimizer.param_groups for p in group["params"]}
    for parameter, power, decay in [
        (body.conv1.weight, 5, 0.05),
        (body.bn1.weight, 5, 0.0),
        (body.layer3[0].conv1.weight, 2, 0.05),
        (training.network.backbone.fpn.inner_blocks[0][0].weight, 0, 0.05),
        (training.network.head.classification_head.cls_logits.bias, 0, 0.0),
    ]:
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(rate * 0.5**power) and group["weight_decay"] == decay


def running(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


def test_frozen_batch_norms_keep_the_statistics_of_whole_images(weights: Path, data: Path, tmp_path: Path) -> None:
    norms = ["--recipe", "paper", "--head", "faster-rcnn", "--short-side", "64"]  # with batch norms in its heads
    training = create(weights, "--data", data, *TINY, *norms, "--batch-norm", "frozen", "--output", tmp_path / "a")
    plain = resnet()
    plain.load_state_dict(safetensors_of(weights))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in training.statistics)
    means, variances = [], []
    for path in sorted((data / "train").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        maps = plain.conv1(((image - mean) / std)[None]).detach()
        means.append(maps.mean((0, 2, 3)))
        variances.append(maps.var((0, 2, 3)))
    norm = training.network.backbone.body.bn1
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    before, deepest = running(training.network), training.network.backbone.body.layer4[0].bn2
    assert not torch.equal(deepest.running_mean, plain.layer4[0].bn2.running_mean)
    run_steps(training, 2)
    after = running(training.network)
    of_body = {name for name in before if "body" in name}
    assert all(torch.equal(before[name], after[name]) for name in of_body)
    assert of_body < before.keys() and all(not torch.equal(before[n], after[n]) for n in before.keys() - of_body)  # head norms
    trained = create(weights, "--data", data, *TINY, "--batch-norm", "trained", "--output", tmp_path / "b")
    assert torch.equal(trained.network.backbone.body.bn1.running_mean, plain.bn1.running_mean)
    run_steps(trained, 1)
    assert not torch.equal(trained.network.backbone.body.bn1.running_mean, plain.bn1.running_mean)


def test_networks_without_batch_norms_are_not_run_on_whole_images_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparkme.training.dense_tasks.DenseTask._run_whole_images", lambda self: pytest.fail("it runs"))
    settings_of("timm:test_convnext", data, tmp_path, "--head", "retinanet", "--batch-norm", "frozen")


def test_accumulated_gradients_are_those_of_the_whole_batch(weights: Path, data: Path, tmp_path: Path) -> None:
    """Where neither batch norms nor drawn regions depend on the parts; RetinaNet's loss is a mean over images."""
    found = []
    for parts in ("1", "2", "4"):
        words = [*TINY, "--batch-norm", "frozen", "--accumulate", parts]
        training = create(weights, "--data", data, *words, "--output", tmp_path / parts)
        found.append((run_steps(training, 3), training.network.state_dict()))
    for values, state in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-4, atol=1e-5)


def test_the_running_average_is_measured_and_saved(weights: Path, data: Path, tmp_path: Path) -> None:
    words = [str(weights), "--data", str(data), *TINY, "--epochs", "1", "--ema-decay", "0.5", "--base-lr", "0.1"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert {"val_box_ap", "val_box_ap_average"} <= records(tmp_path)[-1].keys()
    best = safetensors.torch.load_file(tmp_path / "best.safetensors")
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    name = "head.classification_head.cls_logits.weight"
    assert torch.equal(best[name], saved["average"][name]) and not torch.equal(best[name], saved["model"][name])


@pytest.mark.parametrize(("head", "channels"), [("retinanet", 1), ("fcos", 4), ("faster-rcnn", 1), ("mask-rcnn", 4)])
def test_every_head_learns_from_images_of_any_channels(head: str, channels: int, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data", 4, 2, channels=channels)
    weights = save_weights(tmp_path / "w.safetensors", channels)
    width = "64" if head == "fcos" else "16"
    words = [weights, "--data", data, *SMALLEST, "--head", head, "--regions", "4", "--fpn-channels", width]
    if head == "retinanet":  # the whole command once, with its pictures
        assert main([*map(str, words), "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
        found = read_finetuned(tmp_path / "run")
        assert found.channels == channels and found.settings["head"] == head
        return
    training = create(*words, "--output", tmp_path / "run")
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    assert np.isfinite(run_steps(training, 2)).all()
    changed = {name for name, value in training.network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, p in training.network.named_parameters() if p.requires_grad} <= changed


def test_shots(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [weights, "--data", data, *TINY, "--shots", "2", "--batch-size", "2", "--output"]
    training = create(*words, tmp_path / "a")
    count = len(training.train_set)
    assert 2 <= count < 8 and (training.train_set.presence().sum(0) >= 2).all() and training.settings.num_train_images == count
    assert "--shots 2 of each class" in capsys.readouterr().out
    assert "--shots 20: class" in fails(capsys, *words, tmp_path / "b", "--shots", "20")


def test_odd_sets(weights: Path, tmp_path: Path) -> None:
    """Images without objects, crowds, and classes that no validation image shows."""
    data = make_coco(tmp_path / "data", 4, 3)

    def change(content: dict[str, Any]) -> None:
        first, second = (image["id"] for image in content["images"][:2])
        content["annotations"] = [e for e in content["annotations"] if e["image_id"] != first]
        for entry in content["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] == second)

    change_coco(data, "train", change)
    change_coco(data, "val", change)
    change_coco(data, "val", lambda c: c.update(annotations=[e for e in c["annotations"] if e["category_id"] == 10]))
    words = [str(weights), "--data", str(data), *SMALLEST, "--head", "faster-rcnn", "--batch-size", "2", "--epochs", "1"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    results = results_of(tmp_path / "run")
    assert results["num_val"] == 3 and results["of_each_class"]["blue"] is None and np.isfinite(losses(tmp_path / "run")).all()


def test_one_class_and_a_single_training_image(weights: Path, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data", 1, 2, classes=1)
    words = [str(weights), "--data", str(data), *TINY, "--batch-size", "1", "--output", str(tmp_path / "run")]
    assert main(words) == 0
    assert results_of(tmp_path / "run")["of_each_class"].keys() == {"red"} and len(losses(tmp_path / "run")) == 2
    assert config_of(tmp_path / "run")["num_classes"] == 1


def test_unreadable_images_are_replaced_or_passed_over(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_coco(tmp_path / "data", 5, 3)
    training = create(weights, "--data", data, *TINY, "--epochs", "1", "--output", tmp_path / "run")
    for path in (data / "train" / "0001.png", data / "val" / "1001.png"):
        path.write_bytes(b"no image")
    capsys.readouterr()
    assert Loop(training).run() == 0
    shown = capsys.readouterr()
    assert shown.err.count("skipped unreadable validation image") == 1 and "1001.png" in shown.err
    assert "unreadable images: 1" in shown.out and results_of(tmp_path / "run")["num_val"] == 2
    spoiled = create(weights, "--data", data, *TINY, "--max-unreadable", "0", "--output", tmp_path / "b")
    with pytest.raises(ValueError, match="1 images cannot be read, more than --max-unreadable 0"):
        Loop(spoiled).run()


def test_images_of_many_sizes_over_several_batches(weights: Path, tmp_path: Path) -> None:
    """Padded batches have other sides each, also for the checks of a run's first images."""
    data = make_coco(tmp_path / "data", 12, 1)

    def change(content: dict[str, Any]) -> None:
        for number, image in enumerate(content["images"]):
            size = (64 + 7 * number, 130 - 5 * number)
            values = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(values).save(data / "train" / image["file_name"])
            image.update(height=size[0], width=size[1])

    change_coco(data, "train", change)
    words = [str(weights), "--data", str(data), *TINY, "--eval-epochs", "2", "--batch-size", "1"]
    assert main([*words, "--long-side", "128", "--short-side", "48", "64", "80", "--output", str(tmp_path / "run")]) == 0
    assert len(losses(tmp_path / "run")) == 24 and np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "64"], "--batch-size 64 is more than the 8 training images"),
        (["--batch-size", "7", "--accumulate", "2"], "--batch-size 7 is not a multiple"),
        (["--base-lr", "nan"], "--base-lr nan is not a finite number"),
        (["--decay-epochs", "1", "inf"], "--decay-epochs 1.0 inf is not a finite number"),
        (["--decay-epochs", "0"], "--decay-epochs 0.0 must be above 0"),
        (["--decay-factor", "2"], "--decay-factor 2.0 is outside (0, 1]"),
        (["--random-crop", "1.5"], "--random-crop 1.5 is outside [0, 1]"),
        (["--long-side", "48"], "--long-side 48 is less than --short-side 64"),
        (["--short-side", "16"], "--short-side 16 must be at least 32"),
        (["--regions", "0"], "--regions 0 must be at least 1"),
        (["--head", "unet"], "invalid choice: 'unet'"),
        (["--head", "fcos"], "fcos has group norms of 32 groups: choose 64"),
        (["--mixup", "0.2"], "unrecognized arguments: --mixup"),
        (["--input-size", "64"], "unrecognized arguments: --input-size"),
        (["--head-init", "linear"], "unrecognized arguments: --head-init"),
        (["--labels", "x.csv"], "unrecognized arguments: --labels"),
        (["--task", "sleep"], "invalid choice: 'sleep'"),
        (["--task", "segmentation"], "argument --head: invalid choice: 'retinanet'"),
        (["--task"], "expected one argument"),
        (["--warmup-epochs", "9"], "--warmup-epochs 9.0 must be less than --epochs 2"),
        (
            ["--short-side", "32", "--batch-size", "1", "--batch-norm", "trained"],
            "a single image of 32 x 32 pixels leaves batch",
        ),
        (["--short-side", "32", "--batch-norm", "frozen"], "--batch-norm frozen estimates statistics on whole images"),
        (["--layer-decay", "0"], "--layer-decay 0.0 is outside (0, 1]"),
        (["--val", "x.json"], "--val x.json goes with --train FILE.json, not with --data"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, weights, "--data", data, *TINY, "--output", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing_or_of_another_kind(
    weights: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [weights, *TINY, "--output", tmp_path / "run"]
    assert "pass either --data" in fails(capsys, *words)
    assert "nowhere is neither a folder" in fails(capsys, *words, "--data", tmp_path / "nowhere")
    assert "has no annotations" in fails(capsys, *words, "--data", labelled)
    assert "has no annotations" in fails(capsys, *words, "--data", make_masks(tmp_path / "masks", 2, 1))
    boxes = make_coco(tmp_path / "boxes", 4, 2, masks=None)
    message = fails(capsys, *words, "--data", boxes, "--head", "mask-rcnn")
    assert "--head mask-rcnn learns masks, but some objects have none; use faster-rcnn" in message
    assert "name a checkpoint" in fails(capsys, *words[1:], "--data", boxes)


def test_without_pycocotools_a_line_says_what_to_install(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    message = fails(capsys, weights, "--data", data, *TINY, "--output", tmp_path / "run")
    assert "pip install 'sparkme[detection]'" in message and not (tmp_path / "run").exists()  # before it trains


def test_a_run_of_another_task_is_not_continued(
    weights: Path, data: Path, labelled: Path, learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [weights, "--data", labelled, "--device", "cpu", "--workers", "0", "--batch-size", "8", "--input-size", "64"]
    assert main([*map(str, classes), "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    message = fails(capsys, weights, "--data", data, *TINY, "--output", tmp_path / "run")
    assert "was trained with" in message and "classification" in message
    message = fails(capsys, *classes, "--output", learnt)
    assert "was trained with" in message and "detection" in message
    same = ["--layer-decay", "1", "--fpn-channels", "32", "--batch-norm", "frozen"]
    words = [weights, "--data", data, *TINY, *same, "--output", learnt]
    assert "was trained with --head faster-rcnn, now it is retinanet" in fails(capsys, *words)


def test_the_same_from_python_and_its_run_again(weights: Path, data: Path, tmp_path: Path) -> None:
    words = {"device": "cpu", "workers": 0, "batch_size": 4, "fpn_channels": 16, "epochs": 1, "head": "retinanet"}
    run = finetune(weights, task="detection", data=data, output=tmp_path / "run", short_side=64, **words)
    assert run.finished and config_of(tmp_path / "run")["short_side"] == [64]
    files = [data / "annotations" / f"instances_{split}.json" for split in ("train", "val")]
    by_files = create(weights, *TINY, "--train", files[0], "--val", files[1], "--output", tmp_path / "two").settings
    assert by_files.split_digest == config_of(tmp_path / "run")["split_digest"] and by_files.num_val_images == 4
    with pytest.raises(TypeError, match="there is no setting 'mixup'"):
        finetune(weights, task="detection", data=data, mixup=0.3)
    again = finetune(run.folder / "best.safetensors", task="detection", data=data, output=tmp_path / "again", **words)
    assert again.finished


def test_help_is_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--task", "detection", "--help"],
        ["--tas=detection", "-h"],
        ["--task", "segmentation", "--task", "detection", "-h"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        shown = capsys.readouterr().out
        assert stopped.value.code == 0 and "--fpn-channels" in shown and "--scale-range" not in shown and "--mixup" not in shown
