"""Compares a sparse network with the dense one that it came from, so that every accepted network runs and computes the same.

Both are copies that are thrown away, so the returned network has not run, whatever state it keeps between calls.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparkme.errors import MixedPixelsError, UnsupportedLayerError, first_line
from sparkme.sparse.encoder import SparseEncoder, walk
from sparkme.sparse.engines import ENGINES, why_not
from sparkme.sparse.forms.layer import SparseLayer
from sparkme.sparse.grid import Grid
from sparkme.sparse.hierarchy import Hierarchy, dense_features

# Allowed difference on a whole image, relative to the largest value of a map. Rounding stays a hundred times below it, and a
# wrong layer a hundred times above.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# Allowed difference of a gradient, in Euclidean norm: relative to its own, plus a share of the largest of all. Where a ReLU's
# input is within rounding of zero, a whole gradient may move.
GRADIENT_TOLERANCE, GRADIENT_FLOOR = 0.2, 1e-4
# For maps and gradients in training mode: batch norms over the few pixels of a small image amplify rounding.
TRAINING_TOLERANCE = 0.5

_BLIND = (
    "look for a torch.autograd.Function or a checkpoint with use_reentrant=True, which do not work on sparse maps, and use "
    "torch's own functions instead"
)


class DifferenceError(UnsupportedLayerError):
    """The sparse network computes something else, perhaps because it amplifies rounding."""


class TooSmallError(UnsupportedLayerError):
    """The dense network itself does not run on such small images."""


@torch.no_grad()
def expose_branches(model: nn.Module) -> nn.Module:
    """Sets gains and layer scales close to zero to values around one, so that errors in their branches show."""
    for parameter in model.parameters():
        is_vector = parameter.ndim <= 1 or parameter.numel() == max(parameter.shape)
        if parameter.is_floating_point() and is_vector and parameter.numel() and parameter.abs().mean() < 0.1:
            values = torch.linspace(0.8, 1.2, parameter.numel(), device=parameter.device, dtype=torch.float64)
            parameter.copy_(values.view_as(parameter))
    return model


def try_out(encoder: SparseEncoder, dense: nn.Module) -> None:
    """Runs the encoder on small images, in eval and training mode, on every engine that can run, and compares.

    Args:
        encoder: the run may change it.
        dense: the network that it was made from, with the same weights; the run may change it, too.

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
                f"no gradient reaches any parameter of the network; remove torch.no_grad() and detach(), or {_BLIND}"
            )
        total.backward()


def small_images(hierarchy: Hierarchy, like: Tensor, batch: int = 1) -> Tensor:
    """Noise of 2 x 3 patches, (B, C, H, W), on the device and in the dtype of `like`."""
    shape = batch, hierarchy.in_channels, 2 * hierarchy.patch, 3 * hierarchy.patch
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


@torch.no_grad()
def compare_once(encoder: SparseEncoder, images: Tensor, expected: list[Tensor]) -> None:
    """The shortest part of a trial: whole images, in eval mode, on the engine that `auto` chooses.

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
            f"the network cannot run on images of {sides} pixels, with patches of {encoder.patch} x {encoder.patch}: "
            f"{first_line(error)}; the patch follows from the coarsest map of a module, so if a function makes a coarser map, "
            "use a module for it, such as nn.PixelUnshuffle"
        ) from error


def _compare_maps(
    encoder: SparseEncoder, expected: list[Tensor], images: Tensor, whole: Tensor, spoiled: Tensor, some: Tensor
) -> None:
    """In eval mode: compares with the dense network on whole images, and engines with each other on hidden patches of NaN."""
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
            f"the sparse network returns {tuple(value.shape)} {where}, the dense one {tuple(expected.shape)}; look for code "
            "that checks a tensor's class, or for hard-coded sizes"
        )
    error = (value - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    if not error <= TOLERANCE.get(value.dtype, 0.1) and (value - expected).abs().max() != 0:
        raise DifferenceError(
            f"the sparse and the dense network differ {where}, by {float(error):.1e} of the largest value; look for in-place "
            "operations, state that changes between calls, or hard-coded sizes"
        )


class _Pass(NamedTuple):
    """A forward and backward pass on whole images: maps, and gradients by the dense names (NaN stands for none)."""

    maps: list[Tensor]
    gradients: dict[str, Tensor]


def _compare_gradients(encoder: SparseEncoder, dense: nn.Module, images: Tensor, whole: Tensor, engines: Sequence[str]) -> None:
    """Compares maps and gradients with the dense network's, in the encoder's mode, on every engine.

    If in-place operations forbid training the dense network, the first engine stands for it. If it draws random numbers, only
    the presence of gradients is compared.

    Raises:
        DifferenceError: a map or a gradient differs.
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
    """None if in-place operations forbid training the dense network."""
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
    """Tries more seeds until each parameter has had a gradient, since stochastic depth skips layers."""
    for seed in range(2, 10):
        missing = [n for n, g in found.gradients.items() if _is_missing(g) and not _is_missing(expected.gradients[n])]
        if not missing:
            return
        found.gradients.update(_sparse_pass(encoder, images, whole, missing, expected, seed=seed).gradients)


