"""Writes one page about training runs: progress, settings, curves and reconstructions.

    python -m sparkme.report runs/mine                      # runs/mine/report.html
    python -m sparkme.report runs/a runs/b --output a_b.html
    python -m sparkme.report runs/                          # all runs in a folder, side by side
    python -m sparkme.report runs/mine --watch 30           # keeps the page up to date while the run goes on

It only reads a run's files, and names those on the page that it cannot read.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.settings.commands import ReportSettings
from sparkme.settings.declare import add_flags, from_flags


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.report",
        description="Write a self-contained HTML page about one or several runs of sparkme.pretrain or sparkme.finetune.",
    )
    add_flags(parser, ReportSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    asked = from_flags(ReportSettings, create_parser().parse_args(argv))
    return run_command(lambda: run(asked), watch=True)


def run(asked: ReportSettings) -> int:
    from sparkme.reporting.report import report  # noqa: PLC0415  (Pillow, which --help does not need)

    return report(asked)


if __name__ == "__main__":
    sys.exit(main())
