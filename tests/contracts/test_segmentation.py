"""`python -m sparkme.finetune --task segmentation` as its users run it, tiny: its measure, its loss and its settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated import create, make_masks, run_steps, save_mask, save_weights
from commands import losses, records
from PIL import Image
from small_resnet import resnet
from torch import Tensor, nn

from sparkme.data.annotations import IGNORED, find_segmented
from sparkme.finetune import finetune, main
from sparkme.settings.segmentation import PAPER, SMALL
from sparkme.training.loop import Loop
from sparkme.training.optimizer import learning_rate
from sparkme.training.segmentation import PixelLoss, class_weights, predict_labels
from sparkme.weights.finetuned import read_finetuned

BASE = ["--task", "segmentation", "--device", "cpu", "--workers", "0", "--log-steps", "1", "--batch-size", "4"]
TINY = [*BASE, "--head-channels", "16", "--short-side", "64", "--epochs", "2", "--eval-epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masks(tmp_path_factory.mktemp("masks"), 8, 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def learnt(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learnt")
    words = [*TINY, "--epochs", "24", "--eval-epochs", "12", "--base-lr", "0.5", "--ema-decay", "0.5"]
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


def test_a_run_learns_and_leaves_what_it_promises(learnt: Path) -> None:
    found = {str(p.relative_to(learnt)) for p in learnt.rglob("*") if p.is_file()}
    pictures = {"loss.png", "confusion.png", *(f"predictions-{name}.png" for name in ("best", "worst", "sample"))}
    assert {*pictures, "config.json", "metrics.jsonl", "results.json", "best.safetensors", "checkpoints/last.pt"} <= found
    measured = [record for record in records(learnt) if "val_mean_iou" in record]
    assert [record["epoch"] for record in measured] == [12, 24]
    assert losses(learnt)[-1] < 0.5 * losses(learnt)[0]
    results = json.loads((learnt / "results.json").read_text())
    assert results["best"]["mean_iou"] == max(record["val_mean_iou_average"] for record in measured) > 0.6
    assert results["num_train"] == 8 and results["num_val"] == 4 and set(results["of_each_class"]) == {"0", "1", "2"}
    assert sum(map(sum, results["confusion"])) == 4 * 60 * 60  # without the ignored border
    with Image.open(learnt / "predictions-sample.png") as sheet:
        assert min(sheet.size) > 100
    config = config_of(learnt)
    assert config["task"] == "segmentation" and config["recipe"] == "small" and config["batch_norm"] == "trained"


def test_the_best_weights_give_the_same_figures_again(learnt: Path, data: Path) -> None:
    found = read_finetuned(learnt)
    assert found.task == "segmentation" and found.classes == ["0", "1", "2"] and not found.network.training
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in found.statistics)
    confusion = np.zeros((3, 3), dtype=np.int64)
    for path in sorted((data / "val" / "images").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        mask = np.array(Image.open(data / "val" / "masks" / path.name))
        with torch.no_grad():
            predicted = found.network(((image - mean) / std)[None])[0].argmax(0).numpy()
        for true, seen in zip(mask[mask != 255], predicted[mask != 255]):
            confusion[true, seen] += 1
    results = json.loads((learnt / "results.json").read_text())
    ious = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
    assert float(ious.mean()) == pytest.approx(results["best"]["mean_iou"], abs=1e-9)
    if results["best"]["epoch"] == 24:
        assert results["confusion"] == confusion.tolist()


EVERYTHING = ["--ema-decay", "0.9", "--loss", "ce+dice", "--class-weights", "balanced", "--colour-jitter", "0.4"]
EVERYTHING += ["--drop-path", "0.2", "--accumulate", "2", "--batch-norm", "trained", "--clip-grad", "1", "--base-lr", "0.1"]


def test_resuming_equals_a_straight_run_bit_for_bit(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle of the second epoch, and continued with other processes that load images."""
    words = [str(weights), "--data", str(data), *TINY, *EVERYTHING, "--output"]
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


