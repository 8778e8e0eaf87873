"""Command lines, files and networks that a generator with a seed has made up: no traceback, no memory that runs away, exit code
2; and gradients that are the dense network's."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest
import random_networks
from commands import SMALL, losses

import sparkme.report
from sparkme.pretrain import main
from sparkme.training.log import RunLog, read_records

SEED, COUNT = 9, 500


def test_made_up_command_lines_end_well(trained: Path, tmp_path: Path) -> None:
    words = [sys.executable, fuzz.__file__, str(SEED), str(COUNT), str(trained), str(tmp_path / "f")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    accepted = int(summary.split()[3])
    assert f"{COUNT} command lines: " in summary and 10 < accepted < COUNT / 2, summary  # it tries both kinds


def damaged(content: bytes, rng: random.Random) -> bytes:
    """What a crash, a disk or a person can make of a file."""
    kind = rng.randrange(9)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        return content + rng.randbytes(rng.randrange(300))
    if kind == 3:
        return b"[" * rng.choice((10, 100_000)) + content
    if kind == 4:
        words = [b"null", b"[]", b"{}", b'"x"', b"1e999", b"-1", b"NaN", b"9" * 400, b"true", b'{"step": {}}']
        return b"\n".join(rng.choice(words) for _ in range(rng.randrange(1, 30)))
    if kind == 5:
        return content.replace(b": 0", b": " + rng.choice((b'"x"', b"[0]", b"Infinity", b"1e308", b"null", b"-5")))
    if kind == 6:
        return b"\0" * rng.randrange(5000)
    if kind == 7:
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    return b""


def test_damaged_files_of_a_run_are_left_out(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the log, which goes on with what is whole, and by the report."""
    rng = random.Random(SEED)
    source = trained.parent.parent
    events = next((source / "tensorboard").iterdir()).name
    whole = {name: (source / name).read_bytes() for name in ("config.json", "metrics.jsonl", "notes.jsonl")}
    for i in range(60):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in whole.items():
            (folder / name).write_bytes(damaged(content, rng) if rng.random() < 0.7 else content)
        if i % 6 == 0:
            shutil.copytree(source / "tensorboard", folder / "tensorboard")
            (folder / "tensorboard" / events).write_bytes(damaged((source / "tensorboard" / events).read_bytes(), rng))
        assert sparkme.report.main([str(folder)]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
        log = RunLog(folder, first_step=2, total_steps=4, steps_per_epoch=2, bar=False, loss_name="loss")
        numbers = {"loss": 1.0, "learning_rate": 1.0, "images_per_s": 1.0, "seconds_left": 1.0}
        log.metrics(3, 1.5, numbers)
        log.plot()
        log.close()
        records = read_records(folder / "metrics.jsonl")
        assert records[-1]["step"] == 3 and all(isinstance(record["step"], int | float) for record in records)
        assert (folder / "loss.png").stat().st_size > 1000


def test_a_run_goes_on_with_damaged_files_beside_it(trained: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for i in range(3):
        folder = tmp_path / str(i)
        shutil.copytree(trained.parent.parent, folder, symlinks=True)
        for name in ("config.json", "metrics.jsonl", "notes.jsonl"):
            (folder / name).write_bytes(damaged((folder / name).read_bytes(), rng))
        for path in (folder / "tensorboard").iterdir():
            path.write_bytes(damaged(path.read_bytes(), rng))
        assert main([*SMALL, "--epochs", "2", "--panel-epochs", "0", "--output", str(folder)]) == 0
        assert len(losses(folder)) in (2, 3, 4) and json.loads((folder / "config.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("first", range(40, 240, 40))
def test_random_networks_have_the_dense_ones_gradients(first: int) -> None:
    """Those after the first 40, which tests/contracts/test_random_networks.py has."""
    outcomes = Counter(random_networks.compare(seed).partition(":")[0] for seed in range(first, first + 40))
    assert outcomes["equal"] >= 32 and not outcomes["refused"], outcomes
