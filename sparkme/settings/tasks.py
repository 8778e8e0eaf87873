"""The settings of each task of `sparkme.finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sparkme.settings.classification import ClassificationSettings
from sparkme.settings.detection import DetectionSettings
from sparkme.settings.finetune import FinetuneSettings
from sparkme.settings.segmentation import SegmentationSettings

SETTINGS: dict[str, type[FinetuneSettings]] = {
    "classification": ClassificationSettings,
    "detection": DetectionSettings,
    "segmentation": SegmentationSettings,
}


def settings_of_task(task: Any) -> type[FinetuneSettings]:
    """The class for a task's name; classification for None, which older runs have, and for unknown names."""
    return SETTINGS.get(str(task), ClassificationSettings)


def task_of(words: Sequence[str]) -> str | None:
    """The value of `--task` on a command line, whatever else is on it; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False)  # which reads abbreviated and repeated flags as the command's own does
    parser.add_argument("--task", nargs="?")
    task: str | None = parser.parse_known_args([*words])[0].task
    return task
