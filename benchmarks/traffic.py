"""Counts the bytes that an encoder's forward and backward pass moves on a GPU, without a GPU.

    python -m benchmarks.traffic --model resnet50 convnext_base --batch-size 256 --json benchmarks/results/traffic.json
    python -m benchmarks.traffic --model timm:convnextv2_tiny --what step --recipe fcmae --lines 30

The pass runs on fake tensors of the device `cuda` under its autocast; they have a shape, a dtype and a device, but no data.
Every operator counts with the bytes of the tensors that it reads and writes: once each, but twice for the input of torch's
batch norms. This is the traffic of eager PyTorch if nothing stays in a cache between operators, and a convolution loads a row
once for all its neighbours. Operators that return a view move nothing.

Kinds: `products` (convolutions and linear layers), `norms`, `casts` between dtypes, `copies`, `sums` over rows, and `pointwise`
(activations, additions, and all others).

An operator that depends on data cannot run on fake tensors, so a pass that completes never waits for the device.

The JSON file has `cases`: model, what, batch size, precision, `gigabytes` {kind: 10^9 bytes}, `operators` (how many ran), and
`largest` {operator: 10^9 bytes}.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.flops import provenance
from benchmarks.memory import create_network
from benchmarks.throughput import METHODS, of_recipes, write_json
from sparkme.errors import Parser, UserError, run_command, user_errors
from sparkme.settings.pretrain import RECIPES

WHAT = ("encoder", "step")
KINDS = ("products", "norms", "casts", "copies", "sums", "pointwise")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "sparse_conv", "depthwise_conv", "mlp", "dot", "mv")
COPIES = ("clone", "copy", "cat", "stack", "index", "contiguous", "densify", "voxelise", "gather", "index_select", "where")
GB = 10**9


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.traffic", description="Count the bytes that an encoder moves on a GPU.")
    parser.add_argument("--recipe", default="spark", choices=METHODS, help="recipe of the training step (default: %(default)s)")
    parser.add_argument("--model", nargs="+", help=f"networks (default: {of_recipes('model')})")
    parser.add_argument("--what", choices=WHAT, default="encoder", help="part whose passes are counted (default: %(default)s)")
    parser.add_argument("--engine", default="cuda_ext", choices=("cuda_ext", "masked-dense"), help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="IMAGES", help="batch size (default: %(default)s)")
    parser.add_argument(
        "--input-size", type=int, default=224, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--lines", type=int, default=12, metavar="N", help="largest operators to list (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, after every model")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: traffic(args, words))


def traffic(args: argparse.Namespace, words: list[str]) -> int:
    if args.batch_size < 1 or args.input_size < 1:
        raise UserError("--batch-size and --input-size must be positive")
    args.model = args.model or [RECIPES[args.recipe].defaults["model"]]
    record: dict[str, Any] = {
        "what": "10^9 bytes that operators read and write on a GPU, counted on fake tensors; see benchmarks/traffic.py",
        "command": shlex.join(["python", "-m", "benchmarks.traffic", *words]),
        **provenance(),
        "cases": [],
    }
    for name in args.model:
        with user_errors():
            case = count(name, args)
        record["cases"].append(case)
        total = sum(case["gigabytes"].values())
        print(
            f"\n{name}, {args.what}, batch {args.batch_size}, {args.precision}: {total:.1f} GB in {case['operators']} operators"
        )
        for kind, gigabytes in case["gigabytes"].items():
            print(f"  {kind:12}{gigabytes:8.1f} GB")
        for operator, gigabytes in list(case["largest"].items())[: args.lines]:
            print(f"    {operator:40}{gigabytes:8.1f} GB")
        write_json(args.json, record)
    return 0


def count(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one pass on fake tensors, and adds up its traffic."""
    seen = Traffic()
    run_pass(name, args, seen)
    kinds: Counter[str] = Counter()
    for operator, moved in seen.bytes.items():
        kinds[kind_of(operator)] += moved
    return {
        "model": name,
        "what": args.what,
        "engine": args.engine,
        "batch_size": args.batch_size,
        "input_size": args.input_size,
        "precision": args.precision,
        "gigabytes": {kind: kinds[kind] / GB for kind in KINDS},
        "operators": seen.calls,
        "largest": {operator: moved / GB for operator, moved in seen.bytes.most_common()},
    }


