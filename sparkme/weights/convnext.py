"""The names of the ConvNeXt authors (facebookresearch/ConvNeXt and ConvNeXt-V2, models/convnext.py, models/convnextv2.py).

They are the hub naming. The official SparK code uses them, too.
"""

from __future__ import annotations

from sparkme.weights.format import Format
from sparkme.weights.names import Rule, Table

_NAMES = (
    "downsample_layers.{i}.{n}.{p}",
    "stages.{i}.{b}.dwconv.{p}",
    "stages.{i}.{b}.norm.{p}",
    "stages.{i}.{b}.pwconv1.{p}",
    "stages.{i}.{b}.pwconv2.{p}",
    "stages.{i}.{b}.gamma",
    "stages.{i}.{b}.grn.gamma",
    "stages.{i}.{b}.grn.beta",
)

CONVNEXT = Table(tuple(Rule(name, name) for name in _NAMES), "facebookresearch/ConvNeXt, models/convnext.py")

FORMAT = Format("the ConvNeXt authors'", {"convnext": CONVNEXT})
