"""Optimisers and schedules, as in SparK (main.py:75-79, utils/lr_control.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparkme.networks.pyramid import Pyramid

OPTIMIZERS = ("lamb", "adamw")


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups: with weight decay, and without (biases, norms, mask tokens, GRN and layer scale).

    Some of the latter have several axes: MinkowskiEngine's biases (1, C), mask tokens (1, C, 1, 1), layer scale (C, 1, 1).
    FCMAE's official code exempts only vectors and biases, so it also decays its mask token and its GRN (1, C).
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 or parameter.shape[1:] == (1, 1)
            exempt = is_vector or name.endswith("bias") or name.startswith("mask_token")
            (free if exempt else decayed).append(parameter)
    return [{"params": decayed, "decay": True}, {"params": free, "decay": False, "weight_decay": 0.0}]


def create_optimizer(name: str, model: nn.Module, *, beta2: float, clip_grad: float | None) -> torch.optim.Optimizer:
    """LAMB, which clips the global gradient norm itself, or AdamW, whose caller clips. `update_schedule` sets the rates."""
    groups = parameter_groups(model)
    if name == "lamb":
        from timm.optim.lamb import Lamb  # noqa: PLC0415  (half a second, for LAMB alone)

        optimizer: torch.optim.Optimizer = Lamb(groups, betas=(0.9, beta2), eps=1e-6, max_grad_norm=clip_grad)
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, beta2))
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def layer_numbers(network: nn.Module, head: str) -> dict[str, int]:
    """The layer of every parameter for layer-wise learning rates, from 0 at the input to the classifier's.

    As in the official code (downstream_imagenet/lr_decay.py) the stem is a layer, and so are three blocks of a stage, in
    torchvision's and timm's ResNets and ConvNeXts. Other networks are cut into eight parts with equally many parameters.
    """
    names = [name for name, _ in network.named_parameters()]
    body = [name for name in names if not name.startswith(f"{head}.")]
    part = max(1, -(-len(body) // 8))
    numbers = _layers_by_stages(body) or {name: i // part for i, name in enumerate(body)}
    last = max(numbers.values(), default=-1) + 1
    return {name: numbers.get(name, last) for name in names}


def pyramid_layers(network: nn.Module, pyramid: Pyramid) -> dict[str, int]:
    """The layer of every parameter of a network that contains a pyramid; all its other weights are the last layer.

    As in the official code for detection (downstream_d2/lr_decay.py) the stem and each stage is a layer, but the third stage
    has one for every three blocks. In networks with other names than torchvision's and timm's ResNets and ConvNeXts each map
    of the pyramid ends a layer.
    """
    names = [name for name, _ in pyramid.network.named_parameters()]
    numbers = _layers_by_stages(names, (2,)) or pyramid.scales_of_weights()
    of_weight = {id(weight): numbers[name] for name, weight in pyramid.network.named_parameters() if name in numbers}
    last = max(of_weight.values(), default=-1) + 1
    return {name: of_weight.get(id(weight), last) for name, weight in network.named_parameters()}


def _layers_by_stages(names: list[str], divided: Sequence[int] = range(9)) -> dict[str, int] | None:
    """The layers of stem and blocks; None if names do not match `_STAGES`, or their order differs.

    Args:
        names: of the weights.
        divided: the stages, counted from 0, that have a layer for every three blocks; others are one layer.
    """
    blocks = {name: block for name in names if (block := _block(name))}
    stages = sorted({stage for stage, _ in blocks.values()})
    if len(stages) < 4:
        return None
    together = {stage: 3 if place in divided else len(names) for place, stage in enumerate(stages)}  # blocks of a layer
    layers, number = {}, 1
    for stage in stages:
        layers[stage] = number
        number += max(block for s, block in blocks.values() if s == stage) // together[stage] + 1
    start = names.index(next(iter(blocks)))
    of_blocks = {name: layers[stage] + block // together[stage] for name, (stage, block) in blocks.items()}
    numbers = dict.fromkeys(names[:start], 0) | of_blocks
    in_order = [numbers[name] for name in names if name in numbers]
    has_others = [*blocks] != names[start : start + len(blocks)]
    return None if has_others or in_order != sorted(in_order) else numbers


_STAGES = (
    re.compile(r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."),  # ResNets
    re.compile(r"stages\.(?P<stage>\d)\.(?:blocks\.(?P<block>\d+)\.|downsample)"),  # timm's ConvNeXts
    re.compile(r"features\.(?P<pair>[1-7])\.(?P<block>\d+)\."),  # torchvision's, where every other part halves the resolution
)


def _block(name: str) -> tuple[int, int] | None:
    """Stage and block of a parameter; None before and after the stages."""
    for pattern in _STAGES:
        if match := pattern.search(name):
            found = match.groupdict()
            stage = int(found["pair"]) // 2 if "pair" in found else int(found["stage"])
            return stage, int(found["block"] or 0)
    return None


def create_finetuning_optimizer(
    name: str, network: nn.Module, layers: dict[str, int], *, layer_decay: float
) -> torch.optim.Optimizer:
    """LAMB as in the official fine-tuning (no clipping, trust ratio everywhere, no bias correction), or AdamW.

    Args:
        name: `lamb` or `adamw`.
        network: the network to train.
        layers: the layer of each parameter, see `layer_numbers`.
        layer_decay: learning rate of a layer divided by the next layer's.
    """
    last = max(layers.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 or parameter.shape[1:] == (1, 1) or key.endswith("bias")
            scale = layer_decay ** (last - layers[key])
            start = {"params": [], "lr_scale": scale, "decay": not is_vector, "weight_decay": 0.0}
            groups.setdefault((layers[key], is_vector), start)["params"].append(parameter)
    if name == "lamb":
        from timm.optim.lamb import Lamb  # noqa: PLC0415

        optimizer: torch.optim.Optimizer = Lamb(
            [*groups.values()], betas=(0.9, 0.999), eps=1e-6, max_grad_norm=None, always_adapt=True, bias_correction=False
        )
        return optimizer
    return torch.optim.AdamW([*groups.values()])


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, start: float = 0.005, end: float = 0.001
) -> float:
    """Linear warm-up from `start` times the peak, then a cosine to `end` times the peak at the last step."""
    if step < warmup_steps:
        return peak * (start + (1 - start) * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (end + (1 - end) * _cosine(progress))


def stepped_rate(
    step: int, *, peak: float, warmup_steps: int, falls: Sequence[int], factor: float, start: float = 0.01
) -> float:
    """Linear warm-up from `start` times the peak, then the peak, times `factor` from each step of `falls` on."""
    if step < warmup_steps:
        return peak * (start + (1 - start) * step / warmup_steps)
    return peak * factor ** sum(step >= fall for fall in falls)


def weight_decay(step: int, *, start: float, end: float, total_steps: int) -> float:
    """A cosine from `start` at the first step to `end` at the last."""
    return end + (start - end) * _cosine(step / max(1, total_steps - 1))


def update_schedule(optimizer: torch.optim.Optimizer, *, learning_rate: float, weight_decay: float) -> None:
    """Sets each group's learning rate, times its `lr_scale` if any, and its weight decay if it decays."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if group["decay"]:
            group["weight_decay"] = weight_decay


def _cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)
