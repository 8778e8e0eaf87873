"""Says what the frozen features of an encoder are worth: nearest neighbours and a linear classifier, on labelled images.

    python -m sparkme.probe runs/mine/checkpoints/last.pt --data labelled/ --compare random
    python -m sparkme.probe resnet50.safetensors --data labelled/ --compare random runs/*/checkpoints/last.pt

Nothing is trained but the linear classifier; seconds for thousands of small images.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.settings.commands import PROBE_GROUPS, ProbeSettings
from sparkme.settings.declare import add_flags, from_flags


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.probe",
        description="Measure frozen features of whole images: weighted kNN and a linear classifier on every map, averaged over "
        "its pixels.",
        epilog="kNN: 20 neighbours vote with weights exp(cosine / 0.07), as in DINO. Linear: logistic regression, its weight "
        "decay chosen on a fifth of the images to learn from. Both on features whose mean is taken away.",
    )
    add_flags(parser, ProbeSettings, groups=PROBE_GROUPS)
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(ProbeSettings, create_parser().parse_args(argv))
    return run_command(lambda: run(asked), watch=True)


def run(asked: ProbeSettings) -> int:
    asked.check()
    from sparkme.training.probing import probe  # noqa: PLC0415  (torch, which --help does not need)

    return probe(asked)


if __name__ == "__main__":
    sys.exit(main())
