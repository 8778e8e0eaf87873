"""Batch norms that train on rows: their statistics, alone or over the processes that train together, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkme import ops

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def normalises_batch(bn: BATCH_NORM) -> bool:
    """Whether it takes the statistics of the batch, and not its running ones."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def processes_of(bn: nn.Module) -> int:
    """How many share its statistics, each with as many rows; see sparkme.training.batch_norm."""
    return getattr(bn, "processes", 1)


def normalise(
    bn: BATCH_NORM, rows: Tensor, mean: Tensor, deviation: Tensor, *, training: bool, factor: Tensor | None = None,
    residual: Tensor | None = None, ceiling: float | None = None,
) -> Tensor:  # fmt: skip
    """`ops.batch_norm` with a layer's weight and bias; `mean` and `deviation` are from `statistics_of_batch` if it trains."""
    if training and (processes := processes_of(bn)) > 1:
        residual = None if residual is None else residual.flatten(0, -2)
        out: Tensor = _Shared.apply(rows, bn.weight, bn.bias, residual, mean, deviation, factor, ceiling, processes)
        return out
    return ops.batch_norm(
        rows, mean, deviation, bn.weight, bn.bias, training=training, factor=factor, residual=residual, ceiling=ceiling
    )


@torch.no_grad()
def statistics_of_batch(bn: BATCH_NORM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation that a batch norm trains with on (N, C) rows; its running statistics move.

    Of several processes one sum of two numbers a channel is taken, and the host does not wait for the device.

    Raises:
        ValueError: there is a single row to train on.
    """
    processes = processes_of(bn)
    if processes == 1:
        return ops.norm_statistics(rows, bn.eps, *running_statistics(bn, len(rows)))
    mean, variance = ops.batch_statistics(rows)
    # In float64, since what comes back is a difference of large numbers where a channel's mean is.
    own = mean.double()
    mean_of_all, square_of_all = sum_over_processes(torch.stack([own, own**2 + variance])) / processes
    variance = (square_of_all - mean_of_all**2).clamp_min(0).to(mean.dtype)
    mean = mean_of_all.to(mean.dtype)
    move_running_statistics(bn, mean, variance, len(rows) * processes)
    return mean, (variance + bn.eps).rsqrt()


@torch.no_grad()
def move_running_statistics(bn: BATCH_NORM, mean: Tensor, variance: Tensor, count: int) -> None:
    """The same where the statistics of `count` pixels are known already."""
    running_mean, running_var, momentum = running_statistics(bn, count)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / max(1, count - 1))).to(running_var.dtype), momentum)


def running_statistics(bn: BATCH_NORM, count: int) -> tuple[Tensor | None, Tensor | None, float]:
    """What has to move after a batch of `count` pixels, and how far, as torch's own batch norm does; the batch is counted."""
    if count == 1:
        raise ValueError("a batch norm cannot train on a single visible pixel")
    if not bn.training or not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        return None, None, 0.0
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if momentum is None else momentum
    return bn.running_mean, bn.running_var, momentum or 0.0


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
    """`ops.batch_norm` with statistics of all processes. The sums that its gradient takes over rows are theirs, too; weight and
    bias get those of the own rows, which are added up with all other gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor,
        deviation: Tensor, factor: Tensor | None, ceiling: float | None, processes: int,
    ) -> Tensor:  # fmt: skip
        numbers = mean, deviation, weight, bias, factor
        out: Tensor = torch.ops.sparkme.batch_norm(rows, *numbers, residual, ceiling, True)
        # Only after a residual it cannot be worked out from the rows where the result was clamped.
        ctx.save_for_backward(rows, *numbers, None if ceiling is None or residual is None else out)
        ctx.ceiling, ctx.processes = ceiling, processes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), ceiling = grads, ctx.ceiling
        rows, mean, deviation, weight, bias, factor, out = ctx.saved_tensors
        numbers = mean, deviation, weight, bias, factor
        masked, sums = torch.ops.sparkme.batch_norm_grad_sums(grad, rows, out, *numbers, ceiling)
        if out is not None:
            grad, ceiling = masked, None
        grad_rows = None
        if ctx.needs_input_grad[0]:
            count = float(len(rows) * ctx.processes)
            grad_rows = torch.ops.sparkme.batch_norm_grad_rows(grad, rows, *numbers, ceiling, sum_over_processes(sums), count)
        found = (
            grad_rows,
            sums[1].to(weight.dtype) if ctx.needs_input_grad[1] else None,
            sums[0].to(bias.dtype) if ctx.needs_input_grad[2] else None,
            grad if ctx.needs_input_grad[3] else None,
        )
        return *found, None, None, None, None, None
