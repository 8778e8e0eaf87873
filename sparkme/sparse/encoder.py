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
        versions: of the weights of each module of the dense network, by its path, as torch keeps them in state dicts.

    Attributes:
        proof: that the network passed its trial, as plain values for a later `sparkme.sparsify`; None where the network's code
            cannot be compared with what it was.
        tried_because: why it was tried this time; empty where a proof made that unnecessary.
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
        """The outermost modules of the dense network that are left out: its head or decoder."""
        left_out = self.hierarchy.left_out
        return tuple(sorted(name for name in left_out if name.rpartition(".")[0] not in left_out))

    @property
    def patch(self) -> int:
        """What the side of a patch has to be a multiple of, in pixels: the total stride or, where the network pools further
        inside of its blocks, that."""
        return self.hierarchy.patch

    @property
    def norm(self) -> str:
        """The network's kind of normalisation, `bn` or `ln`; densify uses the same."""
        return "bn" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()) else "ln"

    def set_engine(self, name: str) -> SparseEncoder:
        """Chooses the kernels: `cuda_ext`, `minkowski`, `masked-dense` or `auto`. The weights stay.

        Kernels are put into the memory order that the engine reads, so choose before optimizers, DistributedDataParallel or
        CUDA graphs take hold of them.

        Raises:
            ValueError: no such engine, or it cannot run on the encoder's device.
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
            The names of the stages: the largest modules of several layers with no map of the hierarchy inside of them.
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
        """Has the forward pass of each block computed once more for its gradient, so that only what goes into blocks is kept.

        The results stay the same. Like `compile_stages`, which it does not go with, this is for the network as it is: a copy of
        it would run the old one's blocks.

        Returns:
            The names of the blocks; none where the network has no rows of blocks.

        Raises:
            ValueError: stages are compiled.
        """
        if self.compiled:
            raise ValueError("blocks of compiled stages cannot be computed twice; use one or the other")
        blocks = find_blocks(self.network, [tap.module for tap in self.hierarchy.taps])
        for name in blocks:
            recompute(self.network.get_submodule(name))
        return blocks

    def forward(self, images: Tensor, active: Tensor, keep: int | None = None) -> list[SparseMap]:
        """Encodes the visible patches.

        Args:
            images: (B, C, H, W). Hidden pixels are never read.
            active: (B, 1, f_h, f_w) bool, True = visible, the same number in every image. A patch has H / f_h pixels.
            keep: that number, where known; it saves reading the mask back from the device.

        Returns:
            Maps at `strides`, shallow to deep.

        Raises:
            ValueError: the sizes do not fit, or images differ in how many patches are visible.
        """
        return self.encode(images, Grid(active, self._patch(images, active), keep))

    def encode(self, images: Tensor, grid: Grid) -> list[SparseMap]:
        """`forward` on a grid that the caller made."""
        recorder = Recorder([tap.call for tap in self.hierarchy.taps], compiled=self.compiled)
        device_type = images.device.type
        name, chosen_for = self._engine_choice
        if chosen_for != device_type:  # the encoder has moved since
            self._choose_engine(name, images.device)
        with self.engine.precision(device_type):
            if not torch.is_autocast_enabled(device_type):
                images = images.to(next(self.parameters()).dtype)
            x = SparseMap(self.engine.voxelise(images, grid), self.engine, recorder)
            with suppress(ReachedDeepest):
                self.network(x)
        if missed := [tap for i, tap in enumerate(self.hierarchy.taps) if i not in recorder.maps]:
            raise RuntimeError(
                f"this time the network did not call {missed[0].module!r}, where its map of stride {missed[0].stride} comes out"
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
        """The weights under the names and in the layout of the dense model it came from, without its head.

        Tensors are copies where the layout differs and share memory where it does not. As torch's own state dicts it says
        which version each module's weights are of, which some models ask for when they load it.
        """
        state = OrderedDict(
            (prefix + name, value) for prefix, module in walk(self.network) for name, value in _dense_state(module).items()
        )
        state._metadata = {name: {"version": version} for name, version in self.versions.items()}  # type: ignore[attr-defined]
        return state

    @torch.no_grad()
    def load_dense_state_dict(self, state: dict[str, Tensor]) -> list[str]:
        """Takes the dense model's weights. Returns the names it did not use, which should be the head's.

        Raises:
            ValueError: a name is missing or has another shape.
        """
        modules = [(prefix, module, _dense_views(module)) for prefix, module in walk(self.network)]
        own = {prefix + name: value for prefix, _, views in modules for name, value in views.items()}
        # Counters, which files of old versions of torch lack.
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
            raise ValueError(f"weights of another model: {'; '.join(problems)} ({len(missing) + len(wrong)} in all)")
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
    """All modules with the prefix of their names; a sparse layer is one, whatever it is made of."""
    yield prefix, module
    if not isinstance(module, SparseLayer):
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")


def _dense_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's own weights as the dense model has them, without those of its children."""
    return module.dense_state() if isinstance(module, SparseLayer) else _dense_views(module)


def _dense_views(module: nn.Module) -> dict[str, Tensor]:
    """The same in the module's own memory, contiguous or not."""
    if isinstance(module, SparseLayer):
        return module.dense_views()
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: value.detach() for name, value in own if name not in module._non_persistent_buffers_set}
