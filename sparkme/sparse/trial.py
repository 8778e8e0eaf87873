"""Tries a sparse network against the dense one it came from, so that what is accepted computes what it should, and runs.

Both are copies that are thrown away: whatever a network keeps between its calls, the one that is handed out has not run.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparkme.errors import UnsupportedLayerError, first_line
from sparkme.sparse.encoder import SparseEncoder, walk
from sparkme.sparse.engines import ENGINES, why_not
from sparkme.sparse.forms.layer import SparseLayer
from sparkme.sparse.grid import Grid
from sparkme.sparse.hierarchy import Hierarchy, dense_features

# What the sparse and the dense network may differ by on a whole image, relative to the largest value of a map. Rounding stays
# a hundred times below, a wrong layer is off by a hundred times more.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# The same for a gradient, of Euclidean norms, relative to its own and, besides, to the largest of all: where a ReLU's input is
# within rounding of zero, a whole gradient may move.
GRADIENT_TOLERANCE, GRADIENT_FLOOR = 0.2, 1e-4
# And for maps and gradients in training mode: batch norms over the few pixels of a small image amplify rounding.
TRAINING_TOLERANCE = 0.5

_BLIND = (
    "look for a torch.autograd.Function or a checkpoint with use_reentrant=True, which see no sparse map, and write it with "
    "torch's own functions"
)


class DifferenceError(UnsupportedLayerError):
    """The sparse network computes something else; which may be rounding, in a network that amplifies it."""


class TooSmallError(UnsupportedLayerError):
    """The dense network itself does not run on images of so few pixels."""


@torch.no_grad()
def expose_branches(model: nn.Module) -> nn.Module:
    """Gives gains and layer scales that are close to zero values around one, else whole branches would not show."""
    for parameter in model.parameters():
        is_vector = parameter.ndim <= 1 or parameter.numel() == max(parameter.shape)
        if parameter.is_floating_point() and is_vector and parameter.numel() and parameter.abs().mean() < 0.1:
            values = torch.linspace(0.8, 1.2, parameter.numel(), device=parameter.device, dtype=torch.float64)
            parameter.copy_(values.view_as(parameter))
    return model


def try_out(encoder: SparseEncoder, dense: nn.Module) -> None:
    """Runs the encoder on small images, in eval and training mode, on every engine that can run, and compares.

    Args:
        encoder: changed by it, as any run changes a network.
        dense: what it was made from, with the same weights; likewise.

    Raises:
        DifferenceError: the encoder does not compute what the dense network does.
        UnsupportedLayerError: the encoder does not run.
    """
    for parameter in (*encoder.parameters(), *dense.parameters()):
        parameter.requires_grad_(parameter.is_floating_point())
    like, patch = next(encoder.parameters()), encoder.patch
    images = small_images(encoder.hierarchy, like, batch=2)
    whole = torch.ones(2, 1, 2, 3, dtype=torch.bool, device=like.device)
    some = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool, device=like.device).view(2, 1, 2, 3)
    hidden = Grid(some, patch).mask(1, torch.bool).logical_not()
    with torch.no_grad():
        _compare_maps(encoder, _dense_maps(dense, encoder, images), images, whole, images.masked_fill(hidden, torch.nan), some)
    _compare_gradients(encoder.eval().set_engine("auto"), dense, images, whole, ["auto"])
    _compare_gradients(encoder.train(), dense, images, whole, [name for name in ENGINES if not why_not(name, images.device)])
    with _named_errors(encoder.network), torch.enable_grad():
        total = torch.stack([x.rows.float().square().mean() for x in encoder.set_engine("auto")(images.clone(), some)]).sum()
        if not total.requires_grad:
            raise UnsupportedLayerError(
                f"no gradient reaches any parameter of the network; take out a torch.no_grad() or detach(), or {_BLIND}"
            )
        total.backward()


def small_images(hierarchy: Hierarchy, like: Tensor, batch: int = 1) -> Tensor:
    """Noise of 2 x 3 patches, (B, C, H, W), on the device and in the dtype of `like`."""
    shape = batch, hierarchy.in_channels, 2 * hierarchy.patch, 3 * hierarchy.patch
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


@torch.no_grad()
def compare_once(encoder: SparseEncoder, images: Tensor, expected: list[Tensor]) -> None:
    """The shortest part of a trial: whole images, in eval mode, on the engine that `auto` stands for.

    Raises:
        UnsupportedLayerError: the encoder does not compute what the dense network does, or does not run.
    """
    whole = torch.ones(len(images), 1, 2, 3, dtype=torch.bool, device=images.device)
    with _named_errors(encoder.network):
        for x, y in zip(encoder.eval()(images.clone(), whole), expected, strict=True):
            _compare(x.dense(), y, f"on a whole image, at stride {x.stride}")


def _dense_maps(dense: nn.Module, encoder: SparseEncoder, images: Tensor, *, training: bool = False) -> list[Tensor]:
    try:
        return dense_features(dense, encoder.hierarchy.taps, images.clone(), training=training)
    except Exception as error:
        sides = " x ".join(map(str, images.shape[2:]))
        raise TooSmallError(
            f"the network cannot be run on images of {sides} pixels, patches of {encoder.patch} x {encoder.patch}: "
            f"{first_line(error)}; patches are as large as the coarsest map of a module needs them, so where a function makes "
            "a coarser one, let a module do it, such as nn.PixelUnshuffle"
        ) from error


def _compare_maps(
    encoder: SparseEncoder, expected: list[Tensor], images: Tensor, whole: Tensor, spoiled: Tensor, some: Tensor
) -> None:
    """In eval mode: on whole images with the dense network, with hidden patches of NaN from engine to engine."""
    results = []
    for name in ENGINES:
        if why_not(name, images.device):
            continue
        encoder.eval().set_engine(name)
        with _named_errors(encoder.network):
            for x, y in zip(encoder(images.clone(), whole), expected, strict=True):
                _compare(x.dense(), y, f"on a whole image, at stride {x.stride}, engine {name}")
            results.append([x.rows for x in encoder(spoiled.clone(), some)])
    for rows in results:
        for x, y, stride in zip(rows, results[0], encoder.strides, strict=True):
            _compare(x, y, f"with hidden patches, at stride {stride}, from engine to engine")


def _compare(value: Tensor, expected: Tensor, where: str) -> None:
    if value.shape != expected.shape:
        raise DifferenceError(
            f"the sparse network gives {tuple(value.shape)} {where}, the dense one {tuple(expected.shape)}; look for code that "
            "asks for a tensor's class, or for sizes that are hard-coded"
        )
    error = (value - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    if not error <= TOLERANCE.get(value.dtype, 0.1) and (value - expected).abs().max() != 0:
        raise DifferenceError(
            f"the sparse network does not compute what the dense one does: {where} they differ by {float(error):.1e} of the "
            "largest value; look for operations in place, state that changes from call to call, or sizes that are hard-coded"
        )


class _Pass(NamedTuple):
    """Forward and backward pass on whole images: the maps, and gradients by the dense network's names, NaN where none comes."""

    maps: list[Tensor]
    gradients: dict[str, Tensor]


