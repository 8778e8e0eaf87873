"""The oracle itself: it reproduces the official code's numbers, and with nothing hidden its layers are torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import GoldenCase, feature_statistics, golden_cases
from oracle import (
    OracleSparK,
    encoder_features,
    map_of,
    masked,
    masked_avg_pool2d,
    masked_batch_norm,
    masked_conv2d,
    masked_global_average,
    masked_grn,
    masked_layer_norm,
    masked_max_pool2d,
    random_active,
    relative_error,
    rows_of,
    trainable,
    upsample_mask,
)
from torch import Tensor

EXACT = 1e-12  # float64, the same sum in another order


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small maps gain nothing from more, and threads that wait for a busy core cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- golden values ----------------------------------------------------------------------------------------------------

VALUES = {torch.float64: 1e-8, torch.float32: 1e-5}
# The golden gradients of the float32 case carry rounding of their own: an activation within rounding of a kink of ReLU
# or ReLU6 passes its gradient or not, and these flips move float32 gradients by 1e-2 and their norms by up to 1e-3
# (with smooth activations in their place float32 and float64 agree to 1e-5). So the norms can tell no more than this.
GRADIENTS = {torch.float64: 1e-8, torch.float32: 2e-3}


@pytest.fixture(scope="module", params=golden_cases(), ids=lambda case: case.name)
def golden(request: pytest.FixtureRequest) -> tuple[GoldenCase, dict[str, Tensor], OracleSparK]:
    case: GoldenCase = request.param
    state = trainable(case.state())
    return case, state, OracleSparK(state, case.model, case.input_size)


def test_training_reproduces_the_official_loss_features_and_gradients(golden):
    case, state, oracle = golden
    images, active = case.images(), case.active()

    features = oracle.features(images, active, training=True)
    loss = oracle.loss_of(oracle.decode(oracle.densify(features, active, True), True), images, active)
    loss.backward()

    assert loss.item() == pytest.approx(case.values["train_loss"], rel=VALUES[case.dtype])
    for x, expected in zip(features, case.values["train_features"], strict=True):
        rows = rows_of(x, active, expected["stride"])
        assert rows.shape == (expected["rows"], expected["channels"])
        assert x[~upsample_mask(active, *x.shape[-2:]).expand_as(x)].abs().max() == expected["hidden_abs_max"] == 0
        for name, value in feature_statistics(rows).items():
            assert value == pytest.approx(expected[name], rel=VALUES[case.dtype]), (expected["stride"], name)
    for key, expected in case.values["grad_l2"].items():
        assert state[key].grad.norm().item() == pytest.approx(expected, rel=GRADIENTS[case.dtype]), key
    squares = sum(p.grad.double().square().sum() for p in state.values() if p.requires_grad)
    assert squares.sqrt().item() == pytest.approx(case.values["grad_l2_total"], rel=GRADIENTS[case.dtype])


def test_evaluation_reproduces_the_official_loss_and_reconstruction(golden):
    case, _, oracle = golden
    images, active = case.images(), case.active()

    with torch.no_grad():
        prediction = oracle.predict(images, active)
        loss = oracle.loss_of(prediction, images, active)
        reconstruction = oracle.reconstruction_of(prediction, images, active)

    assert loss.item() == pytest.approx(case.values["eval_loss"], rel=VALUES[case.dtype])
    for name, value in feature_statistics(reconstruction).items():
        assert value == pytest.approx(case.values["eval_reconstruction"][name], rel=VALUES[case.dtype]), name
    visible = upsample_mask(active, *images.shape[-2:]).expand_as(images)
    assert torch.equal(reconstruction[visible], images[visible])


# --- row order --------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_sample_patch_y_and_x():
    active = random_active(2, (2, 3), visible=3, seed=1)
    b, y, x = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(6), indexing="ij")
    sites = torch.stack([b, y, x], dim=1)  # (2, 3, 4, 6): every site holds its own coordinates

    rows = rows_of(sites, active, stride=16)

    expected = [
        [sample, 2 * patch_y + dy, 2 * patch_x + dx]
        for sample in range(2)
        for patch_y in range(2)
        for patch_x in range(3)
        if active[sample, 0, patch_y, patch_x]
        for dy in range(2)
        for dx in range(2)
    ]
    assert rows.tolist() == expected


@pytest.mark.parametrize("stride", [1, 4, 8, 16, 32])
def test_map_of_is_the_inverse_of_rows_of(stride):
    active = random_active(3, (2, 3), visible=2)
    x = masked(_normal(3, 5, 64 // stride, 96 // stride), active)

    assert torch.equal(map_of(rows_of(x, active, stride), active, stride), x)


def test_a_mask_that_does_not_divide_the_map_is_refused():
    with pytest.raises(ValueError, match="10x12 sites does not divide into 3x3"):
        upsample_mask(random_active(1, 3, visible=1), 10, 12)


# --- layers with nothing hidden are torch's ---------------------------------------------------------------------------

CONVOLUTIONS = [
    {"kernel": 1},
    {"kernel": 3, "padding": 1},
    {"kernel": 3, "padding": 1, "stride": 2},
    {"kernel": 7, "padding": 3, "stride": 2},
    {"kernel": 7, "padding": 3, "groups": 4},
    {"kernel": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel": 4, "stride": 4},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution_with_everything_visible_is_torch_s(options):
    options = dict(options)
    kernel = options.pop("kernel")
    layer = torch.nn.Conv2d(4, 8, kernel, **options).double()
    x = _normal(2, 4, 24, 24)

    y = masked_conv2d(x, _all_visible(2, 3), layer.weight, layer.bias, **options)

    assert torch.equal(y, layer(x))


def test_pools_with_everything_visible_are_torch_s():
    x, active = _normal(2, 4, 12, 12).relu(), _all_visible(2, 3)

    assert torch.equal(masked_max_pool2d(x, active, 3, 2, 1), F.max_pool2d(x, 3, 2, 1))
    assert relative_error(masked_avg_pool2d(x, active, 2), F.avg_pool2d(x, 2)) <= EXACT
    assert relative_error(masked_global_average(x, active), x.mean(dim=(2, 3))) <= EXACT


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_everything_visible_is_torch_s(training):
    layer = _batch_norm(torch.nn.BatchNorm2d(4), training)
    x = _normal(3, 4, 6, 6)

    y, mean, var = masked_batch_norm(x, _all_visible(3, 3), layer.weight, layer.bias, *_running_statistics(layer), training)

    assert relative_error(y, layer(x)) <= EXACT
    assert relative_error(mean, layer.running_mean) <= EXACT  # after torch has updated them
    assert relative_error(var, layer.running_var) <= EXACT


def test_layer_norm_with_everything_visible_is_torch_s():
    x, weight, bias = _normal(2, 8, 6, 6), _normal(8), _normal(8, seed=1)

    y = masked_layer_norm(x, _all_visible(2, 3), weight, bias)

    expected = F.layer_norm(x.permute(0, 2, 3, 1), (8,), weight, bias, 1e-6).permute(0, 3, 1, 2)
    assert relative_error(y, expected) <= EXACT


def test_grn_with_everything_visible_is_the_published_formula():
    x, gamma, beta = _normal(2, 8, 6, 6), _normal(8), _normal(8, seed=1)

    y = masked_grn(x, _all_visible(2, 3), gamma, beta)

    norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    response = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
    assert relative_error(y, gamma.view(1, 8, 1, 1) * (x * response) + beta.view(1, 8, 1, 1) + x) <= EXACT


# --- layers with hidden patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_convolution_sums_over_visible_neighbours_only(stride, groups):
    """Site by site, with an index computation and no convolution."""
    active = random_active(2, 3, visible=4)
    x, weight, bias = _normal(2, 4, 6, 6), _normal(4, 4 // groups, 3, 3), _normal(4)

    y = masked_conv2d(x, active, weight, bias, stride=stride, padding=1, groups=groups)

    visible = upsample_mask(active, 6, 6)[:, 0]
    expected = torch.zeros_like(y)
    size = 6 // stride
    for b, i, j in upsample_mask(active, size, size)[:, 0].nonzero().tolist():
        for channel in range(4):
            group = channel // (4 // groups)
            inputs = slice(group * (4 // groups), (group + 1) * (4 // groups))
            total = bias[channel].clone()
            for ky in range(3):
                for kx in range(3):
                    row, column = i * stride + ky - 1, j * stride + kx - 1
                    if 0 <= row < 6 and 0 <= column < 6 and visible[b, row, column]:
                        total += weight[channel, :, ky, kx] @ x[b, inputs, row, column]
            expected[b, channel, i, j] = total
    assert relative_error(y, expected) <= EXACT


def test_max_pool_of_non_negative_input_is_the_maximum_over_visible_neighbours():
    active = random_active(2, 3, visible=4)
    x = _normal(2, 4, 12, 12).relu()

    y = masked_max_pool2d(x, active, 3, 2, 1)

    lowest = torch.where(upsample_mask(active, 12, 12), x, -torch.inf)
    assert torch.equal(y, masked(F.max_pool2d(lowest, 3, 2, 1), active))


def test_averages_divide_by_the_visible_sites():
    active = random_active(2, 3, visible=2)
    x = _normal(2, 4, 6, 6)

    rows = rows_of(x, active, stride=16).view(2, 2, 2, 2, 4)  # sample, patch, y, x, channel

    assert relative_error(masked_global_average(x, active), rows.mean(dim=(1, 2, 3))) <= EXACT
    pooled = rows_of(masked_avg_pool2d(x, active, 2), active, stride=32).view(2, 2, 4)
    assert relative_error(pooled, rows.mean(dim=(2, 3))) <= EXACT


def test_average_pool_divides_by_the_sites_present_in_a_window_cut_by_the_border():
    x = _normal(2, 4, 5, 5)

    y = masked_avg_pool2d(x, _all_visible(2, 1), 2, ceil_mode=True)

    assert relative_error(y, F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)) <= EXACT


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("visible", [1, 4, 9])
def test_batch_norm_is_torch_s_on_the_visible_rows(training, visible):
    active = random_active(2, 3, visible)
    layer = _batch_norm(torch.nn.BatchNorm1d(4), training)
    x, pull = _normal(2, 4, 6, 6).requires_grad_(), _normal(2, 4, 6, 6, seed=1)

    y, mean, var = masked_batch_norm(x, active, layer.weight, layer.bias, *_running_statistics(layer), training)
    got = torch.autograd.grad((y * pull).sum(), (x, layer.weight, layer.bias))
    rows = layer(rows_of(x, active, stride=16))
    expected = torch.autograd.grad((rows * rows_of(pull, active, 16)).sum(), (x, layer.weight, layer.bias))

    assert relative_error(rows_of(y, active, stride=16), rows) <= EXACT
    assert relative_error(mean, layer.running_mean) <= EXACT
    assert relative_error(var, layer.running_var) <= EXACT
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= 1e-11


def test_visible_sites_that_are_all_zero_count_in_the_statistics():
    active = random_active(2, 3, visible=4)
    x = _normal(2, 4, 6, 6)
    x[0] = 0
    zeros, ones = torch.zeros(4).double(), torch.ones(4).double()

    _, mean, _ = masked_batch_norm(x, active, None, None, zeros, ones, training=True, momentum=1.0)

    assert relative_error(mean, rows_of(x[1:], active[1:], 16).sum(dim=0) / 32) <= EXACT


def test_layer_norm_is_torch_s_on_the_visible_rows():
    active, x, weight, bias = random_active(2, 3, visible=4), _normal(2, 8, 6, 6), _normal(8), _normal(8, seed=1)

    y = masked_layer_norm(x, active, weight, bias)

    expected = F.layer_norm(rows_of(x, active, 16), (8,), weight, bias, 1e-6)
    assert relative_error(rows_of(y, active, 16), expected) <= EXACT


def test_grn_takes_norms_over_the_visible_rows_of_each_sample():
    active, x, gamma, beta = random_active(2, 3, visible=4), _normal(2, 8, 6, 6), _normal(8), _normal(8, seed=1)

    y = masked_grn(x, active, gamma, beta)

    rows = rows_of(x, active, 16).view(2, 16, 8)
    norm = rows.norm(dim=1, keepdim=True)
    expected = rows + gamma * rows * norm / (norm.mean(dim=2, keepdim=True) + 1e-6) + beta
    assert relative_error(rows_of(y, active, 16), expected.reshape(-1, 8)) <= EXACT


LAYERS = {
    "conv": lambda x, active: masked_conv2d(x, active, _normal(4, 4, 3, 3), _normal(4), padding=1),
    "max_pool": lambda x, active: masked_max_pool2d(x.abs(), active, 3, 2, 1),
    "avg_pool": lambda x, active: masked_avg_pool2d(x, active, 2),
    "global_average": masked_global_average,
    "batch_norm": lambda x, active: masked_batch_norm(
        x, active, _normal(4), _normal(4, seed=1), _normal(4, seed=2), _normal(4).abs(), training=True
    )[0],
    "layer_norm": lambda x, active: masked_layer_norm(x, active, _normal(4), _normal(4, seed=1)),
    "grn": lambda x, active: masked_grn(x, active, _normal(4), _normal(4, seed=1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_hidden_sites_give_and_take_nothing(name):
    """Whatever a hidden site holds, the output is bit for bit the same, and no gradient goes to it."""
    active = random_active(2, 3, visible=4)
    x = _normal(2, 4, 6, 6)
    hidden = ~upsample_mask(active, 6, 6).expand_as(x)
    spoiled = x.clone()
    spoiled[hidden] = torch.nan
    spoiled.requires_grad_()

    y = LAYERS[name](spoiled, active)
    (y * y).sum().backward()

    assert torch.equal(y, LAYERS[name](x, active))
    assert (spoiled.grad[hidden] == 0).all()
    assert torch.isfinite(spoiled.grad).all() and spoiled.grad.abs().sum() > 0
    if y.dim() == 4:
        assert (y[~upsample_mask(active, *y.shape[-2:]).expand_as(y)] == 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients_agree_with_finite_differences(name):
    active = random_active(2, 3, visible=4)
    x = masked(_normal(2, 4, 6, 6), active).requires_grad_()

    assert torch.autograd.gradcheck(lambda value: LAYERS[name](masked(value, active), active), (x,))


def test_grn_of_a_silent_channel_has_a_finite_gradient():
    x = _normal(2, 4, 6, 6)
    x[:, 1] = 0
    x.requires_grad_()

    masked_grn(x, _all_visible(2, 3), _normal(4), _normal(4, seed=1)).square().sum().backward()

    assert torch.isfinite(x.grad).all()


# --- encoders and SparK -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_resnet_with_everything_visible_is_torchvision_s(name, training):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().double().train(training)
    images = _normal(2, 3, 64, 96)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    updates: dict[str, Tensor] = {}
    features = encoder_features(state, images, _all_visible(2, (2, 3)), training=training, updates=updates)

    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for i, feature in enumerate(features, start=1):
        x = getattr(model, f"layer{i}")(x)
        assert relative_error(feature, x) <= EXACT
    statistics = {key for key in state if "running" in key or "tracked" in key}
    assert set(updates) == (statistics if training else set())
    for key, value in updates.items():
        assert relative_error(value, model.state_dict()[key]) <= EXACT, key


def test_convnext_v2_blocks_are_recognised_by_their_grn():
    state = _tiny_convnext(grn=True)
    images, active = _normal(2, 3, 64, 64), random_active(2, 2, visible=2)

    with_grn = encoder_features(state, images, active)
    for key in state:
        if ".grn." in key:
            state[key] = torch.zeros_like(state[key])
    silenced = encoder_features(state, images, active)
    without = encoder_features({k: v for k, v in state.items() if ".grn." not in k}, images, active)

    for a, b, c in zip(with_grn, silenced, without, strict=True):
        assert relative_error(b, c) <= EXACT
        assert relative_error(a, c) > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", golden_cases()[:3:2], ids=lambda case: case.name)
def test_hidden_pixels_do_not_reach_the_encoder_output(case, training):
    oracle = OracleSparK(case.state(), case.model, case.input_size)
    images, active = case.images(), case.active()
    hidden = ~upsample_mask(active, *images.shape[-2:]).expand_as(images)
    others = torch.where(hidden, images + 1, images)

    for a, b in zip(oracle.features(images, active, training), oracle.features(others, active, training), strict=True):
        assert torch.equal(a, b)


def test_patchify_and_unpatchify_are_inverses_on_a_rectangle():
    oracle = OracleSparK({"sparse_encoder.sp_cnn.conv1.weight": torch.zeros(1)}, "resnet18", (64, 96))
    images = _normal(2, 3, 64, 96)

    patches = oracle.patchify(images)

    assert patches.shape == (2, 6, 3 * 32 * 32)
    assert torch.equal(patches[:, 4].view(2, 3, 32, 32), images[:, :, 32:64, 32:64])
    assert torch.equal(oracle.unpatchify(patches), images)


def test_loss_ignores_the_prediction_at_visible_patches():
    oracle = OracleSparK({"sparse_encoder.sp_cnn.conv1.weight": torch.zeros(1)}, "resnet18", 96)
    images, active = _normal(2, 3, 96, 96), random_active(2, 3, visible=4)
    perfect = oracle.patchify(images)
    perfect = (perfect - perfect.mean(-1, keepdim=True)) / (perfect.var(-1, keepdim=True) + 1e-6).sqrt()
    prediction = oracle.unpatchify(perfect)

    off_at_visible = prediction + upsample_mask(active, 96, 96)
    off_at_hidden = prediction + 2 * ~upsample_mask(active, 96, 96)

    assert oracle.loss_of(off_at_visible, images, active) < EXACT
    assert oracle.loss_of(off_at_hidden, images, active).item() == pytest.approx(4, rel=EXACT)
    assert relative_error(oracle.reconstruction_of(prediction, images, active), images) <= EXACT


def test_a_model_of_another_family_is_refused():
    with pytest.raises(ValueError, match="'convnext_tiny' does not match"):
        OracleSparK({"sparse_encoder.sp_cnn.conv1.weight": torch.zeros(1)}, "convnext_tiny", 96)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _normal(*shape: int, seed: int = 0) -> Tensor:
    """The same float64 noise for the same shape and seed, on every call."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _all_visible(batch: int, f: int | tuple[int, int]) -> Tensor:
    f_h, f_w = (f, f) if isinstance(f, int) else f
    return random_active(batch, f, visible=f_h * f_w)


