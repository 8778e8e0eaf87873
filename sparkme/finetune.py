"""Trains the ordinary dense network on labelled images, from pretrained weights or, for comparison, from scratch.

    python -m sparkme.finetune runs/mine/checkpoints/last.pt --data labelled/
    python -m sparkme.finetune runs/mine/checkpoints/last.pt --task detection --data coco/
    python -m sparkme.finetune runs/mine/checkpoints/last.pt --task segmentation --data images-and-masks/
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
from sparkme.settings.tasks import settings_of_task, task_of

if TYPE_CHECKING:
    from sparkme.training.loop import Outcome


def create_parser(task: str | None = None) -> argparse.ArgumentParser:
    cls = settings_of_task(task)
    parser = Parser(
        prog="python -m sparkme.finetune",
        description="Train the ordinary dense network on labelled images, from pretrained weights or from scratch. These are "
        f"the settings of --task {cls().task}.",
        epilog="The same command again resumes an interrupted run.",
    )
    add_flags(parser, cls, groups=GROUPS)
    return parser


def main(argv: list[str] | None = None) -> int:
    task = task_of(sys.argv[1:] if argv is None else argv)
    asked = from_flags(settings_of_task(task), create_parser(task).parse_args(argv))
    return run_command(lambda: run(asked).code)


def run(asked: FinetuneSettings) -> Outcome:
    from sparkme.training import tasks  # noqa: PLC0415  (torch, which --help does not need)

    return tasks.finetune(asked)


def finetune(weights: Path | str | None = None, **settings: Any) -> FinetunedRun:
    """Runs the command with its flags as keywords. The same call again resumes an interrupted run.

    Raises:
        TypeError: an unknown or missing setting, or a value of the wrong type.
        UserError: the settings or the data do not work; says what to change.
    """
    asked = from_keywords(settings_of_task(settings.get("task")), {"weights": weights, **settings})
    outcome = call_command(lambda: run(asked))
    return FinetunedRun(outcome.folder, finished=outcome.code == 0)


if __name__ == "__main__":
    sys.exit(main())