def _draws_numbers(dense: nn.Module, encoder: SparseEncoder, images: Tensor) -> bool:
    """Whether the dense network's maps in training mode depend on the seed."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with _as_before(dense), torch.no_grad():
            found.append(_dense_maps(dense, encoder, images, training=True))
    return not all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@contextmanager
def _as_before(network: nn.Module) -> Iterator[None]:
    """Restores the values of buffers."""
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
                f"{where}, the sparse and the dense network differ at stride {stride}, by {error:.1e} of the map; look for "
                "code that checks a layer's class or changes its attributes"
            )


def _compare_passes(
    found: dict[str, Tensor], expected: dict[str, Tensor], where: str, *, is_random: bool, training: bool
) -> None:
    sizes = {name: float(g.norm()) for name, g in expected.items() if not _is_missing(g)}
    least = GRADIENT_FLOOR * max(sizes.values(), default=0.0)
    for name, value in found.items():
        if name not in sizes:
            if not is_random and not _is_missing(value) and float(value.norm()) > least:
                raise DifferenceError(f"{where}, the parameter {name!r} gets a gradient in the sparse network only; {_BLIND}")
            continue
        if _is_missing(value):
            raise DifferenceError(f"{where}, the parameter {name!r} gets no gradient in the sparse network; {_BLIND}")
        tolerance = TRAINING_TOLERANCE if training else GRADIENT_TOLERANCE
        error = float((value - expected[name]).norm())
        if not is_random and not error <= tolerance * sizes[name] + least:
            raise DifferenceError(
                f"{where}, the gradient of the parameter {name!r} in the sparse network is off by {error:.2g}, the dense one's "
                f"norm is {sizes[name]:.2g}; {_BLIND}"
            )


def _is_missing(gradient: Tensor) -> bool:
    return bool(gradient.flatten()[:1].isnan().all() and gradient.isnan().all())  # of most the first number says it


def _gradients(maps: Sequence[Tensor], like: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a sum to which every map contributes, however large its values are; NaN for weights without one."""
    total = _weighted(maps, [y.detach().cos() for y in like])
    found = torch.autograd.grad(total, weights, allow_unused=True) if total.requires_grad else [None] * len(weights)
    return [torch.full_like(p, torch.nan) if g is None else g for p, g in zip(weights, found, strict=True)]


def _weighted(maps: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * factor).mean() for x, factor in zip(maps, factors, strict=True)]).sum()


def _in_dense_layout(encoder: SparseEncoder, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """One value per encoder parameter, such as its gradient, by dense name and in the dense layout."""
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
    """Adds the name of the failing module to errors. Modules inside sparse layers get no hooks, which would prevent fusion."""
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
            remedy = "change it, or its input, in the dense model"
        elif not path:
            remedy = "change its forward, or move that into a module with a sparse form in sparkme.sparse.forms.SPARSE_FORMS"
        kind = "" if isinstance(error, NotImplementedError | ValueError) else f"{type(error).__name__}: "
        mixes = isinstance(error, MixedPixelsError)
        message = f"{where} has no sparse form: {kind}{first_line(error)}; {remedy}"
        raise UnsupportedLayerError(message, path, mixes_pixels=mixes) from error
    finally:
        for handle in handles:
            handle.remove()
