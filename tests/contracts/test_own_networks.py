"""Networks of a user's own, with what real code has: aliases, shared modules, hooks. Right, or refused by name."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import ACTIVE, ENGINES, Block, Masked, Network, check, images, make
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

import sparkme

# --- operations in place ----------------------------------------------------------------------------------------------


def test_a_relu_in_place_changes_the_shortcut_too() -> None:
    network = make(lambda m, x: x + m.norm(m.conv(m.relu(x))))
    masked = Masked(network, ACTIVE)

    def body(m: Block, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return x + masked.norm(m, masked.conv(m, x))

    check(network, masked(images(), body))


def test_an_addition_in_place_reaches_the_alias() -> None:
    def aliased(m: Block, x: Tensor) -> Tensor:
        y = x
        x += m.conv(x)
        return x + y

    network = make(aliased)
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), lambda m, x: 2 * x + 2 * masked.conv(m, x)))


@pytest.mark.parametrize(
    "function", [F.relu_, lambda x: F.relu(x, inplace=True), lambda x: x.clamp_(min=0), lambda x: x.relu_()]
)
def test_a_discarded_result_in_place_counts(function: Callable[[Tensor], Tensor]) -> None:
    def discarded(m: Block, x: Tensor) -> Tensor:
        function(x)
        return m.norm(x)

    network = make(discarded)
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), lambda m, x: masked.norm(m, torch.relu(x))))


def test_a_map_of_the_hierarchy_is_not_changed_by_what_follows_it() -> None:
    """A first operation in place of the next stage, as in pre-activation networks."""

    class PreActivation(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.down(F.relu(x, inplace=True)))

    torch.manual_seed(0)
    widths = (3, 4, 6, 8, 10)
    network = nn.Sequential(*(PreActivation(a, b, lambda m, x: x) for a, b in pairwise(widths))).double().eval()
    encoder = sparkme.sparsify(network)
    features, x = [], images()
    for block in network:
        x = block(x.clone())
        features.append(x)
    assert (features[0] < 0).any()
    for y, expected in zip(encoder.eval()(images(), torch.ones_like(ACTIVE)), features, strict=True):
        assert oracle.relative_error(y.dense(), expected) < 1e-10


def halves_relu_first(m: Block, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([first.relu_(), second], 1)


def halves_then_the_whole(m: Block, x: Tensor) -> Tensor:
    first, _ = x.chunk(2, 1)
    first.relu_()
    return m.norm(x)


def whole_then_a_half(m: Block, x: Tensor) -> Tensor:
    first, second = x.split(x.shape[1] // 2, 1)
    x.relu_()
    return torch.cat([second, first], 1)


def reshaped_then_the_whole(m: Block, x: Tensor) -> Tensor:
    x.view(x.shape[0], 2, -1, *x.shape[2:]).mul_(2)
    return m.norm(x)


def test_a_view_changed_in_place_is_right_where_only_it_is_used() -> None:
    network = make(halves_relu_first)
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), lambda m, x: torch.cat([torch.relu(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1)))


@pytest.mark.parametrize("body", [halves_then_the_whole, whole_then_a_half, reshaped_then_the_whole])
def test_a_view_and_its_map_one_changed_in_place_are_refused(body: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(sparkme.UnsupportedLayerError, match=r"layer 'blocks.0.*changing a map in place"):
        sparkme.sparsify(make(body))


# --- modules used twice, or in another way than others -----------------------------------------------------------------


def test_one_pooling_and_one_relu_serve_all_stages() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in [(3, 4), (4, 6), (6, 8), (8, 10)])
            self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = self.pool(self.relu(conv(x)))
            return x.mean((2, 3))

    torch.manual_seed(0)
    network = Shared().double()
    encoder = sparkme.sparsify(network)
    assert (encoder.strides, encoder.channels) == ((2, 4, 8, 16), (6, 8, 10, 10))  # what each call of the pooling takes
    x, active = oracle.masked(images(), ACTIVE), ACTIVE
    expected = []
    for conv in network.convs:
        x = torch.relu(oracle.masked_conv2d(x, active, conv.weight, conv.bias, padding=1))
        expected.append(x)
        x = oracle.masked_max_pool2d(x, active, 2)
    expected = [*expected[1:], x]
    for engine in ENGINES:
        for y, z in zip(encoder.set_engine(engine)(images(), active), expected, strict=True):
            assert oracle.relative_error(y.dense(), z) < 1e-10


def test_one_convolution_used_twice_has_the_sum_of_both_gradients() -> None:
    network = make(lambda m, x: m.conv(torch.relu(m.conv(x))))
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), lambda m, x: masked.conv(m, torch.relu(masked.conv(m, x)))))


def test_maps_that_travel_channels_last_are_recognised() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in [(3, 4), (4, 6), (6, 8), (8, 10)])
            self.mixers = nn.ModuleList(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU()) for c in (4, 6, 8, 10))

        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            for down, mixer in zip(self.downs, self.mixers, strict=True):
                x = down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                x = x + mixer(x)
            return x.mean((1, 2))

    torch.manual_seed(0)
    network = ChannelsLast().double()
    encoder = sparkme.sparsify(network, num_scales=4)
    assert (encoder.strides, encoder.channels) == ((2, 4, 8, 16), (4, 6, 8, 10))
    for engine in ENGINES:
        maps = encoder.set_engine(engine)(images(), ACTIVE)
        assert [x.dense().shape[1] for x in maps] == [4, 6, 8, 10]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.hardtanh(x, 0.5, 6),
        lambda x: torch.add(x, other=1.0),
        lambda x: x.clamp(min=0.3),
        torch.sigmoid,
        lambda x: F.threshold(x, 0.1, 20.0),
        lambda x: torch.add(x, 1.0),
        lambda x: x.exp(),
        lambda x: F.softplus(x),
        lambda x: torch.clamp(input=x, min=0.3),
        lambda x: torch.maximum(x, torch.ones((), dtype=x.dtype)),
    ],
)
def test_functions_that_move_zero_do_not_leak_into_the_next_window(function: Callable[[Tensor], Tensor]) -> None:
    network = make(lambda m, x: m.conv(function(x)))
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), lambda m, x: masked.conv(m, masked.hide(function(x)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 3), (3, 1), (1, 5), (7, 1)])
def test_kernels_of_one_row_or_column_can_be_trained(size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 2, 2), nn.Conv2d(b, b, size, 1, (size[0] // 2, size[1] // 2)))
        for a, b in [(3, 4), (4, 6), (6, 8), (8, 10)]
    ]
    encoder = sparkme.sparsify(nn.Sequential(*layers).to(dtype))
    results = []
    for engine in ENGINES:
        encoder.set_engine(engine).zero_grad()
        sum(x.rows.square().sum() for x in encoder(images().to(dtype), ACTIVE)).backward()
        results.append([p.grad.clone() for p in encoder.parameters()])
    for ours, *others in zip(*results, strict=True):
        assert all(oracle.relative_error(ours, theirs) < (1e-10 if dtype == torch.float64 else 1e-5) for theirs in others)


def test_a_network_may_ask_what_kind_of_tensor_it_has() -> None:
    def asks(m: Block, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor) and torch.is_tensor(x)
        if x.is_cuda or x.is_sparse or x.is_quantized or not x.is_floating_point() or x.dim() != 4:
            return x
        return m.norm(x)

    network = make(asks)
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), masked.norm))


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_subclasses_that_compute_something_else_run_their_own_code() -> None:
    def replaced(network: Network) -> Network:
        for block in network.blocks:
            conv, norm = ScaledConv(*block.conv.weight.shape[:2], 3, padding=1), ShiftedNorm(len(block.norm.weight))
            conv.load_state_dict(block.conv.state_dict()), norm.load_state_dict(block.norm.state_dict())
            block.conv, block.norm = conv.double(), norm.double()
        return network

    network = replaced(make(lambda m, x: m.norm(m.conv(x))))
    masked = Masked(network, ACTIVE)

    def body(m: Block, x: Tensor) -> Tensor:
        x = oracle.masked_conv2d(x, ACTIVE, 2 * m.conv.weight, m.conv.bias, padding=1)
        return masked.hide(masked.norm(m, x) + 1)

    check(network, masked(images(), body))


def test_hooks_on_layers_do_what_they_do() -> None:
    network = make(lambda m, x: m.norm(m.conv(x)))
    for block in network.blocks:
        block.conv.register_forward_hook(lambda m, args, out: 3 * out)
        block.norm.register_forward_pre_hook(lambda m, args: (args[0] - 1,))
    masked = Masked(network, ACTIVE)
    check(network, masked(images(), lambda m, x: masked.norm(m, masked.hide(3 * masked.conv(m, x) - 1))))


def test_backward_hooks_are_refused_by_name() -> None:
    network = make(lambda m, x: m.norm(m.conv(x)))
    network.blocks[1].conv.register_full_backward_hook(lambda m, a, b: None)
    with pytest.raises(sparkme.UnsupportedLayerError, match=r"layer 'blocks.1.conv' \(Conv2d\) has backward hooks"):
        sparkme.sparsify(network)


@pytest.mark.parametrize("kind", [spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm])
def test_weights_that_are_worked_out_at_every_step(kind: Callable[[nn.Module], nn.Module]) -> None:
    network = make(lambda m, x: m.norm(m.conv(x)))
    for block in network.blocks:
        block.conv = kind(block.conv)
    encoder = sparkme.sparsify(network.eval()).eval()
    masked = Masked(network, ACTIVE)
    with torch.no_grad():
        network(images())  # old-style ones work the weight out in a hook
        expected = masked(images(), lambda m, x: masked.norm(m, masked.conv(m, x)))
    for engine in ENGINES:
        for x, y in zip(encoder.set_engine(engine)(images(), ACTIVE), expected, strict=True):
            assert oracle.relative_error(x.dense(), y) < 1e-10
    encoder.train()
    sum(x.rows.square().mean() for x in encoder(images(), ACTIVE)).backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters())


def test_layers_of_training_only_are_trained() -> None:
    network = make(lambda m, x: m.norm(m.conv(x)) if m.training else m.norm(x))
    masked = Masked(network, ACTIVE)
    check(network.train(), masked(images(), lambda m, x: masked.norm(m, masked.conv(m, x))))
    network.eval()
    check(network, masked(images(), masked.norm))


def test_branches_that_end_elsewhere_are_left_out() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.fc = nn.AdaptiveAvgPool2d(4), nn.Linear(16 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(x).flatten(1))

    class WithAuxiliary(Network):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.norm(m.conv(x)))
            self.aux = Auxiliary()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            first = self.blocks[0](x)
            aux = self.aux(first) if self.training else None
            return self.fc(self.blocks[1:](first).mean((2, 3))), aux

    encoder = sparkme.sparsify(WithAuxiliary().double())
    assert not any(name.startswith(("aux.", "fc.")) for name in encoder.dense_state_dict())
    sum(x.rows.square().mean() for x in encoder.train()(images(), ACTIVE)).backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_the_first_convolution_may_be_registered_last() -> None:
    class LateStem(Network):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.norm(x))
            self.stem = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.stem(x))

    assert sparkme.sparsify(LateStem()).in_channels == 1


def test_weights_without_metadata_are_taken_back() -> None:
    encoder = sparkme.sparsify(torchvision.models.mnasnet1_0())
    state = {name: value + 1 for name, value in encoder.dense_state_dict().items()}
    encoder.load_dense_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in encoder.dense_state_dict().items())
    twin = torchvision.models.mnasnet1_0()
    assert not twin.load_state_dict(encoder.dense_state_dict(), strict=False).unexpected_keys


# --- what torch does not show to a map ----------------------------------------------------------------------------------


class Swish(torch.autograd.Function):
    """Saves memory as many networks do: with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class Louder(torch.autograd.Function):
    """The identity with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.norm(Swish.apply(m.conv(x))), r"parameter 'blocks\.\d"),
        (lambda m, x: m.norm(x + 0.5 * Swish.apply(x)), r"gradient of the parameter 'blocks\.\d"),
        (lambda m, x: m.norm(Louder.apply(m.conv(x)) + x), r"gradient of the parameter 'blocks\.\d.down"),
        (lambda m, x: checkpoint(lambda y: m.norm(m.conv(y)), x, use_reentrant=True), "use_reentrant=True"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_that_torch_does_not_see_are_refused(body: Callable[[nn.Module, Tensor], Tensor], reason: str) -> None:
    """These once ended the process: what looks like a tensor to Python was one to C++, too."""
    with pytest.raises(sparkme.UnsupportedLayerError, match=reason) as caught:
        sparkme.sparsify(make(body))
    assert "torch.autograd.Function" in str(caught.value) and "\n" not in str(caught.value)


def test_activations_may_be_computed_again() -> None:
    network = make(lambda m, x: checkpoint(lambda y: m.norm(m.conv(y)), x, use_reentrant=False))
    masked = Masked(network, ACTIVE)
    check(network.eval(), masked(images(), lambda m, x: masked.norm(m, masked.conv(m, x))))


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_compiled_parts_are_refused_by_name(compiled: Callable[[nn.Module], nn.Module]) -> None:
    network = make(lambda m, x: m.relu(m.conv(x)))
    network.blocks[1].relu = compiled(nn.ReLU())
    with pytest.raises(sparkme.UnsupportedLayerError, match=r"layer 'blocks.1.relu' \(.*\) is compiled"):
        sparkme.sparsify(network)


def test_a_tensors_memory_is_not_a_maps() -> None:
    with pytest.raises(sparkme.UnsupportedLayerError, match=r"torch.Tensor.data has no sparse form"):
        sparkme.sparsify(make(lambda m, x: m.conv(x) * x.data.abs().max()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x).sqrt(),
        lambda x: (x * x + 1e-3).log(),
        lambda x: x / x.abs().sum(1, keepdim=True),
        lambda x: x / torch.norm(x, p=2, dim=1, keepdim=True),
        lambda x: 1 / (x.abs() + 1e-3),
        lambda x: (x * x) ** 0.5,
    ],
)
def test_infinite_derivatives_at_hidden_pixels_reach_nothing(function: Callable[[Tensor], Tensor]) -> None:
    """Hidden pixels are zero on masked-dense after the pooling, and zero times infinity is not zero."""
    network = make(lambda m, x: m.conv(function(F.max_pool2d(x, 3, 1, 1).abs())), 3)
    encoder = sparkme.sparsify(network)
    results = []
    for engine in ENGINES:
        encoder.set_engine(engine).zero_grad()
        sum(x.rows.sin().sum() for x in encoder(images(), ACTIVE)).backward()
        results.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for ours, *others in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert all(oracle.relative_error(theirs, ours) < 1e-10 for theirs in others)


# --- what a trial must not leave behind, and must notice -----------------------------------------------------------------


def test_branches_left_to_chance_stay_trainable() -> None:
    """A branch that the trial's training step happened to skip once was frozen for good."""

    def skips(m: Block, x: Tensor) -> Tensor:
        return x if m.training and torch.rand(()) < 0.9 else x + m.conv(x)

    for seed in range(4):
        torch.manual_seed(seed)
        assert all(p.requires_grad for p in sparkme.sparsify(make(lambda m, x: m.norm(skips(m, x)))).parameters())


