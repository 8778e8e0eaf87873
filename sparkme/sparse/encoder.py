"""The sparse encoder: a dense network's module tree with sparse layers, run on the visible pixels of a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparkme.sparse.engines import create_engine
from sparkme.sparse.forms.convolution import SparseConvolution
from sparkme.sparse.forms.layer import SparseLayer
from sparkme.sparse.grid import Grid
from sparkme.sparse.hierarchy import Hierarchy, ReachedDeepest, attach
from sparkme.sparse.map import SparseMap
from sparkme.sparse.recompute import find_blocks, recompute
from sparkme.sparse.recorder import Recorder


class SparseEncoder(nn.Module):
    """A hierarchical sparse encoder; made by `sparkme.sparsify`.

    Args:
        network: the module tree with sparse layers.
        hierarchy: where the maps come out.
        versions: state-dict version of each module of the dense network, by its path.

    Attributes:
        proof: record of the passed trial, as plain values for a later `sparkme.sparsify`; None if the network's code cannot be
            compared with an earlier one.
        tried_because: why the trial ran; empty if a proof made it unnecessary.
    """

    proof: dict[str, Any] | None = None
    tried_because: str = ""

    def __init__(self, network: nn.Module, hierarchy: Hierarchy, versions: dict[str, int | None] | None = None) -> None:
        super().__init__()
        self.network = network
        self.versions = versions or {}
        self.compiled = False
        self.hierarchy = hierarchy
        self.set_engine("auto")
        attach(network, hierarchy.taps, _reached)

    @property
    def in_channels(self) -> int:
        return self.hierarchy.in_channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per pixel of each map, shallow to deep."""
        return tuple(tap.stride for tap in self.hierarchy.taps)

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each map, shallow to deep."""
        return tuple(tap.channels for tap in self.hierarchy.taps)

    @property
    def head(self) -> tuple[str, ...]:
        """The outermost dropped modules of the dense network: its head or decoder."""
        left_out = self.hierarchy.left_out
        return tuple(sorted(name for name in left_out if name.rpartition(".")[0] not in left_out))

    @property
    def untrained(self) -> str:
        """The first dropped module if it is attention, which has no sparse form; else empty."""
        return self.hierarchy.untrained

    @property
    def patch(self) -> int:
        """The side of a patch must be a multiple of this: the coarsest stride in the network, in pixels."""
        return self.hierarchy.patch

    @property
    def norm(self) -> str:
        """The network's kind of norm, `bn` or `ln`; densify uses the same."""
        return "bn" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()) else "ln"

    def set_engine(self, name: str) -> SparseEncoder:
        """Chooses the kernels: `cuda_ext`, `minkowski`, `masked-dense` or `auto`. The weights stay.

        This changes the memory order of the kernels, so call it before creating an optimizer, DistributedDataParallel or a
        CUDA graph.

        Raises:
            ValueError: an unknown engine, or one that cannot run on the encoder's device.
        """
        return self._choose_engine(name, next(self.parameters()).device)

    def _choose_engine(self, name: str, device: torch.device) -> SparseEncoder:
        self.engine, self.engine_reason = create_engine(name, device)
        self._engine_choice = name, device.type
        for layer in self.modules():
            if isinstance(layer, SparseConvolution):
                layer.kernel.data = self.engine.arranged(layer.kernel.data)
        return self

    def compile_stages(self, **options: Any) -> list[str]:
        """Compiles each stage with torch.compile, without graph breaks on the engine `cuda_ext`.

        Args:
            options: for torch.compile.

        Returns:
            The names of the stages: the largest modules of several layers without a tap inside.
        """
        stages: list[str] = []
        self.compiled = True
        for name, module in self.network.named_modules():
            inside = name.startswith(tuple(f"{stage}." for stage in stages))
            layers = sum(isinstance(m, SparseLayer) for m in module.modules())
            holds_tap = any(tap.module.startswith(f"{name}.") for tap in self.hierarchy.taps)
            if name and not inside and not holds_tap and layers > 1:
                module.compile(**options)
                stages.append(name)
        return stages

    def checkpoint_blocks(self) -> list[str]:
        """Activation checkpointing: stores only the inputs of blocks and recomputes the rest in the backward pass.

        The results stay the same. A copy of the network would run the original's blocks, as after `compile_stages`.

        Returns:
            The names of the blocks; none if the network has no sequence of blocks.

        Raises:
            ValueError: stages are compiled.
        """
        if self.compiled:
            raise ValueError("checkpoint_blocks does not work on compiled stages; use it or compile_stages, not both")
        blocks = find_blocks(self.network, [tap.module for tap in self.hierarchy.taps])
        for name in blocks:
            recompute(self.network.get_submodule(name))
        return blocks

    def forward(self, images: Tensor, active: Tensor, keep: int | None = None) -> list[SparseMap]:
        """Encodes the visible patches.

        Args:
            images: (B, C, H, W). Hidden pixels are never read.
            active: (B, 1, f_h, f_w) bool, True = visible, the same number in every image. A patch has H / f_h pixels.
            keep: that number, if known; this saves a synchronisation with the device.

        Returns:
            Maps at `strides`, shallow to deep.

        Raises:
            ValueError: the sizes do not fit, or the number of visible patches differs between images.
        """
        return self.encode(images, Grid(active, self._patch(images, active), keep))

    def encode(self, images: Tensor, grid: Grid) -> list[SparseMap]:
        """`forward` on a grid that the caller made."""
        recorder = Recorder([tap.call for tap in self.hierarchy.taps], compiled=self.compiled)
        device_type = images.device.type
        name, chosen_for = self._engine_choice
        if chosen_for != device_type:  # the encoder has moved to another device
            self._choose_engine(name, images.device)
        with self.engine.precision(device_type):
            if not torch.is_autocast_enabled(device_type):
                images = images.to(next(self.parameters()).dtype)
            x = SparseMap(self.engine.voxelise(images, grid), self.engine, recorder)
            with suppress(ReachedDeepest):
                self.network(x)
        if missed := [tap for i, tap in enumerate(self.hierarchy.taps) if i not in recorder.maps]:
            raise RuntimeError(
                f"in this forward pass the network did not call {missed[0].module!r}, the tap of its map of stride "
                f"{missed[0].stride}"
            )
        return [recorder.maps[i] for i in range(len(self.strides))]

    def _patch(self, images: Tensor, active: Tensor) -> int:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        if active.ndim != 4 or len(active) != len(images):
            raise ValueError(f"active must be ({len(images)}, 1, f_h, f_w), got {tuple(active.shape)}")
        (h, w), (f_h, f_w) = images.shape[2:], active.shape[2:]
        patch = h // f_h
        if (f_h * patch, f_w * patch) != (h, w) or patch % self.patch:
            raise ValueError(
                f"images of {h}x{w} pixels and a mask of {f_h}x{f_w} patches: a patch must be square and a multiple of "
                f"the encoder's total stride {self.patch}"
            )
        return patch

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The weights with the names and layout of the dense model, without its head.

        Tensors share memory unless the layout differs. Like torch's state dicts it carries each module's version, which some
        models need for loading.
        """
        state = OrderedDict(
            (prefix + name, value) for prefix, module in walk(self.network) for name, value in _dense_state(module).items()
        )
        state._metadata = {name: {"version": version} for name, version in self.versions.items()}  # type: ignore[attr-defined]
        return state

    @torch.no_grad()
    def load_dense_state_dict(self, state: dict[str, Tensor]) -> list[str]:
        """Loads a dense model's weights. Returns the unused names, which should be the head's.

        Raises:
            ValueError: a name is missing or has another shape.
        """
        modules = [(prefix, module, _dense_views(module)) for prefix, module in walk(self.network)]
        own = {prefix + name: value for prefix, _, views in modules for name, value in views.items()}
        # Files of old torch versions lack the counters.
        state = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | state
        missing = [name for name in own if name not in state]
        wrong = [
            f"{n}: {tuple(state[n].shape)}, not {tuple(own[n].shape)}"
            for n in own
            if n in state and state[n].shape != own[n].shape
        ]
        if missing or wrong:
            problems = [f"missing {', '.join(missing[:5])}"] if missing else []
            problems += [f"wrong shape {', '.join(wrong[:5])}"] if wrong else []
            raise ValueError(f"the weights are of another model: {'; '.join(problems)} ({len(missing) + len(wrong)} in all)")
        for prefix, module, views in modules:
            values = {name: state[prefix + name] for name in views}
            if isinstance(module, SparseLayer):
                module.load_dense_state(values)
            else:
                for name, value in views.items():
                    value.copy_(values[name])
        return [name for name in state if name not in own]


def _reached(i: int, value: Any) -> bool:
    return value.recorder.reached(i, value)


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with the prefix of their names. A sparse layer counts as one, whatever is inside."""
    yield prefix, module
    if not isinstance(module, SparseLayer):
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")


def _dense_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's own weights in the dense layout, without those of its children."""
    return module.dense_state() if isinstance(module, SparseLayer) else _dense_views(module)


def _dense_views(module: nn.Module) -> dict[str, Tensor]:
    """The same in the module's own memory, contiguous or not."""
    if isinstance(module, SparseLayer):
        return module.dense_views()
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: value.detach() for name, value in own if name not in module._non_persistent_buffers_set}
