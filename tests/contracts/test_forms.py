"""What becomes of each kind of layer, against the oracle: maps and gradients of all parameters, on every engine.

A small network holds the library's own layer in every block; beside it stands what it means on a masked dense map, by the
oracle's functions and the layer's own weights. In training mode; masks with some patches hidden, all but one, and none.
"""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from networks import ENGINES, Masked, check, images, make
from timm.layers.blur_pool import BlurPool2d
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from timm.layers.space_to_depth import SpaceToDepth
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

import sparkme

MASKS = {
    "some": oracle.random_active(2, (2, 3), 3, seed=1),
    "one patch": oracle.random_active(2, (2, 3), 1, seed=2),
    "all": torch.ones(2, 1, 2, 3, dtype=torch.bool),
}
Reference = Callable[[Any, Tensor, Tensor], Tensor]
hide = oracle.masked


def batch_norm(n: Any, x: Tensor, a: Tensor) -> Tensor:
    return oracle.masked_batch_norm(x, a, n.weight, n.bias, n.running_mean, n.running_var, n.training)[0]


def pooled(x: Tensor, a: Tensor) -> Tensor:
    return oracle.masked_global_average(x, a)[:, :, None, None]


def per_channel(gate: Tensor, x: Tensor, a: Tensor) -> Tensor:
    return hide(x * gate.view(*gate.shape[:2], 1, 1), a)


def linear(weights: Tensor, conv: nn.Conv2d | nn.Linear) -> Tensor:
    return F.linear(weights.flatten(1), conv.weight.flatten(1), conv.bias)


def squeeze_excite(m: Any, x: Tensor, a: Tensor) -> Tensor:
    return per_channel(torch.sigmoid(linear(torch.relu(linear(pooled(x, a), m.fc1)), m.fc2)), x, a)