def test_layers_that_run_without_gradients_still_run() -> None:
    def frozen(m: Block, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(m.conv(x))
        return m.norm(x * gate)

    network = make(frozen)
    masked = Masked(network, ACTIVE)
    encoder = sparkme.sparsify(network)
    assert "blocks.0.conv.weight" in encoder.dense_state_dict()
    check(network, masked(images(), lambda m, x: masked.norm(m, x * masked.hide(torch.sigmoid(masked.conv(m, x))).detach())))


def normalised(network: Network) -> list[Tensor]:
    masked = Masked(network, ACTIVE)
    return masked(images(), lambda m, x: masked.norm(m, masked.conv(m, x)))


def test_frozen_batch_norms_stay_frozen() -> None:
    class Frozen(Network):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            return self

    class FrozenByFlag(Network):
        def train(self, mode: bool = True) -> "FrozenByFlag":
            super().train(mode)
            for block in self.blocks:
                block.norm.training = False
            return self

    for kind in (Frozen, FrozenByFlag):
        network = kind(lambda m, x: m.norm(m.conv(x))).double()
        for block in network.blocks:
            nn.init.uniform_(block.norm.running_var, 2, 3)
        encoder = sparkme.sparsify(network).train()
        expected = normalised(network.eval())
        for x, y in zip(encoder(images(), ACTIVE), expected, strict=True):
            assert oracle.relative_error(x.dense(), y) < 1e-10


def test_what_a_network_does_in_training_only_is_compared() -> None:
    def by_class(m: Block, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) * (5 if m.training and not isinstance(m.conv, nn.Conv2d) else 1)

    with pytest.raises(
        sparkme.UnsupportedLayerError, match=r"in training mode, engine .*, the sparse and the dense network differ"
    ):
        sparkme.sparsify(make(by_class))


def test_errors_in_branches_that_start_at_zero_are_noticed() -> None:
    """A residual branch times zero changes nothing, until it is trained."""
    network = make(lambda m, x: x + m.scale * (m.conv(x) + Swish.apply(x)))
    for block in network.blocks:
        block.scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(sparkme.UnsupportedLayerError, match="gradient"):
        sparkme.sparsify(network)
    network = make(lambda m, x: x + m.scale * m.conv(x))
    for block in network.blocks:
        block.scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    assert not sparkme.sparsify(network).network.blocks[0].scale.any()


def test_gradient_hooks_are_refused_by_name() -> None:
    network = make(lambda m, x: m.norm(m.conv(x)))
    network.blocks[0].conv.weight.register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(
        sparkme.UnsupportedLayerError, match=r"parameter 'weight' of layer 'blocks.0.conv' \(Conv2d\) has hooks"
    ):
        sparkme.sparsify(network)


def test_what_a_forward_pass_leaves_in_the_network_is_not_handed_out() -> None:
    def keeps(m: Any, x: Tensor) -> Tensor:
        m.last, m.calls = x, getattr(m, "calls", 0) + 1
        with torch.no_grad():
            m.conv.bias.clamp_(max=0.01)
        if getattr(m, "ramp", None) is None or m.ramp.shape[-1] != x.shape[-1]:
            m.ramp = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return m.norm(m.conv(x) + m.ramp)

    network = make(keeps)
    with torch.no_grad():
        for block in network.blocks:
            block.conv.bias.fill_(0.005)
    before = network.blocks[0].conv.bias.clone()
    encoder = sparkme.sparsify(network)
    assert not hasattr(encoder.network.blocks[0], "last") and not hasattr(encoder.network.blocks[0], "calls")
    assert torch.equal(encoder.dense_state_dict()["blocks.0.conv.bias"], before)
    copy.deepcopy(encoder)


def test_what_cannot_be_copied_is_refused_in_one_line() -> None:
    network = make(lambda m, x: m.norm(x))
    network.blocks[0].last = network.blocks[0].conv.weight * 2
    with pytest.raises(ValueError, match=r"Network cannot be copied: .*look for tensors") as caught:
        sparkme.sparsify(network)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"takes a torch.nn.Module, not function"):
        sparkme.sparsify(lambda x: x)  # type: ignore[arg-type]


