"""Optimiser and its schedules, as SparK has them (main.py:75-79, utils/lr_control.py)."""

from __future__ import annotations

import math

import torch
from timm.optim.lamb import Lamb
from torch import nn

OPTIMIZERS = ("lamb", "adamw")


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups: decayed, and not, which are biases, norms, mask tokens, GRN and layer scale.

    FCMAE's official code exempts what has one axis or is a bias, and so decays its mask token and its GRN, (1, C), as well.

    Some of these have more than one axis: MinkowskiEngine's biases (1, C), mask tokens (1, C, 1, 1), layer scale (C, 1, 1).
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
    """LAMB with the gradient's global norm clipped inside, or AdamW, whose caller clips. `update_schedule` sets rates.

    Raises:
        ValueError: an unknown name.
    """
    groups = parameter_groups(model)
    if name == "lamb":
        optimizer: torch.optim.Optimizer = Lamb(groups, betas=(0.9, beta2), eps=1e-6, max_grad_norm=clip_grad)
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, beta2))
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, start: float = 0.005, end: float = 0.001
) -> float:
    """Linear from `start` times the peak, then cosine to `end` times it at the last step."""
    if step < warmup_steps:
        return peak * (start + (1 - start) * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (end + (1 - end) * _cosine(progress))


def weight_decay(step: int, *, start: float, end: float, total_steps: int) -> float:
    """Cosine from `start` at the first step to `end` at the last."""
    return end + (start - end) * _cosine(step / max(1, total_steps - 1))


def update_schedule(optimizer: torch.optim.Optimizer, *, learning_rate: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if group["decay"]:
            group["weight_decay"] = weight_decay


def _cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)
