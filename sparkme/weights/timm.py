"""timm's names. Those of its plain ResNets are torchvision's; its ConvNeXts hold V1 and V2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkme.weights.format import Format
from sparkme.weights.names import Rule, Table, resnet_rules, vector

if TYPE_CHECKING:
    from torch import Tensor


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


RESNET = Table(resnet_rules(), "timm.models.resnet")

CONVNEXT = Table(
    (
        Rule("downsample_layers.0.{n}.{p}", "stem.{n}.{p}"),
        *(Rule(f"downsample_layers.{i}.{{n}}.{{p}}", f"stages.{i}.downsample.{{n}}.{{p}}") for i in range(1, 4)),
        Rule("stages.{i}.{b}.dwconv.{p}", "stages.{i}.blocks.{b}.conv_dw.{p}"),
        Rule("stages.{i}.{b}.norm.{p}", "stages.{i}.blocks.{b}.norm.{p}"),
        *(
            rule
            for n in (1, 2)  # the smallest networks have 1x1 convolutions in the place of linear layers
            for rule in (
                Rule(f"stages.{{i}}.{{b}}.pwconv{n}.weight", f"stages.{{i}}.blocks.{{b}}.mlp.fc{n}.weight", None, _matrix),
                Rule(f"stages.{{i}}.{{b}}.pwconv{n}.bias", f"stages.{{i}}.blocks.{{b}}.mlp.fc{n}.bias"),
            )
        ),
        Rule("stages.{i}.{b}.gamma", "stages.{i}.blocks.{b}.gamma"),
        Rule("stages.{i}.{b}.grn.gamma", "stages.{i}.blocks.{b}.mlp.grn.weight", vector, lambda v: v.view(1, 1, 1, -1)),
        Rule("stages.{i}.{b}.grn.beta", "stages.{i}.blocks.{b}.mlp.grn.bias", vector, lambda v: v.view(1, 1, 1, -1)),
    ),
    "timm.models.convnext",
)


class Timm(Format):
    def counterpart(self, model: str) -> str:
        return f"timm:{model.removeprefix('timm:')}"

    def making(self, model: str, channels: int) -> tuple[str, str]:
        options = f", in_chans={channels}" if channels != 3 else ""
        return "timm", f"timm.create_model({model.removeprefix('timm:')!r}{options})"


FORMAT = Timm("timm", {"resnet": RESNET, "convnext": CONVNEXT})
