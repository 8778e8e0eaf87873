"""Every refusal of `sparkme.sparsify` beside a network that causes it, as a user reads it: one line, the layer, the remedy.

A new refusal needs a row here; `<>` in a message stands for anything.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Block, make
from torch import Tensor, nn
from torch.nn.utils import prune

import sparkme

Body = Callable[[Any, Tensor], Tensor]
SPARSE = Path(sparkme.__file__).parent / "sparse"
LAYER = "layer 'blocks.0' (Block) has no sparse form: "
REPLACE = "; replace it in the dense model, or give its class a sparse form in sparkme.sparse.forms.SPARSE_FORMS"
BLIND = (
    "; look for a torch.autograd.Function or a checkpoint with use_reentrant=True, which do not work on sparse maps, and use "
    "torch's own functions instead"
)
UNALIGNED = "Sequential cannot be aligned to a grid of patches: for an image of 128x192 pixels its layer "
PAD = "pad its input, so that a layer of stride s, a power of two, turns n * s pixels into n"


# --- what the code between layers does --------------------------------------------------------------------------------


def changes_a_view(m: Block, x: Tensor) -> Tensor:
    x.chunk(2, 1)[0].relu_()
    return x + 1


def assigns(m: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :1] = 0
    return x


def copies(m: Block, x: Tensor) -> Tensor:
    return m.norm(torch.as_tensor(x) if isinstance(x, Tensor) else x)


def keeps(m: Any, x: Tensor) -> Tensor:
    y = x if getattr(m, "kept", None) is None else x + 0 * m.kept
    m.kept = x.detach()
    return y


def attends(m: Block, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    return (tokens @ tokens.transpose(1, 2) @ tokens).reshape(x.shape)


def grouped_pixels(m: Block, x: Tensor) -> Tensor:
    """(B, C, C, H W), which has four axes, too."""
    return x.view(len(x), 2, -1, x.shape[2] * x.shape[3])


BODIES: dict[str, tuple[Body, str]] = {
    "a view changed in place": (changes_a_view, "changing a map in place and then using an earlier view of it (a slice, a "
    "chunk, a reshaped map), or the reverse, has no sparse form; write x = x + y for x += y there, or inplace=False"),
    "a ReLU after F.pad": (lambda m, x: F.conv2d(F.relu(F.pad(x, (1, 1, 1, 1))), m.conv.weight),
        "only a convolution or a pooling can follow F.pad of a map; pad right before it"),
    "a window over a map without channels": (lambda m, x: x * F.max_pool2d(x.sum(1), 3, 1, 1).unsqueeze(1),
        "a map with axes BHW has no sparse form here, only a map with one channel axis"),
    "cat along H": (lambda m, x: torch.cat([x, x], 2).mean((2, 3), True) + x,
        "axis 2 (H) of a map BCHW: this works along channels only, since it would mix pixels"),
    "a comparison with None": (lambda m, x: m.norm(x) if x != None else x,  # noqa: E711
        "the truth value of a map depends on hidden pixels; write `x is None` for `x == None`"),
    "a loop over samples": (lambda m, x: torch.stack([y for y in x]),  # noqa: C416
        "a loop over the samples of a map has no sparse form; process the whole batch at once"),
    "an assignment": (assigns, "assigning to a part of a map has no sparse form; join channels with torch.cat, or select with "
    "torch.where"),
    "a tensor's class": (lambda m, x: x if type(x) is Tensor else x.flatten3(),
        "AttributeError: a tensor has no attribute 'flatten3'"),
    "a copy by torch.as_tensor": (copies, "could not determine the shape of object type 'SparseMap'"),
    "a property": (lambda m, x: x.mT.mT, "torch.Tensor.mT has no sparse form"),
    "a function": (lambda m, x: x.cumsum(3),
        "torch function 'cumsum' has no sparse form: it may mix visible and hidden pixels, as attention does"),
    "batch norm over groups": (lambda m, x: F.batch_norm(x.flatten(2), None, None, training=True).view(x.shape),
        "batch norm of a map with axes BCP has no sparse form, only of BCHW"),
    "layer norm over the map": (lambda m, x: F.layer_norm(x, x.shape[1:]),
        "layer norm over (4, 4, 6) of a map BCHW has no sparse form, only over channels as the last axis"),
    "RMS norm over the map": (lambda m, x: F.rms_norm(x, x.shape[1:]),
        "RMS norm over (4, 4, 6) of a map BCHW has no sparse form, only over channels as the last axis"),
    "group norm of flat pixels": (lambda m, x: F.group_norm(x.flatten(2), 2).view(x.shape),
        "group norm of a map with axes BCP has no sparse form, only of BCHW"),
    "instance norm of flat pixels": (lambda m, x: F.instance_norm(x.flatten(2)).view(x.shape),
        "instance norm of a map with axes BCP has no sparse form, only of BCHW"),
    "a shift": (lambda m, x: torch.cat([x[:, :, 1:], x[:, :, :1]], 2),
        "a slice of axis 2 (H) of a map BCHW: only channels can be moved, pixels stay where they are"),
    "a map as an index": (lambda m, x: x * x[x > 0].mean(), "a map indexed by a map: only a slice or a list of channel indices "
    "has a sparse form; torch.where selects pixel by pixel"),
    "a mask as an index": (lambda m, x: x[:, torch.ones(x.shape[1], dtype=torch.bool)], "a map indexed by Tensor: only a slice "
    "or a list of channel indices has a sparse form; torch.where selects pixel by pixel"),
    "a transposed image": (lambda m, x: m.norm(x.transpose(2, 3)).transpose(2, 3),
        "permute(0, 1, 3, 2) of a map BCHW moves pixels: only channels can be moved, pixels stay where they are"),
    "a new axis by expand": (lambda m, x: x.expand(1, -1, -1, -1, -1)[0], "expand of a map BCHW of shape (2, 4, 4, 6) to "
        "(1, -1, -1, -1, -1): only channels can be repeated; unsqueeze makes a new axis"),
    "a tensor as a map": (lambda m, x: x * torch.ones(x.shape[3]).expand_as(x), "a tensor of shape (6,) expanded to a map BCHW "
        "of shape (2, 4, 4, 6) has no sparse form; remove the expansion, since products broadcast"),
    "tiles": (lambda m, x: F.avg_pool2d(x.repeat(1, 1, 2, 2), 2),
        "repeat(1, 1, 2, 2) of a map BCHW: only channels can be repeated"),
    "a view as another type": (lambda m, x: x.view(x.dtype),
        "view of a map as torch.float64 has no sparse form, only another shape; x.to(dtype) converts"),
    "a view of other pixels": (lambda m, x: x.view(len(x), -1, x.shape[3], x.shape[2]).view(x.shape), "view of a map BCHW of "
        "shape (2, 4, 4, 6) as (2, 4, 6, 4): only channels can be moved, pixels stay where they are"),
    "all pixels in one vector": (lambda m, x: x * x.flatten(1).sum(1).view(-1, 1, 1, 1), "view of a map BCHW of shape "
        "(2, 4, 4, 6) as (2, 96) joins pixels with other axes, as before a linear layer over the whole map, and so mixes "
        "visible and hidden pixels"),
    "pairs of rows": (
        lambda m, x: x.view(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3]).sum(3).repeat_interleave(2, 2),
        "blocks of 2 pixels along one axis: only square blocks have a sparse form"),
    "every fourth pixel": (lambda m, x: x + x[:, :, ::4, ::4].mean((2, 3), keepdim=True),
        "blocks of 4 x 4 pixels do not tile a patch of 2 x 2 pixels at this layer; use smaller blocks"),
    "maximum with indices": (lambda m, x: F.max_pool2d(x, 3, 1, 1, return_indices=True)[0],
        "max_pool2d with return_indices has no sparse form, only without"),
    "global maximum with indices": (lambda m, x: x * F.adaptive_max_pool2d(x, 1, return_indices=True)[0],
        "adaptive_max_pool2d with return_indices has no sparse form, only without"),
    "a pooling of a reflected border": (lambda m, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
        "pooling after F.pad with mode='reflect' has no sparse form, only with 'constant'"),
    "a mean with a border of ones": (lambda m, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=1.0), 3, 1),
        "avg_pool2d after F.pad with a value other than zero has no sparse form"),
    "a pyramid pooling": (lambda m, x: x + F.interpolate(F.adaptive_avg_pool2d(x, 2), size=x.shape[2:]),
        "adaptive pooling to (2, 2) pixels mixes patches; only 1 has a sparse form"),
    "a mean of everything": (lambda m, x: x * x.mean(),
        "a reduction over all axes mixes samples; only channels, or H and W together, have a sparse form"),
    "a mean of channels and rows": (lambda m, x: x - x.mean((1, 2), keepdim=True), "a reduction over C and H alone mixes "
        "visible and hidden pixels; only channels, or H and W together, have a sparse form"),
    "a mean of samples": (lambda m, x: x - x.mean(0, keepdim=True), "a reduction over B alone mixes visible and hidden pixels; "
        "only channels, or H and W together, have a sparse form"),
    "a maximum of rows": (lambda m, x: x - x.max(2, keepdim=True)[0],
        "max of a map over axis 2: use it over channels, or amax over H and W together"),
    "a minimum of everything": (lambda m, x: x - x.min(),
        "min of a map over all axes: use it over channels, or amin over H and W together"),
    "softmax over columns": (lambda m, x: x.softmax(-1), "softmax over axis -1 of a map BCHW mixes visible and hidden pixels; "
        "only softmax over channels, or over H and W flattened into one axis, has a sparse form"),
    "attention": (attends, "matmul of maps, as in attention, mixes visible and hidden pixels"),
    "a matrix times a map": (lambda m, x: (m.conv.weight[:, :, 0, 0] @ x.flatten(2)).view(x.shape),
        "matmul of shapes (4, 4) and (2, 4, 24) has no sparse form; use a channels-last map times a (C_in, C_out) matrix, or a "
        "1x1 convolution"),
    "bilinear resizing": (lambda m, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
        "interpolate with mode='bilinear' by (2, 2) has no sparse form; use mode='nearest' by an integer factor that divides "
        "the stride 4"),
    "downsampling, and a size that small patches do not have": (
        lambda m, x: x + F.interpolate(F.interpolate(x, scale_factor=0.5), scale_factor=2),
        "interpolate with mode='nearest' by (0.5, 0.5) has no sparse form; use mode='nearest' by an integer factor that "
        "divides the stride 2"),
    "a tensor changed by a map": (lambda m, x: torch.zeros(x.shape, dtype=x.dtype).add_(x),
        "changing a tensor in place with a map has no sparse form; write x = x + y for x += y"),
    "a map of the last call": (keeps, "maps of shape (2, 4, 4, 6) and (2, 4, 4, 6) lie on different sites: their strides "
    "differ, or one is from an earlier call; keep no maps between calls"),
    "maps of different axes": (lambda m, x: (x.unsqueeze(0) + x)[0],
        "maps with axes BCHW and CBCHW cannot be combined; give both the same axes"),
    "a tensor of more axes": (lambda m, x: (x * torch.ones(1, 1, 1, 1, 1))[0],
        "a tensor of shape (1, 1, 1, 1, 1) has more axes than the other operand, a map BCHW"),
    "padding twice": (lambda m, x: F.conv2d(F.pad(x, (1, 0, 1, 0)), F.pad(m.conv.weight, (1, 0, 1, 0)), padding=1),
        "a layer with padding after F.pad has no sparse form; pad in one of the two"),
    "a border of twos": (lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=2.0), m.conv.weight),
        "a convolution after F.pad with 2 has no sparse form, only with zero"),
    "a convolution of groups": (
        lambda m, x: F.conv2d(grouped_pixels(m, x), torch.ones(2, 2, 1, 1, dtype=x.dtype)).view(x.shape),
        "a convolution of a map with axes BCCP has no sparse form, only of BCHW"),
    "a map as a filter": (lambda m, x: x + F.conv2d(torch.ones(1, *x.shape[1:], dtype=x.dtype), x).sum(),
        "conv2d with a map as its weight has no sparse form"),
    "a map as a matrix": (
        lambda m, x: x + F.linear(x.new_ones(1, x.shape[2] * x.shape[3]), x.mean(1).flatten(1)).mean(),
        "a linear layer with a map as its weight has no sparse form"),
    "a linear layer along W": (lambda m, x: F.linear(x, torch.ones(x.shape[3], x.shape[3], dtype=x.dtype)),
        "a linear layer along the last axis of a map BCHW mixes visible and hidden pixels; permute it to channels-last"),
    "a border cut off": (lambda m, x: F.pad(F.pad(x, (-1, -1, -1, -1)), (1, 1, 1, 1)),
        "pad(-1, -1, -1, -1) has no sparse form: padding must not be negative"),
    "padding of channels-last": (
        lambda m, x: F.conv2d(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2), m.conv.weight),
        "pad(0, 0, 1, 1, 1, 1) of a map BHWC has no sparse form, only of BCHW"),
    "a border that goes round": (lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), m.conv.weight),
        "padding with mode='circular' has no sparse form; use constant, reflect or replicate"),
    "padding of pixels and channels": (lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1, 0, 1))[:, :-1], m.conv.weight),
        "pad(1, 1, 1, 1, 0, 1) has no sparse form: pad pixels and channels in two calls"),
    "two kinds of padding": (lambda m, x: F.max_pool2d(F.pad(F.pad(x, (1, 0, 1, 0)), (0, 1, 0, 1), value=1.0), 3, 1),
        "two calls of F.pad with different modes or values have no sparse form; pad once"),
    "a dilation along one axis": (lambda m, x: F.conv2d(x, m.conv.weight, padding=(1, 2), dilation=(1, 2)),
        "the dilation (1, 2) differs between height and width; patches need one value for both"),
    "a window that makes more": (lambda m, x: x * F.max_pool2d(x, 2, 2, 1).mean((2, 3), keepdim=True), "kernel 2, stride 2, "
        "padding 1, dilation 1 cannot be aligned to the grid of patches: it does not turn n * 2 pixels into n; use a total "
        "padding of 0 to 1 pixels"),
    "a window that makes more with ceil_mode": (
        lambda m, x: x * F.max_pool2d(x, 3, 2, 1, ceil_mode=True).mean((2, 3), keepdim=True), "kernel 3, stride 2, padding 1, "
        "dilation 1 cannot be aligned to the grid of patches: it does not turn n * 2 pixels into n; use a total padding of 0 "
        "to 1 pixels"),
}  # fmt: skip


# --- whole networks ---------------------------------------------------------------------------------------------------


class Root(nn.Module):
    """Two convolutions and whatever is under test, in the network's own forward."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.function = down(3, 4), down(4, 6), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def down(channels_in: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, 2, 1)


