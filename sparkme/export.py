"""Exports a checkpoint as weights of the ordinary dense network, and first compares them with the sparse encoder.

With --to onnx it exports a fine-tuned network with its head, and first compares what onnxruntime computes.

    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --output resnet50.safetensors
    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to detectron2 --output resnet50.pkl
    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to timm --hub-folder resnet50-hub
    python -m sparkme.export runs/finetune-resnet50-detection --to onnx --images photos/

A file of weights loads into the library's own model; only the classifier's weights are missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import sparkme
from sparkme.errors import Parser, UserError, call_command, run_command
from sparkme.settings.declare import add_flags, from_flags, from_keywords
from sparkme.weights.settings import ONNX, ExportSettings


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.export",
        description="Export the encoder of a checkpoint as verified weights of the ordinary dense network, or with --to onnx a "
        "fine-tuned network with its head.",
    )
    add_flags(parser, ExportSettings, groups=("what is written", "checks and batch norm"))
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(ExportSettings, create_parser().parse_args(argv))
    return run_command(lambda: int(run(asked) is None), watch=True)


def run(asked: ExportSettings) -> Path | None:
    made_by = f"sparkme {sparkme.__version__}"
    if asked.to == ONNX:
        from sparkme.weights.finetuned_onnx import export_finetuned  # noqa: PLC0415  (torch, which --help does not need)

        return export_finetuned(asked, made_by=made_by)
    from sparkme.training.build import network_of  # noqa: PLC0415
    from sparkme.weights import export as work  # noqa: PLC0415

    return work.export(asked, network_of=network_of, made_by=made_by)


def export(checkpoint: Path | str, **settings: Any) -> Path:
    """Runs the command with its flags as keywords. Returns the file or the hub folder.

    Raises:
        TypeError: an unknown setting, or a value of the wrong type.
        UserError: the settings do not work, or the weights did not pass the check.
    """
    asked = from_keywords(ExportSettings, {"checkpoint": checkpoint, **settings})
    if (written := call_command(lambda: run(asked))) is None:
        raise UserError("the dense model and the sparse encoder give different outputs; nothing was written")
    return written


if __name__ == "__main__":
    sys.exit(main())
