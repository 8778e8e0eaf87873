"""Every sparse layer, on every engine, against the oracle: outputs and gradients, in float64."""

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

import sparkme
from sparkme.sparse.engines import create_engine
from sparkme.sparse.forms import SparseLayer, sparse_form
from sparkme.sparse.map import SparseMap

ENGINES = ("cuda_ext", "minkowski", "masked-dense")
MASKS = {
    "some": oracle.random_active(2, (2, 3), 3, seed=1),
    "one patch": oracle.random_active(2, (2, 3), 1, seed=2),
    "all": torch.ones(2, 1, 2, 3, dtype=torch.bool),
}
CONVOLUTIONS = {
    "7x7 s2": nn.Conv2d(3, 5, 7, 2, 3),
    "3x3": nn.Conv2d(3, 5, 3, 1, 1, bias=False),
    "3x3 s2": nn.Conv2d(3, 5, 3, 2, 1),
    "3x3 dilated": nn.Conv2d(3, 5, 3, 1, 2, dilation=2),
    "3x5": nn.Conv2d(3, 5, (3, 5), 1, (1, 2)),
    "5x5 same": nn.Conv2d(3, 5, 5, padding="same"),
    "1x1": nn.Conv2d(3, 5, 1),
    "1x1 s2": nn.Conv2d(3, 5, 1, 2, bias=False),
    "2x2 s2": nn.Conv2d(3, 5, 2, 2),
    "4x4 s4": nn.Conv2d(3, 5, 4, 4),
    "3x3 grouped": nn.Conv2d(6, 4, 3, 1, 1, groups=2),
    "3x3 s2 grouped": nn.Conv2d(4, 12, 3, 2, 1, groups=4, bias=False),
    "depthwise 7x7": nn.Conv2d(6, 6, 7, 1, 3, groups=6),
    "depthwise 3x3 s2": nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False),
    "depthwise 3x5": nn.Conv2d(6, 6, (3, 5), 1, (1, 2), groups=6),
}


def sparse_input(dense: Tensor, active: Tensor, stride: int, engine: str, channels_last: bool = False) -> SparseMap:
    grid, kernels = sparkme.Grid(active, 32), create_engine(engine)[0]
    features = kernels.layout.of_rows(grid.to_rows(dense, stride), grid, stride)
    return SparseMap(features, kernels, dims="BHWC" if channels_last else "BCHW")


