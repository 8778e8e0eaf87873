"""Makes a sparse network from a dense one: the module tree and its names stay, the leaves become sparse.

`sparkme.sparse.forms` lists the sparse form of each layer and function.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from sparkme.errors import UnsupportedLayerError, first_line
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.forms import SparseLayer, sparse_form
from sparkme.sparse.forms.convolution import SparseConvolution
from sparkme.sparse.hierarchy import Hierarchy, dense_features, find_hierarchy
from sparkme.sparse.proof import NotProved, describe, make_proof, proved_hierarchy, seal
from sparkme.sparse.trial import DifferenceError, TooSmallError, compare_once, expose_branches, small_images, try_out

_tried: dict[str, dict[str, Any]] = {}  # the proofs of this process, by the seal of their description


def sparsify(
    model: nn.Module,
    *,
    taps: Sequence[str] | None = None,
    in_channels: int | None = None,
    num_scales: int = 4,
    proof: Mapping[str, Any] | None = None,
) -> SparseEncoder:
    """Makes a sparse encoder with the weights of a dense convolutional network.

    The dense model does not change. Layers after the deepest feature map (pooling, classifier) are dropped. So is a block of
    attention behind the last convolution; `SparseEncoder.untrained` names it. A trial first compares copies of both networks on
    a small image: on every engine, with and without hidden patches. So the encoder runs, and computes what the model computes.

    Args:
        model: any convolutional network; called as `model(images)`.
        taps: modules whose outputs are the maps, shallow to deep; found if None.
        in_channels: channels of the images; found if None.
        num_scales: take at most this many maps, the deepest ones.
        proof: `SparseEncoder.proof` of an earlier call; None stands for those of this process. The trial is skipped if it is
            of the same network, code and versions; else `SparseEncoder.tried_because` says why not.

    Returns:
        A `SparseEncoder` on the model's device, in its dtype, with the engine that `auto` chooses there.

    Raises:
        UnsupportedLayerError: a layer, or a function that it calls, has no sparse form; says which, why, and what to do.
        ValueError: the network is not hierarchical, or cannot be run.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"sparsify takes a torch.nn.Module, not {type(model).__name__}")
    if num_scales < 1:
        raise ValueError(f"num_scales {num_scales} must be at least 1")
    if isinstance(taps, str):
        raise ValueError(f"taps must be a list of names of modules, such as [{taps!r}], not a string")
    _check_hooks(model)
    request = {"taps": None if taps is None else [*taps], "in_channels": in_channels, "num_scales": num_scales}
    with _undisturbed():
        hierarchy, kept, reason = _known(model, request, proof)
        if hierarchy is None:
            hierarchy = find_hierarchy(_copy(model), num_scales, taps=taps, in_channels=in_channels)
            if next(model.parameters()).device.type != "meta":  # a meta tensor has no values to compare
                hierarchy = _working(model, hierarchy) if taps is not None else _working_part(model, hierarchy, num_scales)
                with suppress(NotProved):
                    kept = make_proof(hierarchy, description := describe(model, request))
                    _tried[seal(description)] = kept
        dense = _copy(model)
        versions = {name: module._version for name, module in dense.named_modules()}
        encoder = SparseEncoder(_sparse_network(dense, hierarchy), hierarchy, versions)
        encoder.proof, encoder.tried_because = kept, reason
        return encoder


def _known(
    model: nn.Module, request: dict[str, Any], proof: Mapping[str, Any] | None
) -> tuple[Hierarchy | None, dict[str, Any] | None, str]:
    """The hierarchy and the proof of an earlier trial, or None and the reason for a new trial."""
    try:
        description = describe(model, request)
        proof = _tried.get(seal(description)) if proof is None else proof
        hierarchy = proved_hierarchy(proof, description, model)
        _check_again(model, hierarchy)
        return hierarchy, make_proof(hierarchy, description), ""
    except NotProved as error:
        return None, None, str(error)


def _check_again(model: nn.Module, hierarchy: Hierarchy) -> None:
    """A short check in place of the trial: one image, in eval mode, on one engine. Raises NotProved if outputs differ."""
    network = expose_branches(_copy(model))
    try:
        images = small_images(hierarchy, next(model.parameters()))
        maps = dense_features(network, hierarchy.taps, images)
        compare_once(SparseEncoder(_sparse_network(network, hierarchy), hierarchy), images, maps)
    except Exception as error:  # a wrong hierarchy may fail anywhere
        raise NotProved(f"it no longer passes the check that it passed before: {first_line(error)}") from error


