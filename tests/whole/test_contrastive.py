"""benchmarks.contrastive: lightly's methods train the network that is named, and its weights are probed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from environments import python_with
from pictures import make_labelled

from sparkme import probe
from sparkme.networks.create import create_dense

MODEL = "timm:test_resnet"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_with(tmp_path_factory.mktemp("lightly"), ["lightly"], ["lightly==1.6.0"])


@pytest.mark.parametrize("method", ["simclr", "densecl"])
def test_weights_are_trained_and_probed(method: str, python: Path, tmp_path: Path) -> None:
    images = make_labelled(tmp_path / "images", {"one": 8, "two": 8})
    words = ["--method", method, "--data", images, "--model", MODEL, "--input-size", "64", "--batch-size", "8", "--epochs", "2"]
    outputs = [tmp_path / f"{i}.pth" for i in range(2)]
    for output in outputs:
        command = [python, "-m", "benchmarks.contrastive", *words, "--output", output]
        root = str(Path(__file__).parents[2])
        done = subprocess.run([*map(str, command)], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    first, second = (torch.load(output, weights_only=True) for output in outputs)
    torch.manual_seed(0)
    before = create_dense(MODEL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in before if not name.startswith("fc.")} == {*first}
    moved = [name for name in first if name.endswith("weight") and not torch.equal(first[name], before[name])]
    assert len(moved) == sum(name.endswith("weight") for name in first)
    record = json.loads(outputs[0].with_suffix(".json").read_text())
    assert record["crops"] == 64 and 0 < record["loss"] < 20
    scored = [outputs[0], "--model", MODEL, "--data", images, "--input-size", "64", "--workers", "0", "--no-linear"]
    assert probe.main([*map(str, scored), "--output", str(tmp_path / "scores.json")]) == 0


def test_without_lightly_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import contrastive

    monkeypatch.setitem(__import__("sys").modules, "lightly", None)
    images = make_labelled(tmp_path / "images", {"one": 3})
    words = ["--method", "simclr", "--data", images, "--model", MODEL, "--epochs", "1", "--output", tmp_path / "w.pth"]
    assert contrastive.main([*map(str, words)]) == 2
    assert "run this with a Python that has lightly" in capsys.readouterr().err
