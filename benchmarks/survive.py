"""Kills a run repeatedly with SIGKILL, and compares its result with that of an undisturbed run.

    python -m benchmarks.survive                                               # 50 kills, about 10 minutes on 2 cores
    python -m benchmarks.survive --kills 5 --json survive.json

A small ResNet trains on the CPU or one GPU, with loader processes, and writes a checkpoint most of the time. After each SIGKILL
the same command starts it again, until it is done. Kills are spread over its steps: half of them right after a step, the other
half while a checkpoint is written (a file that ends in `.writing` exists), and every tenth while the command starts. After each
kill the folder is read: the newest checkpoint with its checksums, every line of the metrics, and the page of `sparkme.report`.

At the end the losses of all steps and the last checkpoint (weights and optimiser) must equal those of the undisturbed run bit
for bit. Then a ResNet-50 at 224 pixels, with SparK's decoder and LAMB's state, is saved, to measure how long a step stops for
it and how long writing takes meanwhile.

The JSON file has `kills` (all, after the session's first step, while a checkpoint was written), `restarts`, `steps`, `redone`
(repeated steps), `losses_equal`, `checkpoint_equal`, `unreadable` (files that were unreadable after a kill), `longest_stop_ms`
and `median_stop_ms` (of a step for a save, in the small run) and `saving` (of the ResNet-50: `once_ms` to allocate memory for
the copy, `stop_ms` of each save, `written_s` meanwhile). The exit code is 1 if anything differs or is unreadable.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import provenance
from benchmarks.throughput import hardware, write_json
from sparkme.errors import UserError, first_line, run_command
from sparkme.methods.spark import SparK
from sparkme.networks.create import create_encoder
from sparkme.reporting.runs import read_run
from sparkme.training.checkpoint import Checkpoints
from sparkme.training.distributed import start_process
from sparkme.training.optimizer import create_optimizer
from sparkme.weights.checkpoint import load_checkpoint

EPOCH = 25  # steps
# A checkpoint of 0.1 GiB is begun every 0.3 s, if the one before is written.
FLAGS = [
    "--model",
    "resnet18",
    "--input-size",
    "64",
    "--decoder-width",
    "32",
    "--batch-size",
    "4",
    "--samples-per-epoch",
    str(4 * EPOCH),
    "--workers",
    "2",
    "--log-steps",
    "1",
    "--base-lr",
    "0.01",
    "--drop-path",
    "0.2",
    "--warmup-epochs",
    "1",
    "--panel-epochs",
    "0",
    "--checkpoint-minutes",
    "0.005",
]
SESSION_S = 600.0  # limit for a start to reach its step


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.survive",
        description="Kill a run many times, and check that its result is the same bit for bit.",
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of kills (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=300, metavar="N", help=f"steps, a multiple of {EPOCH} (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the two runs (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument(
        "--saving", action=argparse.BooleanOptionalAction, default=True, help="also time the saves of a ResNet-50 (default: on)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(argv)
    return run_command(lambda: survive(args, words))


def survive(args: argparse.Namespace, words: list[str]) -> int:
    """Runs the benchmark. Returns the exit code."""
    if args.kills < 1 or args.steps < 2 * EPOCH or args.steps % EPOCH:
        raise UserError(
            f"--kills {args.kills} must be at least 1, and --steps {args.steps} a multiple of {EPOCH}, at least {2 * EPOCH}"
        )
    device = start_process(args.device).device
    record: dict[str, Any] = {
        "what": "a run that is killed again and again, and one that is not; see benchmarks/survive.py",
        "command": shlex.join(["python", "-m", "benchmarks.survive", *words]),
        **provenance(),
        "hardware": hardware(device),
        "settings": {"flags": FLAGS, "steps": args.steps, "seed": args.seed},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        record |= compare(folder, args)
        if args.saving:
            record["saving"] = time_saves(folder / "saves", device)
    print_table(record)
    write_json(args.json, record)
    return int(not (record["losses_equal"] and record["checkpoint_equal"] and not record["unreadable"]))


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs an undisturbed and a killed run, and compares their results."""
    straight, killed = folder / "straight", folder / "killed"
    for run in (straight, killed):
        shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    Session(straight, args).finish()
    straight_s = time.monotonic() - began
    print(f"the undisturbed run took {straight_s:.0f} s", flush=True)
    chance = random.Random(args.seed)
    counts = {"all": 0, "after_first_step": 0, "while_writing": 0, "while_starting": 0}
    redone, unreadable, stops_ms = 0, list[str](), stops(straight)
    for number in range(args.kills):
        target = (number + 1) * args.steps // (args.kills + 1)
        session = Session(killed, args)
        kind = "starting" if number % 10 == 9 else "writing" if number % 2 else "step"
        session.kill(kind, target, chance)
        counts["all"] += 1
        counts["after_first_step"] += session.steps > 0
        counts["while_starting"] += session.steps == 0
        is_torn = any((killed / "checkpoints").glob("*.writing"))
        counts["while_writing"] += is_torn
        problems, saved = check(killed)
        unreadable += problems
        stops_ms += stops(killed, after=session.last - session.steps)
        redone += max(0, session.last - saved) if session.steps else 0
        print(
            f"kill {number + 1}/{args.kills} after step {session.last or '-'}, {session.steps} of this start"
            f"{', while a checkpoint was written' if is_torn else ''}; saved: step {saved}"
            f"{'; ' + '; '.join(problems) if problems else ''}",
            flush=True,
        )
    Session(killed, args).finish()
    a, b = losses(straight), losses(killed)
    return {
        "kills": counts,
        "restarts": args.kills,
        "steps": args.steps,
        "redone": redone,
        "seconds": {"undisturbed": round(straight_s, 1), "killed": round(time.monotonic() - began - straight_s, 1)},
        "losses_equal": a == b and len(a) == args.steps,
        "checkpoint_equal": same(*(load_checkpoint(run / "checkpoints" / "last.pt") for run in (straight, killed))),
        "unreadable": unreadable,
        "longest_stop_ms": round(max(stops_ms, default=0), 1),
        "median_stop_ms": round(statistics.median(stops_ms or [0]), 1),
    }


