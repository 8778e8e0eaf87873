"""`python -m sparkme.finetune` as its users run it, against a plain torchvision training loop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from commands import QUICK, QUICKEST, losses, records
from pictures import make_labelled
from PIL import Image
from torch import nn

from sparkme import export, pretrain, probe
from sparkme.data.dataset import CropDataset, EpochSampler, collate
from sparkme.data.labelled import find_labelled
from sparkme.finetune import main
from sparkme.networks.create import create_dense, find_classifier
from sparkme.training.classification import freeze_auxiliary_heads, scores_of
from sparkme.training.optimizer import create_finetuning_optimizer, layer_numbers, update_schedule
from sparkme.weights.pretrained import read_pretrained


@pytest.fixture(scope="module")
def torchvisions(trained: Path) -> Path:
    path = trained.parent / "resnet18.safetensors"
    assert export.main([str(trained), "--to", "torchvision", "--output", str(path), "--no-verify"]) == 0
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small network after two steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    assert pretrain.main([*QUICKEST, "--epochs", "1", "--output", str(folder)]) == 0
    return folder / "checkpoints" / "last.pt"


@pytest.fixture(scope="module")
def exported(pretrained: Path) -> Path:
    path = pretrained.parent / "weights.safetensors"
    assert export.main([str(pretrained), "--output", str(path), "--no-verify"]) == 0
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def plain_losses(weights: Path, data: Path) -> list[float]:
    """What torchvision's own ResNet-18 makes of the same batches, with torch's own optimiser and loss."""
    train = find_labelled(data).train
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    missing, unexpected = model.load_state_dict(safetensors.torch.load_file(weights), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    dataset = CropDataset(train.paths, (64, 64), min_scale=0.35, seed=0, labels=train.labels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    values, steps = [], 2 * (len(train) // 8)
    model.train()
    for step, draws in enumerate(EpochSampler(len(train), len(train), 8, 0, range(steps))):
        batch = collate([dataset[draw] for draw in draws])
        assert batch.images is not None and batch.labels is not None
        warmup = 0.1 * 2 * (steps // 2)
        progress = step / warmup if step < round(warmup) else (step - round(warmup)) / (steps - 1 - round(warmup))
        rising = 0.005 + 0.995 * progress
        falling = 0.001 + 0.999 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64)))
        for group in optimizer.param_groups:
            group["lr"] = float(1e-3 * (rising if step < round(warmup) else falling))
        loss = nn.functional.cross_entropy(model((batch.images / 255 - mean) / std), batch.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def test_it_is_plain_torchvision_training(torchvisions: Path, labelled: Path, tmp_path: Path) -> None:
    words = [
        *QUICK,
        "--head-init",
        "random",
        "--layer-decay",
        "1",
        "--clip-grad",
        "0",
        "--base-lr",
        str(1e-3 * 256 / 8),
        "--optimizer",
        "adamw",
        "--weight-decay",
        "0.05",
        "--crop-scale",
        "0.35",
        "--smoothing",
        "0.1",
        "--loss",
        "ce",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--auto-augment",
        "none",
        "--random-erasing",
        "0",
        "--ema-decay",
        "0",
        "--warmup-epochs",
        "0.2",
        "--drop-path",
        "0",
    ]
    assert main([str(torchvisions), "--data", str(labelled), *words, "--output", str(tmp_path)]) == 0
    assert losses(tmp_path) == pytest.approx(plain_losses(torchvisions, labelled), rel=1e-5)


EVERYTHING = [
    "--mixup",
    "0.4",
    "--cutmix",
    "1",
    "--random-erasing",
    "0.5",
    "--auto-augment",
    "trivial",
    "--ema-decay",
    "0.9",
    "--loss",
    "bce",
    "--optimizer",
    "lamb",
    "--drop-path",
    "0.2",
    "--accumulate",
    "2",
    "--repeats",
    "2",
]


@pytest.fixture(scope="module")
def straight(exported: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, with all there is, that saves every epoch."""
    folder = tmp_path_factory.mktemp("straight")
    words = [*QUICK, *EVERYTHING, "--checkpoint-minutes", "0", "--output", str(folder)]
    assert main([str(exported), "--data", str(labelled), *words]) == 0
    return folder


