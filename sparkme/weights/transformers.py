"""Names of weights in Hugging Face's transformers: `ResNetModel`, `ConvNextModel` and `ConvNextV2Model`.

Source: transformers 5.24, models/resnet/modeling_resnet.py, models/convnext and models/convnextv2. Classes for a task contain
the network as `.resnet`, `.convnext` or `.convnextv2`.
"""

from __future__ import annotations

from sparkme.weights.format import Format
from sparkme.weights.names import Rule, Table

_IGNORED = ("classifier.", "layernorm.")  # the norm behind the last stage belongs to the head

RESNET = Table(
    (
        Rule("conv1.weight", "embedder.embedder.convolution.weight"),
        Rule("bn1.{p}", "embedder.embedder.normalization.{p}"),
        *(
            Rule(f"layer{s + 1}.{{b}}.{ours}", f"encoder.stages.{s}.layers.{{b}}.{theirs}")
            for s in range(4)
            for ours, theirs in (
                ("downsample.0.weight", "shortcut.convolution.weight"),
                ("downsample.1.{p}", "shortcut.normalization.{p}"),
                *((f"conv{n + 1}.weight", f"layer.{n}.convolution.weight") for n in range(3)),
                *((f"bn{n + 1}.{{p}}", f"layer.{n}.normalization.{{p}}") for n in range(3)),
            )
        ),
    ),
    "transformers, models/resnet/modeling_resnet.py",
    ignored=_IGNORED,
)

_BLOCK = "encoder.stages.{i}.layers.{b}"
CONVNEXT = Table(
    (
        Rule("downsample_layers.0.0.{p}", "embeddings.patch_embeddings.{p}"),
        Rule("downsample_layers.0.1.{p}", "embeddings.layernorm.{p}"),
        Rule("downsample_layers.{i}.{n}.{p}", "encoder.stages.{i}.downsampling_layer.{n}.{p}"),
        Rule("stages.{i}.{b}.dwconv.{p}", f"{_BLOCK}.dwconv.{{p}}"),
        Rule("stages.{i}.{b}.norm.{p}", f"{_BLOCK}.layernorm.{{p}}"),
        Rule("stages.{i}.{b}.pwconv1.{p}", f"{_BLOCK}.pwconv1.{{p}}"),
        Rule("stages.{i}.{b}.pwconv2.{p}", f"{_BLOCK}.pwconv2.{{p}}"),
        Rule("stages.{i}.{b}.gamma", f"{_BLOCK}.layer_scale_parameter"),
        Rule("stages.{i}.{b}.grn.gamma", f"{_BLOCK}.grn.weight"),
        Rule("stages.{i}.{b}.grn.beta", f"{_BLOCK}.grn.bias"),
    ),
    "transformers, models/convnext/modeling_convnext.py and models/convnextv2/modeling_convnextv2.py",
    ignored=_IGNORED,
)

FORMAT = Format("Hugging Face transformers'", {"resnet": RESNET, "convnext": CONVNEXT})
