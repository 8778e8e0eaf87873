"""A dense reference of SparK for the tests: plain torch on whole maps, hidden sites set to zero after every layer.

It shares no code with the package under test, and is written for clarity rather than speed. Everything is a function
of its arguments, keeps the dtype it is given (float64 included) and is differentiable by autograd.

Shapes: a map is x (B, C, H, W); `active` is (B, 1, f_h, f_w) bool, True = visible, one entry per patch, and covers a
map of any stride. Source of the semantics: Tian et al., ICLR 2023 (arXiv:2301.03580) and its official code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ENCODER_PREFIX = "sparse_encoder.sp_cnn."
BATCH_NORM_EPS = 1e-5
LAYER_NORM_EPS = 1e-6
TARGET_EPS = 1e-6
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# --- masks and row order ----------------------------------------------------------------------------------------------


def upsample_mask(active: Tensor, h: int, w: int) -> Tensor:
    """Visibility of every site of an (h, w) map, (B, 1, h, w) bool, from one entry per patch (B, 1, f_h, f_w).

    Raises:
        ValueError: if (h, w) is not a whole multiple of the patch grid.
    """
    f_h, f_w = active.shape[-2:]
    if h % f_h or w % f_w:
        raise ValueError(f"a map of {h}x{w} sites does not divide into {f_h}x{f_w} patches")
    return active.repeat_interleave(h // f_h, dim=2).repeat_interleave(w // f_w, dim=3)


def masked(x: Tensor, active: Tensor) -> Tensor:
    """x (B, C, H, W) with every hidden site set to zero, whatever it held (NaN included)."""
    return torch.where(upsample_mask(active, *x.shape[-2:]), x, x.new_zeros(()))


def random_active(batch: int, f: int | tuple[int, int], visible: int, seed: int = 0) -> Tensor:
    """Seeded mask (B, 1, f_h, f_w) bool with exactly `visible` patches True in every image."""
    f_h, f_w = (f, f) if isinstance(f, int) else f
    if not 0 < visible <= f_h * f_w:
        raise ValueError(f"visible={visible} is outside 1..{f_h * f_w}")
    generator = torch.Generator().manual_seed(seed)
    active = torch.zeros(batch, f_h * f_w, dtype=torch.bool)
    for sample in active:
        sample[torch.randperm(f_h * f_w, generator=generator)[:visible]] = True
    return active.view(batch, 1, f_h, f_w)


def rows_of(dense_map: Tensor, active: Tensor, stride: int, patch: int = 32) -> Tensor:
    """Visible sites of dense_map (B, C, H/stride, W/stride) as rows (N, C), patch-major.

    Sorted by sample, then visible patch (row-major over the patch grid), then y, then x inside the patch.
    """
    p = _patch_side(stride, patch)
    b, c, h, w = dense_map.shape
    f_h, f_w = active.shape[-2:]
    if (h, w) != (f_h * p, f_w * p):
        raise ValueError(f"a map of {h}x{w} at stride {stride} does not fit {f_h}x{f_w} patches of {patch} pixels")
    patches = dense_map.reshape(b, c, f_h, p, f_w, p).permute(0, 2, 4, 3, 5, 1)  # (B, f_h, f_w, p, p, C)
    return patches[active[:, 0]].reshape(-1, c)


def map_of(rows: Tensor, active: Tensor, stride: int, patch: int = 32) -> Tensor:
    """The inverse of `rows_of`: (N, C) patch-major rows to a map (B, C, H/stride, W/stride), zero where hidden."""
    p = _patch_side(stride, patch)
    b, _, f_h, f_w = active.shape
    patches = rows.new_zeros(b, f_h, f_w, p, p, rows.shape[1])
    patches[active[:, 0]] = rows.reshape(-1, p, p, rows.shape[1])
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, rows.shape[1], f_h * p, f_w * p)


def _patch_side(stride: int, patch: int) -> int:
    if patch % stride:
        raise ValueError(f"stride {stride} does not divide the patch of {patch} pixels")
    return patch // stride


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value (absolute when all expected are zero)."""
    if got.shape != expected.shape:
        raise ValueError(f"shapes differ: got {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    scale = expected.abs().max().item()
    return (got - expected).abs().max().item() / (scale or 1.0)


# --- layers -----------------------------------------------------------------------------------------------------------


def masked_conv2d(
    x: Tensor,
    active: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolution in which a hidden neighbour counts as zero, as padding does; the output is zero where hidden."""
    return masked(F.conv2d(masked(x, active), weight, bias, stride, padding, dilation, groups), active)


def masked_max_pool2d(
    x: Tensor,
    active: Tensor,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling in which a hidden neighbour counts as zero, while padding outside the map never wins.

    On non-negative input (after a ReLU) that is the maximum over visible neighbours; only there is it defined.
    """
    pooled = F.max_pool2d(masked(x, active), kernel_size, stride, padding, dilation, ceil_mode)
    return masked(pooled, active)


def masked_avg_pool2d(x: Tensor, active: Tensor, kernel_size: int, ceil_mode: bool = False) -> Tensor:
    """Mean over the visible sites present in each window; windows do not overlap (stride = kernel_size)."""
    present = upsample_mask(active, *x.shape[-2:]).to(x.dtype)
    sums = F.avg_pool2d(masked(x, active), kernel_size, ceil_mode=ceil_mode, divisor_override=1)
    counts = F.avg_pool2d(present, kernel_size, ceil_mode=ceil_mode, divisor_override=1)
    return masked(sums / counts.clamp(min=1), active)


def masked_global_average(x: Tensor, active: Tensor) -> Tensor:
    """Mean of x (B, C, H, W) over the visible sites of each sample, (B, C)."""
    counts = upsample_mask(active, *x.shape[-2:]).sum(dim=(2, 3))
    return masked(x, active).sum(dim=(2, 3)) / counts


def masked_batch_norm(
    x: Tensor,
    active: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = BATCH_NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm whose statistics come from visible sites only.

    Returns:
        The normalised map (zero where hidden), and the running mean and variance that follow (detached; the given
        ones are not modified). Training normalises by the biased variance and accumulates the unbiased one.
    """
    x = masked(x, active)  # first, so that no hidden value reaches a gradient either
    mean, var = running_mean, running_var
    if training:
        count = int(upsample_mask(active, *x.shape[-2:]).sum())
        mean = x.sum(dim=(0, 2, 3)) / count
        squares = masked(x - _per_channel(mean), active).square().sum(dim=(0, 2, 3))
        var = squares / count
        running_mean = torch.lerp(running_mean, mean.detach(), momentum)
        running_var = torch.lerp(running_var, squares.detach() / (count - 1), momentum)
    y = (x - _per_channel(mean)) / torch.sqrt(_per_channel(var) + eps)
    return masked(_affine(y, weight, bias), active), running_mean, running_var


def masked_layer_norm(
    x: Tensor, active: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = LAYER_NORM_EPS
) -> Tensor:
    """LayerNorm over the channels of each visible site; zero where hidden."""
    x = masked(x, active)
    centred = x - x.mean(dim=1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    return masked(_affine(y, weight, bias), active)


def masked_grn(x: Tensor, active: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation of ConvNeXt V2 with the norm of each sample and channel over visible sites."""
    x = masked(x, active)
    energy = x.square().sum(dim=(2, 3), keepdim=True)
    # A channel that is zero everywhere would give sqrt an infinite slope; its response and its gradient are zero.
    norm = torch.where(energy > 0, torch.where(energy > 0, energy, 1.0).sqrt(), 0.0)
    response = norm / (norm.mean(dim=1, keepdim=True) + eps)
    return masked(x + _affine(x * response, gamma.reshape(-1), beta.reshape(-1)), active)


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * _per_channel(weight)
    return x if bias is None else x + _per_channel(bias)


# --- encoders ---------------------------------------------------------------------------------------------------------


def trainable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies of a state dict in which every parameter (not a buffer) is a leaf that requires a gradient."""
    copies = {key: value.detach().clone() for key, value in state.items()}
    for key, value in copies.items():
        value.requires_grad_(not key.endswith(_BUFFERS))
    return copies


def encoder_features(
    state: Mapping[str, Tensor],
    images: Tensor,
    active: Tensor,
    *,
    training: bool = False,
    prefix: str = "",
    updates: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """Maps of a ResNet (timm and torchvision names) or a ConvNeXt (official names, V1 or V2), shallow to deep.

    Args:
        state: weights; `prefix` comes before the network's own names.
        images: (B, C, H, W); hidden pixels are zeroed first.
        training: BatchNorm uses batch statistics; no drop path.
        updates: receives the running statistics that follow a training pass, under their state-dict keys.

    Returns:
        Four maps (B, C_i, H/s, W/s), s = 4, 8, 16, 32, zero at hidden sites.
    """
    net = _Network(state, prefix, active, training, {} if updates is None else updates)
    images = masked(images, active)
    if net.has("conv1.weight"):
        return _resnet_features(net, images)
    if net.has("downsample_layers.0.0.weight"):
        return _convnext_features(net, images)
    raise ValueError(f"no ResNet or ConvNeXt under the prefix {prefix!r}: neither conv1 nor downsample_layers.0.0")


class _Network:
    """Looks weights up by name and applies the layers above, with the mask and the mode of one forward pass."""

    def __init__(
        self, state: Mapping[str, Tensor], prefix: str, active: Tensor, training: bool, updates: dict[str, Tensor]
    ) -> None:
        self.state, self.prefix, self.active, self.training, self.updates = state, prefix, active, training, updates

    def has(self, name: str) -> bool:
        return self.prefix + name in self.state

    def get(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def maybe(self, name: str) -> Tensor | None:
        return self.state.get(self.prefix + name)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.get(f"{name}.weight")
        if padding is None:
            padding = weight.shape[-1] // 2
        groups = x.shape[1] // weight.shape[1]
        return masked_conv2d(x, self.active, weight, self.maybe(f"{name}.bias"), stride, padding, groups)

    def pointwise(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return masked_conv2d(x, self.active, weight[:, :, None, None], bias)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return masked_layer_norm(x, self.active, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (self.get(f"{name}.{n}") for n in ("weight", "bias", "running_mean", "running_var"))
        y, mean, var = masked_batch_norm(x, self.active, weight, bias, mean, var, self.training)
        if self.training:
            self.updates[f"{self.prefix}{name}.running_mean"] = mean
            self.updates[f"{self.prefix}{name}.running_var"] = var
            if self.has(f"{name}.num_batches_tracked"):
                tracked = self.get(f"{name}.num_batches_tracked")
                self.updates[f"{self.prefix}{name}.num_batches_tracked"] = tracked + 1
        return y


def _resnet_features(net: _Network, x: Tensor) -> list[Tensor]:
    x = F.relu(net.batch_norm("bn1", net.conv("conv1", x, stride=2)))
    x = masked_max_pool2d(x, net.active, kernel_size=3, stride=2, padding=1)
    features = []
    for stage in range(1, 5):
        block = 0
        while net.has(f"layer{stage}.{block}.conv1.weight"):
            x = _resnet_block(net, f"layer{stage}.{block}", x, stride=2 if stage > 1 and block == 0 else 1)
            block += 1
        features.append(x)
    return features


def _resnet_block(net: _Network, name: str, x: Tensor, stride: int) -> Tensor:
    """Basic block (two 3x3, the first strided) or bottleneck (1x1, strided 3x3, 1x1)."""
    convs = 3 if net.has(f"{name}.conv3.weight") else 2
    strided = 2 if convs == 3 else 1
    y = x
    for i in range(1, convs + 1):
        y = net.batch_norm(f"{name}.bn{i}", net.conv(f"{name}.conv{i}", y, stride if i == strided else 1))
        y = F.relu(y) if i < convs else y
    if net.has(f"{name}.downsample.0.weight"):
        x = net.batch_norm(f"{name}.downsample.1", net.conv(f"{name}.downsample.0", x, stride))
    return F.relu(x + y)


def _convnext_features(net: _Network, x: Tensor) -> list[Tensor]:
    features = []
    for stage in range(4):
        down = f"downsample_layers.{stage}"
        if stage == 0:
            x = net.layer_norm(f"{down}.1", net.conv(f"{down}.0", x, stride=4, padding=0))
        else:
            x = net.conv(f"{down}.1", net.layer_norm(f"{down}.0", x), stride=2, padding=0)
        block = 0
        while net.has(f"stages.{stage}.{block}.dwconv.weight"):
            x = _convnext_block(net, f"stages.{stage}.{block}", x)
            block += 1
        features.append(x)
    return features


def _convnext_block(net: _Network, name: str, x: Tensor) -> Tensor:
    y = net.layer_norm(f"{name}.norm", net.conv(f"{name}.dwconv", x))
    y = F.gelu(net.pointwise(f"{name}.pwconv1", y))
    if net.has(f"{name}.grn.gamma"):
        y = masked_grn(y, net.active, net.get(f"{name}.grn.gamma"), net.get(f"{name}.grn.beta"))
    y = net.pointwise(f"{name}.pwconv2", y)
    gamma = net.maybe(f"{name}.gamma")
    return x + (y if gamma is None else y * _per_channel(gamma))


# --- SparK ------------------------------------------------------------------------------------------------------------


class OracleSparK:
    """SparK on dense maps, computed from a state dict with the official names.

    Args:
        state: official state dict. Its tensors are used as they are, so gradients arrive in them (see `trainable`).
        model: name of the encoder, only to check that the state dict is of its family: 'resnet...' or 'convnext...'.
        input_size: pixels, one number or (height, width).
        patch: side of a patch in pixels, the total stride of the encoder.

    Attributes:
        updates: running statistics after the latest training pass, under their state-dict keys. They are kept apart:
            `state` still holds the initial ones, and evaluation uses those.

    Raises:
        ValueError: if the model does not match the state dict, or the input does not divide into patches.
    """

    def __init__(self, state: Mapping[str, Tensor], model: str, input_size: int | tuple[int, int], *, patch: int = 32) -> None:
        marker = {"resn": "conv1.weight", "conv": "downsample_layers.0.0.weight"}.get(model[:4])
        if marker is None or ENCODER_PREFIX + marker not in state:
            raise ValueError(f"model {model!r} does not match the state dict: {ENCODER_PREFIX}{marker} is not in it")
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if height % patch or width % patch:
            raise ValueError(f"an input of {height}x{width} pixels does not divide into patches of {patch}")
        self.state = state
        self.patch = patch
        self.size = (height, width)
        self.updates: dict[str, Tensor] = {}

    def features(self, images: Tensor, active: Tensor, training: bool = False) -> list[Tensor]:
        """Encoder maps at strides 4, 8, 16 and 32, zero where hidden."""
        self._check(images, active)
        return encoder_features(self.state, images, active, training=training, prefix=ENCODER_PREFIX, updates=self.updates)

    def densify(self, features: list[Tensor], active: Tensor, training: bool = False) -> list[Tensor]:
        """Maps for the decoder, DEEPEST FIRST: norm at visible sites, mask token at hidden ones, projection."""
        net = _Network(self.state, "", active, training, self.updates)
        maps = []
        for i, x in enumerate(reversed(features)):
            if net.has(f"densify_norms.{i}.running_mean"):
                x = net.batch_norm(f"densify_norms.{i}", x)
            elif net.has(f"densify_norms.{i}.weight"):
                x = net.layer_norm(f"densify_norms.{i}", x)
            x = torch.where(upsample_mask(active, *x.shape[-2:]), x, net.get(f"mask_tokens.{i}"))
            weight = net.maybe(f"densify_projs.{i}.weight")
            if weight is not None:  # absent: the identity, where the encoder is as wide as the decoder
                x = F.conv2d(x, weight, net.get(f"densify_projs.{i}.bias"), padding=weight.shape[-1] // 2)
            maps.append(x)
        return maps

    def decode(self, maps: list[Tensor], training: bool = False) -> Tensor:
        """Prediction (B, 3, H, W) in units of the normalised target, from densified maps, deepest first."""
        x = torch.zeros_like(maps[0])
        block = 0
        while f"dense_decoder.dec.{block}.up_sample.weight" in self.state:
            name = f"dense_decoder.dec.{block}"
            if block < len(maps):
                x = x + maps[block]
            up_weight, up_bias = self.state[f"{name}.up_sample.weight"], self.state[f"{name}.up_sample.bias"]
            x = F.conv_transpose2d(x, up_weight, up_bias, stride=2, padding=1)
            x = F.relu6(self._conv_batch_norm(f"{name}.conv", 0, x, training))
            x = self._conv_batch_norm(f"{name}.conv", 3, x, training)
            block += 1
        return F.conv2d(x, self.state["dense_decoder.proj.weight"], self.state["dense_decoder.proj.bias"])

    def predict(self, images: Tensor, active: Tensor, training: bool = False) -> Tensor:
        """Prediction (B, 3, H, W) in units of the normalised target."""
        self.updates = {}
        features = self.features(images, active, training)
        return self.decode(self.densify(features, active, training), training)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, f_h * f_w, C * patch * patch): one vector per patch, all its channels together."""
        b, c, h, w = images.shape
        p = self.patch
        patches = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(b, (h // p) * (w // p), c * p * p)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        f_h, f_w = (side // self.patch for side in self.size)
        p = self.patch
        maps = patches.reshape(len(patches), f_h, f_w, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return maps.reshape(len(patches), -1, f_h * p, f_w * p)

    def loss_of(self, prediction: Tensor, images: Tensor, active: Tensor) -> Tensor:
        """Mean squared error against normalised patches, averaged over hidden patches; zero if none is hidden."""
        mean, scale = self._patch_statistics(images)
        target = (self.patchify(images) - mean) / scale
        errors = (self.patchify(prediction) - target).square().mean(dim=-1)
        hidden = ~active.flatten(1)
        return torch.where(hidden, errors, 0.0).sum() / hidden.sum().clamp(min=1)

    def loss(self, images: Tensor, active: Tensor, training: bool = True) -> Tensor:
        """The scalar that pretraining minimises."""
        return self.loss_of(self.predict(images, active, training), images, active)

    def reconstruction_of(self, prediction: Tensor, images: Tensor, active: Tensor) -> Tensor:
        """Visible pixels from the image, hidden ones from the prediction, scaled back by their patch's statistics."""
        mean, scale = self._patch_statistics(images)
        filled = self.unpatchify(self.patchify(prediction) * scale + mean)
        return torch.where(upsample_mask(active, *self.size), images, filled)

    def reconstruct(self, images: Tensor, active: Tensor, training: bool = False) -> Tensor:
        """The image (B, 3, H, W) completed by the network."""
        return self.reconstruction_of(self.predict(images, active, training), images, active)

    def _patch_statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sqrt(unbiased variance + eps) of every patch, each (B, f_h * f_w, 1)."""
        patches = self.patchify(images)
        mean = patches.mean(dim=-1, keepdim=True)
        variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
        return mean, torch.sqrt(variance + TARGET_EPS)

    def _conv_batch_norm(self, name: str, index: int, x: Tensor, training: bool) -> Tensor:
        """conv3x3 and BatchNorm of the decoder: all sites count, so this is the masked norm with nothing hidden."""
        x = F.conv2d(x, self.state[f"{name}.{index}.weight"], padding=1)
        everywhere = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
        return _Network(self.state, "", everywhere, training, self.updates).batch_norm(f"{name}.{index + 1}", x)

    def _check(self, images: Tensor, active: Tensor) -> None:
        grid = tuple(side // self.patch for side in self.size)
        if tuple(images.shape[-2:]) != self.size or active.shape != (len(images), 1, *grid):
            got = f"images {tuple(images.shape)}, active {tuple(active.shape)}"
            raise ValueError(f"got {got}; expected images of {self.size} pixels and active (B, 1, *{grid})")


# --- what other networks are made of ----------------------------------------------------------------------------------


def masked_window(x: Tensor, active: Tensor, sides: tuple[int, int, int, int], mode: str = "constant") -> Tensor:
    """x with hidden sites at zero, and pixels around it: (left, right, top, bottom), zeros or reflected."""
    return F.pad(masked(x, active), sides, mode=mode)


def masked_conv2d_padded(
    x: Tensor,
    active: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    sides: tuple[int, int, int, int],
    groups: int = 1,
    dilation: int = 1,
    mode: str = "constant",
) -> Tensor:
    """Convolution after padding by (left, right, top, bottom); a hidden neighbour counts as zero."""
    padded = masked_window(x, active, sides, mode)
    return masked(F.conv2d(padded, weight, bias, stride, 0, dilation, groups), active)


def same_sides(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's `same` padding along one axis: before, after."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def visible_max_pool2d(
    x: Tensor, active: Tensor, kernel_size: int, stride: int, padding: int = 0, ceil_mode: bool = False
) -> Tensor:
    """Maximum over the visible sites of the window, of whatever sign."""
    present = upsample_mask(active, *x.shape[-2:])
    lowest = torch.where(present, x, x.new_full((), -torch.inf))
    return masked(F.max_pool2d(lowest, kernel_size, stride, padding, ceil_mode=ceil_mode), active)


def averaged_with_zeros(x: Tensor, active: Tensor, *options: object) -> Tensor:
    """torch's average pooling with hidden sites at zero; what it divides by does not look at the mask."""
    return masked(F.avg_pool2d(masked(x, active), *options), active)  # type: ignore[arg-type]


def masked_global_max(x: Tensor, active: Tensor) -> Tensor:
    """Maximum of x (B, C, H, W) over the visible sites of each sample, (B, C)."""
    present = upsample_mask(active, *x.shape[-2:])
    return torch.where(present, x, x.new_full((), -torch.inf)).amax(dim=(2, 3))


def masked_group_norm(x: Tensor, active: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Group norm with statistics over the visible sites of each sample."""
    b, c, h, w = x.shape
    present = upsample_mask(active, h, w).to(x.dtype).view(b, 1, 1, h, w)
    split = masked(x, active).view(b, groups, c // groups, h, w)
    count = present.sum(dim=(2, 3, 4), keepdim=True) * (c // groups)
    mean = split.sum(dim=(2, 3, 4), keepdim=True) / count
    centred = (split - mean) * present
    variance = centred.square().sum(dim=(2, 3, 4), keepdim=True) / count
    return masked(_affine((centred / torch.sqrt(variance + eps)).view(b, c, h, w), weight, bias), active)


def standardised(weight: Tensor, eps: float, gain: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """A kernel with mean 0 and variance 1 of each output channel (biased), times a gain of shape (C_out, 1, 1, 1)."""
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    out = (centred / torch.sqrt(centred.square().mean(1, keepdim=True) + eps)).view_as(weight)
    return out * scale if gain is None else out * (gain * scale)