def _batch_norm(layer: torch.nn.Module, training: bool) -> torch.nn.Module:
    layer = layer.double().train(training)
    channels = layer.num_features
    state = {name: _normal(channels, seed=i) for i, name in enumerate(("weight", "bias", "running_mean"))}
    layer.load_state_dict(state | {"running_var": _normal(channels, seed=3).abs() + 0.5}, strict=False)
    return layer


def _running_statistics(layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Copies taken before torch's layer updates its own."""
    return layer.running_mean.clone(), layer.running_var.clone()


def _tiny_convnext(grn: bool) -> dict[str, Tensor]:
    """A ConvNeXt of widths 4, 8, 12, 16 with one block per stage, under official names."""
    widths = (4, 8, 12, 16)
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, width in enumerate(widths):
        down, block = f"downsample_layers.{stage}", f"stages.{stage}.0"
        previous, kernel = (3, 4) if stage == 0 else (widths[stage - 1], 2)
        conv, norm = (0, 1) if stage == 0 else (1, 0)
        shapes |= {f"{down}.{conv}.weight": (width, previous, kernel, kernel), f"{down}.{conv}.bias": (width,)}
        normed = width if stage == 0 else previous
        shapes |= {f"{down}.{norm}.weight": (normed,), f"{down}.{norm}.bias": (normed,)}
        shapes |= {f"{block}.dwconv.weight": (width, 1, 7, 7), f"{block}.dwconv.bias": (width,)}
        shapes |= {f"{block}.norm.weight": (width,), f"{block}.norm.bias": (width,)}
        shapes |= {f"{block}.pwconv1.weight": (4 * width, width), f"{block}.pwconv1.bias": (4 * width,)}
        shapes |= {f"{block}.pwconv2.weight": (width, 4 * width), f"{block}.pwconv2.bias": (width,)}
        if grn:
            shapes |= {f"{block}.grn.gamma": (1, 1, 1, 4 * width), f"{block}.grn.beta": (1, 1, 1, 4 * width)}
    return {key: 0.2 * _normal(*shape) for key, shape in shapes.items()}
