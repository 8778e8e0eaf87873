"""Counts the multiply-accumulates (MACs) of a forward pass, dense and sparse, by layer.

    python -m benchmarks.flops --model resnet50 --mask-ratio 0.6

Every number is per image, and counts the layers that run in a `SparK` network. Three columns:

- dense: all pixels and offsets, also those beyond the image's border, as in a dense network.
- sparse: all offsets at visible pixels, as in a gather of neighbours with a matrix product.
- submanifold: at visible pixels, only offsets whose neighbour lies in the image and is visible. It depends on the mask; the
  column is the exact mean over all masks with that many visible patches. (For ResNet-50 and 20 of 49 patches, single masks
  have a standard deviation of 1 % around it.)

Densify and decoder are dense in all columns (on the CPU `cuda_ext` skips the products of mask tokens in densify's convolutions,
which is ignored). Norms, activations, pooling, residual sums and biases are not counted, since they are not matrix products. A
grouped convolution counts with its groups, whatever an engine does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparkme
from sparkme.errors import UserError, first_line, run_command, user_errors
from sparkme.methods.spark import SparK
from sparkme.networks.create import create_encoder
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.sparse.features import DenseFeatures
from sparkme.sparse.grid import Grid
from sparkme.sparse.recorder import Recorder
from sparkme.sparse.window import Window

PARTS = ("encoder", "densify", "decoder")
LEGEND = """\
dense: all pixels and offsets. sparse: all offsets at visible pixels. subm. (submanifold): only offsets to visible neighbours
at visible pixels, mean over all masks. Densify and decoder are dense. Norms, activations and pooling are not counted."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image, in three columns."""

    dense: float = 0
    sparse: float = 0
    submanifold: float = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.dense + other.dense, self.sparse + other.sparse, self.submanifold + other.submanifold)

    def over(self, unit: Macs) -> Macs:
        """Each column as a multiple of that of `unit`."""
        return Macs(self.dense / unit.dense, self.sparse / unit.sparse, self.submanifold / unit.submanifold)

    def rounded(self, digits: int | None = None) -> dict[str, float]:
        return {column: round(value, digits) for column, value in asdict(self).items()}


def every(value: float) -> Macs:
    return Macs(value, value, value)


GMAC = every(1e9)
GFLOP = every(0.5e9)  # each is a multiplication and an addition


@dataclass(frozen=True)
class Count:
    """The MACs of one call of a layer.

    `stride` names the stage: the next map of the encoder or densify (the stem belongs to the first), or the decoder's output.
    """

    part: str
    stride: int
    kind: str
    macs: Macs


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flops",
        description="Count the multiply-accumulates of one forward pass per image: dense, sparse, and submanifold sparse.",
    )
    parser.add_argument(
        "--model", nargs="+", default=["resnet50"], help="networks, as for sparkme.pretrain (default: resnet50)"
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        default=[224],
        metavar="PIXELS",
        help="side of the images, or their height and width (default: 224)",
    )
    parser.add_argument("--patch", type=int, metavar="PIXELS", help="side of a patch (default: the total stride, 32)")
    parser.add_argument("--mask-ratio", type=float, default=0.6, help="share of patches to hide (default: %(default)s)")
    parser.add_argument("--decoder-width", type=int, default=768, help="channels of the decoder's input (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, with versions, commit and command")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: flops(args, words))


def flops(args: argparse.Namespace, words: list[str]) -> int:
    if len(args.input_size) > 2:
        raise UserError(f"--input-size takes a side, or height and width; got {len(args.input_size)} numbers")
    if args.patch is not None and args.patch < 1:
        raise UserError(f"--patch {args.patch} must be at least 1")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json} must be a file in a folder that exists")
    results = []
    for name in args.model:
        with user_errors():
            network = build(name, args.input_size, args.mask_ratio, args.decoder_width, args.patch)
        counts = count_network(network)
        setting = describe(name, network, args.decoder_width)
        print(f"{title(setting)}\n\n{table(counts)}\n")
        results.append({**setting, **summary(counts)})
    print(LEGEND)
    if args.json:
        record = {
            "what": "multiply-accumulates and 2 x MAC in GFLOP of one forward pass per image; see benchmarks/flops.py",
            "command": shlex.join(["python", "-m", "benchmarks.flops", *words]),
            **provenance(),
            "results": results,
        }
        try:
            args.json.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {first_line(error)}") from None
        print(f"wrote {args.json}")
    return 0


def build(name: str, input_size: list[int], mask_ratio: float, decoder_width: int, patch: int | None) -> SparK:
    """The network in eval mode with uninitialised weights, since only shapes count.

    Raises:
        ValueError: the name is unknown, or sizes, ratio or width do not fit together.
    """
    with torch.device("meta"):
        encoder = create_encoder(name, drop_path=0.0)
        size = input_size[0], input_size[-1]
        network = SparK(encoder, input_size=size, mask_ratio=mask_ratio, decoder_width=decoder_width, patch=patch)
    # Random values would take most of the time. The count does not depend on the engine; this one is fast on the CPU.
    network.to_empty(device="cpu").eval().encoder.set_engine("masked-dense")
    return network


