"""Pretrains a convolutional network on images without labels, with SparK on sparse convolutions.

    python -m sparkme.pretrain                                             # on scikit-image's photographs, no data needed
    python -m sparkme.pretrain --data photos/ --model convnext_tiny        # one GPU, or the CPU
    torchrun --nproc-per-node 8 -m sparkme.pretrain --data imagenet/train  # eight GPUs

The same command again continues where it was interrupted. In a notebook: `pretrain(data="photos", epochs=20)`.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from sparkme.errors import Parser, UserError, call_command, run_command
from sparkme.networks.names import model_names
from sparkme.results import TrainingRun
from sparkme.settings.declare import add_flags, from_flags, from_keywords
from sparkme.settings.pretrain import GROUPS, IN_HELP, OF_RECIPES, PretrainSettings

if TYPE_CHECKING:
    from sparkme.training.loop import Outcome


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.pretrain",
        description="Pretrain a convolutional network on images without labels (SparK, ICLR 2023, or FCMAE, CVPR 2023).",
        epilog=f"Defaults with slashes are those of the recipes {', '.join(IN_HELP)}, in this order. The same command again "
        "resumes an interrupted run.",
    )
    parser.add_argument(
        "--list-models",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="print the networks that are known to work, or those that match PATTERN, such as 'timm:*next*', and exit",
    )
    add_flags(parser, PretrainSettings, groups=GROUPS, otherwise=OF_RECIPES)
    return parser


def main(argv: list[str] | None = None) -> int:
    given = create_parser().parse_args(argv)
    asked = from_flags(PretrainSettings, given)
    return run_command(lambda: run(asked).code if given.list_models is None else list_models(given.list_models))


def list_models(pattern: str) -> int:
    """Prints the names of networks that are known to work. Returns the exit code."""
    if not (names := model_names(pattern)):
        raise UserError(f"--list-models {pattern} matches no network that was tested; others may work, too")
    print("\n".join(names))
    return 0


def run(asked: PretrainSettings) -> Outcome:
    from sparkme.training import pretraining  # noqa: PLC0415  (torch, which --help does not need)

    return pretraining.pretrain(asked)


def pretrain(**settings: Any) -> TrainingRun:
    """Runs the command with its flags as keywords. The same call again resumes an interrupted run.

    Raises:
        TypeError: an unknown setting, or a value of the wrong type.
        UserError: the settings or the data do not work; says what to change.
    """
    asked = from_keywords(PretrainSettings, settings)
    outcome = call_command(lambda: run(asked))
    return TrainingRun(outcome.folder, finished=outcome.code == 0)


if __name__ == "__main__":
    sys.exit(main())
