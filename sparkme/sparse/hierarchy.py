"""Finds the hierarchy of a dense network: where its feature maps of each stride come out, and how wide they are.

A forward pass on a small image records every call of a module with the strides of its inputs and outputs. The map of stride s
is the input of the last, outermost module that leads from s to the next stride. The deepest map is the input of the head. For
torchvision's ResNet these are the outputs of layer1 to layer4. For ConvNeXt they are the outputs of the four stages, before the
norms of the downsampling layers, as in SparK.

A network that predicts maps ends in a decoder, which leads from the deepest stride back to finer ones, or in a head, which
stays at that stride and narrows to the prediction. Neither belongs to the encoder: its deepest map is their input.

The same holds for a block of attention behind the last convolution, as at the end of YOLO11's backbone. The trial finds that it
has no sparse form; then the encoder ends at its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparkme.errors import first_line
from sparkme.sparse.recorder import Recorder

# Not square and not powers of two, so that (B, H, W, C) and pooled (B, C, 1, 1) tensors can be told from (B, C, H, W) maps.
_PROBE_CELLS = (2, 3)
_PROBE_STRIDE = 64  # the largest stride that the probe sees


class ReachedDeepest(Exception):
    """Raised by the last tap: the head of the network is not run."""


@dataclass(frozen=True)
class Tap:
    """Where one map of the hierarchy is read.

    Attributes:
        stride: input pixels per pixel of the map.
        channels: its width.
        module: the path of a module in the network.
        at_input: whether the map is the module's input; else it is its output.
        call: number of the module's call in a forward pass, from 1.
        path: place of the map in (args, kwargs) or in the output: keys and indices, outermost first.
    """

    stride: int
    channels: int
    module: str
    at_input: bool
    call: int = 1
    path: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Hierarchy:
    """The taps and what the probe saw.

    Attributes:
        in_channels: channels of the images.
        taps: shallow to deep.
        patch: the coarsest stride of any map before the last tap, perhaps inside a block. Patches must be multiples of it.
        called: modules that run before the last tap.
        left_out: modules that do not run: the head.
        branches: outermost modules that run and get no gradient from the maps, such as auxiliary heads.
        needed: parameters that get a gradient from the maps, in either mode.
        on_maps: modules whose first argument is a feature map in every call before the last tap.
        untrained: the block of attention behind the last tap, empty if there is none.
    """

    in_channels: int
    taps: tuple[Tap, ...]
    patch: int
    called: frozenset[str]
    left_out: frozenset[str]
    branches: frozenset[str]
    needed: frozenset[str]
    on_maps: frozenset[str]
    untrained: str = ""


@dataclass
class _Found:
    """A feature map among the arguments or results of a call."""

    path: tuple[Any, ...]
    stride: int
    channels: int
    made: int  # the number of the call that returned it, or -1


@dataclass
class _Call:
    module: str
    number: int  # among the calls of this module, from 1
    entered: int
    parents: tuple[_Call, ...]
    inputs: list[_Found]
    outputs: list[_Found] = field(default_factory=list)
    left: int = 0
    unaligned: tuple[int, ...] = ()  # the size of its output map if that lies on no grid of patches
    is_window: bool = False
    steps: bool = False  # a window with a stride

    def takes(self, stride: int) -> bool:
        return any(found.stride == stride for found in self.inputs)

    def gives(self, stride: int) -> bool:
        return any(found.stride == stride for found in self.outputs)


def find_hierarchy(
    model: nn.Module,
    num_scales: int = 4,
    *,
    taps: Sequence[str] | None = None,
    in_channels: int | None = None,
    attention: str = "",
) -> Hierarchy:
    """Runs a small dense image through the model, in eval and in training mode, and reads the hierarchy off its calls.

    Args:
        model: pass a copy, since its buffers, modes and requires_grad flags change.
        num_scales: take at most this many maps, the deepest ones.
        taps: modules whose outputs are the maps; found if None.
        in_channels: channels of the images; found if None.
        attention: a layer that mixes pixels; the encoder ends before the block that it belongs to.

    Raises:
        ValueError: the model has no convolution, cannot be run, or has no hierarchy of feature maps; or convolutions follow the
            block of attention.
    """
    name = type(model).__name__
    if next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None) is None:
        raise ValueError(f"{name} has no nn.Conv2d: it is not a convolutional network")
    in_channels, calls, predicted = _probe(model, in_channels)
    chosen = _given_taps(model, calls, taps) if taps is not None else _find_taps(model, calls, predicted, num_scales, attention)
    last = next(c for c in calls if (c.module, c.number) == (chosen[-1].module, chosen[-1].call))
    end = last.entered if chosen[-1].at_input else last.left
    patch = max(chosen[-1].stride, *(f.stride for c in calls if c.entered < end for f in c.outputs))
    try:
        called, on_maps, needed = _before_last_tap(model, chosen, in_channels, patch)
    except ValueError:  # functions may pool further than any module shows
        called, on_maps, needed = _before_last_tap(model, chosen, in_channels, _PROBE_STRIDE)
    branches = _without_gradient(model, called, needed)
    if not chosen[-1].at_input and taps is None:
        _check_last(calls, chosen[-1], branches)
    head = {call.module for call in calls} - called
    sets = (frozenset(head), branches, frozenset(needed), frozenset(on_maps))
    return Hierarchy(in_channels, tuple(chosen), patch, frozenset(called), *sets, chosen[-1].module if attention else "")


def _without_gradient(model: nn.Module, called: set[str], needed: set[str]) -> frozenset[str]:
    found = set()
    for name, module in model.named_modules():
        inside = [f"{name}.{p}" for p, _ in module.named_parameters()]
        if name in called and inside and needed.isdisjoint(inside):
            found.add(name)
    return frozenset(name for name in found if name.rpartition(".")[0] not in found)


def _check_last(calls: list[_Call], last: Tap, branches: frozenset[str]) -> None:
    """Raises ValueError if a function computes the deepest map from the outputs of several modules."""
    others = [
        c.module
        for c in calls
        if c.gives(last.stride)
        and c.module != last.module
        and not any(parent.gives(last.stride) for parent in c.parents)  # a module around it returns its map
        and any(f"{c.module}.".startswith(f"{b}.") for b in branches)
    ]
    if others:
        raise ValueError(
            f"a function computes the map of stride {last.stride} from the outputs of {last.module!r} and {others[-1]!r}, so "
            "no module returns it; make the function a module, or pass its result through an nn.Identity"
        )


def _find_taps(model: nn.Module, calls: list[_Call], predicted: list[int], num_scales: int, attention: str = "") -> list[Tap]:
    name = type(model).__name__
    strides = sorted({f.stride for call in calls for f in call.outputs if f.stride > 1 and _goes_on(call, f.stride)})
    if any(call.is_window and call.unaligned for call in calls):
        leaves = [c for c in calls if c.unaligned and not any(o.unaligned and c in o.parents for o in calls)]
        bad, (h, w) = leaves[0], (_PROBE_STRIDE * cells for cells in _PROBE_CELLS)
        module = model.get_submodule(bad.module)
        raise ValueError(
            f"{name} cannot be aligned to a grid of patches: for an image of {h}x{w} pixels its layer {bad.module!r} returns "
            f"{'x'.join(map(str, bad.unaligned))}; {_alignment_remedy(module)}"
        )
    if len(strides) < 2:
        maps = f"feature maps at stride {strides[0]} only" if strides else "no feature map smaller than its images"
        raise ValueError(f"{name} has {maps}: it is not hierarchical, as ResNets and ConvNeXts are")
    for call in calls:
        if call.is_window and call.takes(_PROBE_STRIDE) and call.steps:
            raise ValueError(
                f"layer {call.module!r} of {name} has an output stride above {_PROBE_STRIDE}, the largest allowed; choose "
                "layers of smaller strides with taps=[...]"
            )
    strides = strides[-num_scales:]
    chosen = []
    end = _decoder(calls, strides[-1], predicted)
    end = _head(model, calls if end is None else _before(calls, end), strides[-1], predicted) or end
    calls = calls if end is None else _before(calls, end)
    if attention:
        if (end := _last_block(model, calls, strides[-1], attention)) is None:
            raise ValueError(f"the layer {attention!r} is not in the last block of {name}")
        calls = _before(calls, end)
    for stride, following in zip(strides, [*strides[1:], None], strict=True):
        consumer = _consumer(calls, stride, following) if following or end is None else end
        if consumer is not None:
            found = max((f for f in consumer.inputs if f.stride == stride), key=lambda f: f.made)
            chosen.append(Tap(stride, found.channels, consumer.module, True, consumer.number, found.path))
        else:  # a function follows, not a module
            producer = _last_producer(calls, stride)
            found = next(f for f in reversed(producer.outputs) if f.stride == stride)
            chosen.append(Tap(stride, found.channels, producer.module, False, producer.number, found.path))
    return chosen


def _alignment_remedy(module: nn.Module) -> str:
    """How to change a layer whose map lies on no grid of patches."""
    steps = getattr(module, "stride", 1)
    stride = steps[0] if isinstance(steps, tuple | list) and len({*steps}) == 1 else steps
    if not isinstance(stride, int):
        return f"its stride is {tuple(stride)}, but height and width must shrink alike; give it one stride for both"
    if stride & (stride - 1):
        return f"its stride is {stride}, but only powers of two fit; give it another stride"
    if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and not list(module.children()):
        return "let it change the size of its input by a power of two, or leave it out"
    return "pad its input, so that a layer of stride s, a power of two, turns n * s pixels into n"


def _before(calls: list[_Call], end: _Call) -> list[_Call]:
    return [c for c in calls if c.entered < end.entered]


def _decoder(calls: list[_Call], deepest: int, predicted: list[int]) -> _Call | None:
    """The first outermost call that leads from the deepest stride to finer ones only; the encoder ends before it.

    Args:
        calls: those of the whole network.
        deepest: the stride.
        predicted: strides of the network's outputs, if all are maps.
    """
    for c in calls:
        leads_back = c.takes(deepest) and c.outputs and not any(f.stride >= deepest for f in c.outputs)
        if leads_back and not any(parent.gives(deepest) for parent in c.parents):
            comes_again = any(other.entered > c.left and other.gives(deepest) for other in calls)
            return c if predicted or not comes_again else None
    return None


# These layers may follow the last convolution of a head: they change scores, not features.
_OF_SCORES = (nn.Sigmoid, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.LogSigmoid, nn.Identity, nn.Dropout, nn.Dropout2d)


def _head(model: nn.Module, calls: list[_Call], deepest: int, predicted: list[int]) -> _Call | None:
    """The first outermost call after the widest map of the deepest stride, if the following layers narrow to a prediction.

    Args:
        calls: those of the encoder and perhaps of a head, in order.
        deepest, predicted: as for `_decoder`.

    Raises:
        ValueError: the call may belong to a head or to the encoder.
    """
    within = [c for c in calls if c.gives(deepest) and not c.takes(1)]
    chain = [c for c in within if not any(parent in within for parent in c.parents)]
    widths = [max(f.channels for f in c.outputs if f.stride == deepest) for c in chain]
    if not predicted or not chain or widths[-1] == max(widths):
        return None
    widest = max(i for i, width in enumerate(widths) if width == max(widths))
    head, width = chain[widest + 1], widths[-1]
    modules = [model.get_submodule(c.module) for c in calls if c.entered >= head.entered and c.gives(deepest)]
    computing = [m for m in modules if m._parameters or not (list(m.children()) or isinstance(m, _OF_SCORES))]
    if computing and isinstance(computing[-1], nn.Conv2d):  # scores need no norm
        return head
    if 2 * width >= widths[widest]:
        return None
    if deepest not in predicted:
        return head
    raise ValueError(
        f"the maps of stride {deepest} of {type(model).__name__} narrow from {widths[widest]} channels "
        f"({chain[widest].module!r}) to {width} ({chain[-1].module!r}), and either may be its deepest features: pass sparsify "
        "taps=[...], the modules whose outputs are the maps, shallow to deep, or pass the network without its head"
    )


def _last_block(model: nn.Module, calls: list[_Call], deepest: int, layer: str) -> _Call | None:
    """The call of the block that a layer belongs to, if the encoder ends with it or with more blocks of its kind.

    Args:
        calls: those of the encoder.
        deepest: its deepest stride.
        layer: a path.
    """
    around = [c for c in calls if f"{layer}.".startswith(f"{c.module}.") and c.takes(deepest) and c.gives(deepest)]
    while len(around) > 1 and _is_chain(around[0], calls):
        around.pop(0)
    if not around:
        return None
    after = [c for c in calls if c.entered > around[0].left]
    kind = type(model.get_submodule(around[0].module))
    alike = [c for c in after if type(model.get_submodule(c.module)) is kind]
    others = [c for c in after if c not in alike and not any(parent in alike for parent in c.parents)]
    return None if any(isinstance(model.get_submodule(c.module), nn.Conv2d) for c in others) else around[0]


def _is_chain(call: _Call, calls: list[_Call]) -> bool:
    """Whether a module only calls others one after the other, each on the result of the one before."""
    inside = [c for c in calls if c.parents and c.parents[-1] is call]
    if not inside or any(len(c.inputs) != 1 or len(c.outputs) != 1 for c in (call, *inside)):
        return False
    made = [call.inputs[0].made, *(c.left for c in inside)]
    return [c.inputs[0].made for c in inside] == made[:-1] and call.outputs[0].made == made[-1]


def _goes_on(call: _Call, stride: int) -> bool:
    """Whether the block that computes a map of this stride returns it or a deeper map."""
    return all(max(f.stride for f in parent.outputs) >= stride for parent in call.parents if parent.outputs)


def _consumer(calls: list[_Call], stride: int, following: int | None) -> _Call | None:
    """The last outermost call that leads from `stride` to the following one or, from the deepest, to the head."""
    if following is None:
        done = _last_producer(calls, stride).left
        fits = [c for c in calls if c.entered > done and c.takes(stride) and not c.outputs]
    else:
        fits = [c for c in calls if c.takes(stride) and c.gives(following)]
    inside = {id(c) for c in fits}
    outermost = [c for c in fits if not any(id(parent) in inside for parent in c.parents)]
    return outermost[-1] if outermost else None


def _last_producer(calls: list[_Call], stride: int) -> _Call:
    """The call that returns a map of `stride` and ends last: the block rather than its last layer."""
    return max((c for c in calls if c.gives(stride)), key=lambda c: c.left)


def _given_taps(model: nn.Module, calls: list[_Call], names: Sequence[str]) -> list[Tap]:
    chosen = []
    for name in names:
        of_module = [c for c in calls if c.module == name and c.outputs]
        if not of_module:
            known = name in dict(model.named_modules())
            raise ValueError(f"taps names {name!r}, which {'returns no aligned feature map' if known else 'is not a module'}")
        found = of_module[-1].outputs[-1]
        chosen.append(Tap(found.stride, found.channels, name, False, of_module[-1].number, found.path))
    strides = [tap.stride for tap in chosen]
    if strides != sorted(set(strides)) or not strides:
        raise ValueError(f"taps must go from shallow to deep, one per stride; their strides are {strides}")
    return chosen


class TapHook:
    """The hook at a tap's module: calls `reached(i, map)`, and ends the forward pass if that returns True."""

    def __init__(self, i: int, tap: Tap, reached: Callable[[int, Any], bool]) -> None:
        self.i, self.path, self.reached = i, tap.path, reached

    def at_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._look((args, kwargs))

    def at_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._look(output)

    def _look(self, value: Any) -> None:
        for key in self.path:
            value = value[key]
        if self.reached(self.i, value):
            raise ReachedDeepest


