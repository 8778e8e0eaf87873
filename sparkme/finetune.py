"""Trains the ordinary dense network on labelled images, from pretrained weights or, to compare, from scratch.

    python -m sparkme.finetune runs/mine/checkpoints/last.pt --data labelled/
    python -m sparkme.finetune runs/mine/checkpoints/last.pt --data labelled/ --from-scratch
    torchrun --nproc-per-node 8 -m sparkme.finetune resnet50.safetensors --data imagenet/ --batch-size 2048

The same command again continues where it was interrupted. Augmentation, losses, LAMB and the running average are timm's and
torchvision's; nothing here is sparse.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.settings.declare import add_flags, from_flags
from sparkme.settings.finetune import GROUPS, FinetuneSettings


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
    return run_command(lambda: run(asked))


def run(asked: FinetuneSettings) -> int:
    from sparkme.training.finetuning import finetune  # noqa: PLC0415  (torch, which --help does not need)

    return finetune(asked)


if __name__ == "__main__":
    sys.exit(main())
