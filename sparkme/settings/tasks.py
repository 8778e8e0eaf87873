"""The settings of each task of `sparkme.finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparkme.errors import Parser
from sparkme.settings.classification import ClassificationSettings
from sparkme.settings.detection import DetectionSettings
from sparkme.settings.finetune import TASKS, FinetuneSettings
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
    """The value of `--task` on a command line, whatever else is on it; None if it is not given. Exits for an unknown task."""
    parser = Parser(add_help=False)  # which reads abbreviated and repeated flags as the command's own does
    parser.add_argument("--task", choices=TASKS)
    task: str | None = parser.parse_known_args([*words])[0].task
    return task
