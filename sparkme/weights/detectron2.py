"""The names of detectron2's ResNets, as in its tools/convert-torchvision-to-d2.py.

detectron2 reads images as BGR by default; weights trained here on RGB need `INPUT.FORMAT: "RGB"`, `MODEL.PIXEL_MEAN: [123.675,
116.28, 103.53]`, `MODEL.PIXEL_STD: [58.395, 57.12, 57.375]`, and `MODEL.RESNETS.STRIDE_IN_1X1: False`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkme.data.statistics import statistics_of
from sparkme.settings.pretrain import PretrainSettings
from sparkme.weights.format import Format
from sparkme.weights.names import Table, resnet_rules

if TYPE_CHECKING:
    from torch import Tensor

RESNET = Table(
    resnet_rules(stem="stem.", stage="res{s+1}", norm="conv{n}.norm", shortcut="shortcut", shortcut_norm="shortcut.norm"),
    "facebookresearch/detectron2, tools/convert-torchvision-to-d2.py",
    dropped=("num_batches_tracked",),
    ignored=("stem.fc.", "fc."),
)


class Detectron2(Format):
    def content(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """The content for `MODEL.WEIGHTS`: arrays, whose names detectron2 matches by their endings."""
        return {"model": {n: v.numpy() for n, v in state.items()}, "__author__": "sparkme", "matching_heuristics": True}

    def notes(self, settings: PretrainSettings) -> dict[str, str]:
        mean, std = ([round(255 * v, 3) for v in values] for values in statistics_of(settings))
        images = "RGB: INPUT.FORMAT RGB" if settings.channels == 3 else f"images of {settings.channels} channels"
        text = f"trained on {images}, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, MODEL.RESNETS.STRIDE_IN_1X1 False; "
        return {"detectron2": f"{text}num_batches_tracked is left out"}

    def loading(self, path: Path, model: str, channels: int) -> str:
        return f'cfg.MODEL.WEIGHTS = "{path}"  # and the settings in {path.name}.json'


FORMAT = Detectron2("detectron2", {"resnet": RESNET}, suffixes=(".pkl",))