def test_a_last_map_without_a_name_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.short = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
            self.out, self.fc = nn.Identity(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.fc(self.result(self.conv(x) + self.short(x)).mean((2, 3)))

        def result(self, x: Tensor) -> Tensor:
            return x

    class Named(Flat):
        def result(self, x: Tensor) -> Tensor:
            return self.out(x)

    with pytest.raises(ValueError, match=r"a function computes the map of stride 4 .*'short' and 'conv'.*nn.Identity"):
        sparkme.sparsify(Flat())
    names = sparkme.sparsify(Named()).dense_state_dict().keys()
    assert {"conv.weight", "short.weight"} <= names


def test_strides_beyond_the_largest_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 'blocks.6.down' of Network has an output stride above 64"):
        sparkme.sparsify(make(lambda m, x: m.norm(x), 7))
    with pytest.raises(ValueError, match="num_scales 0 must be at least 1"):
        sparkme.sparsify(make(lambda m, x: m.norm(x)), num_scales=0)
    assert sparkme.sparsify(make(lambda m, x: m.norm(x)), num_scales=1).strides == (16,)


def test_a_network_that_skips_a_map_says_so() -> None:
    network = make(lambda m, x: m.norm(x))

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.skip = network, False

        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.network.blocks):
                if not (self.skip and i == 3):
                    x = block(x)
            return self.network.fc(x.mean((2, 3)))

    encoder = sparkme.sparsify(Skips())
    encoder.network.skip = True
    with pytest.raises(RuntimeError, match=r"did not call 'network.blocks.3'"):
        encoder(images(), ACTIVE)


