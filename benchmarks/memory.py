"""Estimates the largest batch that fits into a GPU's memory, and measures the cost of recomputing the encoder's blocks.

    python -m benchmarks.memory --json benchmarks/results/memory.json
    python -m benchmarks.memory --model timm:convnextv2_base --recipe fcmae --gpu 40

The peak of tensors' bytes in forward and backward pass is measured at two batch sizes. They define a line: fixed bytes (mostly
gradients of weights) plus bytes per image. A third batch, twice the larger one, shows the line's error. Weights and the
optimiser's two moments add 4 bytes each, and `--reserve` is an assumption for CUDA, cuDNN and gaps between tensors. The rest of
a GPU's memory, in units of 10^9 bytes, divided by the bytes per image, is the largest batch.

Memory is counted on the CPU, in bf16 by autocast, with the operators of CUDA. These keep more tensors than the CPU's fusions
(see sparkme/sparse/fusion).

Encoders: `cuda_ext`; `twice`, the same with `--checkpoint-activations`; and `masked-dense`. The decoder is the same. Steps of
the first two are timed in turns on the CPU, at the smaller batch size and with all of the CPU's operators.

The JSON file has `cases`: model, recipe, way, `parameters`, `bytes` {images: most bytes}, `fixed_bytes`, `bytes_per_image`,
`off` (of the third batch: measured over the line, less 1), `largest_batch` {GB: images}, `step_s` (median, in seconds).
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import provenance
from benchmarks.host_time import AsOnCuda
from benchmarks.profiling import peak_memory
from benchmarks.throughput import METHODS, hardware, of_recipes, write_json
from sparkme.errors import Parser, UserError, run_command, user_errors
from sparkme.methods.base import MaskedAutoencoder
from sparkme.settings.pretrain import RECIPES, PretrainSettings
from sparkme.training.build import build_network
from sparkme.training.memory import keep_freed_memory

WAYS = ("cuda_ext", "twice", "masked-dense")
GB, GIB = 10**9, 2**30


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.memory", description="Count how many images fit into a GPU's memory.")
    parser.add_argument("--recipe", default="spark", choices=METHODS, help="recipe of the training step (default: %(default)s)")
    parser.add_argument("--model", nargs="+", help=f"networks (default: {of_recipes('model')})")
    parser.add_argument(
        "--input-size", type=int, default=224, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, nargs=2, default=[4, 8], metavar="IMAGES", help="two batch sizes (default: 4 8)"
    )
    parser.add_argument("--gpu", type=float, nargs="+", default=[24, 80], metavar="GB", help="memory of GPUs (default: 24 80)")
    parser.add_argument("--reserve", type=float, default=2, metavar="GB", help="memory to leave free (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps; 0: none (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, after every model")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: memory(args, words))


def memory(args: argparse.Namespace, words: list[str]) -> int:
    small, large = args.batch_size
    if not 0 < small < large:
        raise UserError(f"--batch-size {small} {large} must be two numbers, the smaller one first")
    if args.rounds < 0 or args.input_size < 1:
        raise UserError("--rounds and --input-size must be positive")
    args.model = args.model or [RECIPES[args.recipe].defaults["model"]]
    with user_errors():
        for name in args.model:
            create_network(name, args)
    keep_freed_memory()
    record: dict[str, Any] = {
        "what": "most bytes of tensors in a training step, and the batches that fit; see benchmarks/memory.py",
        "command": shlex.join(["python", "-m", "benchmarks.memory", *words]),
        **provenance(),
        "hardware": hardware(torch.device("cpu")),
        "settings": {"precision": "bf16", "input_size": args.input_size, "reserve_gb": args.reserve},
        "cases": [],
    }
    for name in args.model:
        cases = [count(name, way, args) for way in WAYS]
        if args.rounds:
            for case, step_s in zip(cases, time_steps(name, args), strict=False):
                case["step_s"] = step_s
        record["cases"] += cases
        print_table(cases, args)
        write_json(args.json, record)
    return 0


def create_network(name: str, args: argparse.Namespace) -> MaskedAutoencoder:
    """The network of the recipe, as sparkme.pretrain makes it, without drop path."""
    size = args.input_size, args.input_size
    options = {"recipe": args.recipe, "model": name, "drop_path": 0.0, "input_size": size}
    return build_network(PretrainSettings(**RECIPES[args.recipe].defaults | options)).train()


def arrange(model: MaskedAutoencoder, way: str, *, as_on_cuda: bool) -> None:
    model.encoder.set_engine("masked-dense" if way == "masked-dense" else "cuda_ext")
    if way != "masked-dense" and as_on_cuda:
        model.encoder.engine = AsOnCuda()
    if way == "twice" and not model.encoder.checkpoint_blocks():
        raise UserError("a network without rows of blocks cannot recompute them")


def step(model: MaskedAutoencoder, images: int, args: argparse.Namespace) -> None:
    model.zero_grad(set_to_none=True)
    batch = torch.zeros(images, model.encoder.in_channels, args.input_size, args.input_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
    loss.backward()


def count(name: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    model = create_network(name, args)
    arrange(model, way, as_on_cuda=True)
    small, large = args.batch_size
    peaks = {}
    for images in (small, large, 2 * large):
        model.zero_grad(set_to_none=True)
        gc.collect()
        peaks[images] = peak_memory(lambda images=images: step(model, images, args), torch.device("cpu"))  # type: ignore[misc]
    slope = (peaks[large] - peaks[small]) / (large - small)
    fixed = peaks[large] - slope * large
    parameters = sum(p.numel() for p in model.parameters())
    free = {gb: (gb - args.reserve) * GB - fixed - 3 * 4 * parameters for gb in args.gpu}
    return {
        "model": name,
        "recipe": args.recipe,
        "way": way,
        "parameters": parameters,
        "bytes": peaks,
        "fixed_bytes": round(fixed),
        "bytes_per_image": round(slope),
        "off": peaks[2 * large] / (fixed + slope * 2 * large) - 1,
        "largest_batch": {f"{gb:g}": max(0, int(left / slope)) for gb, left in free.items()},
    }


def time_steps(name: str, args: argparse.Namespace) -> list[float]:
    """Times steps with and without recomputation, in turns."""
    models = []
    for way in WAYS[:2]:
        models.append(create_network(name, args))
        arrange(models[-1], way, as_on_cuda=False)
    seconds: list[list[float]] = [[], []]
    for turn in range(args.rounds + 1):
        for model, times in zip(models, seconds, strict=True):
            begun = time.perf_counter()
            step(model, args.batch_size[0], args)
            if turn:  # the first is a warm-up
                times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in seconds]


def print_table(cases: list[dict[str, Any]], args: argparse.Namespace) -> None:
    case = cases[0]
    print(f"\n{case['model']}, {case['recipe']}, {args.input_size} pixels, bf16, {case['parameters'] / 1e6:.1f} M weights")
    fits = "".join(f"{f'fit into {gb:g} GB':>17s}" for gb in args.gpu)
    print(f"  {'':13s}{'fixed':>10s}{'per image':>11s}{'error':>8s}{fits}{'step here':>15s}")
    for case in cases:
        batches = "".join(f"{images:>17d}" for images in case["largest_batch"].values())
        seconds = f"{1e3 * case['step_s']:12.0f} ms" if "step_s" in case else ""
        print(
            f"  {case['way']:13s}{case['fixed_bytes'] / GIB:6.2f} GiB{case['bytes_per_image'] / 2**20:7.1f} MiB"
            f"{case['off']:8.1%}{batches}{seconds}"
        )
    print(end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
