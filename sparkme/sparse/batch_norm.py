"""Batch norm on rows, with statistics of one process or of all that train together.

`BatchNorm` is the layer of dense networks, such as the decoder. The sparse layer is in `sparkme.sparse.forms.norm`, and its
fusion with later layers in `sparkme.sparse.fusion.norm`. Both compute with the functions here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme import ops

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def normalises_batch(bn: BATCH_NORM) -> bool:
    """Whether it uses the statistics of the batch, not its running ones."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def processes_of(bn: nn.Module) -> int:
    """The number of processes that share its statistics, each with the same number of rows."""
    return getattr(bn, "processes", 1)


def apply_norm(
    bn: BATCH_NORM,
    rows: Tensor,
    mean: Tensor,
    deviation: Tensor,
    *,
    training: bool,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    ceiling: float | None = None,
) -> Tensor:
    """`ops.batch_norm` with a layer's weight and bias. In training, `statistics_of_batch` gives `mean` and `deviation`."""
    if training and (processes := processes_of(bn)) > 1:
        residual = None if residual is None else residual.flatten(0, -2)
        out: Tensor = _Shared.apply(rows, bn.weight, bn.bias, residual, mean, deviation, factor, ceiling, processes)
        return out
    return ops.batch_norm(
        rows, mean, deviation, bn.weight, bn.bias, training=training, factor=factor, residual=residual, ceiling=ceiling
    )


@torch.no_grad()
def statistics_of_batch(bn: BATCH_NORM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of (N, C) rows, in training; updates the running statistics.

    Several processes exchange one sum of two numbers per channel, and the host does not wait for the device. Raises ValueError
    for a single row.
    """
    processes = processes_of(bn)
    if processes == 1:
        return ops.norm_statistics(rows, bn.eps, *running_statistics(bn, len(rows)))
    mean, variance = ops.batch_statistics(rows)
    # In float64: with a large mean, the variance is a small difference of large numbers.
    own = mean.double()
    mean_of_all, square_of_all = sum_over_processes(torch.stack([own, own**2 + variance])) / processes
    variance = (square_of_all - mean_of_all**2).clamp_min(0).to(mean.dtype)
    mean = mean_of_all.to(mean.dtype)
    move_running_statistics(bn, mean, variance, len(rows) * processes)
    return mean, (variance + bn.eps).rsqrt()


@torch.no_grad()
def move_running_statistics(bn: BATCH_NORM, mean: Tensor, variance: Tensor, count: int) -> None:
    """Updates the running statistics with known statistics of `count` pixels."""
    running_mean, running_var, momentum = running_statistics(bn, count)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / max(1, count - 1))).to(running_var.dtype), momentum)


def running_statistics(bn: BATCH_NORM, count: int) -> tuple[Tensor | None, Tensor | None, float]:
    """The running statistics to update after a batch of `count` pixels, and the momentum, as in torch; counts the batch."""
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
    """An operator, so that torch.compile keeps it in the graph."""
    value = value.clone()
    dist.all_reduce(value)
    return value


@sum_over_processes.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class _Shared(torch.autograd.Function):
    """`ops.batch_norm` with statistics of all processes. The gradient of the rows uses sums over all processes; those of weight
    and bias use the process's own rows, since DistributedDataParallel adds them up later."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        deviation: Tensor,
        factor: Tensor | None,
        ceiling: float | None,
        processes: int,
    ) -> Tensor:
        numbers = mean, deviation, weight, bias, factor
        out: Tensor = torch.ops.sparkme.batch_norm(rows, *numbers, residual, ceiling, True)
        # With a residual, the rows alone do not tell where the result was clamped.
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


class BatchNorm(BATCH_NORM):
    """A batch norm of (N, C, ...), optionally with a ReLU, that can use this project's operators.

    Args:
        num_features: C.
        ceiling: clamps the result to [0, ceiling], as a ReLU6 does for 6; None for no clamp.

    Attributes:
        by_operators: in training, normalise and clamp a channels_last map in one pass; see `use_operators`.
        processes: how many processes share its statistics, with batches of equal size. Equal sizes need only two numbers per
            channel and pass, and no wait for the device. torch.nn.SyncBatchNorm allows any size, so that every layer has to
            ask which are zero; and it needs GPUs.
    """

    by_operators = False
    processes = 1

    def __init__(self, num_features: int, ceiling: float | None = None) -> None:
        super().__init__(num_features)
        self.ceiling = ceiling
        # Whether operators run on the CPU and on a GPU; compiled code cannot ask later.
        self.has_operators = (not ops.unavailable(on_gpu=False), not ops.unavailable(on_gpu=True))

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        shares = self.processes > 1 and normalises_batch(self)
        if not (self.has_operators[input.is_cuda] if shares else self._takes(input)):
            out = self._by_torch(input) if shares else super().forward(input)
            return out if self.ceiling is None else F.hardtanh(out, 0.0, self.ceiling, inplace=True)
        rows = input.movedim(1, -1).flatten(0, -2)
        out = apply_norm(self, rows, *statistics_of_batch(self, rows), training=True, ceiling=self.ceiling)
        return out.view(input.shape[0], *input.shape[2:], -1).movedim(-1, 1)

    def _takes(self, input: Tensor) -> bool:
        """Whether the input is rows in memory, and torch.compile does not fuse the layers anyway."""
        asked = self.by_operators and self.training and not torch.compiler.is_compiling()
        return asked and input.is_contiguous(memory_format=torch.channels_last)

    def _by_torch(self, input: Tensor) -> Tensor:
        """The shared batch norm without operators, which may be missing for CUDA; slower and needs more memory."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        axes, by_channel = [axis for axis in range(input.ndim) if axis != 1], (1, -1, *[1] * (input.ndim - 2))
        mean = _AddUp.apply(wide.mean(axes)) / self.processes
        centred = wide - mean.view(by_channel)
        variance = _AddUp.apply(centred.square().mean(axes)) / self.processes
        move_running_statistics(self, mean.detach(), variance.detach(), input.numel() // input.shape[1] * self.processes)
        out = centred * (variance + self.eps).rsqrt().view(by_channel)
        out = out if self.weight is None else out * self.weight.view(by_channel)
        out = out if self.bias is None else out + self.bias.view(by_channel)
        return out.to(input.dtype)


def use_operators(network: nn.Module, enabled: bool) -> None:
    """Sets `by_operators` of the `BatchNorm`s of a network."""
    for module in network.modules():
        if isinstance(module, BatchNorm) and module.by_operators != enabled:
            module.by_operators = enabled


def share_batch_norms(network: nn.Module) -> list[str]:
    """Makes the batch norms of a network share statistics over processes, in place; names, weights and hooks stay.

    Returns:
        Names and classes of batch norms with their own code, which keep the statistics of their process.
    """
    own_code, processes = [], dist.get_world_size() if dist.is_initialized() else 1
    for name, module in list(network.named_modules()):
        if isinstance(module, BatchNorm):
            module.processes = processes
        if not isinstance(module, BATCH_NORM) or isinstance(module, BatchNorm):
            continue
        if type(module).forward not in (BATCH_NORM.forward, nn.SyncBatchNorm.forward):
            own_code.append(f"{name} ({type(module).__name__})")
            continue
        shared = BatchNorm(module.num_features)
        shared.__dict__.update(module.__dict__)
        shared.processes = processes
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, shared)
    return own_code


def add_up(value: Tensor) -> Tensor:
    """The sum of a tensor over processes, with gradients."""
    total: Tensor = _AddUp.apply(value)
    return total


class _AddUp(torch.autograd.Function):
    """A sum over processes that each have their own loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_processes(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_processes(grads[0])