def _compare_gradients(encoder: SparseEncoder, dense: nn.Module, images: Tensor, whole: Tensor, engines: Sequence[str]) -> None:
    """Compares maps and which parameters get which gradient with the dense network, in the encoder's mode, on every engine.

    Where operations in place keep the dense network from being trained, the first engine stands for it. Where it draws random
    numbers, only whether gradients come is compared.

    Raises:
        DifferenceError: something differs, since the network does what torch does not show to a sparse map.
    """
    expected, names = _dense_pass(dense, encoder, images), {name for name, _ in dense.named_parameters()}
    is_random = encoder.training and _draws_numbers(dense, encoder, images)
    for name in engines:
        where = f"in {'training' if encoder.training else 'eval'} mode, engine {encoder.set_engine(name).engine.name}"
        found = _sparse_pass(encoder, images, whole, names, expected)
        expected = expected or found
        if is_random:
            _wait_for_gradients(encoder, images, whole, expected, found)
        elif encoder.training:
            _compare_training_maps(found.maps, expected.maps, encoder.strides, where)
        _compare_passes(found.gradients, expected.gradients, where, is_random=is_random, training=encoder.training)


def _dense_pass(dense: nn.Module, encoder: SparseEncoder, images: Tensor) -> _Pass | None:
    """None where operations in place keep the network from being trained as it is."""
    names, weights = zip(*((name, p) for name, p in dense.named_parameters() if p.requires_grad))
    torch.manual_seed(1)
    with _as_before(dense), torch.enable_grad():
        try:
            maps = dense_features(dense, encoder.hierarchy.taps, images.clone(), training=encoder.training)
            found = _gradients(maps, maps, weights)
        except RuntimeError:
            return None
    return _Pass([x.detach() for x in maps], dict(zip(names, found, strict=True)))


def _sparse_pass(
    encoder: SparseEncoder, images: Tensor, whole: Tensor, names: Container[str], like: _Pass | None, *, seed: int = 1
) -> _Pass:
    torch.manual_seed(seed)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    with _as_before(encoder), torch.enable_grad(), _named_errors(encoder.network):
        maps = [x.dense() for x in encoder(images.clone(), whole)]
        found = _gradients(maps, maps if like is None else like.maps, parameters)
    state = _in_dense_layout(encoder, parameters, found)
    return _Pass([x.detach() for x in maps], {name: value for name, value in state.items() if name in names})


