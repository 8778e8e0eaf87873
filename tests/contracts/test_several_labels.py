"""Fine-tuning on images with several labels: the loss, mean average precision, and what a run leaves."""

import json
import random
from pathlib import Path

import pytest
import safetensors
import torch
from commands import losses, records
from PIL import Image
from torch import Tensor, nn

from sparkme.data.dataset import CropDataset, EpochSampler, collate, normalise
from sparkme.data.labelled import WholeImages, find_labelled, whole_batches
from sparkme.data.statistics import Statistics
from sparkme.finetune import main
from sparkme.report import main as report
from sparkme.training.features import best_decay, fit_linear
from sparkme.training.target import Precision, average_precision
from sparkme.weights.pretrained import read_pretrained


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with red, green and blue in every combination; one column for each, and one for those with nothing."""
    folder = tmp_path_factory.mktemp("colours")
    lines, draw = ["file,red,green,blue"], random.Random(0)
    for i in range(40):
        has = [i >> bit & 1 for bit in range(3)]
        colour = tuple(draw.randrange(180, 255) if one else draw.randrange(60) for one in has)
        Image.new("RGB", (48, 48), colour).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{','.join(map(str, has))}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


def words(table: Path, output: Path, epochs: int = 2) -> list[str]:
    return [
        "--from-scratch",
        "--model",
        "small_resnet:resnet",
        "--data",
        str(table),
        "--labels",
        "red,green,blue",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--input-size",
        "64",
        "--log-steps",
        "1",
        "--eval-epochs",
        "1",
        "--epochs",
        str(epochs),
        "--ema-decay",
        "0.9",
        "--checkpoint-minutes",
        "0",
        "--output",
        str(output),
    ]


@pytest.fixture(scope="module")
def straight(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert main(words(table, folder)) == 0
    return folder


def counted(scores: list[float], labels: list[bool]) -> float:
    """Average precision by counting, threshold by threshold."""
    total, area, recall = sum(labels), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        area += (sum(taken) / total - recall) * sum(taken) / len(taken)
        recall = sum(taken) / total
    return area


def test_average_precision_is_what_counting_gives() -> None:
    draw = random.Random(0)
    for count in (*range(1, 12), 50, 200):
        for levels in (2, 5, 1000):  # few: many scores are equal
            scores = [float(draw.randrange(levels)) for _ in range(count)]
            labels = [draw.random() < 0.3 for _ in range(count)]
            labels[draw.randrange(count)] = True
            assert average_precision(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(counted(scores, labels))
    assert average_precision(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False])) == (1 + 2 / 3) / 2
    assert average_precision(torch.rand(4), torch.zeros(4, dtype=torch.bool)) is None


def test_the_mean_is_over_labels_that_some_image_has_and_over_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(30, 3, generator=generator), torch.rand(30, 3, generator=generator) < 0.4
    labels[:, 1] = False
    parts = [Precision(["a", "b", "c"]) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 7), slice(7, 20), slice(20, 30)), strict=True):
        part.add(scores[rows], labels[rows])
    for part in parts[1:]:
        parts[0].merge(part)
    expected = [counted(scores[:, i].tolist(), labels[:, i].tolist()) for i in (0, 2)]
    assert parts[0].num_images == 30 and parts[0].values() == {"map": pytest.approx(sum(expected) / 2)}
    assert parts[0].write(Path()) == {
        "average_precision": {"a": pytest.approx(expected[0]), "b": None, "c": pytest.approx(expected[1])}
    }


def test_the_loss_is_binary_cross_entropy(table: Path, tmp_path: Path) -> None:
    rate = ["--base-lr", "1e-9", "--head-init", "random", "--warmup-epochs", "0"]
    assert main([*words(table, tmp_path, epochs=1), *rate]) == 0
    split = find_labelled(table, "red,green,blue")
    torch.manual_seed(0)
    network, *_ = read_pretrained(tmp_path / "best.safetensors").random().dense(3)
    dataset = CropDataset(split.train.paths, (64, 64), min_scale=0.35, seed=0, labels=split.train.labels)
    network.train()
    values = []
    for draws in EpochSampler(len(dataset), len(dataset), 8, 0, range(len(dataset) // 8)):
        batch = collate([dataset[draw] for draw in draws])
        assert batch.images is not None and batch.labels is not None and batch.labels.dtype == torch.bool
        scores: Tensor = network(normalise(batch.images, Statistics())).sigmoid()
        values.append(nn.functional.binary_cross_entropy(scores, batch.labels.float()).item())
    assert losses(tmp_path) == pytest.approx(values, rel=1e-3)


def test_a_run_says_and_keeps_mean_average_precision(straight: Path, table: Path, tmp_path: Path) -> None:
    results = json.loads((straight / "results.json").read_text())
    measured = [record for record in records(straight) if "val_map" in record]
    assert len(measured) == 2 and results["best"]["map"] == max(record["val_map_average"] for record in measured)
    assert list(results["average_precision"]) == ["red", "green", "blue"] and "confusion" not in results
    assert results["last"]["val_map_average"] == pytest.approx(sum(results["average_precision"].values()) / 3)
    assert not (straight / "confusion.png").exists()
    # What is kept is what was measured.
    network, *_ = read_pretrained(straight / "best.safetensors").dense(3)
    with safetensors.safe_open(straight / "best.safetensors", "pt") as file:
        notes = file.metadata()
    assert json.loads(notes["several_labels"]) is True and json.loads(notes["classes"]) == ["red", "green", "blue"]
    network.load_state_dict(safetensors.torch.load_file(straight / "best.safetensors"))
    val = find_labelled(table, "red,green,blue").val
    batch = next(iter(whole_batches(WholeImages(val.images, (64, 64)), batch_size=64, workers=0)))
    with torch.no_grad():
        scores = network.eval()(normalise(batch.images, Statistics()))
    each = [counted(scores[:, i].tolist(), val.labels[:, i].tolist()) for i in range(3)]
    assert results["best"]["map"] == pytest.approx(sum(each) / 3)
    assert report([str(straight), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "mean average precision" in page and ">average precision</th>" in page and "accuracy" not in page


def test_resuming_equals_a_straight_run(
    straight: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    step = sorted((straight / "checkpoints").glob("step_*.pt"))[0]
    (tmp_path / "checkpoints" / step.name).write_bytes(step.read_bytes())
    (tmp_path / "metrics.jsonl").write_bytes((straight / "metrics.jsonl").read_bytes())
    assert main(words(table, tmp_path)) == 0
    assert "resumed after step" in capsys.readouterr().out
    ours, theirs = (torch.load(f / "checkpoints" / "last.pt", weights_only=True) for f in (tmp_path, straight))
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    assert records(tmp_path)[-1] == records(straight)[-1]
    others = words(table, tmp_path)
    others[others.index("red,green,blue")] = "green,red,blue"
    assert main(others) == 2
    assert "as digest of the images, their classes" in capsys.readouterr().err


def test_the_classifier_starts_as_the_best_linear_one(table: Path, tmp_path: Path) -> None:
    """Colours are linear in the features, so it is right without a step worth the name."""
    rate = ["--base-lr", "1e-9", "--warmup-epochs", "0", "--ema-decay", "0"]
    assert main([*words(table, tmp_path / "a", epochs=1), *rate]) == 0
    assert records(tmp_path / "a")[-1]["val_map"] > 0.99
    assert main([*words(table, tmp_path / "b", epochs=1), *rate, "--head-init", "random"]) == 0
    assert records(tmp_path / "b")[-1]["val_map"] < 0.95


def test_a_linear_classifier_of_labels_is_one_of_each(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    labels = x @ torch.randn(4, 3, generator=generator) + 0.5 * torch.randn(60, 3, generator=generator) > 0
    both = fit_linear(x, labels, 0.01)
    for i in range(3):
        alone = fit_linear(x, labels[:, i : i + 1], 0.01)
        torch.testing.assert_close(both.weight[i], alone.weight[0], rtol=1e-3, atol=1e-3)
    assert best_decay(x, labels) in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
