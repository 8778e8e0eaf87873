"""Tries a sparse network against the dense one it came from, so that what is accepted computes what it should, and runs.

Both are copies that are thrown away: whatever a network keeps between its calls, the one that is handed out has not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparkme.errors import UnsupportedLayerError, first_line
from sparkme.grid import Grid
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.engines import ENGINES, why_not
from sparkme.sparse.hierarchy import dense_features

# What the sparse and the dense network may differ by on a whole image, relative to the largest value of a map. Rounding stays
# a hundred times below, a wrong layer is off by a hundred times more.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# The same for the norm of a gradient, relative to itself and, besides, to the largest of all: where a ReLU's input is
# within rounding of zero, a whole gradient may move; where a gradient is missing, it is off by itself.
GRADIENT_TOLERANCE, GRADIENT_FLOOR = 0.2, 1e-4
# And for a map in training mode, of Euclidean norms: batch norms over the few pixels of a small image amplify rounding.
TRAINING_TOLERANCE = 0.5

_BLIND = (
    "look for a torch.autograd.Function or a checkpoint with use_reentrant=True, which see no sparse map, and write it with "
    "torch's own functions"
)


class DifferenceError(UnsupportedLayerError):
    """The sparse network computes something else; which may be rounding, in a network that amplifies it."""


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
    images = torch.randn(2, encoder.in_channels, 2 * patch, 3 * patch, generator=torch.Generator().manual_seed(1))
    images = images.to(like.device, like.dtype)
    whole = torch.ones(2, 1, 2, 3, dtype=torch.bool, device=like.device)
    some = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool, device=like.device).view(2, 1, 2, 3)
    hidden = Grid(some, patch).mask(1, torch.bool).logical_not()
    with torch.no_grad():
        _compare_maps(encoder, _dense_maps(dense, encoder, images), images, whole, images.masked_fill(hidden, torch.nan), some)
    encoder.eval().set_engine("auto")
    with _named_errors(encoder.network), torch.enable_grad():
        _compare_gradients(encoder, dense, images, whole)
    encoder.train()
    with _named_errors(encoder.network), torch.enable_grad():
        total = torch.stack([x.rows.float().square().mean() for x in encoder(images.clone(), some)]).sum()
        if not total.requires_grad:
            raise UnsupportedLayerError(f"no gradient reaches the parameters of the sparse network; {_BLIND}")
        total.backward()
    with torch.no_grad():
        _compare_training(encoder, dense, images, whole)


def _dense_maps(dense: nn.Module, encoder: SparseEncoder, images: Tensor, *, training: bool = False) -> list[Tensor]:
    try:
        return dense_features(dense, encoder.hierarchy.taps, images.clone(), training=training)
    except Exception as error:
        sides = " x ".join(map(str, images.shape[2:]))
        raise UnsupportedLayerError(f"the network cannot be run on images of {sides} pixels: {first_line(error)}") from error


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
        raise DifferenceError(f"the sparse network gives {tuple(value.shape)} {where}, the dense one {tuple(expected.shape)}")
    error = (value - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    if not error <= TOLERANCE.get(value.dtype, 0.1) and (value - expected).abs().max() != 0:
        raise DifferenceError(
            f"the sparse network does not compute what the dense one does: {where} they differ by {float(error):.1e} of the "
            "largest value; look for operations in place, state that changes from call to call, or sizes that are hard-coded"
        )


def _compare_gradients(encoder: SparseEncoder, dense: nn.Module, images: Tensor, whole: Tensor) -> None:
    """Compares the gradient of every parameter with the dense network's, in size, on a whole image.

    Raises:
        DifferenceError: one differs, since the network does something that torch does not show to a sparse map.
    """
    names, weights = zip(*((name, p) for name, p in dense.named_parameters() if p.requires_grad))
    try:
        features = dense_features(dense, encoder.hierarchy.taps, images.clone())
        factors = [y.detach().cos() for y in features]  # every map counts, however large its values are
        expected = torch.autograd.grad(_weighted(features, factors), weights, allow_unused=True)
    except RuntimeError:  # operations in place keep the dense network from being trained as it is
        return
    del features
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    total = _weighted([x.dense() for x in encoder(images.clone(), whole)], factors)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else [None] * len(parameters)
    unreached = [torch.full_like(p, torch.nan) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    ours = _in_dense_layout(encoder, parameters, unreached)
    sizes = [(name, float(ours[name].norm()), float(g.norm())) for name, g in zip(names, expected) if g is not None]
    least = GRADIENT_FLOOR * max((size for _, _, size in sizes), default=0.0)
    for name, size, expected_size in sizes:
        if not abs(size - expected_size) <= GRADIENT_TOLERANCE * expected_size + least:
            found = "does not reach" if math.isnan(size) else f"is {size:.2g} instead of {expected_size:.2g} at"
            raise DifferenceError(f"the gradient {found} the parameter {name!r} of the sparse network; {_BLIND}")


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


def _compare_training(encoder: SparseEncoder, dense: nn.Module, images: Tensor, whole: Tensor) -> None:
    """Compares maps in training mode, where the dense network draws no random numbers then."""
    expected = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected.append(_dense_maps(dense, encoder, images, training=True))
    if not all(torch.equal(x, y) for x, y in zip(*expected, strict=True)):
        return
    with _named_errors(encoder.network):
        maps = encoder.train()(images.clone(), whole)
    for x, y in zip(maps, expected[0], strict=True):
        error = float((x.dense() - y).norm() / y.norm().clamp_min(1e-30))
        if not error <= TRAINING_TOLERANCE:
            raise DifferenceError(
                f"in training mode the sparse network does not compute what the dense one does: at stride {x.stride} they "
                f"differ by {error:.1e} of the map; look for code that asks for a layer's class or changes its attributes"
            )


@contextmanager
def _named_errors(network: nn.Module) -> Iterator[None]:
    """Names the module in which something failed."""
    open_modules: list[str] = []
    names = {name: type(module).__name__ for name, module in network.named_modules()}

    def enter(name: str) -> Any:
        return lambda module, args: open_modules.append(name)

    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(lambda m, a, out: open_modules.pop() and None))
    try:
        yield
    except UnsupportedLayerError:
        raise
    except Exception as error:
        path = next((name for name in reversed(open_modules)), "")
        where = f"layer {path!r} ({names[path]})" if path else f"the network ({names['']})"
        kind = "" if isinstance(error, NotImplementedError | ValueError) else f"{type(error).__name__}: "
        raise UnsupportedLayerError(
            f"{where} has no sparse form: {kind}{first_line(error)}; replace it in the dense model, or give its "
            "class a sparse form in sparkme.sparse.forms.SPARSE_FORMS",
            layer=path,
        ) from error
    finally:
        for handle in handles:
            handle.remove()
