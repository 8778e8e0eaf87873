"""Says what the frozen features of an encoder are worth: nearest neighbours and a linear classifier, on labelled images.

    python -m sparkme.probe runs/mine/checkpoints/last.pt --data labelled/ --compare random
    python -m sparkme.probe resnet50.safetensors --data labelled/ --compare random runs/*/checkpoints/last.pt

Nothing is trained but the linear classifier; seconds for thousands of small images.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, UserError, run_command
from sparkme.training.config import (
    add_device,
    add_engine,
    add_labelled_data,
    add_seed,
    add_weights,
    add_workers,
    check_seed,
    check_value_range,
    check_workers,
    path_argument,
)


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.probe",
        description="Measure frozen features of whole images: weighted kNN and a linear classifier on every map, averaged over "
        "its pixels.",
        epilog="kNN: 20 neighbours vote with weights exp(cosine / 0.07), as in DINO. Linear: logistic regression, its weight "
        "decay chosen on a fifth of the images to learn from. Both on features whose mean is taken away.",
    )
    parser.add_argument(
        "weights",
        type=path_argument,
        metavar="CHECKPOINT_OR_WEIGHTS",
        help="a checkpoint, exported weights, a hub folder, or weights of torchvision, timm and others",
    )
    add_labelled_data(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--model", help="the network, where the file does not say it (see sparkme.pretrain --model)")
    add_weights(group)
    group.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="more rows for the table: random, for random weights of the same network, or other checkpoints and weights",
    )
    group.add_argument(
        "--stage", nargs="+", default=["all"], metavar="STRIDE", help="strides of the maps: all, last, or numbers (%(default)s)"
    )
    group.add_argument("--linear", action=argparse.BooleanOptionalAction, default=True, help="fit the classifier (%(default)s)")
    group.add_argument("--shots", type=int, metavar="N", help="learn from N images of each class only (all of them)")
    group.add_argument("--draws", type=int, default=5, metavar="N", help="with --shots: so many times, averaged (%(default)s)")
    group.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of the images, or height and width, for all rows (the first file's, or 224)",
    )
    group = parser.add_argument_group("machine")
    add_device(group)
    add_engine(group)
    add_workers(group)
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    add_seed(group)
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=path_argument, metavar="FILE", help=".json for the numbers and the settings (none)")
    group.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: run(args), watch=True)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be meant, before anything is read."""
    check_seed(args.seed)
    check_workers(args.workers)
    check_value_range(args.value_range)
    for name in ("shots", "draws", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.input_size is not None and (len(args.input_size) > 2 or min(args.input_size) < 1):
        raise UserError("--input-size takes a side, or height and width, in pixels")
    for stage in args.stage:
        if stage not in ("all", "last") and not stage.isdecimal():
            raise UserError(f"--stage {stage} is neither all, nor last, nor the stride of a map in pixels, such as 32")
    if args.output is not None and args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: the suffix must be .json")
    if args.output is not None and args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; choose another --output, or pass --overwrite")


def run(args: argparse.Namespace) -> int:
    check(args)
    from sparkme.training.probing import probe  # noqa: PLC0415  (torch, which --help does not need)

    return probe(args)


if __name__ == "__main__":
    sys.exit(main())
