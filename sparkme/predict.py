"""Predicts classes, objects or the class of each pixel, with a network that sparkme.finetune trained.

    python -m sparkme.predict runs/finetune-resnet50 photos/ --output predictions
    python -m sparkme.predict runs/finetune-resnet50-detection val2017/ --annotations annotations/instances_val2017.json
    python -m sparkme.predict runs/finetune-resnet50-segmentation a.jpg b.jpg 'shards/{000..146}.tar'

The folder gets predictions.csv for classification, predictions.json in COCO's format for detection, and masks/NAME.png for
segmentation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparkme.errors import Parser, call_command, run_command
from sparkme.results import Predictions
from sparkme.settings.commands import PREDICT_GROUPS, PredictSettings
from sparkme.settings.declare import add_flags, from_flags, from_keywords


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.predict",
        description="Predict with the best weights of a run of sparkme.finetune: classes as predictions.csv, objects as "
        "predictions.json in COCO's format, or classes of pixels as masks/NAME.png. The first images are drawn, too.",
        epilog="Unreadable images are named and left out. After Ctrl-C the files have the images predicted so far.",
    )
    add_flags(parser, PredictSettings, groups=PREDICT_GROUPS)
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(PredictSettings, create_parser().parse_args(argv))
    return run_command(lambda: run(asked)[1], watch=True)


def run(asked: PredictSettings) -> tuple[Path, int]:
    """The folder, and the exit code."""
    asked.check()
    from sparkme.training import predicting  # noqa: PLC0415  (torch, which --help does not need)

    return predicting.predict(asked)


def predict(run: Path | str, images: Path | str | Sequence[Path | str], **settings: Any) -> Predictions:
    """Runs the command with its flags as keywords.

    Args:
        run: folder of a run of `sparkme.finetune`, or its best.safetensors.
        images: one or several files, folders, lists, shards or other sources.
        settings: the flags.

    Raises:
        TypeError: an unknown setting, or a value of the wrong type.
        UserError: the settings, the weights or the images do not work; says what to change.
    """
    several = [images] if isinstance(images, Path | str) else images
    asked = from_keywords(PredictSettings, {"run": run, "images": [str(each) for each in several], **settings})
    return Predictions(*call_command(lambda: _finished(asked)))


def _finished(asked: PredictSettings) -> tuple[Path, bool]:
    folder, code = run(asked)
    return folder, code == 0


if __name__ == "__main__":
    sys.exit(main())
