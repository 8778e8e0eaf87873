"""Times the encoder and the whole training step of each engine, after a check that their results agree.

    python -m benchmarks.throughput --model resnet18 --batch-size 8 --json resnet18.json
    python -m benchmarks.throughput --model resnet50 convnext_base --batch-size 256 --precision bf16 --device cuda
    python -m benchmarks.throughput --recipe fcmae --model timm:convnextv2_tiny --what step --decoder-width 256 512
    python -m benchmarks.throughput --sweep --what encoder

Kinds of work (`--what`), always in training mode, with images that are on the device already:

    encoder-forward  the sites of a given mask and the forward pass, which saves tensors for the backward pass
    encoder          the same and the backward pass, from a random gradient of every map
    step             a random mask, the loss, the backward pass, the optimiser, gradients set to None

A step is that of a recipe of sparkme.pretrain (`--recipe`) with its optimiser: `spark` is SparK and LAMB with its gradient
clipping, `fcmae` is FCMAE and AdamW. The recipe also determines the encoder's initial values and the number of visible patches,
which SparK rounds and FCMAE rounds down.

Contenders (`--contenders`):

    cuda_ext           the engine with this project's operators
    minkowski          the engine with stock MinkowskiEngine; its encoder stays in float32
    masked-dense       dense convolutions and masks, tuned, in channels_last memory
    masked-dense-nchw  the same in contiguous memory; the faster of the two is the "tuned masked-dense" of the ratios
    rows-dense         plain PyTorch: rows, and dense convolutions for overlapping windows (benchmarks/rows_dense.py)
    official           the published algorithm, by masked dense layers (benchmarks/official.py), always in float32 and NCHW

With `--graph` an encoder is captured in a CUDA graph and replayed, which measures the device alone, without the host that
queues its work. Of a step only the forward and backward pass are captured, as in pretrain with `--cuda-graph`. A contender that
waits for the device cannot be captured, and is left out.

Each contender has a copy of the weights in its preferred memory order. First all are compared with masked-dense on the same
weights, images and mask: the maps of an encoder pass, the gradients of all its parameters, and for `step` the loss. An error is
|x - y| / |y| with Euclidean norms, the largest over maps or parameters. In float64, on the first two images, it may be 1e-8. In
float32, on the whole batch and with the timed kernels, it may be 1e-3 for maps and loss and 0.1 for gradients, since a single
ReLU that flips, its input within rounding of zero, changes them by a hundredth. Work that is timed in bf16 is also compared in
bf16. Rounding alone moves the maps of a deep network with random weights far from float32, so the limit is 1.5 times the error
of masked-dense in bf16. A contender that disagrees is not timed, and the exit code is 1.

Then the contenders take turns, round by round in one process. Drop path is off. Norm weights and layer scales are random in
[0.5, 1.5], since most initial values are so close to zero that they would hide errors in a branch.

Activation memory is the peak of tensors during one forward and backward pass (for `encoder-forward` the forward pass) above
weights, images, mask, and for `step` the optimiser's state. It includes gradients of the weights, but not the optimiser's step.
See benchmarks/profiling.py for memory outside torch.

The JSON file, rewritten after every case, holds `date`, `commit` (marked if the tree was changed), `versions`, `command`,
`hardware`, `settings` and `cases`. A case is one model, decoder width, batch size, mask ratio and kind of work:

    recipe, model, decoder_width, input_size, patch, num_patches, visible_patches, batch_size, mask_ratio, what, precision,
    compile, graph
    agreement   {contender: {float64: {maps, gradients, loss}, float32: {...}, bf16: {maps}}}: relative errors; loss for
                `step` only, and in bf16 the largest error over that of masked-dense
    left_out    {contender: reason}
    contenders  {contender: {precision, seconds: [...], median_s, quartiles_s: [low, high], images_per_s,
                activation_bytes, gpu: {step_s, busy_s, idle_share} with --host-wait}}
    ratios      {contender: its median time over that of cuda_ext}, and `tuned masked-dense`
    error       instead of the last two if the case failed
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import profiling
from benchmarks.flops import provenance
from benchmarks.official import create_official
from benchmarks.rows_dense import RowsDenseEngine
from sparkme.errors import Parser, UserError, first_line, run_command, user_errors
from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.masking import random_active
from sparkme.networks.names import library_of
from sparkme.settings.pretrain import ABLATIONS, RECIPES, PretrainSettings
from sparkme.sparse.engines import why_not
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.training.build import build_network
from sparkme.training.graph import GraphedLoss
from sparkme.training.memory import keep_freed_memory
from sparkme.training.optimizer import create_optimizer, update_schedule

# Of sparkme.pretrain's recipes those that differ in what is computed: the first of each method.
METHODS = tuple(
    name
    for name in RECIPES
    if name not in ABLATIONS and name == next(n for n, r in RECIPES.items() if r.method == RECIPES[name].method)
)
WHAT = ("encoder-forward", "encoder", "step")
ENGINE_OF = {  # the engine of the kernels and of the weights' memory order
    "cuda_ext": "cuda_ext",
    "minkowski": "minkowski",
    "masked-dense": "masked-dense",
    "masked-dense-nchw": "masked-dense",
    "rows-dense": "masked-dense",
}
CONTENDERS = (*ENGINE_OF, "official")
TUNED = ("masked-dense", "masked-dense-nchw")
SWEEP = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
LIMITS = {
    torch.float64: {"maps": 1e-8, "gradients": 1e-8, "loss": 1e-8},
    torch.float32: {"maps": 1e-3, "gradients": 0.1, "loss": 1e-3},
}
BF16_LIMIT = 1.5  # error of a map in bf16 over that of masked-dense
EXACT_IMAGES = 2  # images that are compared in float64
AGREEING_IMAGES = 32  # images that are compared in other dtypes, since whole batches may not fit
DISAGREES = "disagrees with"
GIB = 2**30


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.throughput",
        description="Time encoder and training step, engine by engine, after checking that all engines compute the same.",
        epilog="The docstring of benchmarks/throughput.py explains the terms and the fields of the JSON file.",
    )
    group = parser.add_argument_group("what is timed")
    group.add_argument(
        "--recipe", default="spark", choices=METHODS, help="training step: spark, with LAMB, or fcmae, with AdamW"
    )
    group.add_argument("--model", nargs="+", help=f"networks (default: {of_recipes('model')})")
    group.add_argument("--what", nargs="+", metavar="WHAT", help=f"any of {', '.join(WHAT)} (default: all)")
    group.add_argument(
        "--contenders", nargs="+", default=list(CONTENDERS), metavar="NAME", help=f"any of {', '.join(CONTENDERS)}"
    )
    group.add_argument("--batch-size", type=int, nargs="+", default=[8], metavar="IMAGES", help="images per pass (default: 8)")
    group.add_argument("--mask-ratio", type=float, nargs="+", metavar="SHARE", help="shares of patches to hide (default: 0.6)")
    group.add_argument(
        "--sweep", action="store_true", help=f"time the encoder at mask ratios {', '.join(f'{ratio:g}' for ratio in SWEEP)}"
    )
    group.add_argument(
        "--input-size", type=int, default=224, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    group.add_argument(
        "--decoder-width", type=int, nargs="+", metavar="N", help=f"decoder widths (default: {of_recipes('decoder_width')})"
    )
    group = parser.add_argument_group("how it runs")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    group.add_argument("--threads", type=int, help="torch's threads on the CPU (default: torch's choice)")
    group.add_argument(
        "--precision", nargs="+", default=["float32"], choices=("float32", "bf16"), help="float32, or autocast to bf16"
    )
    group.add_argument("--compile", action="store_true", help="compile stages and decoder, for all engines of sparkme")
    group.add_argument("--graph", action="store_true", help="replay forward and backward pass from a CUDA graph (CUDA only)")
    group.add_argument("--rounds", type=int, default=7, help="timed runs of each contender (default: %(default)s)")
    group.add_argument("--warmup", type=int, default=2, help="untimed runs before (default: %(default)s)")
    group.add_argument(
        "--seconds", type=float, default=600, help="start no new round of a case after this time (default: %(default)s)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--host-wait", action="store_true", help="also measure the share of time that the GPU waits (CUDA only)")
    group.add_argument("--profile", type=Path, metavar="FILE", help="also write torch.profiler's table of every contender")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, after every case")
    return parser


def of_recipes(name: str) -> str:
    """The default in each recipe, for --help."""
    return ", ".join(f"{method}: {RECIPES[method].defaults[name]}" for method in METHODS)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: throughput(args, words))


def throughput(args: argparse.Namespace, words: list[str]) -> int:
    device = check_arguments(args)
    with user_errors():
        for name, width in product(args.model, args.decoder_width):
            # The device meta saves memory for weights, but a user's own network may not support it.
            with torch.device("cpu" if library_of(name) == "own" else "meta"):
                model = create_model(name, width, args.mask_ratio[0], args)
            for ratio in args.mask_ratio:
                model.set_task(args.input_size, ratio_of_model(ratio, args))
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":  # as in pretrain; all contenders benefit
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # sizes do not change, so it is worth searching for the fastest kernel
    if device.type == "cuda":  # for all float32 work; on the CPU it would only make torch.compile compile again
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.compile:  # fail if torch.compile silently gives up
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    record: dict[str, Any] = {
        "what": "times in seconds of encoder and training step, engine by engine; see benchmarks/throughput.py",
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *words]),
        **provenance(),
        "hardware": hardware(device),
        "settings": {"rounds": args.rounds, "warmup": args.warmup, "drop_path": 0.0},
        "cases": [],
    }
    record["versions"]["cuda"] = torch.version.cuda
    record["settings"]["tf32"] = device.type == "cuda"
    if args.profile:
        args.profile.write_text("")
    print(", ".join(f"{key} {value}" for key, value in record["hardware"].items() if value), flush=True)
    failed = False
    settings = product(args.model, args.decoder_width, args.batch_size, args.mask_ratio, args.precision)
    for name, width, batch_size, ratio, precision in settings:
        for case in run_cases(name, width, batch_size, ratio, precision, device, args):
            record["cases"].append(case)
            failed |= "error" in case or any(DISAGREES in reason for reason in case["left_out"].values())
            write_json(args.json, record)
    if args.json:
        print(f"wrote {args.json}")
    return int(failed)


def check_arguments(args: argparse.Namespace) -> torch.device:
    """Checks the arguments, and fills in defaults that depend on others. Raises UserError if a value is invalid."""
    for flag, chosen, allowed in (("--what", args.what, WHAT), ("--contenders", args.contenders, CONTENDERS)):
        if unknown := [value for value in chosen or () if value not in allowed]:
            raise UserError(f"{flag} {' '.join(unknown)} is unknown; choose from {', '.join(allowed)}")
    for flag in ("batch_size", "rounds", "threads", "input_size", "warmup"):
        values, least = getattr(args, flag), 0 if flag == "warmup" else 1
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                raise UserError(f"--{flag.replace('_', '-')} {value} must be at least {least}")
    if args.sweep:
        if args.mask_ratio:
            raise UserError("--sweep sets the mask ratios; leave out --mask-ratio")
        if "step" in (args.what or ()):
            raise UserError("--sweep times the encoder only; leave out --what step")
        args.mask_ratio, args.what = list(SWEEP), args.what or ["encoder"]
    defaults = RECIPES[args.recipe].defaults
    args.model, args.decoder_width = args.model or [defaults["model"]], args.decoder_width or [defaults["decoder_width"]]
    args.mask_ratio, args.what = args.mask_ratio or [defaults["mask_ratio"]], args.what or list(WHAT)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `python -m sparkme.doctor` says why, or use --device cpu")
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    for flag in ("host_wait", "graph"):
        if getattr(args, flag) and not on_gpu:
            raise UserError(f"--{flag.replace('_', '-')} needs a GPU; leave it out")
    for flag, path in (("--json", args.json), ("--profile", args.profile)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{flag} {path} must be a file in a folder that exists")
    return torch.device("cuda" if on_gpu else "cpu")


def ratio_of_model(ratio: float, args: argparse.Namespace) -> float:
    """The ratio to build a method with: not 0, which methods refuse, if only its encoder is used."""
    return ratio if ratio > 0 or "step" in args.what else 0.5


def hardware(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from None


@dataclass
class Setting:
    """The common input of all contenders for a model, batch size and mask ratio.

    Attributes:
        recipe: one of `METHODS`.
        name: the encoder's name.
        images: (B, 3, H, W) float32.
        active: (B, 1, f_h, f_w) bool, True = visible; `keep` patches in every image.
        autocast: time sparkme's contenders in bf16.
        compiled: compile them.
        shared: the weights, which every contender copies.
    """

    recipe: str
    name: str
    images: Tensor
    active: Tensor
    keep: int
    autocast: bool
    compiled: bool
    shared: MaskedAutoencoder

    @property
    def device(self) -> torch.device:
        return self.images.device

    def draw(self) -> Tensor:
        """A new random mask."""
        return self.shared.random_active(len(self.images), device=self.device)


def create_model(name: str, width: int, ratio: float, args: argparse.Namespace) -> MaskedAutoencoder:
    """The network of `--recipe` as in sparkme.pretrain, without drop path.

    Raises:
        ValueError: the name is unknown, or sizes, ratio or width do not fit together.
    """
    return build_network(
        PretrainSettings(
            **RECIPES[args.recipe].defaults
            | {
                "recipe": args.recipe,
                "model": name,
                "drop_path": 0.0,
                "input_size": (args.input_size, args.input_size),
                "mask_ratio": ratio_of_model(ratio, args),
                "decoder_width": width,
            }
        )
    )


def create_setting(
    name: str, width: int, batch_size: int, ratio: float, precision: str, device: torch.device, args: argparse.Namespace
) -> Setting:
    """Makes weights, images and mask from fixed seeds."""
    torch.manual_seed(0)
    model = create_model(name, width, ratio, args).to(device).train()
    randomise_scales(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, model.encoder.in_channels, *model.input_size, generator=generator)
    num_patches = math.prod(model.num_patches)
    keep = model.num_visible(num_patches, ratio)
    active = random_active(batch_size, model.num_patches, 1 - keep / num_patches, generator=generator)
    autocast = precision == "bf16"
    return Setting(args.recipe, name, images.to(device), active.to(device), keep, autocast, args.compile, model)


@torch.no_grad()
def randomise_scales(model: MaskedAutoencoder) -> None:
    """Draws norm weights and layer scales of the encoder from [0.5, 1.5]."""
    for name, parameter in model.encoder.named_parameters():
        if parameter.numel() == max(parameter.shape) and not name.endswith("bias"):
            parameter.uniform_(0.5, 1.5)


class Contender:
    """One way to compute on a setting: an engine of sparkme.

    Args:
        name: one of `CONTENDERS`.
        setting: the common input.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self._gradients: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._graphed: GraphedLoss | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.model = copy.deepcopy(self.setting.shared)
        encoder = self.model.encoder.set_engine(ENGINE_OF[self.name])
        if self.name == "masked-dense-nchw":
            encoder.engine = MaskedDenseEngine(torch.contiguous_format)
        if self.name == "rows-dense":
            encoder.engine = RowsDenseEngine()
        self.engine = encoder.engine
        if self.setting.compiled:
            self.model.compile_parts()

    @property
    def precision(self) -> str:
        """The precision of the encoder."""
        return "bf16" if self.setting.autocast and self.engine.bf16 else "float32"

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.setting.device.type, torch.bfloat16) if self.setting.autocast else nullcontext()

    def begin(self) -> None:
        """Prepares a run; not timed."""
        self.model.zero_grad(set_to_none=True)

    def encoder_gradients(self) -> dict[str, Tensor]:
        """Copies of the encoder's gradients, by name of the parameter."""
        return {name: p.grad.clone() for name, p in self.model.encoder.named_parameters() if p.grad is not None}

    def encode(self) -> list[Tensor]:
        """The maps in the engine's form: (B, L, C) rows or dense (B, C, H, W)."""
        setting = self.setting
        return [x.values for x in self.model.encoder(setting.images, setting.active, setting.keep)]

    def dense_maps(self) -> list[Tensor]:
        """The maps as (B, C, H, W)."""
        setting = self.setting
        return [x.dense() for x in self.model.encoder(setting.images, setting.active, setting.keep)]

    def loss(self, active: Tensor) -> Tensor:
        return self.model(self.setting.images, active)

    def drawn_loss(self) -> Tensor:
        if self._graphed is not None:
            return self._graphed(self.setting.images, self.setting.draw())
        return self.model(self.setting.images)

    def graph_loss(self) -> None:
        """Captures the loss and its gradients in a CUDA graph, which `step` then replays."""
        precision = torch.bfloat16 if self.setting.autocast else None
        self._graphed = GraphedLoss(self.model, self.setting.images, precision)

    # Timed work.

    def encoder_forward(self) -> list[Tensor]:
        with self.autocast():
            return self.encode()

    def encoder(self) -> None:
        maps = self.encoder_forward()
        if not self._gradients:  # in the first run, which is not timed
            self._gradients = [random_gradient(x, self.setting.active) for x in maps]
        torch.autograd.backward(maps, self._gradients)

    def forward_backward(self) -> None:
        with self.autocast():
            loss = self.drawn_loss()
        loss.backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimiser, with a small learning rate; created at the first use."""
        if self._optimizer is None:
            defaults = RECIPES[self.setting.recipe].defaults
            beta2 = defaults.get("beta2", 0.95 if self.setting.shared.encoder.norm == "bn" else 0.999)
            clip = defaults["clip_grad"] or None
            self._optimizer = create_optimizer(defaults["optimizer"], self.model, beta2=beta2, clip_grad=clip)
            update_schedule(self._optimizer, learning_rate=1e-6, weight_decay=defaults["weight_decay"])
        return self._optimizer


class Official(Contender):
    """The published algorithm."""

    precision = "float32"

    def _prepare(self) -> None:
        self.official = create_official(self.setting.name, self.setting.shared)
        self.model = cast("MaskedAutoencoder", self.official)  # both have parameters and gradients

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encoder_gradients(self) -> dict[str, Tensor]:
        found = self.official.gradients(self.setting.shared)
        return {name.removeprefix("encoder."): grad for name, grad in found.items() if name.startswith("encoder.")}

    def encode(self) -> list[Tensor]:
        return self.official.encode(self.setting.images, self.setting.active)

    dense_maps = encode

    def loss(self, active: Tensor) -> Tensor:
        loss: Tensor = self.official(self.setting.images, active)
        return loss

    def drawn_loss(self) -> Tensor:
        return self.loss(self.setting.draw())

    def graph_loss(self) -> None:
        raise NotImplementedError("the published algorithm is not captured")


def random_gradient(x: Tensor, active: Tensor) -> Tensor:
    """A random gradient with the shape of a map, zero at hidden pixels of a dense one."""
    gradient = torch.randn_like(x)
    return gradient * F.interpolate(active.to(x.dtype), x.shape[2:]) if x.ndim == 4 else gradient


def admit(names: list[str], setting: Setting) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run on the setting's device, and the reasons why others cannot."""
    contenders, left_out = [], {}
    for name in names:
        reason = why_not(ENGINE_OF[name], setting.device) if name in ENGINE_OF else ""
        if not reason:
            try:
                contenders.append((Contender if name in ENGINE_OF else Official)(name, setting))
            except (ImportError, TypeError) as error:
                reason = f"not in this version: {first_line(error)}"
            except Exception as error:  # such as too little memory for another copy of the network
                reason = describe(error)
                release(setting.device)
        if reason:
            left_out[name] = reason
    return contenders, left_out


