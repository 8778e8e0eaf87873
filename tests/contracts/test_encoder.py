"""Whole encoders: against the oracle, against torchvision's and timm's own models, and what must never leak."""

import copy
import gc
import threading
import weakref

import oracle
import pytest
import torch
import torchvision
from random_models import (
    BASIC,
    BOTTLENECK,
    CONVNEXT,
    GROUPED,
    features_and_gradients,
    images_and_mask,
    random_encoder,
    random_model,
)
from timm.models import resnet as timms
from torch import Tensor, nn

import sparkme
from sparkme.networks.create import add_drop_path, create_encoder
from sparkme.networks.names import model_names
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.sparse.engines.minkowski import MinkowskiEngine
from sparkme.sparse.hierarchy import dense_features, find_hierarchy

ENGINES = ("cuda_ext", "minkowski", "masked-dense")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [BASIC, BOTTLENECK])
def test_outputs_and_gradients_equal_the_oracles(name: str, training: bool, engine: str) -> None:
    dense, encoder = random_model(name), random_encoder(name)
    images, active = images_and_mask()
    state = oracle.trainable({k: v for k, v in dense.state_dict().items() if not k.startswith("fc.")})
    expected = oracle.encoder_features(state, images, active, training=training)
    encoder.set_engine(engine).train(training)
    maps = encoder(images, active)
    assert [x.stride for x in maps] == [4, 8, 16, 32]
    for x, y in zip(maps, expected, strict=True):
        assert oracle.relative_error(x.dense(), y) < 1e-10
    weights = [torch.randn_like(y) for y in expected]
    sum((y * w).sum() for y, w in zip(expected, weights, strict=True)).backward()
    sum((x.dense() * w).sum() for x, w in zip(maps, weights, strict=True)).backward()
    for name_, layer in encoder.network.named_modules():
        if hasattr(layer, "dense_weight"):
            layer.kernel.data = layer.kernel.grad
            assert oracle.relative_error(layer.dense_weight, state[f"{name_}.weight"].grad) < 1e-10, name_
        elif hasattr(layer, "bn"):
            assert oracle.relative_error(layer.bn.weight.grad, state[f"{name_}.weight"].grad) < 1e-10, name_
            assert oracle.relative_error(layer.bn.bias.grad, state[f"{name_}.bias"].grad) < 1e-10, name_


