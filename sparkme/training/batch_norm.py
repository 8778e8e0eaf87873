"""Batch norms that share their statistics over the processes that train together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkme import ops
from sparkme.sparse.batch_norm import (
    BATCH_NORM,
    move_running_statistics,
    normalise,
    statistics_of_batch,
    sum_over_processes,
)


class SharedBatchNorm(BATCH_NORM):
    """A batch norm of (N, C, ...) whose statistics are those of all processes' batches, which have to be of the same size.

    Since they are, two numbers per channel are summed over the processes in each pass, and the host never waits for the device.
    torch.nn.SyncBatchNorm allows for any sizes, so it has to learn in every layer which are zero; and it runs on GPUs alone.
    """

    def __init__(self, num_features: int, processes: int) -> None:
        super().__init__(num_features)
        self.processes = processes
        # Asked here, since compiled code cannot; whether they run on the CPU, and on a GPU.
        self.has_operators = (not ops.unavailable(on_gpu=False), not ops.unavailable(on_gpu=True))

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        if not self.has_operators[input.is_cuda]:
            return self._by_torch(input)
        rows = input.movedim(1, -1).flatten(0, -2)
        out = normalise(self, rows, *statistics_of_batch(self, rows), training=True)
        return out.view(input.shape[0], *input.shape[2:], -1).movedim(-1, 1)

    def _by_torch(self, input: Tensor) -> Tensor:
        """The same without the operators, as where they were not built for CUDA; slower, and in more memory."""
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


class _AddUp(torch.autograd.Function):
    """A sum over the processes, each of which has a loss of its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_processes(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_processes(grads[0])


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
