"""Measures the frozen features of an encoder with nearest neighbours and a linear classifier, on labelled images.

    python -m sparkme.probe runs/mine/checkpoints/last.pt --data labelled/ --compare random
    python -m sparkme.probe resnet50.safetensors --data labelled/ --compare random runs/*/checkpoints/last.pt

Only the linear classifier is trained, which takes seconds for thousands of small images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparkme.errors import Parser, call_command, run_command
from sparkme.settings.commands import PROBE_GROUPS, ProbeSettings
from sparkme.settings.declare import add_flags, from_flags, from_keywords


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.probe",
        description="Measure frozen features of whole images: weighted kNN and a linear classifier on the spatial mean of "
        "every map.",
        epilog="kNN: 20 neighbours vote with weights exp(cosine / 0.07), as in DINO. Linear: logistic regression, whose weight "
        "decay is chosen on a fifth of the training images. Both use features with their mean subtracted.",
    )
    add_flags(parser, ProbeSettings, groups=PROBE_GROUPS)
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(ProbeSettings, create_parser().parse_args(argv))
    return run_command(lambda: int(run(asked) is None), watch=True)


def run(asked: ProbeSettings) -> list[dict[str, Any]]:
    asked.check()
    from sparkme.training import probing  # noqa: PLC0415  (torch, which --help does not need)

    return probing.probe(asked)


def probe(weights: Path | str, **settings: Any) -> list[dict[str, Any]]:
    """Runs the command with its flags as keywords.

    Returns:
        The rows of the table: `weights`, `model`, `stride`, `channels`, `knn` and `linear` from 0 to 1, with `knn_error` and
        `linear_error`.

    Raises:
        TypeError: an unknown or missing setting, or a value of the wrong type.
        UserError: the settings or the data do not work; says what to change.
    """
    asked = from_keywords(ProbeSettings, {"weights": weights, **settings})
    return call_command(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