def check(
    layer: nn.Module,
    reference: Callable[..., Tensor],
    channels: int,
    mask: str,
    engine: str,
    *,
    positive: bool = False,
    channels_last: bool = False,
) -> None:
    """Compares output, gradient of the input and gradients of the parameters (in the dense layout) with the reference."""
    layer = layer.double()
    active, stride = MASKS[mask], 4
    torch.manual_seed(3)
    values = torch.randn(2, channels, 16, 24, dtype=torch.float64)
    values = values.abs() if positive else values
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    expected = reference(theirs, active, **parameters)

    sparse = sparse_form(layer) or layer
    out = sparse(sparse_input(ours, active, stride, engine, channels_last))
    assert out.dense().shape == expected.shape
    assert oracle.relative_error(out.dense(), expected) < 1e-10
    assert oracle.relative_error(out.rows, oracle.rows_of(expected, active, out.stride)) < 1e-10

    weights = torch.randn_like(expected)
    (out.dense() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert oracle.relative_error(ours.grad, theirs.grad) < 1e-10
    if parameters:
        gradients = gradients_in_dense_layout(sparse)
        assert gradients.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert oracle.relative_error(gradients[name], parameter.grad) < 1e-10, name


def gradients_in_dense_layout(layer: nn.Module) -> dict[str, Tensor]:
    """Puts the gradients in the parameters' place and asks the layer for its dense weights."""
    if not isinstance(layer, SparseLayer):  # it runs its own code, on its own weights
        return {n: p.grad for n, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data = parameter.grad
    names = {name.rpartition(".")[2] for name, _ in layer.named_parameters()}
    return {n: v for n, v in layer.dense_state().items() if n.replace("weight", "kernel") in names or n in names}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind: str, mask: str, engine: str) -> None:
    conv = CONVOLUTIONS[kind]
    padding = (2, 2) if conv.padding == "same" else conv.padding

    def reference(x: Tensor, active: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return oracle.masked_conv2d(x, active, weight, bias, conv.stride, padding, conv.groups, conv.dilation)

    check(conv, reference, conv.in_channels, mask, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pool(window: tuple[int, int, int], mask: str, engine: str) -> None:
    check(nn.MaxPool2d(*window), lambda x, a: oracle.masked_max_pool2d(x, a, *window), 3, mask, engine, positive=True)


def test_max_pool_of_signed_maps_is_the_same_on_every_engine() -> None:
    values = -torch.rand(2, 3, 16, 24, dtype=torch.float64)
    pool = sparse_form(nn.MaxPool2d(3, 2, 1))
    first, *others = (pool(sparse_input(values, MASKS["some"], 4, engine)).rows for engine in ENGINES)
    assert (first < 0).all()
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_avg_pool_counts_hidden_pixels_as_zeros(window: tuple[int, int, int], mask: str, engine: str) -> None:
    size, stride, padding = window
    ones = torch.ones(3, 1, size, size, dtype=torch.float64) / size**2

    def reference(x: Tensor, active: Tensor) -> Tensor:
        return oracle.masked_conv2d(x, active, ones, None, stride, (padding, padding), groups=3)

    check(nn.AvgPool2d(*window), reference, 3, mask, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(mask: str, engine: str, training: bool) -> None:
    norm = nn.BatchNorm2d(4).double().train(training)
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    before = norm.running_mean.clone(), norm.running_var.clone()

    def reference(x: Tensor, active: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return oracle.masked_batch_norm(x, active, weight, bias, *before, training=training)[0]

    check(norm, reference, 4, mask, engine)


def test_batch_norm_tracks_the_statistics_of_visible_pixels() -> None:
    values, active = torch.randn(2, 4, 16, 24, dtype=torch.float64), MASKS["some"]
    sparse = sparse_form(nn.BatchNorm2d(4).double())
    sparse(sparse_input(values, active, 4, "minkowski"))
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    _, mean, variance = oracle.masked_batch_norm(values, active, ones, zeros, zeros, ones, training=True)
    state = sparse.dense_state()
    assert oracle.relative_error(state["running_mean"], mean) < 1e-12
    assert oracle.relative_error(state["running_var"], variance) < 1e-12
    assert state["num_batches_tracked"] == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_layer_norm(engine: str, channels_last: bool) -> None:
    norm = (nn.LayerNorm if channels_last else LayerNorm2d)(5, eps=1e-6)
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    reference = lambda x, a, weight, bias: oracle.masked_layer_norm(x, a, weight, bias)  # noqa: E731
    check(norm, reference, 5, "some", engine, channels_last=channels_last)


@pytest.mark.parametrize("engine", ENGINES)
def test_linear(engine: str) -> None:
    def reference(x: Tensor, active: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return oracle.masked_conv2d(x, active, weight[:, :, None, None], bias)

    check(nn.Linear(5, 7), reference, 5, "some", engine, channels_last=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_drop_path_leaves_out_whole_samples(engine: str) -> None:
    x = sparse_input(torch.ones(2, 3, 16, 24), MASKS["some"], 4, engine)
    drop = StochasticDepth(0.5, "row").train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        per_sample = drop(x).rows.view(2, -1)
        assert (per_sample == per_sample[:, :1]).all()
        seen |= set(per_sample[:, 0].tolist())
    assert seen == {0.0, 2.0}
    assert torch.equal(drop.eval()(x).rows, x.rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_code_between_layers_sees_visible_pixels_only(engine: str) -> None:
    values = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    active = MASKS["some"]
    x = sparse_input(values, active, 4, engine)
    scale, gate = torch.randn(3, 1, 1, dtype=torch.float64), torch.rand(2, 3, 1, 1, dtype=torch.float64)
    y = x
    y = scale * y
    y += x
    y = torch.sigmoid(nn.functional.relu(y - 0.5, inplace=True)) * gate
    y = (2 - y.permute(0, 2, 3, 1) * scale.flatten()).permute(0, 3, 1, 2)
    expected = 2 - torch.sigmoid(torch.relu(scale * values + values - 0.5)) * gate * scale
    assert oracle.relative_error(y.dense(), oracle.masked(expected, active)) < 1e-12
    assert torch.equal(x.dense(), oracle.masked(values, active))  # nothing was changed in place
    assert y.shape == values.shape and y.dtype == torch.float64


@pytest.mark.parametrize("engine", ENGINES)
def test_functions_that_move_zero_leave_hidden_pixels_at_zero(engine: str) -> None:
    values = torch.rand(2, 3, 16, 24, dtype=torch.float64) + 1
    active = MASKS["some"]
    x = sparse_input(values, active, 4, engine)
    divisor = torch.rand(3, 1, 1, dtype=torch.float64) + 1
    for got, expected in (
        (x / x, values / values),
        (x / divisor, values / divisor),
        (divisor / x, divisor / values),
        (1 / x, 1 / values),
        (x**2, values**2),
        (x**-1, values**-1),
        (x.exp(), values.exp()),
        (x - x, values - values),
        (-x + 3, 3 - values),
        (torch.relu(input=x), values),
        (torch.add(x, x, alpha=2), 3 * values),
    ):
        assert oracle.relative_error(got.dense(), oracle.masked(expected, active)) < 1e-12


def test_what_hidden_pixels_hold_reaches_no_visible_one() -> None:
    """A bias and a norm leave something at the hidden pixels of a dense engine, which the next window must not see."""
    values, active = torch.randn(2, 3, 16, 24, dtype=torch.float64), MASKS["some"]
    linear, norm, conv = nn.Linear(3, 3).double(), nn.LayerNorm(3, eps=1e-6).double(), nn.Conv2d(3, 5, 3, padding=1).double()
    nn.init.uniform_(norm.bias)
    x = sparse_input(values, active, 4, "masked-dense", channels_last=True)
    for layer in (nn.Linear(3, 3, bias=False).double(), linear, norm):
        x = (sparse_form(layer) or layer)(x)
    assert not x.features.clean and (x.values != oracle.masked(x.values, active)).any()
    assert torch.equal(x.dense(), oracle.masked(x.values, active))
    expected = oracle.masked_conv2d(x.values, active, conv.weight, conv.bias, padding=1)
    x = sparse_form(conv)(x.permute(0, 3, 1, 2))
    assert oracle.relative_error(x.dense(), expected) < 1e-12
    assert not any(y.features.clean for y in ((x * 2 + x).relu(), x + 1)) and (x / x).features.clean


@pytest.mark.parametrize("engine", ENGINES)
def test_what_mixes_pixels_is_refused_by_name(engine: str) -> None:
    x = sparse_input(torch.randn(2, 3, 16, 24), MASKS["some"], 4, engine)
    with pytest.raises(NotImplementedError, match="fft2' has no sparse form"):
        torch.fft.fft2(x)
    with pytest.raises(NotImplementedError, match="over H alone mixes visible and hidden pixels"):
        x.mean(2)
    with pytest.raises(NotImplementedError, match="mixes samples"):
        x.mean()
    with pytest.raises(NotImplementedError, match="as in attention"):
        x.flatten(2) @ x.flatten(2).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="pixels stay where they are"):
        x[:, :, 1:]
    with pytest.raises(NotImplementedError, match="'item' has no sparse form"):
        x.item()
    with pytest.raises(ValueError, match="lie on different sites"):
        x + sparse_input(torch.randn(2, 3, 16, 24), MASKS["some"], 4, engine)


class Stem(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 3, 3), "returns 30x46; pad its input"),
        (nn.Conv2d(3, 3, 2), "returns 31x47"),
        (nn.Sequential(nn.Conv2d(3, 3, 2), nn.Conv2d(3, 3, 2, padding=1)), "returns 31x47"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "padding with mode='circular'"),
        (nn.Sequential(nn.AvgPool2d(2, 2), nn.Upsample(scale_factor=2, mode="bilinear")), "mode='bilinear'"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Upsample(scale_factor=2)), "returns 8x8"),
        (nn.MaxPool2d(3, 1, 1, return_indices=False, ceil_mode=True), ""),
    ],
)
def test_a_layer_without_a_sparse_form_is_refused_by_name(layer: nn.Module, reason: str) -> None:
    stages = [nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU()) for _ in range(4)]
    network = nn.Sequential(
        stages[0], nn.Sequential(stages[1], nn.Sequential(Stem(layer))), *stages[2:], nn.AdaptiveAvgPool2d(1)
    )
    if not reason:
        sparkme.sparsify(network)
        return
    with pytest.raises(ValueError, match=f"layer '1.1.0.conv.*{reason}") as caught:
        sparkme.sparsify(network)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_weights_come_back_as_they_went_in(kind: str) -> None:
    conv = CONVOLUTIONS[kind].float()
    for name, value in sparse_form(conv).dense_state().items():
        assert torch.equal(value, conv.state_dict()[name])


def test_weights_of_another_shape_are_refused() -> None:
    sparse = sparse_form(nn.Conv2d(3, 5, 3, padding=1))
    with pytest.raises(RuntimeError, match="expected"):
        sparse.load_dense_state({"weight": torch.zeros(5, 3, 3, 3)})
