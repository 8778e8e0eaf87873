"""Frozen features and what they are worth: against torchvision's own network, and against a plain count of neighbours."""

import json
import math
from pathlib import Path

import pytest
import torch
import torchvision
from commands import QUICKEST
from pictures import make_labelled
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor

from sparkme import export, pretrain
from sparkme.data.labelled import WholeBatch, WholeImages, find_labelled, whole_batches
from sparkme.data.statistics import Statistics
from sparkme.networks.create import create_encoder
from sparkme.probe import main
from sparkme.training.features import best_decay, fit_linear, knn_accuracy, linear_accuracy, pooled_features
from sparkme.weights.pretrained import read_pretrained


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def test_features_are_those_of_torchvisions_own_network() -> None:
    torch.manual_seed(0)
    dense = torchvision.models.resnet18().eval()
    for module in dense.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    encoder = create_encoder("resnet18").train()
    encoder.load_dense_state_dict(dense.state_dict())
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    none = torch.empty(0, dtype=torch.long)
    batches = [
        WholeBatch(images[:2], torch.tensor([0, 1]), ()),
        WholeBatch(None, none, ("b: torn",)),
        WholeBatch(images[2:], torch.tensor([3]), ()),
    ]
    found = pooled_features(encoder, batches, Statistics(), torch.device("cpu"))
    assert encoder.training and found.numbers.tolist() == [0, 1, 3] and found.unreadable == ("b: torn",)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in Statistics())
    layers = {f"layer{i}": str(2 ** (i + 1)) for i in range(1, 5)}
    with torch.no_grad():
        expected = create_feature_extractor(dense, layers)((images / 255 - mean) / std)
    for stride, maps in expected.items():
        torch.testing.assert_close(found.maps[int(stride)], maps.mean((2, 3)), rtol=1e-4, atol=1e-5)


def votes(train: Tensor, labels: Tensor, x: Tensor, neighbours: int) -> int:
    """The winner of the weighted vote, counted by hand."""
    center = train.mean(0)
    cosine = [float((t - center) @ (x - center) / ((t - center).norm() * (x - center).norm())) for t in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:neighbours]
    scores: dict[int, float] = {}
    for i in nearest:
        scores[int(labels[i])] = scores.get(int(labels[i]), 0.0) + math.exp(cosine[i] / 0.07)
    return max(scores, key=lambda label: scores[label])


@pytest.mark.parametrize("neighbours", [1, 7, 100])
def test_the_vote_is_that_of_the_nearest_neighbours(neighbours: int) -> None:
    generator = torch.Generator().manual_seed(neighbours)
    train, val = torch.randn(60, 5, generator=generator) + 1, torch.randn(40, 5, generator=generator) + 1
    labels, truth = torch.randint(0, 4, (60,), generator=generator), torch.randint(0, 4, (40,), generator=generator)
    right = sum(votes(train, labels, x, min(neighbours, 60)) == int(t) for x, t in zip(val, truth))
    assert knn_accuracy(train, labels, val, truth, neighbours=neighbours) == pytest.approx(right / 40)


def test_the_linear_classifier_is_the_minimum_and_learns_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    labels = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    classifier = fit_linear(x, labels, 0.01)
    weight = classifier.weight.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.t() + classifier.bias, labels) + 0.005 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.abs().max()) < 1e-3
    share, decay = linear_accuracy(x[:150] * 7 + 3, labels[:150], x[150:] * 7 + 3, labels[150:])
    assert share > 0.9 and decay < 0.1
    for scale in (1e-14, 1e9):  # of features of deep networks with random weights, and of such without norms
        assert linear_accuracy(x[:150] * scale, labels[:150], x[150:] * scale, labels[150:])[0] == pytest.approx(
            share, abs=0.03
        )
    noise = torch.randint(0, 3, (200,), generator=generator)
    assert best_decay(x, noise) >= 0.01  # what tells nothing is decayed