def plain(change: Callable[[nn.Sequential], Any] = lambda network: None) -> nn.Sequential:
    network = nn.Sequential(down(3, 4), down(4, 6))
    change(network)
    return network


def with_layer(layer: Callable[[int], nn.Module], body: Body) -> nn.Module:
    network = make(body, 2)
    for block in network.blocks:
        block.layer = layer(block.conv.in_channels).double()
    return network


def sharing() -> nn.Module:
    network = with_layer(lambda c: nn.Conv2d(c, c, 3, padding=1), lambda m, x: m.layer(m.conv(x)))
    for block in network.blocks:
        block.layer.weight = block.conv.weight
        block.layer.register_forward_hook(lambda m, args, out: 2 * out)
    return network


def summed() -> nn.Module:
    network = Root(lambda m, x: (m.second(y := m.first(x)) + m.third(y)).mean((2, 3)))
    network.third = nn.Conv2d(4, 6, 1, 2)
    return network


def counts(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return x * m.calls


def wants_targets(m: Any, x: Tensor) -> Tensor:
    assert not m.training, "targets should not be none in training mode"
    return m.second(m.first(x)).mean((2, 3))


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.second(m.first(x)).mean((2, 3))


def on_maps_only(function: Callable[[Any, Tensor], Tensor]) -> Body:
    """Does something that the dense network does not."""
    return lambda m, x: m.conv(x) if type(x) is Tensor else function(m, x)


NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no module": (lambda: "resnet18", {}, "sparsify takes a torch.nn.Module, not str"),
    "no scales": (plain, {"num_scales": 0}, "num_scales 0 must be at least 1"),
    "one name": (plain, {"taps": "1"}, "taps must be a list of names of modules, such as ['1'], not a string"),
    "another name": (plain, {"taps": ["2"]}, "taps names '2', which is not a module"),
    "a vector": (lambda: plain(lambda n: n.append(nn.AdaptiveAvgPool2d(1))), {"taps": ["0", "2"]},
        "taps names '2', which returns no aligned feature map"),
    "deep to shallow": (plain, {"taps": ["1", "0"]},
        "taps must go from shallow to deep, one per stride; their strides are [4, 2]"),
    "no convolution": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 4)), {},
        "Sequential has no nn.Conv2d: it is not a convolutional network"),
    "a sum without a name": (summed, {}, "a function computes the map of stride 4 from the outputs of 'third' and 'second', so "
    "no module returns it; make the function a module, or pass its result through an nn.Identity"),
    "a stride along one axis": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, (2, 1), 1), down(4, 6)), {}, UNALIGNED + "'0' returns "
    "64x192; its stride is (2, 1), but height and width must shrink alike; give it one stride for both"),
    "a stride of three": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 3), down(4, 6)), {},
        UNALIGNED + "'0' returns 42x64; its stride is 3, but only powers of two fit; give it another stride"),
    "no padding": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), down(4, 6)), {}, UNALIGNED + "'0' returns 63x95; " + PAD),
    "a size that is hard-coded": (lambda: nn.Sequential(nn.Upsample((224, 224)), *plain()), {},
        UNALIGNED + "'0' returns 224x224; let it change the size of its input by a power of two, or leave it out"),
    "one size": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), {}, "Sequential has no feature map smaller than its "
        "images: it is not hierarchical, as ResNets and ConvNeXts are"),
    "one stride": (lambda: nn.Sequential(down(3, 4)), {}, "Sequential has feature maps at stride 2 only: it is not "
        "hierarchical, as ResNets and ConvNeXts are"),
    "stride 128": (lambda: nn.Sequential(*(down(4 if i else 3, 4) for i in range(7))), {}, "layer '6' of Sequential has an "
    "output stride above 64, the largest allowed; choose layers of smaller strides with taps=[...]"),
    "perhaps a head": (
        lambda: nn.Sequential(down(3, 32), down(32, 32), nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), {},
        "the maps of stride 4 of Sequential narrow from 32 channels ('1') to 8 ('4'), and either may be its deepest features: "
        "pass sparsify taps=[...], the modules whose outputs are the maps, shallow to deep, or pass the network "
        "without its head"),
    "a broken forward": (lambda: Root(lambda m, x: m.second(m.first(x).flatten(1))), {}, "Root cannot be run as "
        "model(images) on images of 3 channels and 128x192 pixels: RuntimeError: Expected 3D <>"),
    "a detector": (lambda: Root(wants_targets), {}, "Root cannot be run in training mode, as model(images) with two "
        "images: targets should not be none in training mode"),
    "a compiled layer": (lambda: nn.Sequential(down(3, 4), torch.jit.script(down(4, 6))), {}, "layer '1' (<>) is compiled and "
        "cannot run on sparse maps; pass the network without torch.jit or torch.compile"),
    "a backward hook": (lambda: plain(lambda n: n[0].register_full_backward_hook(lambda *a: None)), {},
        "layer '0' (Conv2d) has backward hooks, which a sparse network never calls; remove them"),
    "a hook of a parameter": (lambda: plain(lambda n: n[0].weight.register_hook(lambda g: g)), {}, "the parameter 'weight' of "
        "layer '0' (Conv2d) has hooks, which a sparse network never calls; remove them"),
    "a pruned layer": (lambda: plain(lambda n: prune.l1_unstructured(n[0], "weight", 0.5)), {}, "Sequential cannot be copied: "
        "Only Tensors <>; look for tensors that a forward pass left there, pruned layers (torch.nn.utils.prune.remove) or "
        "weights of torch.nn.utils.weight_norm (remove_weight_norm)"),
    "a generator": (lambda: plain(lambda n: setattr(n, "batches", iter(x for x in "ab"))), {},
        "Sequential cannot be copied: cannot pickle 'generator' object; take it out of the network's attributes"),
    "a weight in two layouts": (sharing, {}, "layers 'blocks.0.conv' and 'blocks.0.layer' share a weight, but their sparse "
    "forms store it in different layouts; give each a weight of its own, or use one layer twice"),
    "no gradient at all": (lambda: Root(without_gradients), {}, "no gradient reaches any parameter of the network; remove "
    "torch.no_grad() and detach(), or " + BLIND.removeprefix("; ")),
    "a function that shrinks the map further": (
        lambda: make(lambda m, x: F.interpolate(F.pixel_unshuffle(x, 4)[:, : x.shape[1]], scale_factor=4), 2), {},
        "the network cannot run on images of 8 x 12 pixels, with patches of 4 x 4: pixel_unshuffle expects width to be "
        "divisible "
        "by downscale_factor, <>; the patch follows from the coarsest map of a module, so if a function makes a coarser map, "
        "use a module for it, such as nn.PixelUnshuffle"),
    "another shape": (
        lambda: make(lambda m, x: x if type(x) is Tensor or x.shape[1] != 6 else torch.cat([x, x], 1), 2), {},
        "the sparse network returns (2, 12, 2, 3) on a whole image, at stride 4, engine cuda_ext, the dense one (2, 6, 2, 3); "
        "look for code that checks a tensor's class, or for hard-coded sizes"),
    "a counter": (lambda: make(counts, 2), {}, "the sparse and the dense network differ on a whole image, at stride 2, engine "
    "minkowski, by <> of the largest value; look for in-place operations, state that changes between calls, or hard-coded "
    "sizes"),
    "something else in training": (lambda: make(lambda m, x: x * 5 if m.training and type(x) is not Tensor else x, 2), {},
        "in training mode, engine cuda_ext, the sparse and the dense network differ at stride 2, by <> of the map; look for "
        "code that checks a layer's class or changes its attributes"),
    "a function with its own gradient": (lambda: make(lambda m, x: Own.apply(m.conv(x)), 2), {}, "in eval mode, engine "
        "cuda_ext, the parameter 'blocks.0.down.weight' gets no gradient in the sparse network" + BLIND),
    "a gradient that torch does not have": (
        lambda: make(lambda m, x: m.norm(m.conv(x).detach() if type(x) is Tensor else m.conv(x)), 2), {},
        "in eval mode, engine cuda_ext, the parameter 'blocks.<>' gets a gradient in the sparse network only" + BLIND),
    "a gradient three times as large": (
        lambda: make(on_maps_only(lambda m, x: 3 * (y := m.conv(x)) - 2 * y.detach()), 2), {},
        "in eval mode, engine cuda_ext, the gradient of the parameter 'blocks.0.<>' in the sparse network is off by <>, the "
        "dense one's norm is <>" + BLIND),
    "a function in the network's own forward": (
        lambda: Root(lambda m, x: m.second(m.first(x).cumsum(3)).mean((2, 3))), {}, "the network (Root) has no sparse form: "
        "torch function 'cumsum' has no sparse form: it may mix visible and hidden pixels, as attention does; change its "
        "forward, or move that into a module with a sparse form in sparkme.sparse.forms.SPARSE_FORMS"),
    "a layer without a sparse form": (
        lambda: with_layer(lambda c: nn.ConvTranspose2d(c, c, 3, 1, 1), lambda m, x: m.layer(x)), {},
        "layer 'blocks.0.layer' (ConvTranspose2d) has no sparse form: torch function 'conv_transpose2d' has no sparse form: it "
        "may mix visible and hidden pixels, as attention does" + REPLACE),
    "a layer whose sparse form does not have it": (
        lambda: with_layer(lambda c: nn.Conv2d(c, c, 3, 1, (1, 2), dilation=(1, 2)), lambda m, x: m.layer(x)), {},
        "layer 'blocks.0.layer' (Conv2d) has no sparse form: the dilation (1, 2) differs between height and width; patches "
        "need one value for both; change it, or its input, in the dense model"),
    "a batch norm of groups": (
        lambda: with_layer(lambda c: nn.BatchNorm2d(2), lambda m, x: m.layer(grouped_pixels(m, x)).view(x.shape)), {},
        "layer 'blocks.0.layer' (BatchNorm2d) has no sparse form: batch norm of a map with axes BCCP has no sparse form, only "
        "of BCHW; change it, or its input, in the dense model"),
}  # fmt: skip