@pytest.mark.parametrize("name", [BASIC, GROUPED, CONVNEXT])
def test_engines_agree(name: str) -> None:
    images, active = images_and_mask()
    encoder = random_encoder(name)
    results = []
    for engine in ENGINES:
        encoder.zero_grad()
        maps = encoder.set_engine(engine)(images, active)
        sum(x.rows.square().mean() for x in maps).backward()
        results.append([x.rows.detach() for x in maps] + [p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for ours, *others in zip(*results, strict=True):
        assert all(oracle.relative_error(ours, theirs) < 1e-10 for theirs in others)


@pytest.mark.parametrize("name", [BASIC, CONVNEXT])
def test_masked_dense_gives_the_same_in_both_memory_formats(name: str) -> None:
    images, active = images_and_mask()
    encoder = random_encoder(name).set_engine("masked-dense")
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        encoder.zero_grad()
        encoder.engine = MaskedDenseEngine(memory_format)
        maps = encoder(images, active)
        sum(x.rows.square().mean() for x in maps).backward()
        results.append([x.rows.detach() for x in maps] + [p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for ours, theirs in zip(*results, strict=True):
        assert oracle.relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("name", [GROUPED, CONVNEXT])
def test_kernels_are_reordered_for_the_engine_and_stay_what_they_are(name: str) -> None:
    encoder = random_encoder(name)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    for engine in ("masked-dense", "minkowski"):
        encoder.set_engine(engine)
        assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert all(p.is_contiguous() for p in encoder.parameters())  # MinkowskiEngine's kernels take nothing else


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_is_within_rounding_of_float64(engine: str) -> None:
    images, active = images_and_mask()
    encoder = random_encoder(BASIC).set_engine(engine).eval()
    expected = [x.rows for x in encoder(images, active)]
    for x, y in zip(encoder.float()(images.float(), active), expected, strict=True):
        assert x.rows.dtype == torch.float32
        assert oracle.relative_error(x.rows.double(), y) < 1e-5


@pytest.mark.parametrize("name", [BASIC, GROUPED, CONVNEXT])
def test_fully_visible_images_give_what_torchvisions_model_gives(name: str) -> None:
    dense, encoder = random_model(name), random_encoder(name)
    images, _ = images_and_mask()
    maps = encoder.eval()(images, torch.ones(2, 1, 2, 3, dtype=torch.bool))
    for x, y in zip(maps, dense_features(dense.eval(), encoder.hierarchy.taps, images), strict=True):
        assert oracle.relative_error(x.dense(), y) < 1e-10


@pytest.mark.parametrize(
    ("name", "block", "layers", "width"),
    [(BASIC, timms.BasicBlock, (2, 1, 1, 1), 64), (BOTTLENECK, timms.Bottleneck, (1, 2, 1, 1), 16)],
)
def test_timms_model_gives_the_same_as_torchvisions(
    name: str, block: type[nn.Module], layers: tuple[int, ...], width: int
) -> None:
    dense, ours = random_model(name), random_encoder(name)
    theirs = timms.ResNet(block, layers, num_classes=0, base_width=width)
    theirs.load_state_dict({k: v for k, v in dense.state_dict().items() if not k.startswith("fc.")})
    theirs = sparkme.sparsify(theirs).double()
    images, active = images_and_mask()
    for x, y in zip(ours(images, active), theirs(images, active), strict=True):
        assert torch.equal(x.rows, y.rows)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [BASIC, CONVNEXT])
def test_hidden_pixels_change_nothing_bit_for_bit(name: str, engine: str) -> None:
    images, active = images_and_mask()
    encoder = random_encoder(name).set_engine(engine)
    pixels = oracle.upsample_mask(active, *images.shape[2:]).bool()
    spoiled = torch.where(pixels, images, torch.full_like(images, float("nan")))
    changed = torch.where(pixels, images, 1e3 * torch.randn_like(images))
    expected = [x.rows for x in encoder(images, active)]
    for other in (spoiled, changed):
        assert all(torch.equal(x.rows, y) for x, y in zip(encoder(other, active), expected, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_black_visible_patches_stay_visible(engine: str) -> None:
    dense, encoder = random_model(BASIC), random_encoder(BASIC)
    images, active = images_and_mask()
    state = {k: v for k, v in dense.state_dict().items() if not k.startswith("fc.")}
    encoder.set_engine(engine).eval()
    for black in (torch.zeros_like(images), images * (images > 0)):
        maps = encoder(black, active)
        assert len(maps[0].rows) == 2 * 3 * 64
        for x, y in zip(maps, oracle.encoder_features(state, black, active), strict=True):
            assert oracle.relative_error(x.dense(), y) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_one_visible_patch(engine: str) -> None:
    dense, encoder = random_model(BASIC), random_encoder(BASIC)
    images, active = images_and_mask(visible=1)
    state = {k: v for k, v in dense.state_dict().items() if not k.startswith("fc.")}
    for x, y in zip(
        encoder.eval().set_engine(engine)(images, active), oracle.encoder_features(state, images, active), strict=True
    ):
        assert oracle.relative_error(x.dense(), y) < 1e-10


def test_two_models_with_two_masks_alternate_and_run_in_threads() -> None:
    jobs = []
    for seed, engine in enumerate(ENGINES):
        encoder = random_encoder(BASIC, seed).set_engine(engine).eval()
        images, active = images_and_mask(visible=2 + seed, seed=seed)
        jobs.append((encoder, images, active, [x.rows.detach() for x in encoder(images, active)]))
    failures: list[str] = []

    def repeat(encoder: nn.Module, images: Tensor, active: Tensor, expected: list[Tensor]) -> None:
        for _ in range(4):
            if not all(torch.equal(x.rows, y) for x, y in zip(encoder(images, active), expected, strict=True)):
                failures.append(str(encoder.engine))

    for job in (*jobs, *jobs):
        repeat(*job)
    threads = [threading.Thread(target=repeat, args=job) for job in (*jobs, *jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_are_grouped_by_sample_at_every_stride(engine: str) -> None:
    """Each sample alone gives its own part of the batch's rows."""
    encoder = random_encoder(BASIC).set_engine(engine).eval()
    images, active = images_and_mask(batch=3)
    maps = encoder(images, active)
    for i in range(3):
        for x, alone in zip(maps, encoder(images[i : i + 1], active[i : i + 1]), strict=True):
            assert oracle.relative_error(x.rows.view(3, -1, x.channels)[i], alone.rows) < 1e-12


def test_the_minkowski_tensor_lies_on_the_same_sites() -> None:
    encoder = random_encoder(BASIC)
    images, active = images_and_mask()
    for x in encoder(images, active):
        tensor = x.minkowski()
        shape = torch.Size((2, x.channels, 64 // x.stride, 96 // x.stride))
        dense = tensor.dense(shape=shape, min_coordinate=torch.IntTensor([0, 0]))[0]
        assert torch.equal(dense, x.dense())
        assert tensor.tensor_stride == [x.stride, x.stride]


@pytest.mark.parametrize("name", [BASIC, CONVNEXT])
def test_an_encoder_can_be_copied(name: str) -> None:
    """As weight averaging does it."""
    encoder = random_encoder(name).eval()
    images, active = images_and_mask()
    twin = copy.deepcopy(encoder)
    for x, y in zip(encoder(images, active), twin(images, active), strict=True):
        assert torch.equal(x.rows, y.rows)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(encoder.parameters()).abs().sum() > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_comes_out_as_something_not_finite(engine: str) -> None:
    """MinkowskiEngine's pooling would swallow it, and its backward pass would write out of bounds."""
    encoder = random_encoder(BASIC).set_engine(engine)
    with torch.no_grad():
        encoder.network.conv1.kernel.fill_(float("nan"))
    images, active = images_and_mask()
    rows = encoder(images, active)[-1].rows
    rows.sum().backward()
    assert not rows.isfinite().any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_is_gone_when_nobody_holds_it(engine: str) -> None:
    encoder = random_encoder(BASIC).set_engine(engine)
    images, active = images_and_mask()
    gc.collect()
    gc.disable()
    try:
        grid = weakref.ref(encoder(images, active)[0].grid)
        assert grid() is None
    finally:
        gc.enable()


HIERARCHIES = {
    "resnet18": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "wide_resnet50_2": (256, 512, 1024, 2048),
    "resnext50_32x4d": (256, 512, 1024, 2048),
    "convnext_tiny": (96, 192, 384, 768),
    "convnext_small": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
}


@pytest.mark.parametrize("name", HIERARCHIES)
def test_the_hierarchy_is_found(name: str) -> None:
    with torch.device("cpu" if name == "convnext_tiny" else "meta"):  # where values are compared
        model = torchvision.models.get_model(name, weights=None)
    hierarchy = find_hierarchy(model)
    assert tuple(tap.stride for tap in hierarchy.taps) == (4, 8, 16, 32)
    assert tuple(tap.channels for tap in hierarchy.taps) == HIERARCHIES[name]
    modules = [tap.module for tap in hierarchy.taps]
    if name.startswith("convnext"):  # the stages' own outputs, before the norms of the downsampling layers
        assert modules == ["features.2", "features.4", "features.6", "avgpool"] and hierarchy.taps[0].at_input
    else:
        assert modules == ["layer2", "layer3", "layer4", "avgpool"]
    if name == "convnext_tiny":
        x, stages = torch.randn(1, 3, 64, 64), []
        features = dense_features(model.eval(), hierarchy.taps, x)
        for i, part in enumerate(model.features):
            x = part(x)
            stages += [x] if i % 2 else []
        assert all(torch.equal(a, b) for a, b in zip(features, stages, strict=True))


def test_all_of_both_families_are_offered() -> None:
    names = set(model_names())
    assert {
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "wide_resnet101_2",
        "resnext101_64x4d",
        "convnext_tiny",
        "convnext_small",
        "convnext_base",
        "convnext_large",
    } <= set(names)
    assert not any(name.startswith(("vit", "swin", "alexnet")) for name in names)
    with pytest.raises(ValueError, match=r"unknown model 'resnet5'; did you mean .*resnet50"):
        create_encoder("resnet5")


def test_sparsify_leaves_the_dense_model_alone_and_gives_its_weights_back() -> None:
    for name in (BASIC, GROUPED, CONVNEXT):
        dense = random_model(name).float().train()
        before = {k: v.clone() for k, v in dense.state_dict().items()}
        images, active = images_and_mask()
        encoder = sparkme.sparsify(dense)
        state = encoder.dense_state_dict()
        assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items()) and dense.training
        assert all(torch.equal(v, before[k]) for k, v in state.items())
        fresh = random_model(name)
        missing, unexpected = fresh.load_state_dict(state, strict=False)
        assert not unexpected and missing == [k for k in before if k not in state]
        assert all(k.startswith(("fc.", "classifier.")) for k in missing)
        encoder(images.float(), active)  # moves the running statistics, of the copy only
        assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())

        other = random_model(name, seed=1).float()
        unused = encoder.load_dense_state_dict(other.state_dict())
        assert unused == missing
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in encoder.dense_state_dict().items())


def test_weights_of_another_model_are_refused() -> None:
    encoder = sparkme.sparsify(torchvision.models.resnet18())
    with pytest.raises(ValueError, match=r"the weights are of another model: missing conv1.weight, .* in all"):
        encoder.load_dense_state_dict(torchvision.models.convnext_tiny().state_dict())
    with pytest.raises(ValueError, match="wrong shape"):
        encoder.load_dense_state_dict(
            torchvision.models.resnet34(num_classes=2).state_dict() | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
        )


def test_a_network_without_sparse_form_is_refused_by_the_layers_name() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(3)

    dense = torchvision.models.resnet18()
    dense.layer2[0].relu = Odd()
    with pytest.raises(sparkme.UnsupportedLayerError, match=r"layer 'layer2.0.relu' \(Odd\) has no sparse form"):
        sparkme.sparsify(dense)
    with pytest.raises(ValueError, match=r"SqueezeNet cannot be aligned to a grid .* layer 'features.0' returns 61x93"):
        sparkme.sparsify(torchvision.models.squeezenet1_0())  # its convolutions are not padded
    with pytest.raises(ValueError, match="not a convolutional network"):
        sparkme.sparsify(nn.Sequential(nn.Linear(3, 3)))


def test_a_users_own_network_works() -> None:
    class Block(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.down, self.conv = nn.Conv2d(a, b, 2, 2), nn.Conv2d(b, b, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(x)
            return x + torch.nn.functional.silu(self.conv(x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(a, b) for a, b in [(1, 4), (4, 6), (6, 8), (8, 10)]))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x).mean((2, 3))

    dense = Network().double().eval()
    encoder = sparkme.sparsify(dense)
    assert (encoder.in_channels, encoder.strides, encoder.channels) == (1, (2, 4, 8, 16), (4, 6, 8, 10))
    images = torch.randn(2, 1, 64, 32, dtype=torch.float64)
    maps = encoder(images, torch.ones(2, 1, 4, 2, dtype=torch.bool))
    expected = images
    for x, block in zip(maps, dense.blocks, strict=True):
        expected = block(expected)
        assert oracle.relative_error(x.dense(), expected) < 1e-12
    larger = encoder(images, torch.ones(2, 1, 2, 1, dtype=torch.bool))  # patches of twice the stride
    assert oracle.relative_error(larger[-1].dense(), expected) < 1e-12


def test_drop_path_of_a_resnet_grows_with_depth() -> None:
    encoder = random_encoder(BASIC).train()
    add_drop_path(encoder, 0.999)
    images, active = images_and_mask()
    torch.manual_seed(0)
    with torch.no_grad():
        encoder.network.layer4[-1].bn2.bn.weight.fill_(1e6)  # the deepest branch is dropped: it cannot be seen
        dropped = encoder(images, active)[-1].rows
        kept = encoder.eval()(images, active)[-1].rows
    assert dropped.abs().max() < 1e4 < kept.abs().max()


def test_sizes_that_do_not_fit_are_refused() -> None:
    encoder = sparkme.sparsify(torchvision.models.resnet18())
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(2, 1, 64, 64\)"):
        encoder(torch.zeros(2, 1, 64, 64), torch.ones(2, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiple of the encoder's total stride 32"):
        encoder(torch.zeros(2, 3, 80, 80), torch.ones(2, 1, 5, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", [BASIC, BOTTLENECK, CONVNEXT])
def test_bf16_rows_are_as_exact_as_plain_torch_in_bf16(name: str) -> None:
    images, active = images_and_mask()
    encoder = random_encoder(name)
    exact = features_and_gradients(encoder.set_engine("cuda_ext"), images, active)
    encoder, images = encoder.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (features_and_gradients(encoder.set_engine(e), images, active) for e in ("cuda_ext", "masked-dense"))
    assert all(x.dtype == torch.bfloat16 or name.startswith("convnext") for x in ours[:4])
    errors, usual = (
        torch.tensor([oracle.relative_error(x.double(), z) for x, z in zip(values, exact, strict=True)])
        for values in (ours, plain)
    )
    assert (errors[:4] <= 2 * usual[:4] + 1e-6).all()
    assert errors[4:].mean() <= 2 * usual[4:].mean()  # of one parameter it is a matter of chance


@pytest.mark.parametrize("engine", ["cuda_ext", "masked-dense"])
@pytest.mark.parametrize("name", [CONVNEXT, "timm:convnextv2_atto", BASIC])
def test_under_autocast_all_maps_are_bf16(name: str, engine: str) -> None:
    """A float32 parameter, as layer scale is one, would make the residual stream float32; gradients of weights are float32."""
    encoder = create_encoder(name).set_engine(engine).train()
    images, active = torch.randn(2, 3, 64, 64), oracle.random_active(2, 2, 2)
    types = []
    for module in encoder.modules():
        module.register_forward_hook(lambda module, inputs, out: types.append(getattr(out, "dtype", torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        maps = encoder(images, active)
    assert {x.dtype for x in maps} == set(types) == {torch.bfloat16}
    torch.autograd.backward([x.rows for x in maps], [torch.ones_like(x.rows) for x in maps])
    assert {p.grad.dtype for p in encoder.parameters()} == {torch.float32}


def test_minkowskis_engine_stays_on_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MinkowskiEngine()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="cannot be captured into a CUDA graph"):
        engine.precision("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "first")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "second")
    with pytest.raises(ValueError, match="default stream only"):
        engine.precision("cuda")
    engine.precision("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "first")
    engine.precision("cuda")
