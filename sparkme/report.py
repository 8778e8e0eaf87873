"""One page about training runs: how far they are, what they were told, their curves, and what they paint.

    python -m sparkme.report runs/mine                      # runs/mine/report.html
    python -m sparkme.report runs/a runs/b --output a_b.html
    python -m sparkme.report runs/                          # all runs in a folder, side by side
    python -m sparkme.report runs/mine --watch 30           # keeps the page up to date while the run goes on

A run's files are read and never written; what cannot be read of them is said on the page.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.training.config import path_argument


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.report",
        description="Write one HTML page, which needs no other file, about one or several runs of sparkme.pretrain or "
        "sparkme.finetune.",
    )
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="a run's folder, or a folder of runs, which stands for all"
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE",
        help=".html; a report that is there is replaced (report.html in the run's folder, of several in the one they share)",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="of the page (the runs' names)")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS",
        help="write the page anew every so often, until Ctrl-C; an open page shows it by itself",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: run(args), watch=True)


def run(args: argparse.Namespace) -> int:
    from sparkme.reporting.report import report  # noqa: PLC0415  (Pillow, which --help does not need)

    return report(args)


if __name__ == "__main__":
    sys.exit(main())
