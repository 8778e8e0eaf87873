"""The tasks of `sparkme.finetune`."""

from __future__ import annotations

from sparkme.settings.finetune import FinetuneSettings
from sparkme.training.classification import Classification
from sparkme.training.detection import Detection
from sparkme.training.distributed import start_process
from sparkme.training.finetuning import Finetuning
from sparkme.training.loop import Outcome, run_training
from sparkme.training.segmentation import Segmentation

TASKS: dict[str, type[Finetuning]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}


def finetune(asked: FinetuneSettings) -> Outcome:
    """Starts or continues a run."""
    process = start_process(asked.device)
    return run_training(lambda: TASKS[asked.task](asked, process), asked.hang_seconds)
