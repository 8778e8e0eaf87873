"""Turns a checkpoint into weights for the ordinary dense network, after checking them against the sparse encoder.

    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --output resnet50.safetensors
    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to detectron2 --output resnet50.pkl
    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to timm --hub-folder resnet50-hub

What comes out loads into the library's own model; only the classifier's weights are missing.
"""

from __future__ import annotations

import argparse
import sys

import sparkme
from sparkme.errors import Parser, run_command
from sparkme.training.config import RECIPES, path_argument
from sparkme.weights.format import STATE_DICTS
from sparkme.weights.formats import FORMATS


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.export",
        description="Export the encoder of a checkpoint as weights of the ordinary dense network, verified.",
    )
    parser.add_argument(
        "checkpoint", type=path_argument, help="a checkpoint of sparkme.pretrain, such as runs/x/checkpoints/last.pt"
    )
    group = parser.add_argument_group("what is written")
    special = {name: form.suffixes[0] for name, form in FORMATS.items() if not {*STATE_DICTS}.intersection(form.suffixes)}
    others = ", ".join(f"for {name} {suffix}" for name, suffix in special.items())
    group.add_argument(
        "--to",
        choices=tuple(FORMATS),
        help=f"whose names and layouts the weights get: {', '.join(form.whose for form in FORMATS.values())} (those of the "
        "library that the network came from)",
    )
    group.add_argument(
        "--output",
        type=path_argument,
        metavar="FILE",
        help=f".safetensors or .pth, {others} (MODEL.safetensors in the run folder)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing file")
    group.add_argument(
        "--hub-folder",
        type=path_argument,
        metavar="DIR",
        help="with --to timm: a folder with config, weights and model card, for timm.create_model('local-dir:DIR')",
    )
    group.add_argument("--push-to-hub", metavar="NAME/REPO", help="send the hub folder to the Hugging Face hub")
    group = parser.add_argument_group("checks and batch norm")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every stage of the dense model with the sparse encoder before writing (%(default)s)",
    )
    group.add_argument(
        "--recalibrate-bn",
        type=path_argument,
        metavar="DATA",
        help="estimate batch norm's running statistics anew, on whole images of this folder",
    )
    group.add_argument("--recalibrate-images", type=int, default=1024, metavar="N", help="on at most so many (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: run(args), watch=True)


def run(args: argparse.Namespace) -> int:
    from sparkme.training.build import network_of  # noqa: PLC0415
    from sparkme.weights.export import export  # noqa: PLC0415  (torch, which --help does not need)

    references = {name: recipe.reference for name, recipe in RECIPES.items()}
    return export(args, network_of=network_of, references=references, made_by=f"sparkme {sparkme.__version__}")


if __name__ == "__main__":
    sys.exit(main())
