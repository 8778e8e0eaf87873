"""Finds the hierarchy of a dense network: where its feature maps of each stride come out, and how wide they are.

Nothing is listed by hand. A dense probe records every call of a module with the strides of its input and output. The map
of stride s is what enters the outermost module that leads from s to the next stride, and the deepest map is what enters
the head. So for torchvision's ResNet these are the outputs of layer1 to layer4, for ConvNeXt the outputs of the four
stages (and not of the norms of the downsampling layers that follow them), as in SparK.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Not square, so that neither a (B, H, W, C) map nor a pooled (B, C, 1, 1) one can be taken for a feature map.
_PROBE_CELLS = (2, 3)


class ReachedDeepest(Exception):
    """Raised by the last tap: the head of the network is not run."""


@dataclass(frozen=True)
class Tap:
    """Where one map of the hierarchy is read: at a module's input or output."""

    stride: int
    channels: int
    module: str
    at_input: bool


@dataclass(frozen=True)
class Hierarchy:
    """The taps, shallow to deep, and the modules that run before the last one."""

    in_channels: int
    taps: tuple[Tap, ...]
    called: frozenset[str]


@dataclass
class _Call:
    module: str
    stride_in: int | None
    stride_out: int | None = None
    channels: int = 0
    channels_in: int = 0
    parents: tuple[str, ...] = ()


def find_hierarchy(model: nn.Module, num_scales: int = 4) -> Hierarchy:
    """Runs a small dense image through the model, in eval mode, and reads the hierarchy off its calls.

    Raises:
        ValueError: the model has no convolution, or fewer than `num_scales` strides.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d: it is not a convolutional network")
    in_channels = first.in_channels
    size = tuple(64 * cells for cells in _PROBE_CELLS)  # strides up to 64
    calls = _record(model, first, in_channels, size)

    strides = sorted({c.stride_out for c in calls if c.stride_out})[-num_scales:]
    if len(strides) < num_scales:
        raise ValueError(f"{type(model).__name__} has feature maps at strides {strides}; SparK needs {num_scales}")
    taps = []
    for stride, following in zip(strides, [*strides[1:], None], strict=True):
        if consumer := _consumer(calls, stride, following):
            taps.append(Tap(stride, consumer.channels_in, consumer.module, at_input=True))
        else:  # what follows is a function and no module
            producer = _outermost_last(calls, stride)
            taps.append(Tap(stride, producer.channels, producer.module, at_input=False))
    called: set[str] = set()
    probe = torch.zeros(1, in_channels, *size, device=first.weight.device, dtype=first.weight.dtype)
    handles = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    try:
        dense_features(model, tuple(taps), probe)
    finally:
        for handle in handles:
            handle.remove()
    if taps[-1].at_input:
        called.discard(taps[-1].module)  # entered, but not run
    return Hierarchy(in_channels, tuple(taps), frozenset(called))


def attach(model: nn.Module, taps: tuple[Tap, ...], found: Callable[[int, Any], None]) -> list[Any]:
    """Calls `found(i, map)` when the map of tap i is reached; the last tap ends the run with `ReachedDeepest`."""

    def reached(i: int, value: Any) -> None:
        found(i, value)
        if i == len(taps) - 1:
            raise ReachedDeepest

    handles = []
    for i, tap in enumerate(taps):
        module = model.get_submodule(tap.module)
        if tap.at_input:
            handles.append(module.register_forward_pre_hook(lambda _m, args, i=i: reached(i, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, out, i=i: reached(i, out)))
    return handles


@torch.no_grad()
def dense_features(model: nn.Module, taps: tuple[Tap, ...], images: Tensor) -> list[Tensor]:
    """The hierarchy of a dense model on images (B, C, H, W), in eval mode: maps (B, D, H / s, W / s), shallow to deep."""
    maps: dict[int, Tensor] = {}
    was_training = model.training
    handles = attach(model, taps, lambda i, value: maps.update({i: value.clone()}))
    try:
        model.eval()(images)
    except ReachedDeepest:
        pass
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [maps[i] for i in range(len(taps))]


@torch.no_grad()
def _record(model: nn.Module, first: nn.Conv2d, in_channels: int, size: tuple[int, ...]) -> list[_Call]:
    calls: list[_Call] = []
    open_calls: list[_Call] = []

    def stride_of(value: Any) -> int | None:
        if not isinstance(value, Tensor) or value.ndim != 4:
            return None
        h, w = value.shape[2:]
        exact = size[0] % h == 0 and size[1] % w == 0 and size[0] // h == size[1] // w
        return size[0] // h if exact else None

    def enter(name: str, args: tuple[Any, ...]) -> None:
        value = args[0] if args else None
        channels = value.shape[1] if isinstance(value, Tensor) and value.ndim == 4 else 0
        call = _Call(name, stride_of(value), channels_in=channels, parents=tuple(c.module for c in open_calls))
        calls.append(call)
        open_calls.append(call)

    def leave(out: Any) -> None:
        call = open_calls.pop()
        call.stride_out = stride_of(out)
        call.channels = out.shape[1] if call.stride_out else 0

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: enter(name, args)))
        handles.append(module.register_forward_hook(lambda _m, _a, out: leave(out)))
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, in_channels, *size, device=first.weight.device, dtype=first.weight.dtype))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return calls


def _consumer(calls: list[_Call], stride: int, following: int | None) -> _Call | None:
    """The outermost call that leads from `stride` to the following one or, from the deepest, to the head."""
    start = 0 if following else max(i for i, c in enumerate(calls) if c.stride_out == stride)
    # Calls are in the order of entry, so the first that qualifies is the outermost.
    return next((c for c in calls[start:] if (c.stride_in, c.stride_out) == (stride, following)), None)


def _outermost_last(calls: list[_Call], stride: int) -> _Call:
    """The last call that gives a map of `stride`, and of those that end there the outermost."""
    last = max(i for i, c in enumerate(calls) if c.stride_out == stride)
    for name in calls[last].parents:
        parent = next(c for c in calls if c.module == name)
        if parent.stride_out == stride:
            return parent
    return calls[last]