@pytest.mark.parametrize(("visible", "size"), [((1, 3), (32, 96)), ((3, 1), (96, 32)), ((2, 2), (64, 64))])
def test_maps_one_pixel_wide_or_high(visible: tuple[int, int], size: tuple[int, int]) -> None:
    def gate(m: Block, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2)
        again = tokens.view(b, c, h, w)
        split = x.view(b, c // 2, 2, h, w).sum(2)
        return m.norm(again) * torch.sigmoid(tokens.mean(2).view(b, c, 1, 1)) + torch.cat([split, split], 1)

    network = make(gate, 5).eval()
    encoder = sparkme.sparsify(network).eval()
    active = torch.ones(2, 1, *visible, dtype=torch.bool)
    x = images(size)
    expected = []
    with torch.no_grad():
        for block in network.blocks:
            expected.append(block(x if not expected else expected[-1]))
        for engine in ENGINES:
            for y, z in zip(encoder.set_engine(engine)(images(size), active), expected[1:], strict=True):
                assert oracle.relative_error(y.dense(), z) < 1e-10


# --- shared parameters -------------------------------------------------------------------------------------------------


def with_twin(network: Network) -> Network:
    """Gives each block a second convolution and norm with the weights of the first, and biases of their own."""
    for block in network.blocks:
        channels = block.conv.in_channels
        block.twin, block.other = nn.Conv2d(channels, channels, 3, padding=1).double(), nn.BatchNorm2d(channels).double()
        block.twin.weight, block.other.weight = block.conv.weight, block.norm.weight
    return network


def test_layers_that_share_a_weight_share_it_in_the_sparse_network() -> None:
    network = with_twin(make(lambda m, x: m.other(m.twin(torch.relu(m.norm(m.conv(x)))))))
    masked = Masked(network, ACTIVE)

    def body(m: Any, x: Tensor) -> Tensor:
        x = masked.hide(torch.relu(masked.norm(m, masked.conv(m, x))))
        x = oracle.masked_conv2d(x, ACTIVE, m.conv.weight, m.twin.bias, padding=1)
        other = m.other
        return oracle.masked_batch_norm(
            x, ACTIVE, m.norm.weight, other.bias, other.running_mean, other.running_var, other.training
        )[0]

    check(network, masked(images(), body))
    encoder = sparkme.sparsify(network)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    sum(x.rows.square().mean() for x in encoder(images(), ACTIVE)).backward()
    optimizer.step()
    state = encoder.dense_state_dict()
    assert torch.equal(state["blocks.0.twin.weight"], state["blocks.0.conv.weight"])
    assert not torch.equal(state["blocks.0.twin.weight"], network.blocks[0].conv.weight)


def test_a_weight_shared_by_layers_of_different_layout_is_refused() -> None:
    network = make(lambda m, x: m.hooked(m.conv(x)))
    for block in network.blocks:
        block.hooked = nn.Conv2d(block.conv.in_channels, block.conv.in_channels, 3, padding=1).double()
        block.hooked.weight = block.conv.weight
        block.hooked.register_forward_hook(lambda m, args, out: 2 * out)
    with pytest.raises(sparkme.UnsupportedLayerError, match=r"layers 'blocks.0.conv' and 'blocks.0.hooked' share a weight"):
        sparkme.sparsify(network)


# --- the hierarchy ----------------------------------------------------------------------------------------------------


def test_taps_can_be_given() -> None:
    model = torchvision.models.resnet18()
    encoder = sparkme.sparsify(model, taps=["layer1", "layer2.0", "layer4"])
    assert (encoder.strides, encoder.channels) == ((4, 8, 32), (64, 128, 512))
    with pytest.raises(ValueError, match="taps names 'layer5', which is not a module"):
        sparkme.sparsify(model, taps=["layer5"])
    with pytest.raises(ValueError, match="shallow to deep"):
        sparkme.sparsify(model, taps=["layer2", "layer1"])


@pytest.mark.parametrize(("blocks", "size"), [(3, (32, 48)), (6, (128, 64))])
def test_three_scales_and_a_stride_of_64_can_be_pretrained(blocks: int, size: tuple[int, int]) -> None:
    encoder = sparkme.sparsify(make(lambda m, x: m.norm(m.conv(x)), blocks))
    assert encoder.strides == tuple(2**i for i in range(1, blocks + 1))[-4:]
    model = sparkme.SparK(encoder, input_size=size, decoder_width=64).double()
    loss = model(images(size))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())