def test_a_run_leaves_what_the_readme_promises(straight: Path) -> None:
    found = {str(p.relative_to(straight)) for p in straight.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "confusion.png",
        "results.json",
        "best.safetensors",
        "checkpoints/last.pt",
    } <= found
    measured = [record for record in records(straight) if "val_top1" in record]
    assert [r["epoch"] for r in measured] == [1, 2] and all(0 <= r["val_top1"] <= r["val_top5"] <= 1 for r in measured)
    results = json.loads((straight / "results.json").read_text())
    assert results["best"]["top1"] == max(r["val_top1_average"] for r in measured) and results["num_val"] == 6
    assert set(results["of_each_class"]) == {"red", "blue", "green"} and sum(map(sum, results["confusion"])) == 6
    with Image.open(straight / "confusion.png") as picture:
        assert picture.size[0] > 300


def test_resuming_equals_a_straight_run_bit_for_bit(
    straight: Path, exported: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(straight / "checkpoints" / "step_00000003.pt", tmp_path / "checkpoints")
    shutil.copy(straight / "metrics.jsonl", tmp_path)
    words = [*QUICK, *EVERYTHING, "--output", str(tmp_path), "--workers", "2"]
    assert main([str(exported), "--data", str(labelled), *words]) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    assert losses(tmp_path) == losses(straight)
    ours, theirs = (torch.load(f / "checkpoints" / "last.pt", weights_only=True) for f in (tmp_path, straight))
    for part in ("model", "average"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert records(tmp_path)[-1] == records(straight)[-1]
    assert main([str(exported), "--data", str(labelled), *words]) == 0
    assert "nothing left to do" in capsys.readouterr().out


def test_the_classifier_starts_as_the_best_linear_one(exported: Path, labelled: Path, tmp_path: Path) -> None:
    """Colours are linear in the features, so without a single step worth the name all is right already."""
    words = [str(exported), "--data", str(labelled), *QUICK, "--epochs", "1", "--base-lr", "1e-9", "--warmup-epochs", "0"]
    assert main([*words, "--head-init", "linear", "--output", str(tmp_path / "a")]) == 0
    assert records(tmp_path / "a")[-1]["val_top1"] == 1
    assert main([*words, "--head-init", "random", "--output", str(tmp_path / "b")]) == 0
    assert records(tmp_path / "b")[-1]["val_top1"] < 1


def test_from_scratch_and_shots(pretrained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(labelled), *QUICK, "--epochs", "1", "--shots", "4", "--output"]
    assert main([str(pretrained), *words, str(tmp_path / "a"), "--from-scratch"]) == 0
    shown = capsys.readouterr().out
    assert "random weights" in shown and "--shots 4 of each class" in shown
    assert json.loads((tmp_path / "a" / "config.json").read_text())["layer_decay"] == 1
    assert main(["--from-scratch", "--model", "small_resnet:resnet", *words, str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert "--model NAME" in fails(capsys, "--from-scratch", *words, tmp_path / "c")
    assert "--from-scratch reads none" in fails(capsys, "--from-scratch", "--weights-key", "ema", *words, tmp_path / "c")
    assert "name a checkpoint" in fails(capsys, *words, tmp_path / "c")


def test_what_was_fine_tuned_can_be_probed_and_fine_tuned_again(straight: Path, labelled: Path, tmp_path: Path) -> None:
    words = ["--data", str(labelled), "--workers", "0", "--stage", "last", "--output", str(tmp_path / "s.json")]
    best, last = straight / "best.safetensors", straight / "checkpoints" / "last.pt"
    assert probe.main([str(best), *words, "--compare", str(last)]) == 0
    found, state = read_pretrained(best), safetensors.torch.load_file(best)
    assert (
        found.model == "small_resnet:resnet"
        and found.input_size == (64, 64)
        and torch.equal(found.state["conv1.weight"], state["conv1.weight"])
    )
    assert main([str(best), "--data", str(labelled), *QUICK, "--epochs", "1", "--output", str(tmp_path / "again")]) == 0


def test_residual_branches_are_dropped_in_training_as_asked(trained: Path) -> None:
    """torchvision's ResNets have no drop path of their own: the last norm of a branch gives zeros where it is dropped."""
    torch.manual_seed(0)
    for rate, expected in ((0.0, 1.0), (0.5, 0.5)):
        network, *_ = read_pretrained(trained).dense(3, drop_path=rate)
        norm = network.layer4[1].bn2.train()  # of the deepest block
        nn.init.ones_(norm.bias)
        kept = (norm(torch.zeros(2000, 512, 1, 1)) != 0).flatten(1).any(1).float().mean()
        assert float(kept) == pytest.approx(expected, abs=0.05)
        assert float((norm.eval()(torch.zeros(9, 512, 1, 1)) != 0).float().mean()) == 1


def test_a_recipes_drop_path_is_left_out_where_the_network_has_none(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_plain.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [
        "--from-scratch",
        "--model",
        "own_plain:features",
        "--data",
        labelled,
        *QUICK,
        "--recipe",
        "paper",
        "--output",
        "run",
    ]
    assert "takes no drop_path; use --drop-path 0" in fails(capsys, *words, "--drop-path", "0.1")
    assert main([*map(str, words)]) == 0
    assert "no drop path, which own_plain:features does not support" in capsys.readouterr().out
    assert json.loads(Path("run", "config.json").read_text())["drop_path"] == 0


def test_images_to_measure_on_that_cannot_be_read_are_named(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_labelled(tmp_path / "data", {"red": 10, "blue": 10})
    find_labelled(data).val.paths[0].write_bytes(b"no image")
    assert main([str(exported), "--data", str(data), *QUICK, "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("skipped unreadable validation image") == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_val"] == 3


def test_the_checkpoints_of_two_commands_are_kept_apart(
    straight: Path, pretrained: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, pretrained, "--data", labelled, *QUICK, "--output", pretrained.parent.parent)
    assert "is a checkpoint of sparkme.pretrain; use another --output" in message
    assert pretrain.main([*QUICKEST, "--output", str(straight)]) == 2
    assert "is a checkpoint of sparkme.finetune; use another --output" in capsys.readouterr().err


def test_a_run_goes_on_with_the_images_it_began_with(
    straight: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, *EVERYTHING, "--output", straight, "--data"]
    fewer = make_labelled(tmp_path / "fewer", {"red": 12, "blue": 12, "green": 8})
    assert "was trained with 28 training images, now it is 26" in fails(capsys, exported, *words, fewer)
    others = make_labelled(tmp_path / "others", {"red": 18, "blue": 17})
    assert "was trained with 3 classes, now it is 2" in fails(capsys, exported, *words, others)
    renamed = make_labelled(tmp_path / "renamed", {"red": 12, "blue": 12, "green": 10})
    (renamed / "blue").rename(renamed / "violet")
    assert "as digest of the images, their classes" in fails(capsys, exported, *words, renamed)
    same = make_labelled(tmp_path / "same", {"red": 12, "blue": 12, "green": 10})
    shutil.copy(exported, tmp_path / "other.safetensors")
    assert f"was trained with {exported} as initial weights" in fails(capsys, tmp_path / "other.safetensors", *words, same)


def test_a_running_average_that_begins_at_a_resume_begins_with_the_trained_weights(
    exported: Path, labelled: Path, tmp_path: Path
) -> None:
    words = [str(exported), "--data", str(labelled), *QUICK, "--output", str(tmp_path)]
    assert main([*words, "--epochs", "1"]) == 0
    trained_weights = safetensors.torch.load_file(tmp_path / "best.safetensors")
    assert main([*words, "--ema-decay", "0.999999", "--base-lr", "1e-9"]) == 0
    average = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["average"]
    torch.testing.assert_close(average["fc.weight"], trained_weights["fc.weight"], rtol=0, atol=1e-6)


def test_arrays_are_augmented_as_images_are(exported: Path, labelled: Path, tmp_path: Path) -> None:
    for path in sorted(labelled.rglob("*.png")):
        target = tmp_path / "data" / path.relative_to(labelled).parts[0] / f"{path.stem}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.asarray(Image.open(path)).transpose(2, 0, 1))
    words = ["--data", str(tmp_path / "data"), *QUICK, "--epochs", "1", "--output", str(tmp_path / "run")]
    assert main([str(exported), *words, "--auto-augment", "trivial", "--random-erasing", "0.5"]) == 0


@pytest.mark.parametrize("name", ["mnasnet0_5", "timm:resnetv2_18"])
def test_networks_that_need_more_than_names_and_linear_layers(name: str, labelled: Path, tmp_path: Path) -> None:
    """torchvision's MNASNet asks for a version in its state dict; timm's ResNet V2 classifies by a 1x1 convolution."""
    torch.manual_seed(0)
    safetensors.torch.save_file(dict(create_dense(name, num_classes=3).state_dict()), tmp_path / "own.safetensors")
    words = ["--data", str(labelled), *QUICK, "--epochs", "1", "--base-lr", "1e-9", "--output", str(tmp_path / "run")]
    assert main([str(tmp_path / "own.safetensors"), "--model", name, *words]) == 0
    if name == "timm:resnetv2_18":  # the classifier was fitted; random features of the other tell nothing
        assert records(tmp_path / "run")[-1]["val_top1"] > 0.5
    again = ["--data", str(labelled), *QUICK, "--epochs", "1", "--output", str(tmp_path / "again")]
    assert main([str(tmp_path / "run" / "best.safetensors"), *again]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "7", "--accumulate", "2"], "--batch-size 7 is not a multiple"),
        (["--batch-size", "64"], "--batch-size 64 is more than the 28 training images"),
        (["--layer-decay", "0"], "--layer-decay 0.0 is outside (0, 1]"),
        (["--warmup-epochs", "9"], "--warmup-epochs 9.0 must be less than --epochs 2"),
        (["--shots", "40"], "--shots 40: class 'blue' has"),
        (["--shots", "0"], "--shots 0 must be at least 1"),
        (["--ema-decay", "1"], "--ema-decay 1.0 is outside [0, 1)"),
        (["--mixup", "0.2", "--batch-size", "7"], "need an even number"),
        (["--base-lr", "nan"], "--base-lr nan is not a finite number"),
        (["--model", "resnet50"], "--model resnet50, but"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, pretrained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, pretrained, "--data", labelled, *QUICK, "--output", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, other in (("resnet34", "resnet18"), ("resnet18", "resnet34"), ("resnet50", "convnext_tiny")):
        torch.save(torchvision.models.get_model(name).state_dict(), tmp_path / "weights.pth")
        message = fails(
            capsys, tmp_path / "weights.pth", "--model", other, "--data", labelled, *QUICK, "--output", tmp_path / "run"
        )
        assert f"weights.pth does not fit {other}" in message or f"has more than {other}" in message


OWN = """
import torch.nn as nn


def features(in_channels=3):
    widths = (in_channels, 8, 16, 24, 32, 40)
    pairs = zip(widths, widths[1:])
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs))


def classifier(in_channels=3):
    return nn.Sequential(features(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))


def with_classes(in_channels=3, num_classes=7):
    return nn.Sequential(features(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, num_classes))
"""


@pytest.mark.parametrize("factory", ["features", "classifier", "with_classes"])
def test_networks_of_ones_own_get_a_classifier(
    factory: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"own_{factory}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = f"own_{factory}:{factory}"
    assert pretrain.main([*QUICKEST, "--model", model, "--drop-path", "0", "--epochs", "1", "--output", "pre"]) == 0
    assert main(["pre/checkpoints/last.pt", "--data", str(labelled), *QUICK, "--output", "fine"]) == 0
    kept = read_pretrained(Path("pre/checkpoints/last.pt")).state
    network, missing, _ = read_pretrained(Path("fine/checkpoints/last.pt")).dense(3)
    assert kept is not None and len(missing) in (0, 2)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert probe.main(["fine/best.safetensors", "--data", str(labelled), "--workers", "0", "--stage", "last"]) == 0


def test_layers_are_those_of_the_official_code() -> None:
    """downstream_imagenet/lr_decay.py: ResNet-50 has 0 for the stem, then 1, 2 to 3, 4 to 5, 6, and the head 7."""

    def layers_of(name: str) -> dict[str, int]:
        model = create_dense(name)
        return layer_numbers(model, find_classifier(model, 3))

    resnet = layers_of("resnet50")
    expected = {
        0: "conv1.weight bn1.bias",
        1: "layer1.0.conv1.weight layer1.2.bn3.weight",
        2: "layer2.2.conv1.weight",
        3: "layer2.3.conv1.weight",
        4: "layer3.2.conv3.weight",
        5: "layer3.3.conv1.weight layer3.5.conv1.weight",
        6: "layer4.0.downsample.0.weight layer4.2.conv1.weight",
        7: "fc.weight fc.bias",
    }
    assert all(resnet[name] == number for number, names in expected.items() for name in names.split())
    convnext = layers_of("convnext_small")  # stage 3 has 27 blocks
    expected = {
        0: "features.0.0.weight",
        1: "features.1.2.layer_scale",
        2: "features.2.0.weight features.3.0.layer_scale",
        3: "features.4.1.weight features.5.2.layer_scale",
        4: "features.5.3.layer_scale",
        11: "features.5.26.layer_scale",
        12: "features.6.0.weight features.7.2.layer_scale",
        13: "classifier.0.weight classifier.2.weight",
    }
    assert all(convnext[name] == number for number, names in expected.items() for name in names.split())
    for name in ("densenet121", "efficientnet_b4", "mobilenet_v3_small", "regnet_y_400mf", "timm:darknet53"):
        numbers = layers_of(name)
        in_order = [*numbers.values()]
        assert in_order[0] == 0 and len(set(in_order)) == 9 and in_order == sorted(in_order)
        assert in_order.count(8) == 2  # the classifier's


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_each_layer_learns_at_its_rate_and_vectors_are_not_decayed(name: str) -> None:
    model = torchvision.models.resnet50(num_classes=3)
    optimizer = create_finetuning_optimizer(name, model, layer_numbers(model, "fc"), layer_decay=0.7)
    update_schedule(optimizer, learning_rate=2.0, weight_decay=0.05)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == sum(1 for _ in model.parameters())
    expected = [
        (model.conv1.weight, 7, 0.05),
        (model.bn1.weight, 7, 0.0),
        (model.layer2[3].conv1.weight, 4, 0.05),
        (model.layer4[2].bn3.bias, 1, 0.0),
        (model.fc.weight, 0, 0.05),
        (model.fc.bias, 0, 0.0),
    ]
    for parameter, power, decay in expected:
        group = of[id(parameter)]
        assert group["lr"] == pytest.approx(2 * 0.7**power) and group["weight_decay"] == decay


def test_heads_that_the_loss_leaves_out_are_not_waited_for() -> None:
    network = torchvision.models.googlenet(num_classes=3, init_weights=False)
    freeze_auxiliary_heads(network)
    network.train()
    scores = scores_of(network(torch.rand(2, 3, 64, 64)))
    scores.sum().backward()
    waiting = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert scores.shape == (2, 3) and not waiting
