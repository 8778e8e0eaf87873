"""The published algorithms of SparK and FCMAE, for comparison: dense layers with masks, in float32 and NCHW.

They follow the papers (Tian et al., ICLR 2023; Woo et al., ConvNeXt V2, CVPR 2023, section 3) and a description of SparK's
official implementation, keyu-tian/SparK; no code is copied. Operations and their cost are kept. In both, every layer expands
the mask from patches to its map's size, and the loss is computed on all patches and masked at the end.

SparK:

- A convolution or pooling computes the whole map, which is then multiplied by the mask.
- A norm finds the visible pixels with `nonzero`, gathers them as (N, C) rows, normalises these, and writes them into a tensor
  of zeros by index.
- Densify writes mask tokens with `where` over the whole map.

FCMAE, by masked dense convolutions, the paper's alternative to a library of sparse ones:

- A map is multiplied by the mask before and after each convolution, but only after a 1x1 convolution.
- Layer norms, linear layers and GELU compute every pixel, and the mask follows each residual branch.
- GRN takes its norm over each image's visible pixels, with another mask for the others, like `sparkme.FCMAE`. MinkowskiEngine's
  GRN takes it over the whole batch, with the same work.
- Mask tokens are added by products with the mask.

`OfficialSparK` and `OfficialFCMAE` copy the weights of a `sparkme.SparK` and a `sparkme.FCMAE`, and compute the same loss and
gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress

import torch
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d

from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.decoder import Decoder
from sparkme.methods.fcmae import FCMAE
from sparkme.methods.spark import SparK
from sparkme.networks.create import add_drop_path, create_dense
from sparkme.sparse.hierarchy import ReachedDeepest, attach


class Visibility:
    """The mask of the current batch, shared by all layers of a network."""

    def __init__(self) -> None:
        self.active: Tensor | None = None

    def pixels(self, h: int, w: int) -> Tensor:
        """(B, 1, h, w) bool, True = visible, expanded from the patches' (B, 1, f_h, f_w)."""
        assert self.active is not None
        f_h, f_w = self.active.shape[2:]
        return self.active.repeat_interleave(h // f_h, dim=2).repeat_interleave(w // f_w, dim=3)

    def indices(self, h: int, w: int) -> tuple[Tensor, ...]:
        """Indices of the visible pixels: (sample, y, x), each (N,) int64. Waits for the device."""
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
    """A dense layer with a mask behind it, and optionally one before it."""

    def __init__(self, layer: nn.Module, visibility: Visibility, *, before: bool = False) -> None:
        super().__init__()
        self.layer, self.visibility, self.before = layer, visibility, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x * self.visibility.pixels(*x.shape[2:])
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


class _ChannelNorm(nn.Module):
    """A layer norm at every pixel of an NCHW map, in that memory order, with a mask behind it."""

    def __init__(self, norm: nn.LayerNorm, visibility: Visibility) -> None:
        super().__init__()
        self.layer, self.visibility = norm, visibility

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        normalised = (x - mean) / (variance + self.layer.eps).sqrt()
        return self.visibility.hide(normalised * self.layer.weight.view(-1, 1, 1) + self.layer.bias.view(-1, 1, 1))


class _VisibleGRN(nn.Module):
    """GRN of an NHWC map, its norm over the visible pixels."""

    def __init__(self, grn: nn.Module, visibility: Visibility) -> None:
        super().__init__()
        self.layer, self.visibility = grn, visibility

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x * self.visibility.pixels(*x.shape[1:3]).permute(0, 2, 3, 1))
        return out


class _ConvNeXtBlock(nn.Module):
    """The block of ConvNeXt; the mask comes after the linear layers, whose biases fill the hidden pixels.

    Args:
        depthwise: of an NCHW map, hides pixels.
        norm: of an NHWC map.
        mlp: of an NHWC map.
        layer_scale: of as many values as channels, if there is one.
        drop_path: of an NCHW map.
        visibility: the network's.
    """

    def __init__(
        self,
        depthwise: nn.Module,
        norm: nn.Module,
        mlp: nn.Module,
        layer_scale: nn.Parameter | None,
        drop_path: nn.Module,
        visibility: Visibility,
    ) -> None:
        super().__init__()
        self.depthwise, self.norm, self.mlp = depthwise, norm, mlp
        self.layer_scale, self.drop_path, self.visibility = layer_scale, drop_path, visibility

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        if self.layer_scale is not None:
            y = self.layer_scale.flatten() * y
        out: Tensor = x + self.drop_path(self.visibility.hide(y.permute(0, 3, 1, 2)))
        return out