def _wait_for_gradients(encoder: SparseEncoder, images: Tensor, whole: Tensor, expected: _Pass, found: _Pass) -> None:
    """Layers may be left out by chance: tries a few times more until each has had its gradient once."""
    for seed in range(2, 10):
        missing = [n for n, g in found.gradients.items() if _is_missing(g) and not _is_missing(expected.gradients[n])]
        if not missing:
            return
        found.gradients.update(_sparse_pass(encoder, images, whole, missing, expected, seed=seed).gradients)


def _draws_numbers(dense: nn.Module, encoder: SparseEncoder, images: Tensor) -> bool:
    """Whether the dense network gives different maps in training mode from seed to seed."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with _as_before(dense), torch.no_grad():
            found.append(_dense_maps(dense, encoder, images, training=True))
    return not all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@contextmanager
def _as_before(network: nn.Module) -> Iterator[None]:
    """Puts back what buffers held before."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _compare_training_maps(maps: Sequence[Tensor], expected: Sequence[Tensor], strides: Sequence[int], where: str) -> None:
    for x, y, stride in zip(maps, expected, strides, strict=True):
        error = float((x - y).norm() / y.norm().clamp_min(1e-30))
        if not error <= TRAINING_TOLERANCE:
            raise DifferenceError(
                f"{where}, the sparse network does not compute what the dense one does: at stride {stride} they differ by "
                f"{error:.1e} of the map; look for code that asks for a layer's class or changes its attributes"
            )


def _compare_passes(
    found: dict[str, Tensor], expected: dict[str, Tensor], where: str, *, is_random: bool, training: bool
) -> None:
    sizes = {name: float(g.norm()) for name, g in expected.items() if not _is_missing(g)}
    least = GRADIENT_FLOOR * max(sizes.values(), default=0.0)
    for name, value in found.items():
        if name not in sizes:
            if not is_random and not _is_missing(value) and float(value.norm()) > least:
                raise DifferenceError(
                    f"{where}, a gradient comes to the parameter {name!r} of the sparse network alone; {_BLIND}"
                )
            continue
        if _is_missing(value):
            raise DifferenceError(
                f"{where}, the gradient does not reach the parameter {name!r} of the sparse network; {_BLIND}"
            )
        tolerance = TRAINING_TOLERANCE if training else GRADIENT_TOLERANCE
        error = float((value - expected[name]).norm())
        if not is_random and not error <= tolerance * sizes[name] + least:
            raise DifferenceError(
                f"{where}, the gradient of the parameter {name!r} of the sparse network differs from the dense one's by "
                f"{error:.2g}, and that is {sizes[name]:.2g} large; {_BLIND}"
            )


def _is_missing(gradient: Tensor) -> bool:
    return bool(gradient.flatten()[:1].isnan().all() and gradient.isnan().all())  # of most the first number says it


def _gradients(maps: Sequence[Tensor], like: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Of a number in which every map counts, however large its values are; NaN for weights that none comes to."""
    total = _weighted(maps, [y.detach().cos() for y in like])
    found = torch.autograd.grad(total, weights, allow_unused=True) if total.requires_grad else [None] * len(weights)
    return [torch.full_like(p, torch.nan) if g is None else g for p, g in zip(weights, found, strict=True)]


def _weighted(maps: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * factor).mean() for x, factor in zip(maps, factors, strict=True)]).sum()


def _in_dense_layout(encoder: SparseEncoder, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Values for the encoder's parameters, such as their gradients, under the dense names and in the dense layout."""
    kept = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        return encoder.dense_state_dict()
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data = value


@contextmanager
def _named_errors(network: nn.Module) -> Iterator[None]:
    """Names the module in which something failed. What a sparse layer is made of gets no hooks: fused layers would not be."""
    open_modules: list[str] = []
    modules: dict[nn.Module, str] = {}
    for prefix, module in walk(network):
        modules.setdefault(module, prefix.removesuffix("."))
    names = {name: type(module).__name__.removeprefix("Sparse") for module, name in modules.items()}

    def enter(name: str) -> Any:
        return lambda module, args: open_modules.append(name)

    handles = []
    for module, name in modules.items():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(lambda m, a, out: open_modules.pop() and None))
    try:
        yield
    except UnsupportedLayerError:
        raise
    except Exception as error:
        path = next((name for name in reversed(open_modules)), "")
        where = f"layer {path!r} ({names[path]})" if path else f"the network ({names['']})"
        has_form = any(name == path and isinstance(module, SparseLayer) for module, name in modules.items())
        remedy = "replace it in the dense model, or give its class a sparse form in sparkme.sparse.forms.SPARSE_FORMS"
        if has_form:
            remedy = "change it, or what enters it, in the dense model"
        elif not path:
            remedy = (
                "change that in its forward, or move it into a module with a sparse form in sparkme.sparse.forms.SPARSE_FORMS"
            )
        kind = "" if isinstance(error, NotImplementedError | ValueError) else f"{type(error).__name__}: "
        raise UnsupportedLayerError(f"{where} has no sparse form: {kind}{first_line(error)}; {remedy}", layer=path) from error
    finally:
        for handle in handles:
            handle.remove()
