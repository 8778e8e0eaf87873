"""The names of OpenMMLab's mmpretrain, whose classifiers keep their encoder under `backbone.`.

Read in open-mmlab/mmpretrain, mmpretrain/models/backbones/resnet.py and convnext.py. mmdetection and mmsegmentation take the
same names with `init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')`.
"""

from __future__ import annotations

from pathlib import Path

from sparkme.weights.format import Format
from sparkme.weights.names import Rule, Table, resnet_rules, vector

_IGNORED = ("head.", "backbone.norm")  # norm0 to norm3 stand behind the stages and belong to the heads

RESNET = Table(
    resnet_rules(stem="backbone.", stage="backbone.layer{s}"),
    "mmpretrain/models/backbones/resnet.py",
    ignored=_IGNORED,
)

CONVNEXT = Table(
    (
        Rule("downsample_layers.{i}.{n}.{p}", "backbone.downsample_layers.{i}.{n}.{p}"),
        Rule("stages.{i}.{b}.dwconv.{p}", "backbone.stages.{i}.{b}.depthwise_conv.{p}"),
        Rule("stages.{i}.{b}.norm.{p}", "backbone.stages.{i}.{b}.norm.{p}"),
        Rule("stages.{i}.{b}.pwconv1.{p}", "backbone.stages.{i}.{b}.pointwise_conv1.{p}"),
        Rule("stages.{i}.{b}.pwconv2.{p}", "backbone.stages.{i}.{b}.pointwise_conv2.{p}"),
        Rule("stages.{i}.{b}.gamma", "backbone.stages.{i}.{b}.gamma"),
        Rule("stages.{i}.{b}.grn.gamma", "backbone.stages.{i}.{b}.grn.gamma", vector, lambda v: v.view(1, 1, 1, -1)),
        Rule("stages.{i}.{b}.grn.beta", "backbone.stages.{i}.{b}.grn.beta", vector, lambda v: v.view(1, 1, 1, -1)),
    ),
    "mmpretrain/models/backbones/convnext.py",
    ignored=_IGNORED,
)


class MMPretrain(Format):
    def loading(self, path: Path, model: str, channels: int) -> str:
        return f"init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}, prefix='backbone.')"


FORMAT = MMPretrain("mmpretrain", {"resnet": RESNET, "convnext": CONVNEXT})