@contextmanager
def exact_arithmetic(setting: Setting) -> Iterator[None]:
    """Turns off autocast and, on a GPU, TF32."""
    autocast, setting.autocast = setting.autocast, False
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if setting.device.type == "cuda" else ()
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        setting.autocast = autocast
        for switch in switches:
            switch.allow_tf32 = True


@dataclass
class Answer:
    """The results of a contender: maps, gradients of all parameters of the encoder, and optionally the loss."""

    maps: list[Tensor]
    gradients: dict[str, Tensor]
    loss: Tensor | None

    def errors(self, reference: Answer) -> dict[str, float]:
        """The largest relative errors, by kind."""
        missing = reference.gradients.keys() - self.gradients.keys()
        found = {
            "maps": max(self.map_errors(reference)),
            "gradients": math.inf
            if missing
            else max(relative(self.gradients[name], gradient) for name, gradient in reference.gradients.items()),
        }
        if self.loss is not None and reference.loss is not None:
            found["loss"] = relative(self.loss, reference.loss)
        return found

    def map_errors(self, reference: Answer) -> list[float]:
        """The relative errors of the maps, shallow to deep."""
        return [relative(x, y) for x, y in zip(self.maps, reference.maps, strict=True)]


def relative(x: Tensor, y: Tensor) -> float:
    error = (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)).item()
    return error if math.isfinite(error) else math.inf