def settings_of(weights: Path | None, data: Path, tmp_path: Path, *words: object) -> Any:
    start = [weights] if weights else ["--from-scratch", "--model", "small_resnet:resnet"]
    return create(*start, "--data", data, *BASE, *words, "--output", tmp_path / "run").settings


def test_recipes(weights: Path, data: Path, tmp_path: Path) -> None:
    small = settings_of(weights, data, tmp_path)
    for name in ("base_lr", "weight_decay", "layer_decay", "loss", "scale_range", "head_channels", "batch_norm", "clip_grad"):
        assert getattr(small, name) == SMALL[name], name
    assert small.recipe == "small" and small.epochs == 300 and small.warmup_epochs == 30 and small.eval_epochs == 15
    assert small.short_side == 64 and small.size == (64, 64) and small.run_folder("a").name == "run"
    paper = settings_of(weights, data, tmp_path, "--recipe", "paper")
    for name in ("base_lr", "weight_decay", "layer_decay", "colour_jitter", "epochs", "batch_norm", "loss", "scale_range"):
        assert getattr(paper, name) == PAPER[name], name
    assert paper.drop_path == 0 and paper.warmup_epochs == 1.2 and paper.size == (512, 512) and paper.eval_epochs == 1
    assert paper.peak_rate == pytest.approx(1e-4 * 4 / 16)  # ConvNeXt's rate is for 16 images
    convnext = ["--from-scratch", "--model", "timm:test_convnext", "--data", data, *BASE, "--recipe", "paper"]
    assert create(*convnext, "--output", tmp_path / "convnext").settings.drop_path == PAPER["drop_path"]
    scratch = settings_of(None, data, tmp_path)
    assert scratch.layer_decay == 1 and scratch.batch_norm == "trained" and scratch.base_lr == SMALL["base_lr"]
    assert settings_of(None, data, tmp_path, "--layer-decay", "0.8", "--batch-norm", "frozen").batch_norm == "frozen"
    assert settings_of(weights, data, tmp_path, "--head", "deeplabv3").head_channels == 256
    sides = settings_of(weights, data, tmp_path, "--short-side", "96", "--input-size", "64", "128")
    assert sides.size == (64, 128) and sides.short_side == 96
    assert settings_of(weights, data, tmp_path, "--short-side", "96").size == (96, 96)


def test_rates_follow_the_layers_and_a_cosine(weights: Path, data: Path, tmp_path: Path) -> None:
    words = [weights, "--data", data, *TINY, "--epochs", "10", "--layer-decay", "0.5", "--warmup-epochs", "2"]
    training = create(*words, "--output", tmp_path)
    assert [training.rates(step)["learning_rate"] for step in range(20)] == [
        learning_rate(step, peak=SMALL["base_lr"] * 4 / 256, warmup_steps=4, total_steps=20) for step in range(20)
    ]
    run_steps(training, 1)
    rate_of = {
        id(p): group["lr"] / training.rates(0)["learning_rate"]
        for group in training.optimizer.param_groups
        for p in group["params"]
    }
    network = training.network
    found = [rate_of[id(p)] for p in (network.backbone.conv1.weight, network.backbone.layer1[0].bn1.weight)]
    found += [rate_of[id(getattr(network.backbone, f"layer{i}")[0].conv1.weight)] for i in (2, 3, 4)]
    found += [rate_of[id(network.classifier.scores.weight)], rate_of[id(network.classifier.blocks[0][0][0].weight)]]
    assert found == pytest.approx([0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1, 1])
    assert len(rate_of) == sum(p.requires_grad for p in network.parameters())


