"""A dense network that returns its feature maps by stride, for detection and segmentation.

The hierarchy is that of pretraining (`sparkme.sparse.hierarchy`), so any network that can be pretrained has a pyramid.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from sparkme.sparse.hierarchy import Hierarchy, ReachedDeepest, attach, probe_images

if TYPE_CHECKING:
    from timm.models import FeatureInfo


class Pyramid(nn.Module):
    """A dense network that returns its feature maps, shallow to deep; made by `sparkme.pyramid`.

    It can be trained, copied, compiled, exported and run in DistributedDataParallel like any module. It lacks the head behind
    the deepest map.

    Args:
        network: the network with its weights, which is modified.
        hierarchy: the taps of its maps.
        mean: of the images that it was trained on, one value per channel, for pixel values from 0 to 1.
        std: likewise, the standard deviation.

    Attributes:
        network: the network; the names of its weights are unchanged.
        strides: input pixels per pixel of each map.
        channels: channels of each map.
        in_channels: channels of the images.
    """

    def __init__(
        self, network: nn.Module, hierarchy: Hierarchy, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
    ) -> None:
        super().__init__()
        self.strides = tuple(tap.stride for tap in hierarchy.taps)
        self.channels = tuple(tap.channels for tap in hierarchy.taps)
        self.in_channels, self.mean, self.std = hierarchy.in_channels, mean, std
        self.modules_of_maps = tuple(tap.module for tap in hierarchy.taps)
        _leave_out(network, hierarchy)
        self.network = network
        self._running = _Running([tap.call for tap in hierarchy.taps], *_facts(network, hierarchy))
        attach(network, hierarchy.taps, self._running.reached)
        self.training = network.training

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps as torchvision's feature pyramids expect them.

        Args:
            images: (B, C, H, W), normalised; sides need not be multiples of the strides if the network pads.

        Returns:
            Maps "0", "1", ... (B, channels[i], H / strides[i], W / strides[i]), shallow to deep.
        """
        return OrderedDict((str(i), value) for i, value in enumerate(self.maps(images)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps as a list."""
        return self._running.run(self.network, images)

    @torch.no_grad()
    def scales_of_weights(self) -> dict[str, int]:
        """For each weight of `network` the number of maps that are complete when it is first used; of unused ones the last."""
        network, found = self.network, dict[str, int]()
        names = {id(module): f"{name}." if name else "" for name, module in network.named_modules()}

        def note(module: nn.Module, args: Any) -> None:
            for name, *_ in module.named_parameters(recurse=False):
                found.setdefault(names[id(module)] + name, len(self._running.local.maps))

        modes = [(module, module.training) for module in network.modules()]
        handles = [module.register_forward_pre_hook(note) for module in network.modules()]
        network.eval()
        like = next(network.parameters())
        side = 2 * self.strides[-1]
        try:
            self.maps(like.new_zeros(1, self.in_channels, side, side))
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes:
                module.training = mode
        return {name: found.get(name, len(self.strides) - 1) for name, _ in network.named_parameters()}

    def with_fpn(self, out_channels: int = 256, extra: ExtraFPNBlock | None = None) -> PyramidWithFPN:
        """A backbone for torchvision's detectors: a feature pyramid network on these maps.

        Args:
            out_channels: channels of every level.
            extra: block of the levels above; if None, max pooling of the last level, as in Faster and Mask R-CNN.
        """
        return PyramidWithFPN(self, out_channels, extra)

    def as_timm(self) -> TimmFeatures:
        """The convention of `timm.create_model(..., features_only=True)`: a list of maps, and `feature_info`."""
        return TimmFeatures(self)

    def as_smp(self) -> SmpEncoder:
        """The convention of segmentation_models_pytorch's encoders: a list of images and maps, and `out_channels`."""
        return SmpEncoder(self)


class PyramidWithFPN(nn.Module):
    """A pyramid with a feature pyramid network (Lin et al., CVPR 2017), the backbone of torchvision's detectors."""

    def __init__(self, pyramid: Pyramid, out_channels: int, extra: ExtraFPNBlock | None = None) -> None:
        super().__init__()
        self.body, self.out_channels = pyramid, out_channels
        self.fpn = FeaturePyramidNetwork([*pyramid.channels], out_channels, extra or LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) to maps (B, out_channels, ., .) by name."""
        levels: dict[str, Tensor] = self.fpn(self.body(images))
        return levels


class TimmFeatures(nn.Module):
    """A pyramid with the interface of timm's `features_only` networks."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    @property
    def feature_info(self) -> FeatureInfo:
        """timm's description: `channels()`, `reduction()`, `module_name()`."""
        from timm.models import FeatureInfo  # noqa: PLC0415  (half a second)

        pyramid = self.pyramid
        rows = zip(pyramid.channels, pyramid.strides, pyramid.modules_of_maps)
        described = [{"num_chs": channels, "reduction": stride, "module": name} for channels, stride, name in rows]
        return FeatureInfo(described, tuple(range(len(described))))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) to maps (B, channels, H / stride, W / stride), shallow to deep."""
        return self.pyramid.maps(images)


class SmpEncoder(nn.Module):
    """A pyramid as an encoder of segmentation_models_pytorch. A missing stride gets a map without channels.

    Attributes:
        out_channels: channels of the images, and of the maps at strides 2, 4, 8, ...
        output_stride: stride of the deepest map.
    """

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.in_channels, self.output_stride = pyramid.in_channels, pyramid.strides[-1]
        widths = dict(zip(pyramid.strides, pyramid.channels))
        self.depth = self.output_stride.bit_length() - 1
        self.out_channels = [self.in_channels, *(widths.get(2**i, 0) for i in range(1, self.depth + 1))]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) to the images and `depth` maps, shallow to deep; sides must be multiples of `output_stride`."""
        maps = dict(zip(self.pyramid.strides, self.pyramid.maps(images)))
        b, _, h, w = images.shape
        strides = [2**i for i in range(1, self.depth + 1)]
        return [images, *(maps[s] if s in maps else images.new_empty(b, 0, h // s, w // s) for s in strides)]


class _LeftOut(nn.Identity):
    """Replaces a head, without its weights; it runs only if a forward pass cannot end at the deepest map."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class _Running:
    """Collects the maps of a forward pass, for each thread separately.

    Args:
        calls: for each map, the number, from 1, of its module's call that returns it.
        changed: whether the network later changes a map in place, so that it must be copied.
        channels_last: whether channels are the last axis of a map.
    """

    def __init__(self, calls: list[int], changed: list[bool], channels_last: list[bool]) -> None:
        self.calls, self.changed, self.channels_last = calls, changed, channels_last
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = threading.local()

    def reached(self, i: int, value: Tensor) -> bool:
        """Records a call of the module of map i; True ends the forward pass."""
        local = self.local
        if getattr(local, "counts", None) is None:  # the network is called by itself, or a block again for its gradient
            return False
        local.counts[i] += 1
        if local.counts[i] == self.calls[i]:
            local.maps[i] = value.clone() if self.changed[i] else value
        # torch.export counts entered and left modules, and miscounts if an exception leaves them.
        is_traced = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        return len(local.maps) == len(self.calls) and not is_traced

    def run(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        local = self.local
        local.counts, local.maps = [0] * len(self.calls), {}
        try:
            network(images)
        except ReachedDeepest:
            pass
        finally:
            maps = local.maps
            local.counts = local.maps = None
        if len(maps) < len(self.calls):
            raise RuntimeError("the network did not call all modules of its maps in this forward pass")
        found = [maps[i] for i in range(len(self.calls))]
        return [value.permute(0, 3, 1, 2) if last else value for value, last in zip(found, self.channels_last)]


def _facts(network: nn.Module, hierarchy: Hierarchy) -> tuple[list[bool], list[bool]]:
    """For each map, whether the network changes it in place later, and whether channels are its last axis."""
    twin, num_maps = copy.deepcopy(network), len(hierarchy.taps)
    images = probe_images(network, hierarchy.in_channels, hierarchy.patch)
    maps: dict[int, Tensor] = {}
    versions: dict[int, int] = {}
    counts = [0] * num_maps

    def reached(i: int, value: Tensor) -> bool:
        counts[i] += 1
        if counts[i] == hierarchy.taps[i].call:
            maps[i], versions[i] = value, value._version
        return len(maps) == num_maps

    attach(twin, hierarchy.taps, reached)
    changed: set[int] = set()
    for training in (False, True):
        maps.clear()
        counts[:] = [0] * num_maps
        twin.train(training)
        with torch.no_grad(), suppress(ReachedDeepest):
            twin(images)
        changed |= {i for i, value in maps.items() if value._version != versions[i]}
    h, w = images.shape[2:]
    is_last = [maps[i].shape[2:] != (h // tap.stride, w // tap.stride) for i, tap in enumerate(hierarchy.taps)]
    return [i in changed for i in range(num_maps)], is_last


def _leave_out(network: nn.Module, hierarchy: Hierarchy) -> None:
    """Removes the head's modules, and turns off gradients of parameters that no map needs."""
    names: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    gone: list[str] = []
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if name and not name.startswith(tuple(gone)) and all(alias in hierarchy.left_out for alias in names[id(module)]):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _LeftOut().train(module.training))
            gone.append(f"{name}.")
    for name, parameter in network.named_parameters():
        if name not in hierarchy.needed:  # DistributedDataParallel would wait for its gradient
            parameter.requires_grad_(False)
