"""benchmarks.transfer: both sides get the same images and steps, each its best rate; and what it writes is documented."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from annotated import make_coco
from commands import value_of
from pictures import make_labelled

from benchmarks import ablations, small_data, transfer

TINY = [
    "--model",
    "timm:test_resnet",
    "--input-size",
    "64",
    "--shots",
    "3",
    "0",
    "--seeds",
    "2",
    "--rates",
    "0.5",
    "1",
    "--processes",
    "1",
    "--finetune-flags",
    "--epochs 1 --batch-size 4",
    "--pretrain-flags",
    "--epochs 1 --batch-size 4 --workers 0 --decoder-width 32 --mask-ratio 0.5",
]


def test_both_sides_are_treated_alike(tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    data = make_labelled(tmp_path / "data", {"red": 20, "blue": 20, "green": 20})
    words = ["--data", str(data), "--work", str(tmp_path / "work"), *TINY]
    assert transfer.main(words) == 0
    record = json.loads((tmp_path / "work" / "transfer.json").read_text())
    assert record.keys() >= {"commit", "settings", "images", "classes", "pretraining", "probe", "finetuning"}
    assert record["images"] == {"train": 36, "choose": 6, "test": 18}

    tables = {name: list(csv.reader((tmp_path / "work" / f"{name}.csv").open())) for name in ("choose", "final")}
    parts = {
        (name, part): {row[0] for row in rows if row[2] == part} for name, rows in tables.items() for part in ("train", "val")
    }
    assert parts["choose", "train"] == parts["final", "train"] and not parts["choose", "val"] & parts["final", "val"]
    seen_in_pretraining = {p.resolve() for p in (tmp_path / "work" / "unlabelled").iterdir()}
    assert seen_in_pretraining == {(data / path).resolve() for path in parts["final", "train"]}

    finetuned = [command for command in commands if command[0] == "sparkme.finetune"]
    assert len(finetuned) == 2 * 2 * (2 + 2)
    for shots in ("3", None):
        mine = [c for c in finetuned if ("--shots" in c and value_of(c, "--shots")) == (shots or False)]
        scratch, pretrained = ([c for c in mine if ("--from-scratch" in c) == side] for side in (True, False))
        assert len(scratch) == len(pretrained) == 4
        for ours, theirs in zip(sorted(scratch, key=str), sorted(pretrained, key=str)):
            drop = {
                "--from-scratch",
                value_of(ours, "--output"),
                value_of(theirs, "--output"),
                value_of(ours, "--base-lr"),
                value_of(theirs, "--base-lr"),
            }
            assert [w for w in ours if w not in drop] == [w for w in theirs if w not in drop]
    for result in record["finetuning"]:
        for side in transfer.SIDES:
            rates = {float(rate): accuracy for rate, accuracy in result[side]["accuracy_of_rates"].items()}
            chosen = min(rates, key=lambda rate: abs(rate - result[side]["rate"]))
            assert rates[chosen] == max(rates.values()) and chosen == pytest.approx(result[side]["rate"])
            assert result[side]["mean"] == pytest.approx(sum(result[side]["accuracies"]) / 2)
        gains = [a - b for a, b in zip(result["pretrained"]["accuracies"], result["scratch"]["accuracies"])]
        assert result["gain"]["mean"] == pytest.approx(sum(gains) / 2)
        assert result["gain"]["standard_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert "| labels per class |" in capsys.readouterr().out
    capsys.readouterr()
    for changed in (["--finetune-flags", "--epochs 2"], ["--test-share", "0.5"]):  # whose results would be mixed with these
        assert transfer.main([*words, *changed]) == 2
        assert "choose another --work" in capsys.readouterr().err
    before = len(commands)
    assert transfer.main(words) == 0  # what is done is not done again
    assert {command[0] for command in commands[before:]} <= {"sparkme.pretrain"}


def test_the_picture_and_the_table_come_from_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = {"mean": 0.5, "standard_error": 0.01, "accuracies": [0.5], "rate": 1e-3, "accuracy_of_rates": {}}
    scores = [{"shots": 10, "weights": weights, "stride": 32, "knn": 0.3, "linear": 0.4} for weights in ("x", "random weights")]
    record = {
        "settings": {"model": "resnet18", "input_size": 96},
        "classes": ["a", "b"],
        "probe": scores,
        "finetuning": [
            {"shots": 10, "pretrained": side, "scratch": {**side, "mean": 0.45}, "gain": {"mean": 0.05, "standard_error": None}}
        ],
    }
    path, page = tmp_path / "numbers.json", tmp_path / "page.md"
    path.write_text(json.dumps(record))
    page.write_text(f"before\n{transfer.BEGIN}\n{transfer.END}\nafter\n")
    monkeypatch.setattr(transfer, "PAGE", page)
    assert transfer.main(["--write", "--json", str(path)]) == 0
    assert "| 10 | 45.0 ± 1.0 | 50.0 ± 1.0 | +5.0 | 30.0, 40.0 | 30.0, 40.0 |" in page.read_text()
    assert path.with_suffix(".png").stat().st_size > 1000 and page.read_text().endswith("after\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "-1"], "--shots -1 must be at least 0"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--rates", "0"], "--rates and --base-lr must be above 0"),
        (["--finetune-flags", "--base-lr 1"], "--finetune-flags must not contain --base-lr"),
        (["--write", "--json", "none.json"], "none.json does not exist"),
        (["--data", "none"], "--data none is not a folder and matches no file"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transfer.main(["--work", str(tmp_path), *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]


def test_settings_of_pretraining_are_compared_once_each(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_labelled(tmp_path / "data", {"red": 20, "blue": 20, "green": 20})
    output = tmp_path / "numbers.json"
    words = [
        "--data",
        str(data),
        "--work",
        str(tmp_path / "work"),
        "--model",
        "timm:test_resnet",
        "--input-size",
        "64",
        "--base",
        "--epochs 1 --batch-size 4 --workers 0 --decoder-width 32 --mask-ratio 0.5",
        "--draws",
        "2",
        "--json",
        str(output),
        "--processes",
        "1",
    ]
    assert small_data.main([*words, "--trial", "", "--trial", "--crop-scale 0.5"]) == 0
    first, second = json.loads(output.read_text())["trials"]
    assert (first["flags"], second["flags"]) == ("", "--crop-scale 0.5")
    assert first["loss"] != second["loss"] and 0 <= first["ten_labels_a_class"]["knn"] <= 1
    pretrained = [command for command in commands if command[0] == "sparkme.pretrain"]
    assert "--crop-scale" not in pretrained[0] and value_of(pretrained[1], "--crop-scale") == "0.5"
    before = len(commands)
    assert small_data.main([*words, "--trial", "--crop-scale 0.5"]) == 0 and len(commands) == before
    assert small_data.main([*words, "--processes", "0"]) == 2
    assert "--processes 0 must be at least 1" in capsys.readouterr().err


def test_ablations_are_compared_seed_by_seed(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_labelled(tmp_path / "data", {"red": 20, "blue": 20, "green": 20})
    output = tmp_path / "numbers.json"
    words = [
        "--data",
        str(data),
        "--work",
        str(tmp_path / "work"),
        "--model",
        "timm:test_resnet",
        "--input-size",
        "64",
        "--base",
        "--epochs 1 --batch-size 4 --workers 0 --decoder-width 32 --mask-ratio 0.5 --panel-epochs 0",
        "--draws",
        "2",
        "--json",
        str(output),
        "--processes",
        "1",
    ]
    assert ablations.main([*words, "--seeds", "1"]) == 0
    before = len(commands)
    first = json.loads(output.read_text())
    assert ablations.main([*words, "--seeds", "2"]) == 0  # what is done is not done again
    record = json.loads(output.read_text())
    assert record["runs"][:5] == first["runs"] and record.keys() >= {"commit", "settings", "images", "classes"}
    rows = ["small", "spark-zeroed", "spark-single-scale", "spark-loss-on-all", "random"]
    order = [*rows[:1], "random", *rows[1:4]]
    assert [(run["row"], run["seed"]) for run in record["runs"]] == [(row, seed) for seed in (0, 1) for row in order]
    for these, seed in ((commands[:before], "0"), (commands[before:], "1")):
        pretrained = [command for command in these if command[0] == "sparkme.pretrain"]
        assert [value_of(command, "--recipe") for command in pretrained] == rows[:4]
        assert {value_of(command, "--seed") for command in these} == {seed} and len(these) == 4 + 2 * 4
        drop = {value_of(command, flag) for command in pretrained for flag in ("--recipe", "--output")}
        assert len({tuple(word for word in command if word not in drop) for command in pretrained}) == 1
    losses = [run["loss"] for run in record["runs"] if "loss" in run]
    assert len(losses) == len(set(losses)) == 8

    assert [row["row"] for row in record["rows"]] == rows
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablations.BEGIN}\n{ablations.END}\nafter\n")
    monkeypatch.setattr(ablations, "PAGE", page)
    assert ablations.main(["--write", "--json", str(output)]) == 0
    assert all(f"\n| {name} | " in page.read_text() for name in ("SparK", "SparK, deepest scale alone", "random weights"))
    assert page.read_text().endswith("after\n")
    capsys.readouterr()
    assert ablations.main([*words, "--draws", "3"]) == 2
    assert "choose another --work" in capsys.readouterr().err
    assert ablations.main([*words, "--draws", "3", "--work", str(tmp_path / "other")]) == 2
    assert "has runs with other settings" in capsys.readouterr().err
    assert ablations.main([*words, "--seeds", "0"]) == 2
    assert "--seeds 0 must be at least 1" in capsys.readouterr().err


def test_ablations_differ_from_spark_in_pairs_of_seeds() -> None:
    def run(row: str, seed: int, accuracy: float) -> dict[str, Any]:
        scores = {"knn": accuracy, "linear": 0.5}
        return {"row": row, "seed": seed, "ten_labels_a_class": scores, "all_labels": scores}

    runs = [run("small", 0, 0.3), run("random", 0, 0.1), run("spark-zeroed", 1, 0.35), run("small", 1, 0.5)]
    runs += [run("spark-zeroed", 0, 0.25), run("spark-zeroed", 2, 0.9)]  # no run of SparK yet for the last one
    rows = {row["row"]: row for row in ablations.summarise(runs)}
    assert list(rows) == ["small", "spark-zeroed", "random"] and rows["spark-zeroed"]["seeds"] == [0, 1, 2]
    found = rows["spark-zeroed"]["all_labels_knn"]
    assert found["accuracy"] == {"mean": pytest.approx(0.5), "standard_error": pytest.approx((0.1225 / 3) ** 0.5)}
    assert found["difference"] == {"mean": pytest.approx(-0.1), "standard_error": pytest.approx(0.05)}  # of -0.05 and -0.15
    assert rows["random"]["ten_labels_a_class_knn"]["difference"] == {"mean": pytest.approx(-0.2), "standard_error": None}
    table = ablations.table({"rows": list(rows.values())})
    assert "| SparK, hidden pixels at zero | 50.0 ± 20.2 (-10.0 ± 5.0) | 50.0 ± 0.0 (+0.0 ± 0.0) |" in table


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_both_sides_of_a_dense_task_are_treated_alike(
    task: str, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    data, work = make_coco(tmp_path / "coco", train=14), tmp_path / "work"
    few = {"detection": "--fpn-channels 16 --regions 16", "segmentation": "--head-channels 16"}[task]
    words = [
        "--task",
        task,
        "--data",
        data,
        "--unlabelled",
        data / "train",
        "--work",
        work,
        "--images",
        "4",
        "--input-size",
        "64",
    ]
    words += ["--model", "small_resnet:resnet", "--steps", "1", "--seeds", "2", "--rates", "0.5", "1", "--processes", "1"]
    words += ["--finetune-flags", f"{few} --batch-size 4", "--pretrain-flags", "--epochs 1 --batch-size 4 --workers 0"]
    assert transfer.main([*map(str, words)]) == 0
    record = json.loads((work / "transfer.json").read_text())
    assert record["images"] == {"train": 12, "choose": 2, "test": 4}
    (result,) = record["finetuning"]
    for name in ("mask_ap", "box_ap") if task == "detection" else ("mean_iou", "pixel_accuracy"):
        pretrained, scratch = (result[side][name]["values"] for side in ("pretrained", "scratch"))
        assert result["gain"][name]["values"] == [a - b for a, b in zip(pretrained, scratch, strict=True)]

    finetuned = [command for command in commands if command[0] == "sparkme.finetune"]
    assert len(finetuned) == 2 * (2 + 2)
    source = "--train" if task == "detection" else "--data"
    of_sides = [[c for c in finetuned if ("--from-scratch" in c) == side] for side in (True, False)]
    seen = [sorted((value_of(c, source), value_of(c, "--seed")) for c in side) for side in of_sides]
    assert seen[0] == seen[1] and len({*seen[0]}) == 3  # seed 0 with the images to choose by, and two seeds with the test's


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "4", "--steps", "1", "2"], "--steps needs one number, or one for each of --images"),
        (["--images", "-1"], "--images -1 must be at least 0"),
        (["--data", "coco"], "--data needs --unlabelled DIR"),
        (["--base-lr", "0"], "--rates and --base-lr must be above 0"),
    ],
)
def test_a_dense_comparison_that_cannot_run_is_refused_first(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer.main(["--task", "detection", "--work", str(tmp_path / "work"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "work").exists()
