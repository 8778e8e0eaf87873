"""Measures the host's time to queue an encoder's work. A GPU that computes faster waits for the host.

    python -m benchmarks.host_time --json benchmarks/results/host_time.json

The networks have the layers of ResNet-50 and ConvNeXt-B with 8 to 64 channels, and images hardly any visible pixels, so that
only host time remains: Python, torch's dispatcher, autograd. They run on the CPU in one thread, with separate operators as on
CUDA, without the CPU's fusions (see sparkme/sparse/fusion). A GPU adds kernel launches and removes the arithmetic. The dtype is
float64, because oneDNN computes float32 products on the CPU and has a high host time of its own. Engines run in turns;
`optimiser` is LAMB's step, the same for all.

The JSON file has `cases`: network, `layers` (convolutions, linear layers and norms), and `engines` {engine: {`forward_us`,
`backward_us`, `layer_us`: both together, per layer}}, medians in microseconds, `optimiser_us`; and `operators` {name:
{`forward_us`, `both_us`}}: single operators on 64 rows of 8 channels, `torch.mm` among them.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from benchmarks.flops import provenance
from benchmarks.throughput import hardware, write_json
from sparkme import Grid, ops, random_active, sparsify
from sparkme.errors import Parser, UserError, run_command
from sparkme.sparse.engines.cuda_ext import CudaExtEngine
from sparkme.training.optimizer import create_optimizer

ENGINES = ("cuda_ext", "masked-dense")
CHANNELS = (8, 16, 32, 64)
SIDE, BATCH = 64, 2  # pixels and images; one patch of each is visible


class AsOnCuda(CudaExtEngine):
    """The engine `cuda_ext` with its operators of CUDA."""

    def fuses_products(self, dtype: torch.dtype, device: torch.device) -> bool:
        return False


def slim_resnet50() -> nn.Module:
    network: nn.Module = ResNet(Bottleneck, (3, 4, 6, 3), channels=CHANNELS, num_classes=0)  # type: ignore[arg-type]
    return network


def slim_convnext_base() -> nn.Module:
    return ConvNeXt(depths=(3, 3, 27, 3), dims=CHANNELS, num_classes=0)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet50": slim_resnet50, "convnext_base": slim_convnext_base}


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.host_time", description="Time the host's part of an encoder's pass.")
    parser.add_argument(
        "--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to time (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="passes of each engine (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: host_time(args, words))


def host_time(args: argparse.Namespace, words: list[str]) -> int:
    if args.rounds < 1:
        raise UserError("--rounds must be positive")
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": "microseconds of the host for an encoder's pass; see benchmarks/host_time.py",
        "command": shlex.join(["python", "-m", "benchmarks.host_time", *words]),
        **provenance(),
        "hardware": hardware(torch.device("cpu")),
        "cases": [],
    }
    for name in args.network:
        case = time_network(name, args.rounds)
        record["cases"].append(case)
        print(f"\n{name}, {case['layers']} layers, LAMB {case['optimiser_us'] / 1e3:.1f} ms")
        for engine, found in case["engines"].items():
            forward, backward = found["forward_us"] / 1e3, found["backward_us"] / 1e3
            print(f"  {engine:14} forward {forward:5.1f} ms, backward {backward:5.1f} ms, {found['layer_us']:5.0f} us/layer")
    record["operators"] = time_operators(args.rounds * 10)
    print("\noperator          forward  with its gradient")
    for name, found in record["operators"].items():
        print(f"  {name:14}{found['forward_us']:8.1f} us{found['both_us']:12.1f} us")
    write_json(args.json, record)
    return 0


def time_network(name: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = sparsify(NETWORKS[name]()).double().train()
    active = random_active(BATCH, (2, 2), 0.75)
    images = torch.randn(BATCH, 3, SIDE, SIDE, dtype=torch.float64)
    times: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
    for i in range(rounds + 3):
        for engine in ENGINES:
            encoder.set_engine(engine)
            if engine == "cuda_ext":
                encoder.engine = AsOnCuda()
            encoder.zero_grad(set_to_none=True)
            start = time.perf_counter()
            ends = [x.values for x in encoder(images, active, 1)]
            middle = time.perf_counter()
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
            end = time.perf_counter()
            if i >= 3:
                times[engine].append((1e6 * (middle - start), 1e6 * (end - middle)))
    layers = sum(isinstance(m, LAYERS) for m in NETWORKS[name]().modules())
    medians = {engine: [statistics.median(part) for part in zip(*found, strict=True)] for engine, found in times.items()}
    optimizer = create_optimizer("lamb", encoder, beta2=0.95, clip_grad=5.0)
    return {
        "network": name,
        "layers": layers,
        "engines": {
            engine: {"forward_us": forward, "backward_us": backward, "layer_us": (forward + backward) / layers}
            for engine, (forward, backward) in medians.items()
        },
        "optimiser_us": median_us(optimizer.step, rounds),
    }


LAYERS = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def time_operators(rounds: int) -> dict[str, dict[str, float]]:
    grid = Grid(torch.ones(1, 1, 2, 2, dtype=torch.bool), 4)
    sites = grid.slots, grid.patches, 4
    table, inverse = (ops.neighbour_table(*sites, (3, 3), transposed=transposed) for transposed in (False, True))
    shapes = (64, 8), (8, 8), (9, 8, 8), (9, 8)
    rows, weight, kernel, channelwise = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    operators: dict[str, Callable[[], Tensor]] = {
        "torch.mm": partial(torch.mm, rows, weight),
        "linear": partial(ops.linear, rows, weight),
        "sparse_conv": partial(ops.sparse_conv, rows, kernel, table, inverse),
        "depthwise_conv": partial(ops.depthwise_conv, rows, channelwise, None, *sites, (3, 3)),
        "max_pool": partial(ops.max_pool, rows, table, inverse),
    }
    grad = torch.ones(64, 8, dtype=torch.float64)
    return {
        name: {
            "forward_us": median_us(operator, rounds),
            "both_us": median_us(lambda: torch.autograd.grad(operator(), rows, grad), rounds),  # noqa: B023
        }
        for name, operator in operators.items()
    }


def median_us(work: Callable[[], Any], rounds: int) -> float:
    found = []
    for i in range(rounds + 3):
        start = time.perf_counter()
        work()
        if i >= 3:
            found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found)


if __name__ == "__main__":
    sys.exit(main())