def answer(contender: Contender, with_loss: bool) -> Answer:
    setting = contender.setting
    contender.begin()
    with contender.autocast():
        maps = contender.dense_maps()
    shown = setting.active.to(setting.images.dtype)
    maps = [x.to(shown.dtype) * F.interpolate(shown, x.shape[2:]) for x in maps]
    generator = torch.Generator(setting.device).manual_seed(1)
    gradients = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in maps]
    torch.autograd.backward(maps, gradients)
    found = contender.encoder_gradients()
    loss = None
    if with_loss:
        with torch.no_grad():
            loss = contender.loss(setting.active)
    contender.begin()
    return Answer([x.detach() for x in maps], found, loss)


def check_agreement(
    contenders: list[Contender], setting: Setting, with_loss: bool
) -> tuple[list[Contender], dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """Compares every contender with the engine masked-dense, in float64, float32 and, if it is timed, bf16.

    Returns:
        The contenders that agree, all errors, and the reasons for leaving out the others.
    """
    exact = replace(
        setting,
        images=setting.images[:EXACT_IMAGES].double(),
        active=setting.active[:EXACT_IMAGES],
        compiled=False,
        shared=copy.deepcopy(setting.shared).double(),
    )
    part = setting
    if len(setting.images) > AGREEING_IMAGES and not setting.compiled:  # another size would be compiled again
        part = replace(setting, images=setting.images[:AGREEING_IMAGES], active=setting.active[:AGREEING_IMAGES])
    agreed = list(contenders)
    errors: dict[str, dict[str, dict[str, float]]] = {contender.name: {} for contender in contenders}
    left_out: dict[str, str] = {}
    for asked in (exact, part):
        dtype = asked.images.dtype
        with exact_arithmetic(asked):
            expected = answer(Contender("masked-dense", replace(asked, compiled=False)), with_loss)
            for contender in list(agreed):
                name = contender.name
                try:
                    asked_one = contender if asked is setting else type(contender)(name, asked)
                    found = answer(asked_one, with_loss).errors(expected)
                    errors[name][str(dtype).removeprefix("torch.")] = found
                    limits = LIMITS[dtype]
                    wrong = [f"{kind} off by {value:.1e}" for kind, value in found.items() if not value <= limits[kind]]
                    if wrong:
                        left_out[name] = f"{DISAGREES} masked-dense in {dtype}: {', '.join(wrong)}"
                except Exception as error:
                    left_out[name] = describe(error)
                if name in left_out:
                    agreed.remove(contender)
                    release(setting.device)
    if setting.autocast:
        rounding = answer(Contender("masked-dense", replace(part, compiled=False)), False).map_errors(expected)
        for contender in list(agreed):
            name = contender.name
            try:
                asked_one = contender if part is setting else type(contender)(name, part)
                pairs = zip(answer(asked_one, False).map_errors(expected), rounding, strict=True)
                worst = max(error / own for error, own in pairs)
                errors[name]["bf16"] = {"maps": worst}
                if not worst <= BF16_LIMIT:
                    left_out[name] = f"{DISAGREES} masked-dense in bf16: maps {worst:.1f} times as far from float32"
            except Exception as error:
                left_out[name] = describe(error)
            if name in left_out:
                agreed.remove(contender)
                release(setting.device)
    return agreed, errors, left_out


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def release(device: torch.device) -> None:
    """Frees memory after a failure, or before the next case."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_cases(
    name: str, width: int, batch_size: int, ratio: float, precision: str, device: torch.device, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Checks, times and prints one setting, a case for each kind of work."""
    about = {
        "recipe": args.recipe,
        "model": name,
        "decoder_width": width,
        "input_size": args.input_size,
        "batch_size": batch_size,
        "mask_ratio": ratio,
        "precision": precision,
        "compile": args.compile,
        "graph": args.graph,
    }
    print(
        f"\n{RECIPES[args.recipe].name}, {name}, decoder width {width}, {args.input_size} pixels, batch {batch_size}, "
        f"mask ratio {ratio:g}, {precision}",
        flush=True,
    )
    try:
        setting = create_setting(name, width, batch_size, ratio, precision, device, args)
        about |= {"patch": setting.shared.patch, "num_patches": setting.active[0].numel(), "visible_patches": setting.keep}
        contenders, left_out = admit(args.contenders, setting)
        contenders, agreement, refused = check_agreement(contenders, setting, "step" in args.what)
        left_out |= refused
    except Exception as error:
        print(f"  failed: {describe(error)}", flush=True)
        release(device)
        yield from ({**about, "what": what, "left_out": {}, "error": describe(error)} for what in args.what)
        return
    for contender, errors in agreement.items():
        found = (f"{dtype} " + " ".join(f"{kind} {value:.0e}" for kind, value in one.items()) for dtype, one in errors.items())
        print(f"  agreement  {contender:18}" + ", ".join(found))
    for contender, reason in left_out.items():
        print(f"  left out   {contender:18}{reason}")
    for what in args.what:
        case = {**about, "what": what, "agreement": agreement, "left_out": dict(left_out)}
        release(device)
        print(f"  {what}", flush=True)
        case |= run_case(what, contenders, case["left_out"], setting, args)
        print(as_table(case), flush=True)
        yield case


def run_case(
    what: str, contenders: list[Contender], left_out: dict[str, str], setting: Setting, args: argparse.Namespace
) -> dict[str, Any]:
    """Times one kind of work. Contenders that fail are added to `left_out`."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    running = list(contenders)
    kinds: dict[str, tuple[Callable[[Contender], Any], Callable[[Contender], Any]]] = {  # for time, and for memory
        "encoder-forward": (Contender.encoder_forward, Contender.encoder_forward),
        "encoder": (Contender.encoder, Contender.encoder),
        "step": (Contender.step, Contender.forward_backward),
    }
    work, weighed = kinds[what]
    graphs: dict[str, Callable[[], None]] = {}

    def each(action: Callable[[Contender], Any], order: list[Contender]) -> dict[str, Any]:
        """Calls a function for every remaining contender, and drops those that fail."""
        done = {}
        for contender in order:
            try:
                contender.begin()
                done[contender.name] = action(contender)
            except Exception as error:
                running.remove(contender)
                left_out[contender.name] = describe(error)
                print(f"    {contender.name} failed: {describe(error)}", flush=True)
                release(setting.device)
        return done

    for _ in range(args.warmup):
        each(work, list(running))
    each(work, list(running))  # draws gradients, creates the optimisers' state, and compiles
    peaks = each(lambda c: profiling.peak_memory(lambda: weighed(c), setting.device), list(running))
    if args.graph and what == "step":
        each(Contender.graph_loss, list(running))
    elif args.graph:
        captured = work
        graphs |= each(lambda c: capture(lambda: captured(c)), list(running))
        work = lambda c: graphs[c.name]()  # noqa: E731
    start = time.perf_counter()
    for i in range(args.rounds):
        if i >= min(3, args.rounds) and time.perf_counter() - start > args.seconds:
            print(f"    stopped after {i} rounds and {time.perf_counter() - start:.0f} s")
            break
        first = i % max(1, len(running))
        for name, seconds in each(lambda c: timed(lambda: work(c), setting.device), running[first:] + running[:first]).items():
            times[name].append(seconds)
    gpu = each(lambda c: profiling.gpu_times(lambda: work(c)), list(running)) if args.host_wait else {}
    if args.profile:
        tables = each(lambda c: profiling.step_table(lambda: work(c), setting.device), list(running))
        with args.profile.open("a") as file:
            file.writelines(f"{what}: {name}\n{table}\n" for name, table in tables.items())
    for contender in contenders:
        contender.begin()
    results = {
        c.name: {
            "precision": c.precision,
            **summary(times[c.name], len(setting.images)),
            "activation_bytes": peaks[c.name],
            **({"gpu": gpu[c.name]} if gpu else {}),
        }
        for c in running
    }
    if not results:
        return {"error": "no contender could run"}
    return {"contenders": results, "ratios": ratios({name: result["median_s"] for name, result in results.items()})}


def capture(work: Callable[[], Any]) -> Callable[[], None]:
    """A function that replays `work` from a CUDA graph. `work` has run before, so that kernels are compiled and chosen."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds from an idle device to the end of the work."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize(device)
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begin
    del result
    return seconds


def summary(seconds: list[float], batch_size: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    return {
        "seconds": [float(f"{value:.6g}") for value in seconds],
        "median_s": median,
        "quartiles_s": [low, high],
        "images_per_s": batch_size / median,
    }


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Times of the contenders over that of `cuda_ext`; the tuned masked-dense is the faster of the two."""
    if "cuda_ext" not in medians:
        return {}
    others = {name: median for name, median in medians.items() if name != "cuda_ext"}
    if tuned := [others[name] for name in TUNED if name in others]:
        others["tuned masked-dense"] = min(tuned)
    return {name: median / medians["cuda_ext"] for name, median in others.items()}


def as_table(case: dict[str, Any]) -> str:
    if "error" in case:
        return f"    failed: {case['error']}"
    lines = [f"    {'':18}{'median':>10}{'quartiles':>20}{'images/s':>10}{'activations':>13}  over cuda_ext"]
    for name, result in case["contenders"].items():
        low, high = result["quartiles_s"]
        ratio = f"{case['ratios'][name]:.2f}x" if name in case["ratios"] else ""
        idle = f"GPU idle {result['gpu']['idle_share']:.1%}" if "gpu" in result else ""
        note = "" if result["precision"] == case["precision"] else result["precision"]
        lines.append(
            f"    {name:18}{1e3 * result['median_s']:>7.1f} ms{f'{1e3 * low:.1f} to {1e3 * high:.1f} ms':>20}"
            f"{result['images_per_s']:>10.1f}{result['activation_bytes'] / GIB:>9.3f} GiB  {ratio:13}  {idle} {note}".rstrip()
        )
    if "tuned masked-dense" in case["ratios"]:
        lines.append(f"    time of the tuned masked-dense over that of cuda_ext: {case['ratios']['tuned masked-dense']:.2f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
