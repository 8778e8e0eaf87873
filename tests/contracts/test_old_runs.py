"""Runs that earlier code left behind are resumed, exported, probed and reported as that code did it.

tests/data/old_runs holds three runs of `tiny_network:tiny`, made before settings were dataclasses; the numbers here are what
the code of then made of them.
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import losses
from pictures import make_labelled
from safetensors import safe_open

from sparkme import export, finetune, pretrain, probe, report
from sparkme.reporting.runs import read_run
from sparkme.settings.declare import to_config
from sparkme.settings.saved import read_settings

RUNS = Path(__file__).parents[1] / "data" / "old_runs"
SHORT = [
    "--model",
    "tiny_network:tiny",
    "--input-size",
    "32",
    "--decoder-width",
    "32",
    "--batch-size",
    "4",
    "--samples-per-epoch",
    "8",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--log-steps",
    "1",
    "--base-lr",
    "0.01",
    "--keep-checkpoints",
    "1",
]
TUNED = [
    "old_runs/small/checkpoints/last.pt",
    "--data",
    "labelled",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--log-steps",
    "1",
    "--eval-epochs",
    "1",
    "--keep-checkpoints",
    "1",
]
COMMANDS = {
    "small": (pretrain.main, SHORT, [0.9955, 0.9936]),
    "fcmae": (pretrain.main, [*SHORT, "--recipe", "fcmae", "--no-norm-pix-loss"], [2.4372, 2.5838]),
    "finetune": (finetune.main, TUNED, [0.8748, 0.4022, 0.3977]),
}
DEFAULTS = {
    "samples_per_epoch": 512,
    "model": "resnet50",
    "input_size": [224, 224],
    "decoder_width": 128,
    "epochs": 782,
    "batch_size": 32,
    "base_lr": 0.04,
    "device": "auto",
    "keep_checkpoints": 3,
    "log_steps": 10,
}
# What the settings of the runs are instead of, if they are not the defaults.
DIFFERENCES = {
    "small": DEFAULTS,
    "fcmae": DEFAULTS
    | {
        "recipe": "small",
        "model": "timm:convnextv2_tiny",
        "decoder_width": 512,
        "norm_pix_loss": True,
        "epochs": 800,
        "base_lr": 1.5e-4,
    },
    "finetune": {
        "weights": None,
        "data": None,
        "input_size": [224, 224],
        "epochs": 200,
        "batch_size": 14,
        "device": "auto",
        "keep_checkpoints": 3,
        "log_steps": 10,
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the runs and the images of fine-tuning, in the working directory."""
    shutil.copytree(RUNS, tmp_path / "old_runs")
    make_labelled(tmp_path / "labelled", {"blue": 6, "green": 6, "red": 6})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "old_runs"


def config(name: str) -> dict[str, Any]:
    return json.loads((RUNS / name / "config.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_is_the_same_after_it_was_read(name: str) -> None:
    newer = {"task": "classification"} if name == "finetune" else {}
    assert to_config(read_settings(config(name))) == config(name) | newer
    assert to_config(read_settings(config(name) | {"of_another_version": 1})) == config(name) | newer


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_is_resumed(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, words, expected = COMMANDS[name]
    assert main([*words, "--output", f"old_runs/{name}", "--epochs", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    changed = ["changed   epochs from 2 to 3", "changed   warmup epochs from 0.2 to 0.3"]
    assert [line for line in printed if line.startswith("changed")] == changed
    assert losses(folder / name)[-len(expected) :] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "weights"), [("small", 165.33333), ("fcmae", 82.84026)])
def test_a_run_is_exported_and_probed(name: str, weights: float, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([f"old_runs/{name}/checkpoints/last.pt", "--output", "out.safetensors"]) == 0
    with safe_open("out.safetensors", "pt") as file:
        assert sum(float(file.get_tensor(key).abs().sum()) for key in file.keys()) == pytest.approx(weights)  # noqa: SIM118
        notes = file.metadata()
    kept = {
        "mask_ratio": 0.6,
        "epochs": 2,
        "batch_size": 4,
        "base_lr": 0.01,
        "init": None,
        "data": None,
        "num_images": 8,
        "input_size": [32, 32],
        "optimizer": "adamw" if name == "fcmae" else "lamb",
    }
    assert json.loads(notes["recipe"]) == kept and notes["method"].startswith("FCMAE" if name == "fcmae" else "SparK")
    expected = {
        "input_size": "[32, 32]",
        "mean": "[0.485, 0.456, 0.406]",
        "value_range": "{}",
        "upright": "true",
        "channels": "3",
        "background": "white",
        "drop_path": "0.0",
    }
    assert {key: notes[key] for key in expected} == expected
    words = ["--data", "labelled", "--workers", "0", "--device", "cpu", "--no-linear", "--stage", "last"]
    for path in (f"old_runs/{name}/checkpoints/last.pt", "out.safetensors", "old_runs/finetune/checkpoints/last.pt"):
        assert probe.main([path, *words]) == 0
        assert "100.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_what_differs_from_the_defaults_and_the_command_that_continues(name: str, folder: Path) -> None:
    run = read_run(folder / name, name)
    assert {d.name: d.other for d in run.differences if d.name != "workers"} == DIFFERENCES[name]
    words = shlex.split(run.continuing)
    assert words[1:3] == ["-m", "sparkme.finetune" if name == "finetune" else "sparkme.pretrain"]
    assert COMMANDS[name][0](words[3:]) == 0  # which says that there is nothing left to do


def test_runs_are_reported(folder: Path) -> None:
    assert report.main(["old_runs", "--output", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert all(word in page for word in ("tiny_network:tiny", "fcmae", "norm_pix_loss", "split_digest"))
