"""Makes a sparse network from a dense one: the module tree and its names stay, the leaves become sparse.

What becomes of which layer and function stands in `sparkme.sparse.forms`.
"""

from __future__ import annotations

import copy
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
from sparkme.sparse.forms import SPARSE_FORMS, sparse_form
from sparkme.sparse.hierarchy import Hierarchy, dense_features, find_hierarchy

# What the sparse and the dense network may differ by on a whole image, relative to the largest value of a map. Rounding stays
# a hundred times below, a wrong layer is off by a hundred times more.
TRIAL_TOLERANCE = 1e-3


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
    return network


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
        encoder.train().set_engine("auto")
        with _named_errors(encoder.network), torch.enable_grad():
            maps = encoder(images, some)
            reached = [p for p in encoder.parameters() if p.requires_grad]
            total = sum(x.rows.float().square().mean() for x in maps)
            gradients = torch.autograd.grad(total, reached, allow_unused=True) if isinstance(total, Tensor) else []
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
