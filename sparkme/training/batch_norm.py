"""Batch norms that share their statistics over the processes that train together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.sparse.unwritten import move_running_statistics

BATCH_NORM = nn.modules.batchnorm._BatchNorm


class SharedBatchNorm(BATCH_NORM):
    """A batch norm of (N, C, ...) whose statistics are those of all processes' batches, which have to be of the same size.

    Since they are, two numbers per channel are summed over the processes in each pass, and the host never waits for the device.
    torch.nn.SyncBatchNorm allows for any sizes, so it has to learn in every layer which are zero; and it runs on GPUs alone.
    """

    def __init__(self, num_features: int, processes: int) -> None:
        super().__init__(num_features)
        self.processes = processes

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        out, mean, variance = _Shared.apply(input, self.weight, self.bias, self.eps, self.processes)
        move_running_statistics(self, mean, variance, input.numel() // input.shape[1] * self.processes)
        result: Tensor = out
        return result


@torch.library.custom_op("sparkme_training::sum_over_processes", mutates_args=())
def sum_over_processes(value: Tensor) -> Tensor:
    """An operator, since compiled code takes those as they are, and cannot be interrupted."""
    value = value.clone()
    dist.all_reduce(value)
    return value


@sum_over_processes.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class _Shared(torch.autograd.Function):
    """With g the gradient of the result, w the weight, x the input, and means over all processes:
    dx = w / deviation * (g - mean(g) - xhat * mean(g * xhat)), xhat = (x - mean) / deviation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, processes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        variance, mean = torch.var_mean(wide, _axes(x), correction=0)
        # In float64, since what comes back is a difference of large numbers where a channel's mean is.
        own = mean.double()
        mean_of_all, square_of_all = sum_over_processes(torch.stack([own, own**2 + variance])) / processes
        variance = (square_of_all - mean_of_all**2).clamp_min(0).to(mean.dtype)
        mean = mean_of_all.to(mean.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.epsilon, ctx.processes = epsilon, processes
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, epsilon), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        grad, scale = grads[0], torch.ones_like(mean) if weight is None else weight
        # Without what goes through the statistics.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, variance, None, None, False, ctx.epsilon, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = sum_over_processes(torch.stack([grad_bias, grad_weight]).to(mean.dtype))
            means = sums / (x.numel() // x.shape[1] * ctx.processes)
            deviation = (variance + ctx.epsilon).sqrt()
            by_channel = (1, -1, *[1] * (x.ndim - 2))
            factor, slope = (scale / deviation).view(by_channel), (means[1] / deviation).view(by_channel)
            through = (x - mean.view(by_channel)).mul_(slope).add_(means[0].view(by_channel)).mul_(factor)
            grad_x = (grad_x - through).to(x.dtype)
        return (
            grad_x if ctx.needs_input_grad[0] else None,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _axes(x: Tensor) -> list[int]:
    """All but the channels'."""
    return [axis for axis in range(x.ndim) if axis != 1]


def share_batch_norms(network: nn.Module) -> list[str]:
    """Makes the batch norms of a network shared ones, in place, with all that hangs on them: names, weights, hooks.

    Returns:
        Those that have code of their own, with their kind: they keep to their process's part of the batch.
    """
    own_code, processes = [], dist.get_world_size() if dist.is_initialized() else 1
    for name, module in list(network.named_modules()):
        if not isinstance(module, BATCH_NORM) or isinstance(module, SharedBatchNorm):
            continue
        if type(module).forward not in (BATCH_NORM.forward, nn.SyncBatchNorm.forward):
            own_code.append(f"{name} ({type(module).__name__})")
            continue
        shared = SharedBatchNorm(module.num_features, processes)
        shared.__dict__.update(module.__dict__)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, shared)
    return own_code
