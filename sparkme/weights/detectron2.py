"""The names of detectron2's ResNets, as its tools/convert-torchvision-to-d2.py makes them of torchvision's.

detectron2 reads images as BGR by default; weights trained here on RGB need `INPUT.FORMAT: "RGB"`, `MODEL.PIXEL_MEAN: [123.675,
116.28, 103.53]`, `MODEL.PIXEL_STD: [58.395, 57.12, 57.375]`, and `MODEL.RESNETS.STRIDE_IN_1X1: False`.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from torch import Tensor

from sparkme.files import replaced_when_whole
from sparkme.weights.names import Table, resnet_rules

RESNET = Table(
    resnet_rules(stem="stem.", stage="res{s+1}", norm="conv{n}.norm", shortcut="shortcut", shortcut_norm="shortcut.norm"),
    "facebookresearch/detectron2, tools/convert-torchvision-to-d2.py",
    dropped=("num_batches_tracked",),
    ignored=("stem.fc.", "fc."),
)


def write(path: Path, state: dict[str, Tensor]) -> None:
    """The file that `MODEL.WEIGHTS` takes: a pickle of arrays, whose names detectron2 matches by their endings."""
    arrays = {name: value.numpy() for name, value in state.items()}
    with replaced_when_whole(path) as temporary, temporary.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "sparkme", "matching_heuristics": True}, file)
