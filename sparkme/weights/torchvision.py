"""torchvision's names. Those of its ResNets are the hub's."""

from __future__ import annotations

from sparkme.weights.format import Format
from sparkme.weights.names import Rule, Table, resnet_rules, vector

RESNET = Table(resnet_rules(), "torchvision.models.resnet")

# Stage i of the authors' ConvNeXt is torchvision's features[2 i + 1], the stem is features[0], and the downsampling layer
# before stage i > 0 is features[2 i].
CONVNEXT = Table(
    tuple(
        rule
        for i in range(4)
        for rule in (
            Rule(f"downsample_layers.{i}.{{n}}.{{p}}", f"features.{2 * i}.{{n}}.{{p}}"),
            Rule(f"stages.{i}.{{b}}.dwconv.{{p}}", f"features.{2 * i + 1}.{{b}}.block.0.{{p}}"),
            Rule(f"stages.{i}.{{b}}.norm.{{p}}", f"features.{2 * i + 1}.{{b}}.block.2.{{p}}"),
            Rule(f"stages.{i}.{{b}}.pwconv1.{{p}}", f"features.{2 * i + 1}.{{b}}.block.3.{{p}}"),
            Rule(f"stages.{i}.{{b}}.pwconv2.{{p}}", f"features.{2 * i + 1}.{{b}}.block.5.{{p}}"),
            Rule(f"stages.{i}.{{b}}.gamma", f"features.{2 * i + 1}.{{b}}.layer_scale", lambda v: v.view(-1, 1, 1), vector),
        )
    ),
    "torchvision.models.convnext",
)


class Torchvision(Format):
    def counterpart(self, model: str) -> str:
        return model.removeprefix("timm:")

    def making(self, model: str, channels: int) -> tuple[str, str]:
        make = f"torchvision.models.{self.counterpart(model)}()"
        if channels == 3:
            return "torchvision", make
        return "torchvision, sparkme.networks.create", f"sparkme.networks.create.with_in_channels({make}, {channels})"


FORMAT = Torchvision("torchvision", {"resnet": RESNET, "convnext": CONVNEXT})
