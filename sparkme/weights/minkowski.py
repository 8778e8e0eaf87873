"""The names and layouts of the ConvNeXt V2 authors' pretraining (facebookresearch/ConvNeXt-V2, models/convnextv2_sparse.py).

Its encoder has MinkowskiEngine's layers: kernels (K, C_in, C_out), depthwise kernels (K, C), and biases and GRN weights with a
leading axis. In its files the encoder has the prefix `encoder.`, beside a decoder. They are read, not written.
"""

from __future__ import annotations

import math

from torch import Tensor

from sparkme.sparse.layout import (
    channelwise_kernel_to_weight,
    channelwise_weight_to_kernel,
    kernel_to_weight,
    weight_to_kernel,
)
from sparkme.weights.names import Rule, Table, vector


def _row(value: Tensor) -> Tensor:
    return value.reshape(1, -1)


def _to_kernel(weight: Tensor) -> Tensor:
    return weight_to_kernel(weight, (weight[0, 0].numel(), weight.shape[1], weight.shape[0]))


def _to_weight(kernel: Tensor) -> Tensor:
    side = math.isqrt(len(kernel))
    return kernel_to_weight(kernel, (side, side))


def _to_channelwise_kernel(weight: Tensor) -> Tensor:
    return channelwise_weight_to_kernel(weight, (weight[0, 0].numel(), len(weight)))


def _to_channelwise_weight(kernel: Tensor) -> Tensor:
    side = math.isqrt(len(kernel))
    return channelwise_kernel_to_weight(kernel, (side, side))


CONVNEXT = Table(
    (
        Rule("downsample_layers.0.{n}.{p}", "downsample_layers.0.{n}.{p}"),
        *(
            rule
            for i in range(1, 4)
            for rule in (
                Rule(f"downsample_layers.{i}.0.{{p}}", f"downsample_layers.{i}.0.ln.{{p}}"),
                Rule(f"downsample_layers.{i}.1.weight", f"downsample_layers.{i}.1.kernel", _to_kernel, _to_weight),
                Rule(f"downsample_layers.{i}.1.bias", f"downsample_layers.{i}.1.bias", _row, vector),
            )
        ),
        Rule("stages.{i}.{b}.dwconv.weight", "stages.{i}.{b}.dwconv.kernel", _to_channelwise_kernel, _to_channelwise_weight),
        Rule("stages.{i}.{b}.dwconv.bias", "stages.{i}.{b}.dwconv.bias", _row, vector),
        Rule("stages.{i}.{b}.norm.{p}", "stages.{i}.{b}.norm.ln.{p}"),
        Rule("stages.{i}.{b}.pwconv1.{p}", "stages.{i}.{b}.pwconv1.linear.{p}"),
        Rule("stages.{i}.{b}.pwconv2.{p}", "stages.{i}.{b}.pwconv2.linear.{p}"),
        Rule("stages.{i}.{b}.gamma", "stages.{i}.{b}.gamma"),
        Rule("stages.{i}.{b}.grn.gamma", "stages.{i}.{b}.grn.gamma", _row, lambda v: v.view(1, 1, 1, -1)),
        Rule("stages.{i}.{b}.grn.beta", "stages.{i}.{b}.grn.beta", _row, lambda v: v.view(1, 1, 1, -1)),
    ),
    "facebookresearch/ConvNeXt-V2, models/convnextv2_sparse.py",
)
