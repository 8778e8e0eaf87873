"""Activation checkpointing: keeps the inputs of blocks and recomputes the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparkme.sparse.forms.layer import SparseLayer
from sparkme.sparse.map import SparseMap
from sparkme.sparse.recorder import Recorder


def find_blocks(network: nn.Module, taps: Sequence[str]) -> list[str]:
    """The paths of a sparse network's blocks: the smallest modules of several layers inside a Sequential or ModuleList.

    Args:
        network: the sparse network.
        taps: paths of the modules whose maps are read; no block contains one.
    """
    in_a_row = {
        f"{name}.{child}" if name else child
        for name, module in network.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for child, _ in module.named_children()
    }
    found = [
        name
        for name in in_a_row
        if sum(isinstance(m, SparseLayer) for m in network.get_submodule(name).modules()) > 1
        and not any(tap.startswith(f"{name}.") for tap in taps)
    ]
    return sorted(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def recompute(block: nn.Module) -> None:
    """Makes a block run under torch.utils.checkpoint when gradients are on.

    The second forward pass sees the same random numbers, running statistics and inputs as the first.
    """
    forward = block.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        run = _Run(block, forward, args, kwargs)
        return checkpoint(run, use_reentrant=False)

    block.forward = twice


class _Run:
    """A call of a block that can be repeated."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.block, self.forward, self.kwargs = block, forward, kwargs
        self.args: tuple[Any, ...] | None = args
        self.copies = tuple(_copy(value) for value in args)  # the block may change its maps in place

    def __call__(self) -> Any:
        if self.args is not None:  # the first time
            args, self.args = self.args, None
            return _written(self.forward(*args, **self.kwargs))
        with _as_it_was(self.block):
            return _written(self.forward(*map(_copy, self.copies), **self.kwargs))


def _copy(value: Any) -> Any:
    """A copy of the map as it is now, without a recorder."""
    if type(value) is not SparseMap or value.padding is not None:
        return value
    recorder = None if value.recorder is None else Recorder([], compiled=value.recorder.compiled)
    return SparseMap(value.features, value.engine, recorder, value.dims)


def _written(value: Any) -> Any:
    """Computes a waiting map inside the block."""
    if type(value) is SparseMap:
        value.storage.read()
    return value


@contextmanager
def _as_it_was(block: nn.Module) -> Iterator[None]:
    """Freezes running statistics."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