class CountingEngine(MaskedDenseEngine):
    """The engine masked-dense, which calls `note` with the kind of each convolution or linear layer and its MACs per image."""

    def __init__(self, note: Callable[[str, Macs], None]) -> None:
        super().__init__()
        self.note = note

    def convolution(
        self, x: DenseFeatures, kernel: Tensor, bias: Tensor | None, window: Window, groups: int = 1
    ) -> DenseFeatures:
        out = super().convolution(x, kernel, bias, window, groups)
        depthwise = kernel.ndim == 2 and groups > 1
        self.note(
            kind_of(window, "depthwise" if depthwise else "grouped" if groups > 1 else ""), sparse_macs(kernel, x, out, window)
        )
        return out

    def linear(self, x: DenseFeatures, weight: Tensor, bias: Tensor | None) -> DenseFeatures:
        out = super().linear(x, weight, bias)
        self.note("linear", sparse_macs(weight, x, out, Window((1, 1))))
        return out


def count_encoder(encoder: SparseEncoder, images: Tensor, grid: Grid) -> list[Count]:
    """Runs an image through the encoder and counts each convolution and linear layer on its maps, in the order of the calls.

    Layers on pooled vectors, as in squeeze-excite, are not counted.
    """
    counts: list[Count] = []
    recorders: list[Recorder] = []

    def note(kind: str, macs: Macs) -> None:
        stage = encoder.strides[len(recorders[-1].maps)]  # the next map after this layer
        counts.append(Count("encoder", stage, kind, macs))

    handle = encoder.network.register_forward_pre_hook(lambda _, args: recorders.append(args[0].recorder))
    before, encoder.engine = encoder.engine, CountingEngine(note)
    try:
        encoder.encode(images, grid)
    finally:
        handle.remove()
        encoder.engine = before
    return counts


