"""The official SparK algorithm as published, for comparison: dense layers, each followed by a mask, in float32 and NCHW.

Written from the description of the method (Tian et al., ICLR 2023) and of its official implementation, keyu-tian/SparK; no
code is copied. What makes it what it is, and what it costs, is kept:

- a convolution or pooling computes the whole map, which is then multiplied with the mask; the mask of the map's size is
  expanded from one entry per patch at every layer anew;
- a norm looks for the visible pixels with `nonzero`, gathers them as (N, C) rows, normalises these, and writes them into
  a tensor of zeros by index;
- densify writes mask tokens with `where` over the whole map; the loss is computed on all patches and masked at the end.

`OfficialSparK` takes its weights from a `sparkme.SparK`, and gives the same loss and gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d

from sparkme.decoder import Decoder
from sparkme.models import add_drop_path, create_dense
from sparkme.spark import SparK
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.hierarchy import ReachedDeepest, attach


class Visibility:
    """The mask of the current batch, which all layers of one network share."""

    def __init__(self) -> None:
        self.active: Tensor | None = None

    def pixels(self, h: int, w: int) -> Tensor:
        """(B, 1, h, w) bool, True = visible, expanded from the patches' (B, 1, f_h, f_w)."""
        assert self.active is not None
        f_h, f_w = self.active.shape[2:]
        return self.active.repeat_interleave(h // f_h, dim=2).repeat_interleave(w // f_w, dim=3)

    def indices(self, h: int, w: int) -> tuple[Tensor, ...]:
        """Where the visible pixels are: (sample, y, x), each (N,) int64. Waits for the device."""
        return self.pixels(h, w).squeeze(1).nonzero(as_tuple=True)

    def hide(self, x: Tensor) -> Tensor:
        """(B, C, H, W) with zeros at hidden pixels, in place."""
        return x.mul_(self.pixels(*x.shape[2:]))

    def normalise(self, pixels: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, H, W, C) with `norm`, of (N, C), applied to the visible pixels, and zeros elsewhere; memory order as given."""
        where = self.indices(*pixels.shape[1:3])
        out = torch.zeros_like(pixels)
        out[where] = norm(pixels[where])
        return out


class _Masked(nn.Module):
    """A dense layer, and a mask behind it."""

    def __init__(self, layer: nn.Module, visibility: Visibility) -> None:
        super().__init__()
        self.layer, self.visibility = layer, visibility

    def forward(self, x: Tensor) -> Tensor:
        return self.visibility.hide(self.layer(x))


class _RowNorm(nn.Module):
    """A norm over the visible pixels of an NCHW map, or of an NHWC one."""

    def __init__(self, norm: nn.Module, visibility: Visibility, *, channels_last: bool) -> None:
        super().__init__()
        self.layer, self.visibility, self.channels_last = norm, visibility, channels_last

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            return self.visibility.normalise(x, self.layer)
        return self.visibility.normalise(x.permute(0, 2, 3, 1), self.layer).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    """The block of ConvNeXt; the mask comes after the linear layers, whose biases fill the hidden pixels."""

    def __init__(self, block: CNBlock, visibility: Visibility) -> None:
        super().__init__()
        depthwise, _, norm, expand, activation, reduce, _ = block.block
        self.depthwise = _Masked(depthwise, visibility)
        self.norm = _RowNorm(norm, visibility, channels_last=True)
        self.mlp = nn.Sequential(expand, activation, reduce)
        self.layer_scale, self.drop_path, self.visibility = block.layer_scale, block.stochastic_depth, visibility

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.layer_scale.flatten() * self.mlp(y)).permute(0, 3, 1, 2)
        out: Tensor = x + self.drop_path(self.visibility.hide(y))
        return out


def _official_form(layer: nn.Module, visibility: Visibility) -> nn.Module | None:
    """What stands in for a layer of the dense network, with the same parameters; None where the layer stays."""
    if isinstance(layer, CNBlock):
        return _ConvNeXtBlock(layer, visibility)
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return _Masked(layer, visibility)
    if isinstance(layer, nn.BatchNorm2d):
        return _RowNorm(_batch_norm_of_rows(layer), visibility, channels_last=False)
    if isinstance(layer, nn.LayerNorm):
        rows = nn.LayerNorm(layer.normalized_shape, layer.eps)
        rows.weight, rows.bias = layer.weight, layer.bias
        return _RowNorm(rows, visibility, channels_last=not isinstance(layer, LayerNorm2d))
    return None


def _batch_norm_of_rows(norm: nn.BatchNorm2d) -> nn.BatchNorm1d:
    """The same norm over (N, C), with the same parameters, buffers and hooks."""
    rows = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum)
    rows.weight, rows.bias = norm.weight, norm.bias
    rows.running_mean, rows.running_var = norm.running_mean, norm.running_var
    rows.num_batches_tracked = norm.num_batches_tracked
    return rows


class OfficialSparK(nn.Module):
    """SparK with the weights of a `sparkme.SparK`, as copies in the dense layout and in NCHW memory.

    Args:
        name: torchvision's name of the encoder.
        model: whose weights, device, dtype and mode are taken.
        drop_path: as the encoder was made with, see `sparkme.models.create_encoder`.

    Raises:
        ValueError: the model is not that network.
    """

    def __init__(self, name: str, model: SparK, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch, self.visibility = model.patch, Visibility()
        self.taps = model.encoder.hierarchy.taps
        example = next(model.parameters())
        self.network = create_dense(name, drop_path=drop_path).to(example)
        state = model.encoder.dense_state_dict()
        if unexpected := self.network.load_state_dict(state, strict=False).unexpected_keys:
            raise ValueError(f"{name} has no {', '.join(unexpected[:5])}")
        for child, module in self.network.named_children():
            if any(True for _ in module.parameters()) and not any(key.startswith(f"{child}.") for key in state):
                setattr(self.network, child, nn.Identity())  # the head
        self.dense_parameters = dict(self.network.named_parameters())  # under their names in the dense network
        _replace_layers(self.network, self.visibility)
        if not name.startswith("convnext"):
            add_drop_path(cast(SparseEncoder, self), drop_path)  # it asks for nothing but `network`
        self.maps: dict[int, Tensor] = {}
        attach(self.network, self.taps, self._keep)

        self.densify_norms = nn.ModuleList(
            _RowNorm(copy.deepcopy(norm), self.visibility, channels_last=False) for norm in model.densify_norms
        )
        self.densify_projs = nn.ModuleList(_fresh_projection(projection) for projection in model.densify_projs)
        self.mask_tokens = nn.ParameterList(
            token.detach().clone(memory_format=torch.contiguous_format) for token in model.mask_tokens
        )
        width = model.decoder.get_submodule("dec.0.up_sample").get_parameter("weight").shape[0]
        self.decoder = Decoder(model.encoder.strides[-1], width, model.encoder.in_channels).to(example)
        self.decoder.load_state_dict(model.decoder.state_dict())
        self.train(model.training)

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """Loss of (B, C, H, W) images and a (B, 1, f_h, f_w) bool mask, True = visible."""
        dense = {i: self._densify(i, x) for i, x in enumerate(reversed(self.encode(images, active)))}
        prediction = _patches(self.decoder(dense), self.patch)
        target = _patches(images, self.patch)
        mean, variance = target.mean(2, keepdim=True), target.var(2, keepdim=True)
        errors = (prediction - (target - mean) / (variance + 1e-6).sqrt()).square().mean(2)
        hidden = active.logical_not().flatten(1).to(errors.dtype)
        return (errors * hidden).sum() / (hidden.sum() + 1e-8)

    def encode(self, images: Tensor, active: Tensor) -> list[Tensor]:
        """The encoder's maps (B, C, H / s, W / s), zero at hidden pixels, shallow to deep."""
        self.visibility.active = active
        with suppress(ReachedDeepest):
            self.network(images * self.visibility.pixels(*images.shape[2:]))
        maps = [self.maps[i] for i in range(len(self.taps))]
        self.maps.clear()
        return maps

    def _keep(self, i: int, x: Tensor) -> bool:
        self.maps[i] = x
        return len(self.maps) == len(self.taps)

    def _densify(self, i: int, x: Tensor) -> Tensor:
        visible = self.visibility.pixels(*x.shape[2:]).expand_as(x)
        filled = torch.where(visible, self.densify_norms[i](x), self.mask_tokens[i].expand_as(x))
        projected: Tensor = self.densify_projs[i](filled)
        return projected

    def gradients(self, model: SparK) -> dict[str, Tensor]:
        """The gradients that this network has, under the names and in the layout of `model`'s parameters."""
        found = _gradients({name.replace(".layer.", "."): p for name, p in self.named_parameters()})
        found = {name: gradient for name, gradient in found.items() if not name.startswith("network.")}
        twin = copy.deepcopy(model.encoder)  # takes the gradients in the place of its weights
        twin.load_dense_state_dict(twin.dense_state_dict() | _gradients(self.dense_parameters))
        return found | {f"encoder.{name}": parameter.detach() for name, parameter in twin.named_parameters()}


def _replace_layers(module: nn.Module, visibility: Visibility) -> None:
    for name, child in module.named_children():
        form = _official_form(child, visibility)
        if form is None:
            _replace_layers(child, visibility)
        else:
            setattr(module, name, form)


def _fresh_projection(projection: nn.Module) -> nn.Module:
    """A copy in NCHW memory. The memory order of a 1x1 weight is ambiguous, so it is copied into a new layer."""
    if not isinstance(projection, nn.Conv2d):
        return nn.Identity()
    out_channels, in_channels, kernel_size, _ = projection.weight.shape
    fresh = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2).to(projection.weight)
    fresh.load_state_dict(projection.state_dict())
    return fresh


def _gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def _patches(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, L, p * p * C), patches and pixels in row-major order."""
    b, c, h, w = images.shape
    blocks = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)