def running(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


def test_frozen_batch_norms_keep_statistics_that_were_estimated_on_whole_images(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    training = create(weights, "--data", data, *TINY, "--batch-norm", "frozen", "--output", tmp_path)
    plain = resnet()
    plain.load_state_dict(training.pretrained.state)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in training.statistics)
    means, variances = [], []
    for path in sorted((data / "train" / "images").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        with torch.no_grad():
            maps = plain.conv1(((image - mean) / std)[None])
        means.append(maps.mean((0, 2, 3)))
        variances.append(maps.var((0, 2, 3)))
    norm = training.network.backbone.bn1
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    before = running(training.network)
    run_steps(training, 2)
    after = running(training.network)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("backbone"), name
    assert training.network.classifier.training and training.network.backbone.bn1.weight.grad is None
    assert norm.weight.requires_grad and not norm.training  # its scale and shift learn
    again = create(weights, "--data", data, *TINY, "--batch-norm", "trained", "--output", tmp_path / "b")
    assert torch.equal(again.network.backbone.bn1.running_mean, plain.bn1.running_mean)
    before = running(again.network)
    run_steps(again, 1)
    assert all(not torch.equal(value, running(again.network)[name]) for name, value in before.items())


def test_shots(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [weights, "--data", data, *TINY, "--shots", "2", "--batch-size", "2", "--output"]
    training = create(*words, tmp_path / "a")
    count = len(training.train_set)
    assert 2 <= count < 8 and (training.train_set.presence().sum(0) >= 2).all() and training.settings.num_train_images == count
    assert "--shots 2 of each class" in capsys.readouterr().out
    assert "--shots 20: class" in fails(capsys, *words, tmp_path / "b", "--shots", "20")


@pytest.mark.parametrize(
    ("head", "channels"), [("unet", 1), ("fcn", 4), ("deeplabv3", 3), ("unet", 4)], ids=lambda value: str(value)
)
def test_every_head_learns_from_images_of_any_channels(head: str, channels: int, tmp_path: Path) -> None:
    data = make_masks(tmp_path / "data", 4, 2, channels=channels)
    weights = save_weights(tmp_path / "w.safetensors", channels)
    width = [] if head == "deeplabv3" else ["--head-channels", "16"]
    words = [weights, "--data", data, *BASE, *width, "--short-side", "64", "--epochs", "1", "--head", head]
    assert main([*map(str, words), "--recipe", "paper", "--output", str(tmp_path / "run")]) == 0
    config = config_of(tmp_path / "run")
    assert config["colour_jitter"] == (0.4 if channels == 3 else 0) and config["channels"] == channels
    found = read_finetuned(tmp_path / "run")
    assert found.network(torch.zeros(1, channels, 50, 70)).shape == (1, 3, 50, 70) and found.channels == channels


def plain_loss(scores: Tensor, labels: Tensor, weights: Tensor | None, dice: bool) -> float:
    """Pixel by pixel, in numbers of Python."""
    total = norm = 0.0
    num_classes = scores.shape[1]
    overlap, sums, present = [0.0] * num_classes, [0.0] * num_classes, [False] * num_classes
    for image, mask in zip(scores.double(), labels):
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                label = int(mask[y, x])
                if label == 255:
                    continue
                exponents = [float(torch.exp(value)) for value in image[:, y, x]]
                shares = [value / sum(exponents) for value in exponents]
                weight = 1.0 if weights is None else float(weights[label])
                total -= weight * float(np.log(shares[label]))
                norm += weight
                present[label] = True
                for i in range(num_classes):
                    overlap[i] += shares[i] * (i == label)
                    sums[i] += shares[i] + (i == label)
    loss = total / norm if norm else 0.0
    if dice:
        each = [1 - (2 * overlap[i] + 1) / (sums[i] + 1) for i in range(num_classes) if present[i]]
        loss += sum(each) / max(1, len(each))
    return loss


@pytest.mark.parametrize("dice", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_its_formula(dice: bool, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 4, 5, 6, generator=generator)
    labels = torch.randint(3, (2, 5, 6), generator=generator)  # class 3 is absent
    labels[0, :2] = IGNORED
    weights = torch.tensor([0.5, 2.0, 1.0, 4.0]) if weighted else None
    loss = PixelLoss(weights, dice=dice)
    scores.requires_grad_()
    value = loss(scores, labels)
    assert value.item() == pytest.approx(plain_loss(scores.detach(), labels, weights, dice), rel=1e-5)
    value.backward()
    assert scores.grad is not None and not scores.grad[0, :, :2].any() and scores.grad[1].any()  # of ignored pixels
    nothing = loss(scores, torch.full_like(labels, IGNORED))
    assert nothing.item() == 0 and nothing.requires_grad


def test_weights_of_classes_are_the_inverse_root_of_their_pixels() -> None:
    weights = class_weights(torch.tensor([100, 400, 0, 1600]))
    assert weights[2] == 0 and float(weights[0] / weights[1]) == pytest.approx(2) == float(weights[1] / weights[3])
    shares = torch.tensor([100, 400, 0, 1600]) / 2100
    assert float((weights * shares).sum()) == pytest.approx(1)


def test_large_images_are_predicted_in_windows_and_scores_are_enlarged() -> None:
    """By a network whose scores are the image itself."""
    image = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    network: Any = nn.Identity().eval()
    assert torch.equal(predict_labels(network, image, 64, (64, 48)), image[0].argmax(0).byte())
    assert torch.equal(predict_labels(network, image, 20, (64, 48)), image[0].argmax(0).byte())
    enlarged = nn.functional.interpolate(image, (130, 100), mode="bilinear", align_corners=False)
    assert torch.equal(predict_labels(network, image, 20, (130, 100)), enlarged[0].argmax(0).byte())
    seen: list[torch.Size] = []
    network.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert predict_labels(network, image, 32, (64, 48)).dtype == torch.uint8 and {*seen} == {torch.Size([1, 3, 32, 32])}


def change_masks(folder: Path, split: str, change: Any) -> None:
    for path in sorted((folder / split / "masks").iterdir()):
        values = np.array(Image.open(path))
        change(values)
        save_mask(path, values)


def test_validation_images_without_a_class(weights: Path, tmp_path: Path) -> None:
    data = make_masks(tmp_path / "data", 4, 2)

    def without(values: np.ndarray) -> None:
        values[values == 2] = 0

    change_masks(data, "val", without)
    assert main([str(weights), "--data", str(data), *TINY, "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["accuracy_of_each_class"]["2"] is None and results["confusion"][2] == [0, 0, 0]


def test_a_single_training_image_and_images_without_a_known_pixel(weights: Path, tmp_path: Path) -> None:
    data = make_masks(tmp_path / "data", 1, 2)
    words = [str(weights), "--data", str(data), *BASE[:-2], "--head-channels", "16", "--epochs", "2", "--output"]
    assert main([*words, str(tmp_path / "run")]) == 0
    assert config_of(tmp_path / "run")["batch_size"] == 1 and np.isfinite(losses(tmp_path / "run")).all()

    two = make_masks(tmp_path / "two", 2, 2)
    save_mask(two / "train" / "masks" / "0000.png", np.full((64, 64), 255, np.uint8))
    save_mask(two / "val" / "masks" / "1000.png", np.full((64, 64), 255, np.uint8))
    words[2] = str(two)
    assert main([*words, str(tmp_path / "two-run"), "--loss", "ce+dice", "--batch-size", "1"]) == 0
    found = losses(tmp_path / "two-run")
    assert np.isfinite(found).all() and 0 in found  # a batch without a known pixel


def test_unreadable_images_are_replaced_or_passed_over(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_masks(tmp_path / "data", 5, 3)
    words = [weights, "--data", data, *TINY, "--epochs", "1", "--output"]
    training = create(*words, tmp_path / "a")
    for path in (data / "train" / "images" / "0001.png", data / "val" / "images" / "1001.png"):
        path.write_bytes(b"no image")
    capsys.readouterr()
    assert Loop(training).run() == 0
    shown = capsys.readouterr()
    assert shown.err.count("skipped unreadable validation image") == 1 and "1001.png" in shown.err
    assert "unreadable images: 1" in shown.out
    assert json.loads((tmp_path / "a" / "results.json").read_text())["num_val"] == 2
    assert main([*map(str, words), str(tmp_path / "b")]) == 0  # they are left out at the start
    assert config_of(tmp_path / "b")["num_train_images"] == 4 and "left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "64"], "--batch-size 64 is more than the 8 training images"),
        (["--base-lr", "nan"], "--base-lr nan is not a finite number"),
        (["--scale-range", "2", "1"], "--scale-range 2.0 1.0: the lower number comes first"),
        (["--scale-range", "0", "1"], "--scale-range 0.0 1.0 must be above 0"),
        (["--input-size", "64", "64", "64"], "--input-size takes a side, or height and width"),
        (["--head", "mask-rcnn"], "invalid choice: 'mask-rcnn'"),
        (["--head", "deeplabv3", "--head-channels", "64"], "deeplabv3 has 256 channels, not 64"),
        (["--head", "deeplabv3", "--head-channels", "256", "--batch-size", "1"], "--head deeplabv3 needs two images"),
        (["--mixup", "0.2"], "unrecognized arguments: --mixup"),
        (["--regions", "9"], "unrecognized arguments: --regions"),
        (["--short-side", "32", "--batch-size", "1"], "a single image of 32 x 32 pixels leaves batch norms a single value"),
        (["--short-side", "16"], "--short-side 16 must be at least 32"),
        (["--loss", "focal"], "invalid choice: 'focal'"),
        (["--ignore-index", "-1"], "--ignore-index -1 must be at least 0"),
        (["--task", "detection"], "unrecognized arguments: --head-channels"),
        (["--task", "sleep"], "invalid choice: 'sleep'"),
        (["--max-unreadable", "-1"], "--max-unreadable -1 must be at least 0"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, weights, "--data", data, *TINY, "--output", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing_or_of_another_kind(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [weights, *TINY, "--output", tmp_path / "run"]
    assert "the following arguments are required: --data" in fails(capsys, *words)
    assert "nowhere" in fails(capsys, *words, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, *words, "--data", tmp_path / "empty")


def test_colour_jitter_is_for_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, weights = make_masks(tmp_path / "data", 4, 2, channels=1), save_weights(tmp_path / "w.safetensors", 1)
    words = [weights, "--data", data, *TINY, "--output", tmp_path / "run"]
    assert "--colour-jitter needs 3 channels" in fails(capsys, *words, "--colour-jitter", "0.2")


def test_the_same_from_python_and_its_run_again(weights: Path, data: Path, tmp_path: Path) -> None:
    words = {"device": "cpu", "workers": 0, "batch_size": 4, "head_channels": 16, "epochs": 1, "short_side": 64}
    run = finetune(weights, task="segmentation", data=data, output=tmp_path / "run", **words)
    assert run.finished and 0 <= json.loads((tmp_path / "run" / "results.json").read_text())["best"]["mean_iou"] <= 1
    with pytest.raises(TypeError, match="there is no setting 'regions'"):
        finetune(weights, task="segmentation", data=data, regions=3)
    with pytest.raises(TypeError, match="'data' is missing"):
        finetune(weights, task="segmentation")
    again = finetune(run.folder / "best.safetensors", task="segmentation", data=data, output=tmp_path / "again", **words)
    assert again.finished


def test_help_is_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--task", "segmentation", "--help"],
        ["--task=segmentation", "-h"],
        ["--task", "detection", "--task", "segmentation", "-h"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        shown = capsys.readouterr().out
        assert stopped.value.code == 0 and "--scale-range" in shown and "--regions" not in shown and "--mixup" not in shown


def test_a_folder_of_another_task_is_not_continued(
    weights: Path, data: Path, learnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [weights, "--data", data, "--device", "cpu", "--workers", "0", "--batch-size", "4", "--output", learnt]
    message = fails(capsys, *words, "--task", "segmentation", "--head", "fcn")
    assert "was trained with" in message and "unet" in message


def test_the_set_is_read_as_it_was_made(data: Path) -> None:
    split = find_segmented(data)
    assert len(split.train) == 8 and split.train.classes == ["0", "1", "2"] and int((split.train.labels(0) == 255).sum()) == 496
