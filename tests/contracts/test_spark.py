"""SparK around the encoder: masks, densify, decoder and loss, and what they refuse."""

import oracle
import pytest
import torch
import torchvision

import sparkme
from sparkme.methods.loss import hidden_patch_loss
from sparkme.sparse.engines.cuda_ext import CudaExtEngine
from sparkme.weights.spark import split_official_state


def small_spark(**kwargs) -> sparkme.SparK:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    encoder = sparkme.sparsify(torchvision.models.resnet18())
    return sparkme.SparK(encoder, **{"input_size": (64, 96), "decoder_width": 32, **kwargs})


def test_rectangular_images_and_larger_patches() -> None:
    images = torch.randn(2, 3, 64, 128)
    model = small_spark(input_size=(64, 128), patch=64, mask_ratio=0.5)
    assert (model.num_patches, model.keep) == ((1, 2), 1)
    loss = model(images)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


def test_a_random_mask_follows_the_generator() -> None:
    model, images = small_spark().eval(), torch.randn(2, 3, 64, 96)
    draw = lambda seed: model(images, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_loss_equals_the_oracles_and_ignores_visible_pixels() -> None:
    torch.manual_seed(0)
    images, prediction = torch.randn(2, 2, 3, 64, 96, dtype=torch.float64)
    active = oracle.random_active(2, (2, 3), 2)
    got = hidden_patch_loss(prediction, images, sparkme.Grid(active, 32))
    reference = oracle.OracleSparK.__new__(oracle.OracleSparK)
    reference.patch = 32
    expected = reference.loss_of(prediction, images, active)
    assert oracle.relative_error(got, expected) < 1e-9  # the official code adds 1e-8 to the number of hidden patches
    spoiled = torch.where(oracle.upsample_mask(active, 64, 96).bool(), torch.nan, prediction)
    assert torch.equal(hidden_patch_loss(spoiled, images, sparkme.Grid(active, 32)), got)


def test_reconstruction_keeps_visible_pixels_and_paints_hidden_ones() -> None:
    model, images = small_spark().eval(), torch.randn(2, 3, 64, 96)
    active = oracle.random_active(2, (2, 3), 2)
    masked, painted = model.reconstruct(images, active)
    visible = oracle.upsample_mask(active, 64, 96).bool().expand_as(images)
    assert torch.equal(masked, images * visible) and torch.equal(painted[visible], images[visible])
    assert (painted[~visible] != images[~visible]).all() and painted.isfinite().all()


def test_an_official_encoder_alone_loads() -> None:
    model = small_spark()
    dense = torchvision.models.resnet18()
    decoder = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    model.load_official_state_dict(dense.state_dict())
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in model.encoder.dense_state_dict().items())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in decoder.items())


def test_official_states_that_do_not_fit_are_refused() -> None:
    model = small_spark()
    with pytest.raises(ValueError, match=r"the weights are of another model: missing conv1.weight"):
        model.load_official_state_dict({"sparse_encoder.sp_cnn.stem": torch.zeros(1)})
    whole = {"sparse_encoder.sp_cnn." + k: v for k, v in torchvision.models.resnet18().state_dict().items()}
    with pytest.raises(ValueError, match=r"another network: missing .*, unexpected \['mask_tokens.9'\]"):
        model.load_official_state_dict(whole | {"mask_tokens.9": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight 'stages.0.0.odd' of .* has no name in that library"):
        split_official_state({"downsample_layers.0.0.weight": torch.zeros(1), "stages.0.0.odd": torch.zeros(1)})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_size": 230}, "input size 230x230 is not a multiple of the patch of 32; use 224"),
        ({"input_size": (64, 100)}, "use 64x96"),
        ({"mask_ratio": 0.99}, "leaves none of 6 patches visible"),
        ({"mask_ratio": 0.01}, "hides none of 6 patches"),
        ({"mask_ratio": 1.5}, r"mask ratio 1.5 is outside \[0, 1\]"),
        ({"decoder_width": 50}, "decoder width 50 is not a multiple of 32"),
        ({"densify_norm": "gn"}, "unknown densify norm 'gn'"),
        ({"patch": 48}, "patch 48 is not a multiple of the encoder's total stride 32"),
    ],
)
def test_impossible_settings_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_spark(**kwargs)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 96\), got \(1, 3, 96, 64\)"):
        small_spark()(torch.zeros(1, 3, 96, 64))


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("visible", [1, 5, 12])
def test_densify_and_convolution_without_products_of_mask_tokens(side: int, visible: int) -> None:
    """Values and all gradients of a dense convolution of the densified map."""
    torch.manual_seed(0)
    active = oracle.random_active(2, (3, 4), visible)
    grid, channels, width = sparkme.Grid(active, 32), 20, 17
    sizes = {
        "rows": (grid.num_rows(8), channels),
        "fill": (channels,),
        "weight": (width, channels, side, side),
        "bias": (width,),
    }
    given = {name: torch.randn(size, dtype=torch.float64, requires_grad=True) for name, size in sizes.items()}
    rows, fill, weight, bias = given.values()
    shown = oracle.upsample_mask(active, 12, 16).bool()
    dense = torch.where(shown, oracle.map_of(rows, active, 8), fill.view(1, -1, 1, 1))
    expected = torch.nn.functional.conv2d(dense, weight, bias, padding=side // 2)
    got = CudaExtEngine().densify_convolution(rows, grid, 8, fill, weight, bias)
    assert oracle.relative_error(got, expected) < 1e-12 and got.is_contiguous(memory_format=torch.channels_last)
    outer = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(x, list(given.values()), outer) for x in (got, expected)), strict=True):
        assert oracle.relative_error(mine, theirs) < 1e-12


def test_mask_tokens_are_not_multiplied_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_spark(), torch.randn(2, 3, 64, 96)
    monkeypatch.setattr(CudaExtEngine, "densify", lambda *_: pytest.fail("a map was densified before its convolution"))
    model.encoder.set_engine("cuda_ext")
    model(images).backward()
    assert all(token.grad is not None and token.grad.any() for token in model.mask_tokens)
