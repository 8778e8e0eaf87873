"""benchmarks.worth: all ways get the same images and minutes; what is done is not done again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import value_of
from pictures import make_labelled

from benchmarks import transfer, worth


def test_ways_are_compared_at_equal_cost(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_labelled(tmp_path / "data", {"red": 30, "blue": 30, "green": 30})
    output = tmp_path / "numbers.json"
    monkeypatch.setattr(worth, "TRIED_CROPS", 64)
    monkeypatch.setattr(worth, "LEAST_CROPS", 32)
    words = ["--work", tmp_path / "work", "--json", output, "--model", "timm:test_resnet", "--input-size", "64"]
    words += ["--minutes", "0.1", "--shares", "0.5", "1", "--shots", "3", "--seeds", "2", "--draws", "2", "--processes", "1"]
    words += ["--finetune-flags", "--epochs 1 --batch-size 4"]
    main = [f"three={data}", *map(str, words), "--ways", "random", "spark"]
    assert worth.main(main) == 0
    record = json.loads(output.read_text())
    assert record["sets"]["three"]["classes"] == 3 and record["sets"]["three"]["recipes_were_chosen_on_it"] is None
    images = record["sets"]["three"]["images"]
    assert images["train"] + images["choose"] + images["test"] == 90
    assert [(run["way"], run["budget"]) for run in record["runs"]] == [("random", 0.0), ("spark", 0.05), ("spark", 0.1)]
    half, whole = record["runs"][1:]
    assert half["crops"] < whole["crops"] and half["loss"] != whole["loss"]
    pretrained = [command for command in commands if command[0] == "sparkme.pretrain"]
    assert len(pretrained) == 4 and {value_of(command, "--data") for command in pretrained} == {
        str(tmp_path / "work" / "three" / "unlabelled")
    }
    assert len(list((tmp_path / "work" / "three" / "unlabelled").iterdir())) == images["train"] + images["choose"]

    tuned = [command for command in commands if command[0] == "sparkme.finetune"]
    by_side = {side: [c for c in tuned if ("--from-scratch" in c) == (side == "scratch")] for side in transfer.SIDES}
    for commands_of_side in by_side.values():
        tables = [Path(value_of(command, "--labels")).stem for command in commands_of_side]
        assert tables == ["choose", "choose", "final", "final"]  # two rates, then two seeds
        assert [value_of(command, "--seed") for command in commands_of_side] == ["0", "0", "0", "1"]
    for found in record["finetuned"]:
        rates = found["accuracy_of_rates"]
        assert rates[f"{found['rate']:g}"] == max(rates.values()) and len(found["accuracies"]) == 2

    before = len(commands)
    assert worth.main(main) == 0 and len(commands) == before
    page = tmp_path / "page.md"
    page.write_text(f"before\n{worth.BEGIN}\n{worth.END}\nafter\n")
    monkeypatch.setattr(worth, "PAGE", page)
    assert worth.main(["--write", "--json", str(output)]) == 0
    assert re.search(r"^\| three \| SparK \| [\d,]+ \| [\d.]+ \|.* ± .*\(.* ± .*\) \|$", page.read_text(), re.MULTILINE)
    assert output.with_suffix(".png").stat().st_size > 1000

    capsys.readouterr()
    assert worth.main([*main, "--draws", "3"]) == 2
    assert "has runs with other settings" in capsys.readouterr().err


def test_the_table_has_gains_over_scratch_seed_by_seed() -> None:
    def run(way: str, budget: float, score: float) -> dict[str, Any]:
        scores = {"knn": score, "linear": score}
        return {"set": "a", "way": way, "budget": budget, "crops": 1000, "all_labels": scores, "ten_labels_a_class": scores}

    runs = [run("spark", 30, 0.5), run("spark", 60, 0.4), run("random", 0, 0.2)]  # in the order in which they ended
    tuned = [("random", [0.3, 0.4]), ("spark", [0.35, 0.5])]
    finetuned = [{"set": "a", "way": way, "budget": 60, "shots": 10, "accuracies": values} for way, values in tuned]
    rows = worth.table({"sets": {"a": {}}, "runs": runs, "finetuned": finetuned}).splitlines()
    assert rows[2] == "| a | random weights | 1,000 | 20.0 | 20.0 | 20.0 | 35.0 ± 5.0 |"
    assert rows[3] == "| a | SparK | 1,000 | 40.0 | 40.0 | 40.0 | 42.5 ± 7.5 (+7.5 ± 2.5) |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--rates", "0"], "--shots must be at least 1, and --rates above 0"),
        (["nothing"], "there is no set 'nothing'"),
        (["--write", "--json", "none.json"], "none.json does not exist"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worth.main(["--ways", "random", "--work", str(tmp_path), *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]


def test_lightlys_ways_need_lightly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = worth.create_parser().parse_args(["--ways", "random", "simclr", "--work", str(tmp_path)])
    worth.check(args)
    assert args.ways == ["random"] and "left out: simclr; they need --lightly PYTHON" in capsys.readouterr().err