class Session:
    """One start of the command.

    Attributes:
        steps: number of its steps.
        last: the newest step, counted over the whole run.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.steps, self.last = folder, 0, 0
        command = [
            sys.executable,
            "-m",
            "sparkme.pretrain",
            *FLAGS,
            "--epochs",
            str(args.steps // EPOCH),
            "--device",
            args.device,
            "--output",
            str(folder),
        ]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors, text=True, bufsize=1
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("step "):
                self.last = int(line.removeprefix("step ").partition("/")[0])
                self.steps += 1

    def finish(self) -> None:
        """Waits for the end. Raises UserError if the run fails."""
        if self.process.wait():
            raise UserError(f"the run in {self.folder} ended with exit code {self.process.returncode}: {self._said()}")

    def kill(self, kind: str, target: int, chance: random.Random) -> None:
        """Sends SIGKILL: while the command starts; right after step `target`; or later, while a checkpoint is written.

        Raises:
            UserError: the run ended before that.
        """
        ends = time.monotonic() + (chance.uniform(1, 9) if kind == "starting" else SESSION_S)
        while time.monotonic() < ends and not (self.steps and self.last >= target):
            self._is_running()
            time.sleep(0.002)
        if kind == "writing":
            while not any((self.folder / "checkpoints").glob("*.writing")) and time.monotonic() < ends:
                self._is_running()
                time.sleep(0.0005)
            time.sleep(chance.choice((0.0, chance.uniform(0, 0.02), chance.uniform(0, 0.5))))
        elif kind == "step":
            time.sleep(chance.uniform(0, 0.1))
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join(10)

    def _is_running(self) -> None:
        if self.process.poll() is not None:
            raise UserError(f"the run in {self.folder} ended before it was killed: {self._said()}")

    def _said(self) -> str:
        self.errors.seek(0)
        return " / ".join(self.errors.read().strip().splitlines()[-3:])


def check(folder: Path) -> tuple[list[str], int]:
    """Unreadable files of a run after a kill, and the step of its newest checkpoint."""
    problems, step = list[str](), 0
    try:
        newest = Checkpoints(folder / "checkpoints", keep=1).newest()
        step = load_checkpoint(newest)["step"] if newest else 0
    except UserError as error:
        problems.append(first_line(error))
    for name in ("metrics.jsonl", "notes.jsonl"):
        with suppress(FileNotFoundError):
            for number, line in enumerate((folder / name).read_text().splitlines(), 1):
                try:
                    json.loads(line)
                except ValueError as error:
                    problems.append(f"line {number} of {name}: {error}")
    try:
        read_run(folder, "killed")
    except Exception as error:  # any error would prevent a report
        problems.append(f"sparkme.report: {type(error).__name__} {first_line(error)}")
    return problems, step


def records(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder) if "loss" in record]


def stops(folder: Path, after: int = 0) -> list[float]:
    """Milliseconds for which each save stopped a step, from the steps after a save."""
    return [record["save_ms"] for record in records(folder) if "save_ms" in record and record["step"] > after]


def same(a: Any, b: Any) -> bool:
    """Whether nested dicts, lists and tensors are equal bit for bit, except the folder's name in the settings."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a if name != "output")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def time_saves(folder: Path, device: torch.device, rounds: int = 3) -> dict[str, Any]:
    """Measures how long training stops to save a ResNet-50 at 224 pixels, with SparK's decoder and LAMB's state."""
    network = SparK(create_encoder("resnet50"), input_size=224, decoder_width=768).to(device)
    optimizer = create_optimizer("lamb", network, beta2=0.95, clip_grad=5.0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "config": {}}
    checkpoints = Checkpoints(folder, keep=1)
    began = time.perf_counter()
    checkpoints.make_room(state)
    first_s, stops, writes = time.perf_counter() - began, list[float](), list[float]()
    for step in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        checkpoints.start_saving(state, step)
        stops.append(time.perf_counter() - began)
        checkpoints.wait()
        writes.append(time.perf_counter() - began - stops[-1])
    size = checkpoints.last.stat().st_size / 2**30
    shutil.rmtree(folder)
    return {
        "state_gib": round(size, 3),
        "once_ms": round(1e3 * first_s, 1),
        "stop_ms": [round(1e3 * s, 1) for s in stops],
        "written_s": [round(s, 2) for s in writes],
    }


def print_table(record: dict[str, Any]) -> None:
    kills, yes = record["kills"], {True: "yes", False: "NO"}
    rows = {
        "kills": kills["all"],
        "  after the first step of their start": kills["after_first_step"],
        "  while a checkpoint was written": kills["while_writing"],
        "restarts": record["restarts"],
        "steps, and repeated steps": f"{record['steps']}, {record['redone']}",
        "losses equal, bit for bit": yes[record["losses_equal"]],
        "last checkpoint equal, bit for bit": yes[record["checkpoint_equal"]],
        "unreadable files after a kill": len(record["unreadable"]),
        "longest stop of training for a save": f"{record['longest_stop_ms']:.0f} ms (median {record['median_stop_ms']:.0f})",
    }
    if saving := record.get("saving"):
        rows[f"longest stop for ResNet-50, {saving['state_gib']:.2f} GiB"] = f"{max(saving['stop_ms']):.0f} ms"
        rows["  time to write it"] = f"{max(saving['written_s']):.1f} s"
    for name, value in rows.items():
        print(f"{name:45s} {value}")
    print(end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