def test_a_checkpoint_and_its_export_score_alike(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = make_labelled(tmp_path / "alike", {"one": 15, "two": 20})  # all grey: what is guessed depends on every weight
    exported = [tmp_path / "weights.pth", tmp_path / "timm.safetensors"]
    for path in exported:
        library = "timm" if path.stem == "timm" else "torchvision"
        assert export.main([str(trained), "--to", library, "--output", str(path), "--no-verify"]) == 0
    output = tmp_path / "scores.json"
    words = [str(trained), "--data", str(labelled), "--workers", "0", "--input-size", "64", "--output", str(output)]
    assert main([*words, "--compare", "random", *map(str, exported)]) == 0
    shown = capsys.readouterr().out
    assert "random weights" in shown and "kNN" in shown and "data has no split" in shown
    scores = json.loads(output.read_text())["scores"]
    assert len(scores) == 4 * 4 and [s["stride"] for s in scores[:4]] == [4, 8, 16, 32]
    whole = [{k: v for k, v in s.items() if k != "weights"} for s in scores]
    assert whole[:4] == whole[8:12] == whole[12:] != whole[4:8]
    assert main([*words, "--stage", "last", "--no-linear", "--shots", "3", "--draws", "2", "--overwrite"]) == 0
    (score,) = json.loads(output.read_text())["scores"]
    assert score["stride"] == 32 and "linear" not in score


def test_weights_that_do_not_say_their_network_need_model(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    assert "pass --model NAME" in fails(capsys, path, "--data", labelled)
    words = ["--data", labelled, "--workers", "0", "--input-size", "64", "--stage", "32"]
    assert main([*map(str, [path, "--model", "resnet18", *words])]) == 0
    capsys.readouterr()
    assert "does not fit resnet34: 120 of its 216 tensors match" in fails(capsys, path, "--model", "resnet34", *words)


def test_mistakes_are_one_line(trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file" in fails(capsys, tmp_path / "checkpoints" / "none.pt", "--data", labelled)
    words = [trained, "--data", labelled, "--workers", "0"]
    assert "--stage 5: the network has maps at strides 4, 8, 16, 32" in fails(capsys, *words, "--stage", "5")
    assert "--stage deep must be all, last" in fails(capsys, *words, "--stage", "deep")
    assert "not a multiple of the network's total stride 32; use 64" in fails(capsys, *words, "--input-size", "70")
    assert "--shots 17: class 'blue' has 10 training images" in fails(capsys, *words, "--shots", "17")
    assert "must be .json" in fails(capsys, *words, "--output", tmp_path / "scores.txt")
    (tmp_path / "there.json").write_text("")
    assert "--overwrite" in fails(capsys, *words, "--output", tmp_path / "there.json")
    assert "--compare: no file" in fails(capsys, *words, "--compare", tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert "cannot be read as weights" in fails(capsys, tmp_path / "torn.safetensors", "--data", labelled)


def test_pretraining_measures_the_encoder_while_it_trains(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICKEST, "--output", str(tmp_path), "--probe-data", str(labelled), "--probe-epochs", "2"]
    assert pretrain.main(words) == 0
    assert "of 6 images of --probe-data right" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {record["epoch"]: record["knn"] for record in records if "knn" in record}
    assert [*measured] == [0, 2, 3] and len([r for r in records if "loss" in r]) == 6
    split = find_labelled(labelled)
    encoder = read_pretrained(tmp_path / "checkpoints" / "last.pt").encoder()[0]
    parts = [
        pooled_features(
            encoder,
            whole_batches(WholeImages(part.paths, (64, 64)), batch_size=8, workers=0),
            Statistics(),
            torch.device("cpu"),
        ).maps[32]
        for part in (split.train, split.val)
    ]
    assert measured[3] == pytest.approx(knn_accuracy(parts[0], split.train.labels, parts[1], split.val.labels), abs=0.1)
    assert main_fails(capsys, [*QUICKEST, "--output", str(tmp_path / "b"), "--probe-epochs", "2"]).startswith(
        "error: --probe-epochs needs --probe-data"
    )


def main_fails(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert pretrain.main(words) == 2
    return capsys.readouterr().err.strip()
