"""Detectors of ultralytics, as files that `YOLO(FILE)` loads.

Such a file holds a pickled network. Weights alone would get lost: for training, ultralytics builds a new network for the
classes of the data, and takes over only what it has loaded from such a file. So this format builds the detector around the
pretrained backbone, which needs the package; it is no dependency. The backbone that is compared with the sparse encoder is
the one that `YOLO` has loaded.

A backbone is a sequence of the detector's first layers, with the detector's description as its `yaml`; see docs/weights.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkme.data.statistics import statistics_of
from sparkme.errors import UserError, first_line
from sparkme.networks.names import library_of
from sparkme.settings.pretrain import PretrainSettings
from sparkme.weights.format import Format, Whole

if TYPE_CHECKING:
    from torch import nn

# ultralytics' classes of networks by its names of tasks.
CLASSES = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "classify": "ClassificationModel",
}


class Ultralytics(Format):
    def whole(self, dense: nn.Module, settings: PretrainSettings) -> Whole | None:
        description = getattr(dense, "yaml", None)
        if not isinstance(description, dict):
            if library_of(settings.model) != "own":
                return None
            raise UserError(
                f"--to ultralytics: the network of {settings.model} does not say which detector it belongs to; give it the "
                "detector's description: backbone.yaml = detector.yaml"
            )
        detector, num_layers = _detector_around(dense, description, settings.channels)
        content = {"model": detector, "train_args": {}}
        with tempfile.TemporaryDirectory() as folder:
            loaded = _saved_and_loaded(content, Path(folder) / "detector.pt")
        notes = [f"the other layers of the detector, from {num_layers} on, are random"]
        statistics = statistics_of(settings)
        if any(statistics.mean) or {*statistics.std} != {1.0}:
            notes.append(
                f"ultralytics does not normalise images, but this run did; pretrain with --mean{' 0' * settings.channels} "
                f"--std{' 1' * settings.channels}"
            )
        return Whole(content, loaded.model[:num_layers], notes)

    def loading(self, path: Path, model: str, channels: int) -> str:
        return f"from ultralytics import YOLO\nmodel = YOLO({str(path)!r})  # then model.train(data=...)"


def _detector_around(backbone: nn.Module, description: dict[str, Any], channels: int) -> tuple[Any, int]:
    """The detector with a copy of the backbone's weights, and how many of its layers they are. Raises UserError."""
    import torch  # noqa: PLC0415  (which --help does not need)

    try:
        from ultralytics.nn import tasks  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise UserError(f"--to ultralytics needs the package ultralytics: pip install ultralytics ({error})") from error
    task, num_layers = tasks.guess_model_task(description), len([*backbone.children()])
    if task not in CLASSES:
        raise UserError(f"--to ultralytics: {task} is not among the tasks that can be exported: {', '.join(CLASSES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = getattr(tasks, CLASSES[task])(description, ch=channels, verbose=False)
    try:
        detector.model[:num_layers].load_state_dict(backbone.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"--to ultralytics: the network is not the first {num_layers} layers of the detector: {first_line(error)}"
        ) from error
    return detector.eval(), num_layers


def _saved_and_loaded(content: dict[str, Any], path: Path) -> Any:
    """The network that ultralytics loads from a file with this content. Raises UserError if it cannot."""
    import torch  # noqa: PLC0415
    from ultralytics import YOLO  # noqa: PLC0415

    torch.save(content, path)
    try:
        return YOLO(str(path)).model
    except Exception as error:  # another version of the package may expect another content
        raise UserError(f"--to ultralytics: YOLO cannot load the file: {first_line(error)}") from error


FORMAT = Ultralytics("ultralytics'", suffixes=(".pt",))
