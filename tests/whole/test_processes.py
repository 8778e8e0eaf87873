"""The training commands as processes of their own: signalled, started again, and several together by torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import QUICK, SMALL, losses, weights

from sparkme.data.dataset import normalise
from sparkme.data.labelled import WholeImages, find_labelled, whole_batches
from sparkme.data.statistics import Statistics
from sparkme.pretrain import main
from sparkme.weights.pretrained import read_pretrained


def run(*arguments: object, processes: int = 1, **kwargs: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*launcher, "sparkme.pretrain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    assert main([*SMALL, "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(straight: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "sparkme.pretrain", *SMALL, "--output", str(tmp_path), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            os.killpg(process.pid, number)  # as a terminal and a scheduler do: to the loading processes too
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert f"{number.name}: saved" in rest and "Traceback" not in errors
    done = run(*SMALL, "--output", tmp_path)
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr
    assert losses(tmp_path) == losses(straight)
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())


def test_two_processes_train_together_and_resume(tmp_path: Path) -> None:
    flags = [*SMALL, "--output", tmp_path, "--checkpoint-minutes", 0]
    first = run(*flags, "--epochs", 1, processes=2)
    assert first.returncode == 0, first.stderr
    assert "machine   2 x cpu" in first.stdout
    second = run(*flags, "--epochs", 2, processes=2)
    assert second.returncode == 0 and "resumed after step 2" in second.stdout, second.stderr
    assert "changed   epochs from 1 to 2" in second.stdout and len(losses(tmp_path)) == 4


def test_two_processes_stop_together_at_a_signal(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sparkme.pretrain",
        *SMALL,
        "--epochs",
        "500",
        "--output",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGTERM)  # to every process, and torchrun passes its own on
            break
    rest, _ = process.communicate(timeout=120)
    assert "SIGTERM: saved" in rest and "KeyboardInterrupt" not in rest, rest
    assert (tmp_path / "checkpoints" / "last.pt").exists()


def test_processes_share_the_batch_and_the_measurement(trained: Path, labelled: Path, tmp_path: Path) -> None:
    words = [str(trained), "--data", str(labelled), *QUICK, "--epochs", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "sparkme.finetune", *words, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_val"] == 6 and len(losses(tmp_path)) == 3
    # What both measured is what the weights that are kept make of all images: the first process's batch norms, too.
    network, *_ = read_pretrained(tmp_path / "best.safetensors").dense(3)
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "best.safetensors"))
    val = find_labelled(labelled).val
    batch = next(iter(whole_batches(WholeImages(val.paths, (64, 64)), batch_size=6, workers=0)))
    with torch.no_grad():
        scores = network.eval()(normalise(batch.images, Statistics()))
    confusion = torch.zeros(3, 3, dtype=torch.long)
    confusion.index_put_((val.labels, scores.argmax(1)), torch.ones(6, dtype=torch.long), accumulate=True)
    assert results["confusion"] == confusion.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("model", ["resnet50", "convnext_tiny"])
def test_a_run_on_the_gpu(model: str, tmp_path: Path) -> None:
    flags = [*SMALL, "--model", model, "--device", "cuda", "--output", tmp_path]
    assert run(*flags, "--epochs", 1).returncode == 0
    done = run(*flags, "--epochs", 2)
    assert done.returncode == 0 and "resumed after step 2" in done.stdout, done.stderr