def run_pass(name: str, args: argparse.Namespace, seen: Traffic) -> None:
    """A forward and a backward pass as in training, without the optimiser."""
    network = create_network(name, args).train()
    network.encoder.set_engine(args.engine)
    network.encoder._engine_choice = args.engine, "cuda"  # without a check whether it can run there
    with FakeTensorMode() as fake, autocast_of_cuda(args.precision == "bf16"):
        held: list[dict[str, Any]] = [own for module in network.modules() for own in (module._parameters, module._buffers)]
        for own in held:
            for key, value in own.items():
                if value is not None:
                    moved = fake.from_tensor(value).detach().to("cuda")
                    own[key] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
        images = torch.empty(args.batch_size, 3, args.input_size, args.input_size, device="cuda")
        with seen:
            if args.what == "step":
                ends = [network(images)]
            else:
                ends = [x.values for x in network.encoder.encode(images, network.grid(images))]
        grads = [torch.ones_like(end) for end in ends]
        with seen:
            backward(ends, grads)


@torch.no_grad()
def backward(ends: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """torch.autograd.backward without its access to the device's streams, and without keeping gradients of weights."""
    waiting: Counter[Any] = Counter()  # gradients that a node still lacks
    found: list[Any] = [end.grad_fn for end in ends]
    seen: set[Any] = set()
    while found:
        node = found.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
                found.append(following)
    given: dict[Any, list[Tensor | None]] = {}

    def give(node: Any, place: int, grad: Tensor | None) -> None:
        held = given.setdefault(node, [None] * len(node._input_metadata))
        if grad is not None:
            like = node._input_metadata[place]
            grad = grad.sum_to_size(like.shape).to(like.dtype)  # as the autograd engine does after broadcasting or promotion
            held[place] = grad if (before := held[place]) is None else before + grad

    for end, grad in zip(ends, grads, strict=True):
        give(end.grad_fn, end.output_nr, grad)
    ready: list[Any] = [node for node in dict.fromkeys(end.grad_fn for end in ends) if not waiting[node]]
    while ready:
        node = ready.pop()
        run = node.apply if isinstance(node, BackwardCFunction) else node  # of a torch.autograd.Function, or torch's own
        results = run(*given.pop(node, [None] * len(node._input_metadata)))
        results = results if isinstance(results, tuple) else (results,)
        for (following, place), grad in zip(node.next_functions, results, strict=False):
            if following is None:
                continue
            give(following, place, grad)
            waiting[following] -= 1
            if not waiting[following] and following.next_functions:  # the others keep the gradients of weights
                ready.append(following)


@contextmanager
def autocast_of_cuda(enabled: bool) -> Iterator[None]:
    """torch.autocast("cuda", torch.bfloat16), which is unavailable without a GPU."""
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write.

    Attributes:
        bytes: bytes of every operator, by name.
        calls: number of operators that moved anything.
        types: number of outputs with at least `large` elements, by operator and dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls = 0
        self.types: Counter[tuple[str, torch.dtype]] = Counter()
        self.large = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        written = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        memory = {id_of(value) for value in read}
        is_mutable = func._schema.is_mutable
        if all(id_of(value) in memory for value in written) and not is_mutable:  # a view
            return result
        name = operator_name(func)
        times = 2 if "native_batch_norm" in name else 1  # ours are operators of one pass each
        moved = sum(size(value) for value in written)
        moved += sum(size(value) * (times if value.numel() == largest(read) else 1) for value in read)
        if name.startswith(("empty", "new_empty")):
            return result
        if name in ("zeros", "ones", "full", "new_zeros", "zeros_like", "ones_like", "fill_", "zero_", "full_like"):
            moved = sum(size(value) for value in written)
        if kind_of(name) == "casts" and read and written and read[0].dtype == written[0].dtype:
            name = "clone"
        self.bytes[name] += moved
        self.calls += 1
        for value in written:
            if value.numel() < self.large:
                continue
            self.types[name, value.dtype] += 1
        return result


def operator_name(func: Any) -> str:
    return str(func).removeprefix("aten.").removeprefix("sparkme.").rpartition(".")[0]


def kind_of(operator: str) -> str:
    """The operator's kind, one of `KINDS`."""
    plain = operator.removesuffix("_backward").strip("_").removesuffix("_grad_rows").removesuffix("_grad_kernel")
    if plain.removesuffix("_grad") in PRODUCTS:
        return "products"
    if "norm" in plain or plain == "batch_statistics":
        return "norms"
    if plain == "to_copy":
        return "casts"
    if plain in COPIES:
        return "copies"
    return "sums" if plain in ("sum", "mean", "var_mean", "var") else "pointwise"


def id_of(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def largest(values: list[Tensor]) -> int:
    return max((value.numel() for value in values), default=0)


if __name__ == "__main__":
    sys.exit(main())
