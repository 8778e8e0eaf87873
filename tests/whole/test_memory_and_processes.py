"""benchmarks.memory and benchmarks.processes: what they count, and what they write."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import memory, processes
from benchmarks.profiling import peak_memory

SMALL = ["--model", "timm:test_resnet", "--input-size", "64", "--rounds", "1", "--batch-size", "2", "4"]


def test_memory_lies_on_a_line_and_blocks_twice_need_less(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "memory.json"
    assert memory.main([*SMALL, "--gpu", "8", "12", "--json", str(path)]) == 0
    assert "fit into 12 GB" in capsys.readouterr().out
    record = json.loads(path.read_text())
    ours, twice, dense = record["cases"]
    assert [case["way"] for case in record["cases"]] == list(memory.WAYS)
    for case in (ours, twice, dense):
        assert abs(case["off"]) < 0.05 and case["bytes"].keys() == {"2", "4", "8"}
        left = 12e9 - 2e9 - case["fixed_bytes"] - 12 * case["parameters"]
        assert case["largest_batch"]["12"] == int(left / case["bytes_per_image"])
        assert 0 < case["largest_batch"]["8"] < case["largest_batch"]["12"]
    assert twice["bytes_per_image"] < ours["bytes_per_image"] < dense["bytes_per_image"]
    assert ours["step_s"] > 0 and twice["step_s"] > 0 and "step_s" not in dense


def test_memory_counts_what_a_step_keeps() -> None:
    args = memory.create_parser().parse_args(SMALL)
    network = memory.create_network("resnet18", args)
    peak = peak_memory(lambda: memory.step(network, 2, args), torch.device("cpu"))
    gradients = sum(4 * p.numel() for p in network.parameters())
    assert peak > gradients and all(p.grad is not None for p in network.parameters())


def test_two_processes_are_compared_with_one(tmp_path: Path) -> None:
    path = tmp_path / "processes.json"
    words = [
        "--recipe",
        "spark",
        "--model",
        "resnet18",
        "--batch-size",
        "1",
        "--steps",
        "3",
        "--turns",
        "1",
        "--input-size",
        "64",
        "--decoder-width",
        "32",
        "--precision",
        "float32",
    ]
    assert processes.main([*words, "--json", str(path)]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    one, two = case["images_per_s"]["1"], case["images_per_s"]["2"]
    assert len(one) == len(two) == 1 and case["ratio"] == pytest.approx(two[0] / one[0])


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (memory.main, ["--batch-size", "8", "4"], "smaller one first"),
        (memory.main, ["--model", "resnet17"], "resnet17"),
        (processes.main, ["--recipe", "mae"], "--recipe mae is unknown"),
        (processes.main, ["--steps", "2"], "--steps must be more than 2"),
        (processes.main, ["--recipe", "spark", "--model", "resnet17", "--turns", "1"], "resnet17"),
    ],
)
def test_mistakes_are_one_line(main, words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:  # type: ignore[no-untyped-def]
    assert main(words) == 2
    assert message in capsys.readouterr().err