def attach(model: nn.Module, taps: tuple[Tap, ...], reached: Callable[[int, Any], bool]) -> list[Any]:
    """Hooks all taps: each call of tap i's module calls `reached(i, map)`; when that is True, `ReachedDeepest` is raised."""
    handles = []
    for i, tap in enumerate(taps):
        module, hook = model.get_submodule(tap.module), TapHook(i, tap, reached)
        if tap.at_input:
            handles.append(module.register_forward_pre_hook(hook.at_input, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(hook.at_output))
    return handles


def dense_features(model: nn.Module, taps: tuple[Tap, ...], images: Tensor, *, training: bool = False) -> list[Tensor]:
    """A dense model's maps (B, D, H / s, W / s), shallow to deep, of images (B, C, H, W), in eval mode; differentiable."""
    recorder = Recorder([tap.call for tap in taps])
    modes = {module: module.training for module in model.modules()}
    handles = attach(model, taps, recorder.reached)
    try:
        model.train(training)  # a user's class may not return self
        model(images)
    except ReachedDeepest:
        pass
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    h, w = images.shape[2:]
    maps = []
    for i, tap in enumerate(taps):
        value = recorder.maps[i]
        is_first = value.shape[2:] == (h // tap.stride, w // tap.stride)
        maps.append(value if is_first else value.permute(0, 3, 1, 2))
    return maps


def _probe(model: nn.Module, in_channels: int | None) -> tuple[int, list[_Call], list[int]]:
    """The number of channels that the model takes, and what `_record` finds on a small image."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    candidates = [in_channels] if in_channels else list(dict.fromkeys([*(m.in_channels for m in convolutions), 3, 1]))
    problems = []
    for channels in candidates:
        try:
            return channels, *_record(model, channels)
        except Exception as error:  # a network may fail in any way on an image that it does not take
            said = f": {first_line(error)}" if str(error).strip() else ""
            problems.append(f"{type(error).__name__}{said}")
    raise ValueError(
        f"{type(model).__name__} cannot be run as model(images) on images of {candidates[0]} channels and "
        f"{_PROBE_CELLS[0] * _PROBE_STRIDE}x{_PROBE_CELLS[1] * _PROBE_STRIDE} pixels: {problems[0]}"
    )


def probe_images(model: nn.Module, in_channels: int, stride: int = _PROBE_STRIDE) -> Tensor:
    """Two images that tell strides up to the given one apart."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    size = tuple(stride * cells for cells in _PROBE_CELLS)
    return torch.randn(2, in_channels, *size, generator=generator).to(like.device, like.dtype)


def _stride_and_channels(value: Any, largest: int = _PROBE_STRIDE) -> tuple[int, int] | None:
    """Those of a map (B, C, H, W) or (B, H, W, C) of the probe; None for other tensors and unaligned maps."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return None
    for sizes, channels in ((value.shape[2:], value.shape[1]), (value.shape[1:3], value.shape[3])):
        full = [largest * cells for cells in _PROBE_CELLS]
        strides = {n // size if size and n % size == 0 else 0 for n, size in zip(full, sizes, strict=True)}
        if len(strides) == 1 and 0 not in strides and sizes[1] > 1:
            return strides.pop(), channels
    return None


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, (*path, key))
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _tensors(part, (*path, i))


@torch.no_grad()
def _record(model: nn.Module, in_channels: int) -> tuple[list[_Call], list[int]]:
    """The calls of the model's modules, and the strides of its outputs if all are maps."""
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    made: dict[int, int] = {}  # by the id of a tensor: the number of the call that returned it
    kept: list[Tensor] = []  # so that no id comes twice
    clock = 0

    def maps_in(value: Any) -> list[_Found]:
        found = []
        for path, tensor in _tensors(value):
            if seen := _stride_and_channels(tensor):
                found.append(_Found(path, *seen, made.get(id(tensor), -1)))
        return found

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal clock
        clock += 1
        number = 1 + sum(c.module == name for c in calls)
        call = _Call(name, number, clock, tuple(open_calls), maps_in((args, kwargs)))
        module = model.get_submodule(name)
        call.is_window = isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
        call.steps = call.is_window and module.stride not in (1, (1, 1))
        calls.append(call)
        open_calls.append(call)

    def leave(out: Any) -> None:
        nonlocal clock
        clock += 1
        call = open_calls.pop()
        call.left, call.outputs = clock, maps_in(out)
        if not call.outputs:
            call.unaligned = next((tuple(t.shape[2:]) for _, t in _tensors(out) if _is_unaligned(t)), ())
        for _, tensor in _tensors(out):
            made[id(tensor)] = clock
            kept.append(tensor)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda _m, a, k, name=name: enter(name, a, k), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda _m, _a, out: leave(out)))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        out = [_stride_and_channels(tensor) for _, tensor in _tensors(model(probe_images(model, in_channels)))]
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    return calls, [found[0] for found in out if found] if all(out) else []


