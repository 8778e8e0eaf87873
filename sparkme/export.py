"""Turns a checkpoint into weights for the ordinary dense network, after checking them against the sparse encoder.

    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --output resnet50.safetensors
    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to detectron2 --output resnet50.pkl
    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to timm --hub-folder resnet50-hub

What comes out loads into the library's own model; only the classifier's weights are missing.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.settings.commands import ExportSettings
from sparkme.settings.declare import add_flags, from_flags


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.export",
        description="Export the encoder of a checkpoint as weights of the ordinary dense network, verified.",
    )
    add_flags(parser, ExportSettings, groups=("what is written", "checks and batch norm"))
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(ExportSettings, create_parser().parse_args(argv))
    return run_command(lambda: run(asked), watch=True)


def run(asked: ExportSettings) -> int:
    from sparkme.weights.export import export  # noqa: PLC0415  (torch, which --help does not need)

    return export(asked)


if __name__ == "__main__":
    sys.exit(main())