def _replaced(layer: nn.Module, form: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replaces a layer of the dense network or, if it has no replacement, its children."""
    if (replacement := form(layer)) is not None:
        return replacement
    for name, child in layer.named_children():
        setattr(layer, name, _replaced(child, form))
    return layer


def _batch_norm_of_rows(norm: nn.BatchNorm2d) -> nn.BatchNorm1d:
    """The same norm over (N, C), with the same parameters, buffers and hooks."""
    rows = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum)
    rows.weight, rows.bias = norm.weight, norm.bias
    rows.running_mean, rows.running_var = norm.running_mean, norm.running_var
    rows.num_batches_tracked = norm.num_batches_tracked
    return rows


class Official(nn.Module):
    """The common base: an encoder with copied weights of a model of sparkme, in the dense layout and in NCHW memory.

    Args:
        name: of the encoder, see `sparkme.networks.create.create_dense`.
        model: whose weights, device and dtype are taken.
        drop_path: as the encoder was made with, see `sparkme.networks.create.create_encoder`.

    Raises:
        ValueError: the model is not that network.
    """

    def __init__(self, name: str, model: MaskedAutoencoder, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch, self.normalise_patches, self.visibility = model.patch, model.normalise_patches, Visibility()
        self.taps = model.encoder.hierarchy.taps
        network = create_dense(name, drop_path=drop_path).to(next(model.parameters()))
        state = model.encoder.dense_state_dict()
        if unexpected := network.load_state_dict(state, strict=False).unexpected_keys:
            raise ValueError(f"{name} has no {', '.join(unexpected[:5])}")
        for child, module in network.named_children():
            if any(True for _ in module.parameters()) and not any(key.startswith(f"{child}.") for key in state):
                setattr(network, child, nn.Identity())  # the head
        self.dense_parameters = dict(network.named_parameters())  # under their names in the dense network
        self.network = _replaced(network, self._form)
        if ":" not in name:
            add_drop_path(self.network, drop_path)
        self.maps: dict[int, Tensor] = {}
        attach(self.network, self.taps, self._keep)

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """Loss of (B, C, H, W) images and a (B, 1, f_h, f_w) bool mask, True = visible."""
        prediction = self._predict(self.encode(images, active))
        target = _patches(images, self.patch)
        if self.normalise_patches:
            mean, variance = target.mean(2, keepdim=True), target.var(2, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        errors = (prediction - target).square().mean(2)
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

    def gradients(self, model: MaskedAutoencoder) -> dict[str, Tensor]:
        """This network's gradients, with the names and the layout of `model`'s parameters."""
        found = _gradients({name.replace(".layer.", "."): p for name, p in self.named_parameters()})
        found = {name: gradient for name, gradient in found.items() if not name.startswith("network.")}
        twin = copy.deepcopy(model.encoder)  # takes the gradients in the place of its weights
        twin.load_dense_state_dict(twin.dense_state_dict() | _gradients(self.dense_parameters))
        return found | {f"encoder.{name}": parameter.detach() for name, parameter in twin.named_parameters()}

    def _form(self, layer: nn.Module) -> nn.Module | None:
        """The replacement of a layer of the dense network, with the same parameters; None if the layer stays."""
        if isinstance(layer, CNBlock):
            depthwise, _, norm, expand, activation, reduce, _ = layer.block
            parts = depthwise, norm, nn.Sequential(expand, activation, reduce)
            return self._block(parts, layer.layer_scale, layer.stochastic_depth)
        if isinstance(layer, ConvNeXtBlock) and not layer.use_conv_mlp:
            return self._block((layer.conv_dw, layer.norm, layer.mlp), layer.gamma, layer.drop_path)
        if isinstance(layer, GlobalResponseNorm) and layer.channel_dim == -1:
            return _VisibleGRN(layer, self.visibility)
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            return _Masked(layer, self.visibility)
        if isinstance(layer, nn.BatchNorm2d):
            return _RowNorm(_batch_norm_of_rows(layer), self.visibility, channels_last=False)
        return None

    def _block(self, parts: tuple[nn.Module, ...], scale: nn.Parameter | None, drop_path: nn.Module) -> _ConvNeXtBlock:
        depthwise, norm, mlp = (_replaced(part, self._form) for part in parts)
        return _ConvNeXtBlock(depthwise, norm, mlp, scale, drop_path, self.visibility)

    def _keep(self, i: int, x: Tensor) -> bool:
        self.maps[i] = x
        return len(self.maps) == len(self.taps)

    def _predict(self, maps: list[Tensor]) -> Tensor:
        """The encoder's maps to (B, L, p * p * C), in the order of `_patches`."""
        raise NotImplementedError


class OfficialSparK(Official):
    """SparK with the weights of a `sparkme.SparK`, in its mode; see `Official`."""

    def __init__(self, name: str, model: SparK, *, drop_path: float = 0.0) -> None:
        super().__init__(name, model, drop_path=drop_path)
        self.densify_norms = nn.ModuleList(
            _RowNorm(copy.deepcopy(norm), self.visibility, channels_last=False) for norm in model.densify_norms
        )
        self.densify_projs = nn.ModuleList(_fresh(projection) for projection in model.densify_projs)
        self.mask_tokens = nn.ParameterList(
            token.detach().clone(memory_format=torch.contiguous_format) for token in model.mask_tokens
        )
        width = model.decoder.get_submodule("dec.0.up_sample").get_parameter("weight").shape[0]
        self.decoder = Decoder(model.encoder.strides[-1], width, model.encoder.in_channels).to(self.mask_tokens[0])
        self.decoder.load_state_dict(model.decoder.state_dict())
        self.train(model.training)

    def _form(self, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.Conv2d):
            return _Masked(layer, self.visibility)
        if isinstance(layer, nn.LayerNorm):
            rows = nn.LayerNorm(layer.normalized_shape, layer.eps)
            rows.weight, rows.bias = layer.weight, layer.bias
            return _RowNorm(rows, self.visibility, channels_last=not isinstance(layer, LayerNorm2d | TimmLayerNorm2d))
        return super()._form(layer)

    def _predict(self, maps: list[Tensor]) -> Tensor:
        dense = {i: self._densify(i, x) for i, x in enumerate(reversed(maps))}
        return _patches(self.decoder(dense), self.patch)

    def _densify(self, i: int, x: Tensor) -> Tensor:
        visible = self.visibility.pixels(*x.shape[2:]).expand_as(x)
        filled = torch.where(visible, self.densify_norms[i](x), self.mask_tokens[i].expand_as(x))
        projected: Tensor = self.densify_projs[i](filled)
        return projected


class OfficialFCMAE(Official):
    """FCMAE with the weights of a `sparkme.FCMAE`, in its mode; see `Official`."""

    def __init__(self, name: str, model: FCMAE, *, drop_path: float = 0.0) -> None:
        super().__init__(name, model, drop_path=drop_path)
        self.stride = model.stride
        self.projection, self.prediction = _fresh(model.projection), _fresh(model.prediction)
        self.mask_token = nn.Parameter(model.mask_token.detach().clone(memory_format=torch.contiguous_format))
        self.decoder = ConvNeXtBlock(self.mask_token.shape[1], use_grn=True, ls_init_value=None).to(self.mask_token)
        self.decoder.load_state_dict(model.decoder.state_dict())
        self.train(model.training)

    def _form(self, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.Conv2d):
            return _Masked(layer, self.visibility, before=max(layer.kernel_size) > 1)
        if isinstance(layer, LayerNorm2d | TimmLayerNorm2d):
            return _ChannelNorm(layer, self.visibility)
        return super()._form(layer)

    def _predict(self, maps: list[Tensor]) -> Tensor:
        x = self.projection(maps[-1])
        b, s, (h, w) = len(x), self.stride, x.shape[2:]
        visible = self.visibility.pixels(h, w).to(x.dtype)
        x = self.decoder(x * visible + self.mask_token * (1 - visible))
        blocks = self.prediction(x).view(b, s, s, -1, h, w)  # values of a place are ordered (y, x, channel)
        return _patches(blocks.permute(0, 3, 4, 1, 5, 2).reshape(b, -1, h * s, w * s), self.patch)


def create_official(name: str, model: MaskedAutoencoder) -> Official:
    """The published algorithm of a `sparkme.SparK` or `sparkme.FCMAE`, whose encoder has this name; see `Official`."""
    if isinstance(model, FCMAE):
        return OfficialFCMAE(name, model)
    assert isinstance(model, SparK)
    return OfficialSparK(name, model)


def _fresh(projection: nn.Module) -> nn.Module:
    """A copy in NCHW memory, in a new layer, since the memory order of a 1x1 weight is ambiguous."""
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