def _before_last_tap(model: nn.Module, taps: list[Tap], in_channels: int, patch: int) -> tuple[set[str], set[str], set[str]]:
    """Modules that run before the last tap in either mode, those of them whose first argument is always a map, and parameters
    that get a gradient. `patch` is at least the coarsest stride of a module's map."""
    called: set[str] = set()
    on_vectors: set[str] = set()
    needed: set[str] = set()

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.add(name)
        first = next(_tensors((args, kwargs)), ((), None))[1]
        if _stride_and_channels(first, patch) is None and not _is_unaligned(first):
            on_vectors.add(name)

    parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}

    def run(training: bool) -> None:
        recorder = Recorder([tap.call for tap in taps])
        # The taps come first, so that a module whose input is the last map does not count as called.
        handles = attach(model, tuple(taps), recorder.reached)
        handles += [
            module.register_forward_pre_hook(lambda _m, a, k, name=name: enter(name, a, k), with_kwargs=True)
            for name, module in model.named_modules()
            if name
        ]
        try:
            with suppress(ReachedDeepest):
                model.train(training)
                model(probe_images(model, in_channels, patch))
        finally:
            for handle in handles:
                handle.remove()
        if torch.is_grad_enabled():
            total = sum(x.float().sum() for x in recorder.maps.values())
            gradients = torch.autograd.grad(total, [*parameters.values()], allow_unused=True)
            needed.update(name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)

    for training in (False, True):
        try:
            with torch.enable_grad():
                run(training)
        except Exception:  # autograd forbids some in-place operations: without gradients it runs, and all may be needed
            needed.update(parameters)
            try:
                with torch.no_grad():
                    run(training)
            except Exception as error:
                mode = "training" if training else "eval"
                raise ValueError(
                    f"{type(model).__name__} cannot be run in {mode} mode, as model(images) with two images: "
                    f"{first_line(error)}"
                ) from error
    return called, called - on_vectors, needed


def _is_unaligned(value: Any) -> bool:
    """Whether a tensor is a map on no grid of patches; its layers become sparse, too, so that they can say what is wrong."""
    return isinstance(value, Tensor) and value.ndim == 4 and min(value.shape[2:]) > 1
