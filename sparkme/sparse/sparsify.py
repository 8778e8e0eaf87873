"""Makes a sparse network from a dense one: the module tree and its names stay, the leaves become sparse.

What becomes of which layer and function stands in `sparkme.sparse.forms`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparkme.errors import first_line
from sparkme.grid import Grid
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.engines import ENGINES, why_not
from sparkme.sparse.forms import SPARSE_FORMS, SparseLayer, sparse_form
from sparkme.sparse.forms.convolution import SparseConvolution
from sparkme.sparse.hierarchy import Hierarchy, dense_features, find_hierarchy

# What the sparse and the dense network may differ by on a whole image, relative to the largest value of a map. Rounding stays
# a hundred times below, a wrong layer is off by a hundred times more.
TRIAL_TOLERANCE = 1e-3
# The same for the norm of a gradient, relative to itself and, besides, to the largest of all: where a ReLU's input is
# within rounding of zero, a whole gradient may move; where a gradient is missing, it is off by itself.
GRADIENT_TOLERANCE, GRADIENT_FLOOR = 0.2, 1e-4


class UnsupportedLayerError(ValueError):
    """A layer of the dense network, or a function it calls, has no sparse form."""


def sparsify(
    model: nn.Module, *, taps: Sequence[str] | None = None, in_channels: int | None = None, num_scales: int = 4
) -> SparseEncoder:
    """Makes a sparse encoder with the weights of a dense convolutional network.

    The dense model is left as it is. Layers after the deepest feature map (pooling, classifier) are dropped. In the end the
    encoder is tried on a small image: on every engine, with patches hidden and with none, against the dense model. So what
    comes back computes what the model computes, and runs.

    Args:
        model: any convolutional network; called as `model(images)`.
        taps: the modules whose outputs are the maps, shallow to deep, instead of those that are found.
        in_channels: of the images; found if None.
        num_scales: how many maps at most, the deepest ones.

    Returns:
        A `SparseEncoder`, on the model's device and in its dtype, with the engine that `auto` stands for there.

    Raises:
        UnsupportedLayerError: a layer, or a function that one calls, has no sparse form; says which one, why, and what to do.
        ValueError: the network is not hierarchical, or cannot be run.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise UnsupportedLayerError(
                f"{f'layer {name!r}' if name else 'the network'} is compiled: its code cannot be run on sparse maps; "
                "pass it as it was before torch.jit or torch.compile"
            )
    with _undisturbed():
        dense, reference = copy.deepcopy(model), copy.deepcopy(model)
        hierarchy = find_hierarchy(reference, num_scales, taps=taps, in_channels=in_channels)
        versions = {name: module._version for name, module in dense.named_modules()}
        encoder = SparseEncoder(_sparse_network(dense, hierarchy), hierarchy, versions)
        if next(encoder.parameters()).device.type != "meta":  # without values there is nothing to try
            with torch.no_grad():  # the probe has moved its running statistics
                for value, before in zip(reference.buffers(), model.buffers(), strict=True):
                    value.copy_(before)
            try:
                _try_out(encoder, reference)
            except UnsupportedLayerError as error:
                # A function may pool further than any module shows: then patches have to be larger.
                encoder.hierarchy = replace(hierarchy, patch=2 * hierarchy.patch)
                try:
                    _try_out(encoder, reference)
                except UnsupportedLayerError:
                    raise error from None
    return encoder


def _sparse_network(network: nn.Module, hierarchy: Hierarchy) -> nn.Module:
    """Replaces the leaves of a network by sparse ones, in place."""
    done: dict[int, nn.Module] = {}
    replaced: list[str] = []
    tied: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    names: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not name:
            if type(module) in SPARSE_FORMS:
                raise UnsupportedLayerError(f"{type(module).__name__} is a single layer, not a network")
            continue
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedLayerError(
                f"layer {name!r} ({type(module).__name__}) has backward hooks, which nothing calls in a sparse network"
            )
        if name.startswith(tuple(replaced)):
            continue
        if id(module) not in done:
            aliases = names[id(module)]
            if all(alias in hierarchy.left_out for alias in aliases):
                done[id(module)] = nn.Identity()
            elif any(alias in hierarchy.on_maps for alias in aliases):
                try:
                    done[id(module)] = sparse_form(module) or module
                except ValueError as error:
                    raise UnsupportedLayerError(f"layer {name!r} ({module}): {error}") from None
            else:
                done[id(module)] = module
        if done[id(module)] is not module:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, done[id(module)])
            replaced.append(f"{name}.")
    for group in tied.values():
        if len(group) > 1:
            _tie(network, group)
    return network


def _tie(network: nn.Module, names: Sequence[str]) -> None:
    """Has layers that share a parameter in the dense network, by these names, share it in the sparse one.

    Raises:
        UnsupportedLayerError: they have become layers that keep it in different layouts.
    """
    first: tuple[str, type, nn.Parameter] | None = None
    for name in names:
        path, _, own = name.rpartition(".")
        try:
            layer = network.get_submodule(path)
            holder, key = layer.holder(own) if isinstance(layer, SparseLayer) else (layer, own)
            parameter = holder._parameters[key]
        except (AttributeError, KeyError):  # of the head, which is gone
            continue
        layout = type(layer) if isinstance(layer, SparseConvolution) else nn.Module
        assert parameter is not None
        if first is None:
            first = path, layout, parameter
        elif (layout, parameter.shape) != (first[1], first[2].shape):
            raise UnsupportedLayerError(
                f"layers {first[0]!r} and {path!r} share a weight, of which sparse networks have different layouts; give each "
                "a weight of its own, or use one layer twice"
            )
        holder._parameters[key] = first[2]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves torch's random state as it was, and computes in full precision."""
    with torch.random.fork_rng(), torch.backends.cudnn.flags(allow_tf32=False):
        yield