def _check_hooks(model: nn.Module) -> None:
    """Raises UnsupportedLayerError for compiled code and backward hooks, which a sparse network would silently lose."""
    for name, module in model.named_modules():
        where = f"layer {name!r} ({type(module).__name__})" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise UnsupportedLayerError(
                f"{where} is compiled and cannot run on sparse maps; pass the network without torch.jit or torch.compile"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedLayerError(f"{where} has backward hooks, which a sparse network never calls; remove them")
        for own, parameter in module.named_parameters(recurse=False):
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise UnsupportedLayerError(
                    f"the parameter {own!r} of {where} has hooks, which a sparse network never calls; remove them"
                )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        remedy = (
            "look for tensors that a forward pass left there, pruned layers (torch.nn.utils.prune.remove) or weights of "
            "torch.nn.utils.weight_norm (remove_weight_norm)"
            if isinstance(error, RuntimeError)  # from torch, for a tensor with a graph
            else "take it out of the network's attributes"
        )
        raise ValueError(f"{type(model).__name__} cannot be copied: {first_line(error)}; {remedy}") from error


def _working_part(model: nn.Module, hierarchy: Hierarchy, num_scales: int) -> Hierarchy:
    """As `_working`; if attention at the end of the network is refused, the hierarchy that ends before it.

    Raises:
        UnsupportedLayerError: see `_working`.
    """
    try:
        return _working(model, hierarchy)
    except UnsupportedLayerError as problem:
        if not problem.mixes_pixels:
            raise
        try:
            shorter = find_hierarchy(_copy(model), num_scales, in_channels=hierarchy.in_channels, attention=problem.layer)
        except ValueError:  # it is not at the end
            raise problem from None
    return _working(model, shorter)


def _working(model: nn.Module, hierarchy: Hierarchy) -> Hierarchy:
    """The hierarchy with which copies of the network pass the trial.

    Branches without gradients run if they can, since something else may depend on them. Patches double if that helps, since a
    function may pool further than any module shows.

    Raises:
        UnsupportedLayerError: no variant works; says what to change.
    """
    without_branches = replace(hierarchy, left_out=hierarchy.left_out | hierarchy.branches)
    variants = [hierarchy, without_branches] if hierarchy.branches else [hierarchy]
    problems: list[UnsupportedLayerError] = []
    for factor, variant in product((1, 2), variants):
        attempt = replace(variant, patch=factor * variant.patch)
        try:
            _try(model, attempt)
            return attempt
        except UnsupportedLayerError as error:
            problems.append(error)
    if ran := [problem for problem in problems if not isinstance(problem, TooSmallError)]:
        problems = ran  # errors about the size do not matter if a larger one runs
    in_branch = len(problems) > 1 and any(f"{problems[0].layer}.".startswith(f"{branch}.") for branch in hierarchy.branches)
    raise problems[1 if in_branch else 0] from None


def _try(model: nn.Module, hierarchy: Hierarchy) -> None:
    """Tries copies of the network, and again in float64 if they differ, since rounding can be the reason."""
    try:
        _try_copies(_copy(model), hierarchy)
    except DifferenceError as difference:
        if next(model.parameters()).dtype != torch.float32:
            raise
        try:
            _try_copies(_copy(model).double(), hierarchy)
        except UnsupportedLayerError:  # also of networks that cannot be float64
            raise difference from None


def _try_copies(dense: nn.Module, hierarchy: Hierarchy) -> None:
    expose_branches(dense)
    try_out(SparseEncoder(_sparse_network(_copy(dense), hierarchy), hierarchy), dense)


def _sparse_network(network: nn.Module, hierarchy: Hierarchy) -> nn.Module:
    """Replaces the leaves of a network by sparse ones, in place."""
    done: dict[int, nn.Module] = {}
    replaced: list[str] = []
    unneeded = [name for name, _ in network.named_parameters() if name not in hierarchy.needed]
    tied: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    names: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not name:
            continue
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
    for name in unneeded:  # DistributedDataParallel would wait for their gradients
        if (unreached := _find(network, name)) is not None:
            unreached.requires_grad_(False)
    return network


def _find(network: nn.Module, name: str) -> nn.Parameter | None:
    """A dense network's parameter in the sparse network; None for dropped layers."""
    found = _place(network, name)
    return found[0]._parameters[found[1]] if found else None


def _place(network: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module that holds the parameter, and its name there."""
    path, _, own = name.rpartition(".")
    try:
        layer = network.get_submodule(path)
    except AttributeError:  # a layer of the dropped head
        return None
    holder, key = layer.holder(own) if isinstance(layer, SparseLayer) else (layer, own)
    return (holder, key) if holder._parameters.get(key) is not None else None


def _tie(network: nn.Module, names: Sequence[str]) -> None:
    """Ties a parameter that layers of the dense network share. Raises UnsupportedLayerError if their layouts differ."""
    first: tuple[str, type, nn.Parameter] | None = None
    for name in names:
        path = name.rpartition(".")[0]
        if (place := _place(network, name)) is None:
            continue
        (holder, key), layer = place, network.get_submodule(path)
        layout, parameter = type(layer) if isinstance(layer, SparseConvolution) else nn.Module, holder._parameters[key]
        assert parameter is not None
        if first is None:
            first = path, layout, parameter
        elif (layout, parameter.shape) != (first[1], first[2].shape):
            raise UnsupportedLayerError(
                f"layers {first[0]!r} and {path!r} share a weight, but their sparse forms store it in different layouts; give "
                "each a weight of its own, or use one layer twice"
            )
        holder._parameters[key] = first[2]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the random states, and computes in full precision with gradients, whatever the caller's modes are."""
    state = random.getstate()
    try:
        with (
            torch.random.fork_rng(),
            torch.backends.cudnn.flags(allow_tf32=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(state)