def test_a_scale_may_be_missing_in_between() -> None:
    """The map of stride 16 joins the decoder where it has that resolution."""
    encoder = sparkme.sparsify(torchvision.models.resnet18(), taps=["layer1", "layer3", "layer4"]).double()
    model = sparkme.SparK(encoder, input_size=64, decoder_width=32).double()
    model(images((64, 64))).backward()
    assert all(p.grad is not None for p in model.densify_projs.parameters())


# --- refused at construction, by name ---------------------------------------------------------------------------------


def attention(m: Block, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return (torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (attention, "attention"),
        (lambda m, x: torch.fft.fft2(x).real, "fft"),
        (lambda m, x: x.flip(3), "channels only"),
        (lambda m, x: x.roll(1, 2), "'roll'"),
        (lambda m, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"), "mode='bilinear'"),
        (lambda m, x: x - x.mean(2, keepdim=True), "over H alone"),
        (lambda m, x: x * x.mean(), "mixes samples"),
        (lambda m, x: x[:, :, 1:, 1:], "pixels stay where they are|cannot be aligned"),
        (lambda m, x: F.pad(x, (0, -1, 0, -1)), "padding must not be negative|cannot be aligned"),
        (lambda m, x: x * float(x.flatten()[0]), "."),
        (lambda m, x: F.conv2d(x, m.conv.weight), "aligned|stride"),
        (lambda m, x: x.transpose(2, 3).contiguous().transpose(2, 3), "moves pixels"),
        (lambda m, x: m.norm(x) if x.shape[0] % 2 else x.cumsum(3), "'cumsum'"),
        (lambda m, x: torch.nn.functional.grid_sample(x, torch.zeros(len(x), *x.shape[2:], 2, dtype=x.dtype)), "grid_sample"),
        (lambda m, x: x.sort(1).values + x.argmax(1, keepdim=True), "'sort'"),
    ],
)
def test_what_mixes_pixels_is_refused_at_construction(body: Callable[[nn.Module, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        sparkme.sparsify(make(body))
    assert "\n" not in str(caught.value)


def test_what_is_refused_is_named_by_path_class_and_function() -> None:
    network = make(lambda m, x: m.norm(x))
    network.blocks[2].body = lambda m, x: x.cumsum(3)
    with pytest.raises(
        sparkme.UnsupportedLayerError, match=r"layer 'blocks.2' \(Block\) has no sparse form: .*'cumsum'.*replace"
    ):
        sparkme.sparsify(network)


def test_an_unpadded_stem_is_refused_for_its_alignment() -> None:
    network = make(lambda m, x: m.norm(x))
    network.blocks[0].down = nn.Conv2d(3, 4, 3, 2).double()
    with pytest.raises(ValueError, match=r"aligned to a grid of patches: .* layer 'blocks.0.down' returns 63x95; pad"):
        sparkme.sparsify(network)


def test_state_that_changes_from_call_to_call_is_noticed() -> None:
    def counts(m: Block, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        return x * m.calls

    with pytest.raises(sparkme.UnsupportedLayerError, match="the sparse and the dense network differ"):
        sparkme.sparsify(make(counts))


# --- what sparsify leaves alone ---------------------------------------------------------------------------------------


def test_the_dense_model_and_the_random_state_stay_as_they_were() -> None:
    network = make(lambda m, x: F.dropout(m.norm(m.conv(x)), 0.5, m.training))
    network.blocks[1].eval()
    network.blocks[2].conv.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    torch.manual_seed(5)
    encoder = sparkme.sparsify(network)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert modes == [module.training for module in network.modules()]
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["blocks.2.conv.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == ["network.blocks.2.conv.kernel"]
    assert all(torch.equal(value, before[name]) for name, value in encoder.dense_state_dict().items())
    assert not encoder.network.blocks[1].training and encoder.network.blocks[0].training


NARROW = """
import torch, sparkme
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.short = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
        self.out, self.fc = nn.Identity(), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(self.out(self.conv(x) + self.short(x)).mean((2, 3)))

encoder = sparkme.sparsify(Network()).set_engine("masked-dense")
for side in (2, 3, 4) * 100:
    maps = encoder(torch.randn(2, 3, 4 * side, 16), torch.ones(2, 1, side, 4, dtype=torch.bool))
    sum(x.rows.square().mean() for x in maps).backward()
"""
CHECKED_MEMORY = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")


@pytest.mark.skipif(not CHECKED_MEMORY.is_file(), reason="this system has no glibc that checks memory")
def test_gradients_of_narrow_strided_convolutions_stay_in_their_memory() -> None:
    environment = {**os.environ, "LD_PRELOAD": str(CHECKED_MEMORY), "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", NARROW], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
