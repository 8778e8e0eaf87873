"""Draws a pretrained network's reconstructions of hidden patches, and shows why its convolutions are sparse.

python -m sparkme.visualize runs/mine/checkpoints/last.pt                               # scikit-image's photographs
python -m sparkme.visualize runs/mine/checkpoints/last.pt photos/ cat.jpg --output page.html
python -m sparkme.visualize runs/mine/checkpoints/last.pt --mask-ratio 0.4 0.6 0.8 --statistics predicted
python -m sparkme.visualize --mask-pattern --output mask_pattern.png
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.settings.commands import VISUALIZE_GROUPS, VisualizeSettings
from sparkme.settings.declare import add_flags, from_flags


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.visualize",
        description="Draw images, their visible patches, a network's reconstruction of the hidden ones, and its error.",
        epilog="Give images before flags that take several values, such as --mask-ratio.",
    )
    add_flags(parser, VisualizeSettings, groups=VISUALIZE_GROUPS)
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(VisualizeSettings, create_parser().parse_intermixed_args(argv))
    return run_command(lambda: run(asked), watch=True)


def run(asked: VisualizeSettings) -> int:
    if asked.mask_pattern:
        from sparkme.reporting.mask_pattern import draw_pattern  # noqa: PLC0415  (torch, which --help does not need)

        return draw_pattern(asked)
    from sparkme.reporting.visualize import visualize  # noqa: PLC0415

    return visualize(asked)


if __name__ == "__main__":
    sys.exit(main())
