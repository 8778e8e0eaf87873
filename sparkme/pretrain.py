"""Pretrains a convolutional network on images without labels, with SparK on sparse convolutions.

    python -m sparkme.pretrain                                             # on scikit-image's photographs, no data needed
    python -m sparkme.pretrain --data photos/ --model convnext_tiny        # one GPU, or the CPU
    torchrun --nproc-per-node 8 -m sparkme.pretrain --data imagenet/train  # eight GPUs

The same command again continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import UserError, run_command
from sparkme.networks.names import model_names
from sparkme.training.config import create_parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: run(args) if args.list_models is None else list_models(args.list_models))


def list_models(pattern: str) -> int:
    """Prints the names of networks that are known to work. Returns the exit code."""
    if not (names := model_names(pattern)):
        raise UserError(f"--list-models {pattern} matches none of the networks that were tried; any other may be tried, too")
    print("\n".join(names))
    return 0


def run(args: argparse.Namespace) -> int:
    from sparkme.training.pretraining import pretrain  # noqa: PLC0415  (torch, which --help does not need)

    return pretrain(args)


if __name__ == "__main__":
    sys.exit(main())