@torch.no_grad()
def count_network(network: SparK) -> list[Count]:
    """Runs one image through the network and counts each call of a layer, in the order of the calls."""
    counts: list[Count] = []

    def dense_layer(part: str, layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        window = kind_of(layer, "transposed" if isinstance(layer, nn.ConvTranspose2d) else "")
        counts.append(Count(part, network.input_size[0] // out.shape[2], window, every(dense_macs(layer, args[0], out))))

    hooks: list[tuple[nn.Module, str]] = [(network.densify_projs, "densify"), (network.decoder, "decoder")]
    handles = [
        module.register_forward_hook(partial(dense_layer, part))
        for root, part in hooks
        for module in root.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    images = torch.zeros(1, network.encoder.in_channels, *network.input_size)
    grid = network.grid(images)
    try:
        counts += count_encoder(network.encoder, images, grid)
        network.decoder(network.densify(network.encoder.encode(images, grid)))
    finally:
        for handle in handles:
            handle.remove()
    return counts


def kind_of(layer: Any, kind: str = "") -> str:
    """`1x1`, `depthwise 7x7`, `grouped 3x3`, `transposed 4x4`."""
    return f"{kind} {'x'.join(map(str, layer.kernel_size))}".strip()


def dense_macs(layer: nn.Module, x: Tensor, out: Tensor) -> int:
    """MACs of a dense convolution: each output pixel (each input pixel if it is transposed) uses each weight once."""
    pixels = (x if isinstance(layer, nn.ConvTranspose2d) else out).shape[2:].numel()
    return pixels * layer.get_parameter("weight").numel()


def sparse_macs(kernel: Tensor, x: DenseFeatures, out: DenseFeatures, window: Window) -> Macs:
    """MACs of a sparse convolution or linear layer, per image."""
    grid, num_weights = out.grid, kernel.numel()
    h, w = grid.size(out.stride)
    visible = grid.keep * grid.pixels(out.stride) ** 2
    pairs = mean_visible_pairs(window, grid, x.stride)
    return Macs(h * w * num_weights, visible * num_weights, pairs * num_weights / window.volume)


def mean_visible_pairs(layer: Window, grid: Grid, stride: int) -> float:
    """Pairs of a visible output pixel and a visible input pixel in its window, per image.

    This is the exact mean over all masks with `grid.keep` visible patches. Of L patches, one is visible with probability
    keep / L, and two are with keep (keep - 1) / (L (L - 1)). So it suffices to count pairs within a patch and between patches
    in a fully visible image. Both counts are products over the two axes.

    Args:
        layer: a layer with a window.
        grid: number and size of patches, and the number of visible ones.
        stride: stride of the layer's input map.
    """
    down = axis_pairs(layer, 0, grid.f_h, grid.pixels(stride))
    across = axis_pairs(layer, 1, grid.f_w, grid.pixels(stride))
    seen = int(down.sum() * across.sum())
    within = int(down.trace() * across.trace())
    patches = grid.f_h * grid.f_w
    one = grid.keep / patches
    two = one * (grid.keep - 1) / max(1, patches - 1)
    return one * within + two * (seen - within)


def axis_pairs(layer: Window, axis: int, patches: int, pixels: int) -> Tensor:
    """Pairs of output and input pixel along one axis of a fully visible image.

    Args:
        layer: see `mean_visible_pairs`.
        axis: 0 vertical, 1 horizontal.
        patches: number of patches along this axis.
        pixels: pixels of the input map along a patch.

    Returns:
        (patches, patches) int64: number of pairs with the output pixel in patch i and the input pixel in patch j.
    """
    size = patches * pixels
    out = torch.arange(0, size, layer.stride)  # centre (odd kernel) or start (even kernel) of the window
    taps = torch.arange(layer.kernel_size[axis]) * layer.dilation - layer.padding[axis]
    read = out.view(-1, 1) + taps
    inside = (read >= 0) & (read < size)
    pair = out.view(-1, 1) // pixels * patches + read // pixels
    return pair[inside].bincount(minlength=patches**2).view(patches, patches)


def total(counts: Iterable[Count]) -> Macs:
    return sum((count.macs for count in counts), Macs())


def describe(name: str, network: SparK, decoder_width: int) -> dict[str, Any]:
    """A line with the network and its settings."""
    return {
        "model": name,
        "input_size": list(network.input_size),
        "patch": network.patch,
        "num_patches": network.num_patches[0] * network.num_patches[1],
        "visible_patches": network.keep,
        "mask_ratio": network.mask_ratio,
        "decoder_width": decoder_width,
    }


def title(setting: dict[str, Any]) -> str:
    return (
        f"{setting['model']}, {'x'.join(map(str, setting['input_size']))} pixels, {setting['visible_patches']} of "
        f"{setting['num_patches']} patches of {setting['patch']} pixels visible, decoder width {setting['decoder_width']}; "
        "forward, per image"
    )


def table(counts: list[Count]) -> str:
    """A tree of parts, stages and kinds of layer: MACs, FLOPs, ratios and shares."""
    whole = total(counts)
    three = ("dense", "sparse", "subm.")
    lines = [
        f"{'':22}{'GMAC':>24}{'GFLOP = 2 x MAC':>26}{'ratio to dense':>18}{'share of all':>26}",
        f"{'':22}{columns(three)}  {columns(three)}  {columns(three[1:])}  {columns(three)}",
    ]
    for depth, label, macs in tree(counts):
        gmac, gflop, ratio, share = (asdict(macs.over(unit)).values() for unit in (GMAC, GFLOP, every(macs.dense), whole))
        lines.append(
            f"{'  ' * depth + label:22}{columns(gmac, '.3f')}  {columns(gflop, '.2f')}  {columns([*ratio][1:], '.3f')}  "
            f"{columns(share, '.1%')}"
        )
    return "\n".join(lines)


def columns(values: Iterable[Any], form: str = "") -> str:
    return "".join(f"{value:>8{form}}" for value in values)


def tree(counts: list[Count]) -> list[tuple[int, str, Macs]]:
    """(depth, label, sum) of every part, its stages, their kinds of layer, the part's kinds of layer, and the total."""
    rows = []
    for part in PARTS:
        of_part = [count for count in counts if count.part == part]
        rows.append((0, part, total(of_part)))
        groups = {f"stride {s}": [c for c in of_part if c.stride == s] for s in unique(c.stride for c in of_part)}
        for label, group in [*groups.items(), ("all strides", of_part)]:
            kinds = by_kind(group)
            rows.append((1, label if len(kinds) > 1 else f"{label}: {next(iter(kinds))}", total(group)))
            rows += [(2, kind, macs) for kind, macs in kinds.items() if len(kinds) > 1]
    return [*rows, (0, "all", total(counts))]


def by_kind(counts: list[Count]) -> dict[str, Macs]:
    return {kind: total(c for c in counts if c.kind == kind) for kind in unique(c.kind for c in counts)}


def unique(values: Iterable[Any]) -> list[Any]:
    """Without repetition, in order of first occurrence."""
    return list(dict.fromkeys(values))


def summary(counts: list[Count]) -> dict[str, Any]:
    """The numbers for a JSON file: GFLOP, ratio to dense and share of all by part; MACs by part, stage and kind."""
    parts = {part: [count for count in counts if count.part == part] for part in PARTS}
    sums = {**{part: total(of_part) for part, of_part in parts.items()}, "all": total(counts)}
    macs: dict[str, Any] = {}
    for part, of_part in parts.items():
        macs[part] = {}
        for stride in unique(count.stride for count in of_part):
            kinds = by_kind([count for count in of_part if count.stride == stride])
            macs[part][f"stride {stride}"] = {kind: value.rounded() for kind, value in kinds.items()}
    return {
        "gflop": {name: value.over(GFLOP).rounded(4) for name, value in sums.items()},
        "ratio_to_dense": {name: value.over(every(value.dense)).rounded(4) for name, value in sums.items()},
        "share_of_all": {name: value.over(sums["all"]).rounded(4) for name, value in sums.items()},
        "macs": macs,
    }


def provenance() -> dict[str, Any]:
    """Date, commit and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "sparkme": sparkme.__version__,
            **{name: metadata.version(name) for name in ("torch", "torchvision", "MinkowskiEngine")},
        },
    }


def commit() -> str | None:
    """The commit of the sources, marked if Python files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/*.py")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