# What no network can reach, as the text stands in the code, and why.
UNREACHED = {
    "a map <> has no axis <>": "torch says the same when the dense network is probed",
    "the layer <> is not in the last block of <>": "the refusal of that layer is raised in its place",
    "a map <> cannot be an output of the encoder": "a tap is a tensor (B, C, H, W) or (B, H, W, C) when the network is probed",
    "a window with border <> has no plain form": "engines ask for it after they have treated borders",
    "torch has no function <>": "a mistake in the table of functions, found at import",
    "expected <>, got <>": "raised by load_state_dict, not by sparsify",
    "layer <> (<>): <>": "for forms that users add: those of the project refuse when they are called",
}

_RUNS = ("encoder.py", "batch_norm.py", "grid.py", "recompute.py")  # of an encoder that is there, no refusals of a network


def matching(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split("<>"))


def refused(network: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        sparkme.sparsify(network, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is ValueError or isinstance(caught.value, sparkme.UnsupportedLayerError)
    if isinstance(network, nn.Module):
        named = [name for name in re.findall(r"'([^']+)'", message) if name in dict(network.named_modules())]
        assert len(named) == len({*named}), f"a layer is named twice: {message}"
    return message


@pytest.mark.parametrize("name", BODIES)
def test_what_code_between_layers_is_refused_for(name: str) -> None:
    body, text = BODIES[name]
    message = refused(make(body, 2))
    assert re.fullmatch(matching(LAYER + text + REPLACE), message), message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_is_refused_for(name: str) -> None:
    network, options, text = NETWORKS[name]
    message = refused(network(), **options)
    assert re.fullmatch(matching(text), message), message


def texts_in(path: Path) -> Iterator[str]:
    """Of the errors in a file, with `<>` for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")):
            continue
        text = node.args[0] if node.args else None
        if isinstance(text, ast.Constant):
            yield text.value
        elif isinstance(text, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in text.values)


def test_every_refusal_has_a_row() -> None:
    files = [*SPARSE.glob("*.py"), *SPARSE.glob("forms/*.py")]
    found = {text for path in files if path.name not in _RUNS for text in texts_in(path)}
    rows = [LAYER + text + REPLACE for _, text in BODIES.values()] + [text for *_, text in NETWORKS.values()]
    assert len(found) > 70
    without = {text for text in found if not any(re.search(matching(text), row) for row in rows)}
    assert without <= UNREACHED.keys() <= found


def test_the_remedy_for_a_function_that_shrinks_the_map_helps() -> None:
    network = with_layer(
        lambda c: nn.PixelUnshuffle(4), lambda m, x: F.interpolate(m.layer(x)[:, : x.shape[1]], scale_factor=4)
    )
    assert sparkme.sparsify(network, taps=["blocks.0", "blocks.1"]).patch == 16