def eca(m: Any, x: Tensor, a: Tensor) -> Tensor:
    y = F.conv1d(pooled(x, a).view(len(x), 1, -1), m.conv.weight, padding=m.conv.weight.shape[-1] // 2)
    return per_channel(torch.sigmoid(y).view(len(x), -1), x, a)


def split_attention(m: Any, x: Tensor, a: Tensor) -> Tensor:
    sides = (1, 1, 1, 1)
    x = torch.relu(oracle.masked_conv2d_padded(x, a, m.conv.weight, m.conv.bias, 1, sides, m.conv.groups))
    branches = x.view(len(x), 2, -1, *x.shape[2:])
    gap = torch.relu(linear(pooled(branches[:, 0] + branches[:, 1], a), m.fc1))
    attention = torch.softmax(linear(gap, m.fc2).view(len(x), 2, -1), 1)  # one group of channels
    return sum(per_channel(attention[:, i], branches[:, i], a) for i in range(2))  # type: ignore[return-value]


def same_conv(m: Any, x: Tensor, a: Tensor, weight: Tensor | None = None) -> Tensor:
    k, s, d = m.kernel_size[0], m.stride[0], m.dilation[0]
    (top, bottom), (left, right) = (oracle.same_sides(n, k, s, d) for n in x.shape[2:])
    weight = m.weight if weight is None else weight
    return oracle.masked_conv2d_padded(x, a, weight, m.bias, s, (left, right, top, bottom), m.groups, d)


def by_deviation(x: Tensor, groups: int) -> Tensor:
    """Each group of channels over its deviation, as EvoNorm has it."""
    split = x.reshape(len(x), groups, -1, *x.shape[2:])
    deviation = (split.var((2, 3, 4), unbiased=False, keepdim=True) + 0.1).sqrt()
    return x / deviation.expand(split.shape).reshape(x.shape)


def by_visible_deviation(x: Tensor, a: Tensor, groups: int) -> Tensor:
    mean, square = (oracle.masked_global_average(y, a).view(len(x), groups, -1).mean(2) for y in (x, x * x))
    deviation = (square - mean.square() + 0.1).sqrt().repeat_interleave(x.shape[1] // groups, 1)
    return x / deviation[:, :, None, None]


def padded_conv(*sides: int) -> Reference:
    return lambda m, x, a: oracle.masked_conv2d_padded(x, a, m.weight, m.bias, m.stride[0], sides, m.groups, m.dilation[0])


class Func(nn.Module):
    """A function of a map as a layer, with a convolution that it may use."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.conv = function, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def func(function: Callable[[Any, Tensor], Tensor]) -> Callable[[int], nn.Module]:
    return lambda c: Func(function)


def power_in_place(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y **= 2
    return y


def shuffled(x: Tensor, a: Tensor) -> Tensor:
    return torch.cat([x[:, i :: x.shape[1] // 2] for i in range(x.shape[1] // 2)], 1)


def blur(m: Any, x: Tensor, a: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)
    kernel = (kernel[:, None] * kernel / 16).expand(x.shape[1], 1, 3, 3)
    return oracle.masked_conv2d_padded(x, a, kernel, None, 2, (1, 1, 1, 1), x.shape[1], mode="reflect")


def space_to_depth(m: Any, x: Tensor, a: Tensor) -> Tensor:
    parts = [x[:, :, i::4, j::4] for i in range(4) for j in range(4)]
    return hide(F.conv2d(torch.cat(parts, 1), m.conv.weight), a)


def depth_conv(c: int, times: int = 4) -> nn.Conv2d:
    return nn.Conv2d(times * c, c, 1, bias=False)


# name -> (the layer for c channels, what it means); those of SMALLER make the map smaller by that factor.
KINDS: dict[str, tuple[Callable[[int], nn.Module], Reference]] = {
    "BatchNormAct2d": (lambda c: BatchNormAct2d(c), lambda m, x, a: torch.relu(batch_norm(m, x, a))),
    "BatchNormAct2d SiLU": (lambda c: BatchNormAct2d(c, act_layer=nn.SiLU), lambda m, x, a: F.silu(batch_norm(m, x, a))),
    "GroupNorm": (lambda c: nn.GroupNorm(2, c), lambda m, x, a: oracle.masked_group_norm(x, a, 2, m.weight, m.bias)),
    "GroupNormAct": (lambda c: GroupNormAct(c, 2),
                     lambda m, x, a: torch.relu(oracle.masked_group_norm(x, a, 2, m.weight, m.bias))),
    "timm GroupNorm1": (lambda c: tl.GroupNorm1(c), lambda m, x, a: oracle.masked_group_norm(x, a, 1, m.weight, m.bias, m.eps)),
    "InstanceNorm2d": (lambda c: nn.InstanceNorm2d(c, affine=True),
                       lambda m, x, a: oracle.masked_group_norm(x, a, x.shape[1], m.weight, m.bias)),
    "timm LayerNorm2d": (lambda c: tl.LayerNorm2d(c),
                         lambda m, x, a: oracle.masked_layer_norm(x, a, m.weight, m.bias, m.eps)),
    "LayerNorm and Linear, channels last": (
        lambda c: nn.Sequential(tl.LayerNorm(c), nn.Linear(c, c), nn.GELU()),
        lambda m, x, a: hide(F.gelu(F.conv2d(oracle.masked_layer_norm(x, a, m[0].weight, m[0].bias, m[0].eps),
                                             m[1].weight[:, :, None, None], m[1].bias)), a)),
    "GRN": (lambda c: GlobalResponseNorm(c, channels_last=False), lambda m, x, a: oracle.masked_grn(x, a, m.weight, m.bias)),
    "GRN, channels last": (lambda c: GlobalResponseNorm(c, channels_last=True),
                           lambda m, x, a: oracle.masked_grn(x, a, m.weight, m.bias)),
    "SEModule": (lambda c: tl.SEModule(c), squeeze_excite),
    "SEModule with maximum": (
        lambda c: tl.SEModule(c, add_maxpool=True),
        lambda m, x, a: per_channel(torch.sigmoid(linear(torch.relu(linear(
            (pooled(x, a).flatten(1) + oracle.masked_global_max(x, a)) / 2, m.fc1)), m.fc2)), x, a)),
    "torchvision SqueezeExcitation": (lambda c: SqueezeExcitation(c, 2), squeeze_excite),
    "EffectiveSEModule": (lambda c: tl.EffectiveSEModule(c),
                          lambda m, x, a: per_channel(F.hardsigmoid(linear(pooled(x, a), m.fc)), x, a)),
    "EcaModule": (lambda c: tl.EcaModule(c), eca),
    "SplitAttn": (lambda c: tl.SplitAttn(c, rd_channels=4), split_attention),
    "expand_as": (func(lambda m, x: x * F.adaptive_avg_pool2d(x, 1).expand_as(x)),
                  lambda m, x, a: per_channel(pooled(x, a), x, a)),
    "amax": (func(lambda m, x: x - x.amax((2, 3), keepdim=True)),
             lambda m, x, a: hide(x - oracle.masked_global_max(x, a)[:, :, None, None], a)),
    "AdaptiveMaxPool2d": (func(lambda m, x: x + F.adaptive_max_pool2d(x, 1)),
                          lambda m, x, a: hide(x + oracle.masked_global_max(x, a)[:, :, None, None], a)),
    "cat": (lambda c: Func(lambda m, x: m.conv(torch.cat([x, -x, x * x, 2 * x], 1)), depth_conv(c)),
            lambda m, x, a: hide(F.conv2d(torch.cat([x, -x, x * x, 2 * x], 1), m.conv.weight), a)),
    "stack and sum": (func(lambda m, x: torch.stack([x, x * x, torch.relu(x)], 1).sum(1)),
                      lambda m, x, a: x + x * x + torch.relu(x)),
    "split": (func(lambda m, x: torch.cat([y * i for i, y in enumerate(torch.split(x, [1, x.shape[1] - 1], 1), 1)], 1)),
              lambda m, x, a: torch.cat([x[:, :1], 2 * x[:, 1:]], 1)),
    "chunk": (func(lambda m, x: (lambda p, q: torch.cat([q, p * q], 1))(*x.chunk(2, 1))),
              lambda m, x, a: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]], 1)),
    "slices": (func(lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1) + x[:, [0]] * x[:, -1:, ...]),
               lambda m, x, a: torch.cat([x[:, ::2], x[:, 1::2]], 1) + x[:, :1] * x[:, -1:]),
    "shuffle by view": (func(lambda m, x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)),
                        lambda m, x, a: shuffled(x, a)),
    "shuffle by reshape": (func(lambda m, x: x.reshape(len(x), 2, -1, *x.shape[2:]).permute(0, 2, 1, 3, 4).flatten(1, 2)),
                           lambda m, x, a: shuffled(x, a)),
    "groups of one channel": (
        func(lambda m, x: (x.view(len(x), x.shape[1], 1, *x.shape[2:]) * 2).reshape(x.shape)), lambda m, x, a: 2 * x),
    "CBAM pool": (
        func(lambda m, x: x * torch.sigmoid(torch.cat([x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)], 1).sum(1, True))),
        lambda m, x, a: hide(x * torch.sigmoid(x.amax(1, keepdim=True) + x.mean(1, keepdim=True)), a)),
    "max by name, clip": (func(lambda m, x: x - x.max(dim=1, keepdim=True).values.clip(min=0.1)),
                          lambda m, x, a: hide(x - x.amax(1, keepdim=True).clip(0.1), a)),
    "keywords": (
        func(lambda m, x: F.relu(input=x) + torch.mean(input=x, axis=1, keepdims=True) + torch.flip(x, dims=(1,))
             + x.permute(dims=(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        lambda m, x, a: hide(torch.relu(x) + x.mean(1, keepdim=True) + x.flip(1) + x, a)),
    "operators": (func(lambda m, x: (+x) * 2 + x.to(memory_format=torch.channels_last) * ((x > 0) & ~(x > 1)) + 0 * 2**x),
                  lambda m, x, a: 2 * x + x * ((x > 0) & (x <= 1))),
    "power in place": (func(power_in_place), lambda m, x, a: x**2),
    "stack in front": (func(lambda m, x: torch.stack([x, x * x, torch.relu(x)]).sum(0)),
                       lambda m, x, a: x + x * x + torch.relu(x)),
    "every fourth pixel": (
        lambda c: Func(lambda m, x: x + F.interpolate(x[:, :, ::2, 1::2], scale_factor=2)),
        lambda m, x, a: x + x[:, :, ::2, 1::2].repeat_interleave(2, 2).repeat_interleave(2, 3)),
    "hand-written batch norm": (
        func(lambda m, x: (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), False, True) + 1e-3).sqrt()),
        lambda m, x, a: oracle.masked_batch_norm(x, a, torch.ones(x.shape[1], dtype=x.dtype), torch.zeros(
            x.shape[1], dtype=x.dtype), x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), True, eps=1e-3)[0]),
    "global max by window": (func(lambda m, x: x - F.max_pool2d(x, x.shape[2:])),
                             lambda m, x, a: hide(x - oracle.masked_global_max(x, a)[:, :, None, None], a)),
    "deviation of single channels": (func(lambda m, x: by_deviation(x, x.shape[1])),
                                     lambda m, x, a: by_visible_deviation(x, a, x.shape[1])),
    "deviation of groups": (func(lambda m, x: by_deviation(x, 2)), lambda m, x, a: by_visible_deviation(x, a, 2)),
    "ChannelShuffle": (lambda c: nn.ChannelShuffle(2), lambda m, x, a: shuffled(x, a)),
    "LayerScale2d": (lambda c: tl.LayerScale2d(c), lambda m, x, a: x * m.gamma.view(1, -1, 1, 1)),
    "softmax over channels": (func(lambda m, x: torch.softmax(x, 1) + x.mean(1, keepdim=True)),
                              lambda m, x, a: hide(torch.softmax(x, 1) + x.mean(1, keepdim=True), a)),
    "StdConv2d": (lambda c: StdConv2d(c, c, 3), lambda m, x, a: oracle.masked_conv2d(
        x, a, oracle.standardised(m.weight, m.eps), m.bias, padding=1)),
    "StdConv2dSame": (lambda c: StdConv2dSame(c, c, 3),
                      lambda m, x, a: same_conv(m, x, a, oracle.standardised(m.weight, m.eps))),
    "ScaledStdConv2d": (lambda c: ScaledStdConv2d(c, c, 3, groups=2), lambda m, x, a: oracle.masked_conv2d(
        x, a, oracle.standardised(m.weight, m.eps, m.gain, m.scale), m.bias, padding=1, groups=2)),
    "dilated same": (lambda c: nn.Conv2d(c, c, 3, padding="same", dilation=2), padded_conv(2, 2, 2, 2)),
    "even kernel, same": (lambda c: nn.Conv2d(c, c, 4, padding="same"), padded_conv(1, 2, 1, 2)),
    "F.pad and depthwise 2x2": (lambda c: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 2, groups=c)),
                                lambda m, x, a: padded_conv(0, 1, 0, 1)(m[1], x, a)),
    "reflected 3x3": (lambda c: nn.Conv2d(c, c, 3, padding=1, padding_mode="reflect"),
                      lambda m, x, a: oracle.masked_conv2d_padded(x, a, m.weight, m.bias, 1, (1, 1, 1, 1), mode="reflect")),
    "AvgPool2d without padding in its mean": (lambda c: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                                              lambda m, x, a: oracle.averaged_with_zeros(x, a, 3, 1, 1, False, False)),
    "MaxPool2d of signed maps": (lambda c: nn.MaxPool2d(3, 1, 1), lambda m, x, a: oracle.visible_max_pool2d(x, a, 3, 1, 1)),
    "nearest upsampling": (
        lambda c: Func(lambda m, x: x + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)),
        lambda m, x, a: hide(x + F.interpolate(oracle.averaged_with_zeros(x, a, 2), scale_factor=2.0), a)),
    "empty Sequential": (lambda c: nn.Sequential(), lambda m, x, a: x),
    "timm GELU": (lambda c: nn.Sequential(tl.GELU(), tl.GELUTanh()), lambda m, x, a: F.gelu(F.gelu(x), approximate="tanh")),
    "timm HardSwish, Mish, Swish": (
        lambda c: nn.Sequential(tl.HardSwish(), tl.Mish(), tl.Swish(), tl.HardMish()),
        lambda m, x, a: (lambda y: 0.5 * y * (y + 2).clamp(0, 2))(F.silu(F.mish(F.hardswish(x))))),
    "PReLU": (lambda c: nn.PReLU(c), lambda m, x, a: F.prelu(x, m.weight)),
    "LocalResponseNorm": (lambda c: nn.LocalResponseNorm(3, alpha=0.5, k=2.0), lambda m, x, a: x / (
        2 + 0.5 / 3 * sum(F.pad(x**2, (0, 0, 0, 0, 1, 1))[:, i : i + x.shape[1]] for i in range(3)))**0.75),
}  # fmt: skip
SMALLER: dict[str, tuple[int, Callable[[int], nn.Module], Reference]] = {
    "7x7 s4 p2": (4, lambda c: nn.Conv2d(c, c, 7, 4, 2), padded_conv(2, 2, 2, 2)),
    "4x4 s2 p1": (2, lambda c: nn.Conv2d(c, c, 4, 2, 1), padded_conv(1, 1, 1, 1)),
    "depthwise 4x4 s2 p1": (2, lambda c: nn.Conv2d(c, c, 4, 2, 1, groups=c, bias=False), padded_conv(1, 1, 1, 1)),
    "Conv2dSame 3x3 s2": (2, lambda c: tl.Conv2dSame(c, c, 3, 2), same_conv),
    "Conv2dSame depthwise 5x5 s2": (2, lambda c: tl.Conv2dSame(c, c, 5, 2, groups=c), same_conv),
    "ScaledStdConv2dSame s2": (2, lambda c: ScaledStdConv2dSame(c, c, 3, 2, padding="same"), lambda m, x, a: same_conv(
        m, x, a, oracle.standardised(m.weight, m.eps, m.gain, m.scale))),
    "F.pad and 3x3 s2": (2, lambda c: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(c, c, 3, 2, 0)),
                         lambda m, x, a: padded_conv(1, 0, 1, 0)(m[1], x, a)),
    "MaxPool2d 3, 2, ceil_mode": (2, lambda c: nn.MaxPool2d(3, 2, 0, ceil_mode=True),
                                  lambda m, x, a: oracle.visible_max_pool2d(x, a, 3, 2, ceil_mode=True)),
    "MaxPool2dSame": (2, lambda c: tl.create_pool2d("max", 3, 2, padding="same"),
                      lambda m, x, a: oracle.visible_max_pool2d(x, a, 3, 2, ceil_mode=True)),
    "AvgPool2d ceil_mode, without padding": (2, lambda c: nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
                                             lambda m, x, a: oracle.averaged_with_zeros(x, a, 2)),
    "AvgPool2d 3, 2, 1": (2, lambda c: nn.AvgPool2d(3, 2, 1), lambda m, x, a: oracle.averaged_with_zeros(x, a, 3, 2, 1)),
    "BlurPool2d": (2, lambda c: BlurPool2d(c), blur),
    "Focus": (2, lambda c: Func(lambda m, x: m.conv(torch.cat(
        [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)), depth_conv(c)),
        lambda m, x, a: hide(F.conv2d(torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1), m.conv.weight), a)),
    "option A shortcut": (2, lambda c: Func(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))[:, 1:-2]),
                          lambda m, x, a: x[:, :, ::2, ::2]),
    "SpaceToDepth": (4, lambda c: Func(lambda m, x: m.conv(SpaceToDepth(4)(x)), depth_conv(c, 16)), space_to_depth),
    "pixel_unshuffle": (2, lambda c: Func(lambda m, x: m.conv(F.pixel_unshuffle(x, 2)), depth_conv(c)),
                        lambda m, x, a: hide(F.conv2d(F.pixel_unshuffle(x, 2), m.conv.weight), a)),
}  # fmt: skip
NHWC = ("LayerNorm and Linear, channels last", "GRN, channels last")


def check_kind(name: str, mask: str, training: bool) -> None:
    factor, layer, reference = (1, *KINDS[name]) if name in KINDS else SMALLER[name]
    active = MASKS[mask]

    def body(m: Any, x: Tensor) -> Tensor:
        return m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if name in NHWC else m.layer(x)

    network = make(body, {1: 3, 2: 2, 4: 1}[factor])
    torch.manual_seed(4)
    for block in network.blocks:
        block.layer = layer(block.conv.in_channels).double()
        for parameter in block.layer.parameters():
            if parameter.ndim < 2 or parameter.numel() == max(parameter.shape):
                nn.init.uniform_(parameter, 0.5, 1.5)
    network.train(training)
    expected = Masked(network, active)(images(), lambda m, x: reference(m.layer, x, active))
    check(network, expected, active, taps=[f"blocks.{i}" for i in range(len(network.blocks))])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [*KINDS, *SMALLER])
def test_every_kind_of_layer_equals_the_oracle_on_every_mask(name: str, mask: str, training: bool) -> None:
    check_kind(name, mask, training)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "drop", [tl.DropPath(0.5), StochasticDepth(0.5, "row"), nn.Dropout2d(0.5), tl.DropBlock2d(0.3, 3)], ids=str
)
def test_dropping_is_per_sample_in_training_and_nothing_in_eval(drop: nn.Module, engine: str) -> None:
    network = make(lambda m, x: m.drop(x) * 1.0)
    for block in network.blocks:
        block.drop = drop
    encoder = sparkme.sparsify(network).set_engine(engine)
    active = MASKS["some"]
    quiet = [x.dense() for x in encoder.eval()(images(), active)]
    expected = Masked(network, active)(images(), lambda m, x: x)
    assert all(oracle.relative_error(x, y) < 1e-10 for x, y in zip(quiet, expected, strict=True))
    encoder.train()
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        first = encoder(images(), active)[0]
        ratios.append((first.dense() / quiet[0]).nan_to_num())
    seen = torch.stack(ratios)
    assert (seen == 0).any() and (seen > 1).any()
    if not isinstance(drop, tl.DropBlock2d):  # one decision for all visible pixels of a sample (and channel)
        values = [r[b, c][oracle.upsample_mask(active, *r.shape[2:])[b, 0]] for r in ratios for b in range(2) for c in range(4)]
        assert all((v - v[0]).abs().max() < 1e-12 for v in values)


def test_what_is_pooled_stays_dense_and_trains() -> None:
    network = make(lambda m, x: m.gate(x))
    for block in network.blocks:
        block.gate = tl.SEModule(block.conv.in_channels, norm_layer=nn.BatchNorm2d).double()
    encoder = sparkme.sparsify(network)
    gate = encoder.network.blocks[0].gate
    assert type(gate.fc1) is nn.Conv2d and type(gate.bn) is nn.BatchNorm2d
    sum(x.rows.square().mean() for x in encoder(images(), MASKS["some"])).backward()
    assert gate.fc1.weight.grad is not None and gate.fc1.weight.grad.abs().sum() > 0