def _try_out(encoder: SparseEncoder, dense: nn.Module) -> None:
    """Runs the encoder on small images, in eval and training mode, on every engine that can run, and compares.

    Raises:
        UnsupportedLayerError: it does not run, or does not compute what the dense model does.
    """
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    modes = {module: module.training for module in encoder.modules()}
    like = next(encoder.parameters())
    patch = encoder.patch
    images = torch.randn(2, encoder.in_channels, 2 * patch, 3 * patch, generator=torch.Generator().manual_seed(1))
    images = images.to(like.device, like.dtype)
    whole = torch.ones(2, 1, 2, 3, dtype=torch.bool, device=like.device)
    some = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool, device=like.device).view(2, 1, 2, 3)
    hidden = Grid(some, patch).mask(1, torch.bool).logical_not()
    try:
        try:
            with torch.no_grad():
                expected = dense_features(dense, encoder.hierarchy.taps, images)
        except Exception as error:
            sides = " x ".join(map(str, images.shape[2:]))
            raise UnsupportedLayerError(
                f"the network cannot be run on images of {sides} pixels: {first_line(error)}"
            ) from error
        spoiled = images.masked_fill(hidden, float("nan"))
        results = []
        for name in ENGINES:
            if why_not(name, like.device):
                continue
            encoder.eval().set_engine(name)
            with torch.no_grad(), _named_errors(encoder.network):
                for x, y in zip(encoder(images, whole), expected, strict=True):
                    _compare(x.dense(), y, f"on a whole image, at stride {x.stride}, engine {name}")
                results.append([x.rows for x in encoder(spoiled, some)])
        for rows in results:
            for x, y, stride in zip(rows, results[0], encoder.strides, strict=True):
                _compare(x, y, f"with hidden patches, at stride {stride}, from engine to engine")
        encoder.eval().set_engine("auto")
        with _named_errors(encoder.network), torch.enable_grad():
            _compare_gradients(encoder, dense, images, whole)
        encoder.train()
        with _named_errors(encoder.network), torch.enable_grad():
            maps = encoder(images, some)
            reached = [p for p in encoder.parameters() if p.requires_grad]
            total = torch.stack([x.rows.float().square().mean() for x in maps]).sum()
            if reached and not total.requires_grad:
                raise UnsupportedLayerError(f"no gradient reaches the parameters of the sparse network; {_BLIND}")
            gradients = torch.autograd.grad(total, reached, allow_unused=True) if reached else ()
        # Parameters that no map depends on are of branches that end elsewhere; DistributedDataParallel would wait for them.
        for parameter, gradient in zip(reached, gradients, strict=False):
            parameter.requires_grad_(gradient is not None)
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, value in encoder.named_buffers():
                value.copy_(buffers[name])
        encoder.set_engine("auto")


_BLIND = (
    "look for a torch.autograd.Function or a checkpoint with use_reentrant=True, which see no sparse map, and write it with "
    "torch's own functions"
)


def _compare(value: Tensor, expected: Tensor, where: str) -> None:
    if value.shape != expected.shape:
        raise UnsupportedLayerError(
            f"the sparse network gives {tuple(value.shape)} {where}, the dense one {tuple(expected.shape)}"
        )
    error = (value - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    if not error <= TRIAL_TOLERANCE and (value - expected).abs().max() != 0:
        raise UnsupportedLayerError(
            f"the sparse network does not compute what the dense one does: {where} they differ by {float(error):.1e} of the "
            "largest value; look for operations in place, state that changes from call to call, or sizes that are hard-coded"
        )


def _compare_gradients(encoder: SparseEncoder, dense: nn.Module, images: Tensor, whole: Tensor) -> None:
    """Compares the gradient of every parameter with the dense network's, in size, on a whole image.

    Raises:
        UnsupportedLayerError: one differs, since the network does something that torch does not show to a sparse map.
    """
    names, weights = zip(*((name, p) for name, p in dense.named_parameters() if p.requires_grad))
    try:
        features = dense_features(dense, encoder.hierarchy.taps, images)
        factors = [y.detach().cos() for y in features]  # every map counts, however large its values are
        expected = torch.autograd.grad(_weighted(features, factors), weights, allow_unused=True)
    except RuntimeError:  # operations in place keep the dense network from being trained as it is
        return
    del features
    parameters = [p for p in encoder.parameters() if p.is_floating_point()]
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    total = _weighted([x.dense() for x in encoder(images, whole)], factors)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else [None] * len(parameters)
    for parameter in frozen:
        parameter.requires_grad_(False)

    unreached = [torch.full_like(p, torch.nan) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    ours = _in_dense_layout(encoder, parameters, unreached)
    sizes = [(name, float(ours[name].norm()), float(g.norm())) for name, g in zip(names, expected) if g is not None]
    least = GRADIENT_FLOOR * max((size for _, _, size in sizes), default=0.0)
    for name, size, expected_size in sizes:
        if not abs(size - expected_size) <= GRADIENT_TOLERANCE * expected_size + least:
            found = "does not reach" if math.isnan(size) else f"is {size:.2g} instead of {expected_size:.2g} at"
            raise UnsupportedLayerError(f"the gradient {found} the parameter {name!r} of the sparse network; {_BLIND}")


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
            "class a sparse form in sparkme.sparse.forms.SPARSE_FORMS"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
