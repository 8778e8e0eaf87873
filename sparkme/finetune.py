"""Trains the ordinary dense network on labelled images, from pretrained weights or, for comparison, from scratch.

    python -m sparkme.finetune runs/mine/checkpoints/last.pt --data labelled/
    python -m sparkme.finetune runs/mine/checkpoints/last.pt --data labelled/ --from-scratch
    torchrun --nproc-per-node 8 -m sparkme.finetune resnet50.safetensors --data imagenet/ --batch-size 2048

The same command again resumes an interrupted run. Augmentation, losses, LAMB and the running average come from timm and
torchvision; nothing here is sparse.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkme.errors import Parser, call_command, run_command
from sparkme.results import FinetunedRun
from sparkme.settings.declare import add_flags, from_flags, from_keywords
from sparkme.settings.finetune import GROUPS, FinetuneSettings

if TYPE_CHECKING:
    from sparkme.training.loop import Outcome


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.finetune",
        description="Train the ordinary dense network on labelled images, from pretrained weights or from scratch.",
        epilog="The same command again resumes an interrupted run.",
    )
    add_flags(parser, FinetuneSettings, groups=GROUPS)
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(FinetuneSettings, create_parser().parse_args(argv))
    return run_command(lambda: run(asked).code)


def run(asked: FinetuneSettings) -> Outcome:
    from sparkme.training import finetuning  # noqa: PLC0415  (torch, which --help does not need)

    return finetuning.finetune(asked)


def finetune(weights: Path | str | None = None, **settings: Any) -> FinetunedRun:
    """Runs the command with its flags as keywords. The same call again resumes an interrupted run.

    Raises:
        TypeError: an unknown or missing setting, or a value of the wrong type.
        UserError: the settings or the data do not work; says what to change.
    """
    asked = from_keywords(FinetuneSettings, {"weights": weights, **settings})
    outcome = call_command(lambda: run(asked))
    return FinetunedRun(outcome.folder, finished=outcome.code == 0)


if __name__ == "__main__":
    sys.exit(main())
