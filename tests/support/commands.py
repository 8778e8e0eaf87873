"""Commands that tests run, and what they leave behind."""

import json
from pathlib import Path

import pytest
import torch

from sparkme import finetune
from sparkme.pretrain import create_parser, main
from sparkme.settings.declare import from_flags
from sparkme.settings.finetune import FinetuneSettings
from sparkme.settings.pretrain import PretrainSettings
from sparkme.settings.tasks import settings_of_task, task_of

# As small as a run can be: 2 x 2 patches, 8 images, two steps an epoch.
_RUN = [
    "--input-size",
    "64",
    "--decoder-width",
    "32",
    "--batch-size",
    "4",
    "--samples-per-epoch",
    "8",
    "--epochs",
    "3",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--log-steps",
    "1",
    "--base-lr",
    "0.01",
    "--drop-path",
    "0.2",
]
SMALL = ["--model", "resnet18", *_RUN]  # whose weights have names in every library
QUICKEST = ["--model", "small_resnet:resnet", *_RUN]  # a tenth of the time
# The same of fine-tuning.
QUICK = [
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--input-size",
    "64",
    "--log-steps",
    "1",
    "--eval-epochs",
    "1",
    "--epochs",
    "2",
]


def asked(*words: object) -> PretrainSettings:
    """What a command line of sparkme.pretrain asks for."""
    return from_flags(PretrainSettings, create_parser().parse_args([*map(str, words)]))


def asked_to_finetune(*words: object) -> FinetuneSettings:
    given = [*map(str, words)]
    task = task_of(given)
    return from_flags(settings_of_task(task), finetune.create_parser(task).parse_args(given))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must end with exit code 2 and one line; returns that line."""
    assert main([*map(str, arguments)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)["model"]


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if "loss" in record]


def value_of(command: list[str], flag: str) -> str:
    """What a flag of a command line is given."""
    return command[command.index(flag) + 1]
