"""Compares images per second of two processes with those of one, with a thread per process and gloo.

    python -m benchmarks.processes --json benchmarks/results/processes.json
    python -m benchmarks.processes --recipe fcmae --batch-size 16

torchrun starts sparkme.pretrain on scikit-image's photographs, with one and two processes in turns, each with `--batch-size`
images per step. Rates are those of a run's steps after the second. Every process has one thread and loads its own images. With
as many cores as processes, the ratio shows the cost of communication and of sharing memory.

The JSON file has `cases`: recipe, model, images_per_process, `images_per_s` {processes: [of every step]}, `ratio` of the
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import provenance
from benchmarks.throughput import METHODS, hardware, of_recipes, write_json
from sparkme.errors import Parser, UserError, run_command, user_errors
from sparkme.networks.create import create_encoder
from sparkme.settings.pretrain import RECIPES

WARM_UP = 2  # steps


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.processes", description="Compare the speed of two processes with one.")
    parser.add_argument("--recipe", nargs="+", default=list(METHODS), metavar="NAME", help=f"any of {', '.join(METHODS)}")
    parser.add_argument("--model", help=f"network (default: {of_recipes('model')})")
    parser.add_argument("--batch-size", type=int, default=8, metavar="IMAGES", help="batch per process (default: %(default)s)")
    parser.add_argument(
        "--input-size", type=int, default=224, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    parser.add_argument("--decoder-width", type=int, metavar="CHANNELS", help="decoder width (default: the recipe's)")
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=7, metavar="N", help="steps per run (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: processes(args, words))


def processes(args: argparse.Namespace, words: list[str]) -> int:
    if unknown := [name for name in args.recipe if name not in METHODS]:
        raise UserError(f"--recipe {' '.join(unknown)} is unknown; choose from {', '.join(METHODS)}")
    if args.steps <= WARM_UP or args.turns < 1 or args.batch_size < 1:
        raise UserError(f"--steps must be more than {WARM_UP}, --turns and --batch-size positive")
    with user_errors(), torch.device("meta"):
        for recipe in args.recipe:
            create_encoder(args.model or RECIPES[recipe].defaults["model"])
    record: dict[str, Any] = {
        "what": "images per second of one process and of two; see benchmarks/processes.py",
        "command": shlex.join(["python", "-m", "benchmarks.processes", *words]),
        **provenance(),
        "hardware": hardware(torch.device("cpu")) | {"threads": 1},
        "settings": {"precision": args.precision, "steps": args.steps, "turns": args.turns},
        "cases": [],
    }
    for recipe in args.recipe:
        model, rates = args.model or RECIPES[recipe].defaults["model"], dict[str, list[float]]()
        for _ in range(args.turns):
            for count in (1, 2):
                rates.setdefault(str(count), []).extend(run(recipe, model, count, args))
        medians = [statistics.median(values) for values in rates.values()]
        print(
            f"{recipe}, {model}, {args.batch_size} images per process, {args.precision}: {medians[0]:.2f} images/s with one, "
            f"{medians[1]:.2f} with two, {medians[1] / medians[0]:.2f} times as many",
            flush=True,
        )
        record["cases"].append(
            {
                "recipe": recipe,
                "model": model,
                "images_per_process": args.batch_size,
                "images_per_s": rates,
                "ratio": medians[1] / medians[0],
            }
        )
        write_json(args.json, record)
    return 0


def run(recipe: str, model: str, count: int, args: argparse.Namespace) -> list[float]:
    """Images per second of each step of a run, after the first ones. Raises UserError with the last output if the run fails."""
    images = count * args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            count,
            "-m",
            "sparkme.pretrain",
            "--output",
            f"{folder}/run",
            "--recipe",
            recipe,
            "--model",
            model,
            "--batch-size",
            images,
            "--samples-per-epoch",
            images * args.steps,
            "--epochs",
            1,
            "--warmup-epochs",
            0,
            "--log-steps",
            1,
            "--workers",
            0,
            "--precision",
            args.precision,
            "--panel-epochs",
            0,
            "--device",
            "cpu",
            "--input-size",
            args.input_size,
            *(["--decoder-width", args.decoder_width] if args.decoder_width else []),
        ]
        done = subprocess.run([*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()[-1:]
            raise UserError(f"a run with {count} processes failed: {' '.join(said)[:500]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [line["images_per_s"] for line in lines[WARM_UP:]]


if __name__ == "__main__":
    sys.exit(main())
