"""The ablations of SparK, restated on dense maps: each differs from SparK in one thing. And runs of their recipes."""

import copy
import json
from pathlib import Path

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from commands import fails
from pictures import make_labelled
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import sparkme
from sparkme import export, probe, visualize
from sparkme.methods.ablations import LossOnAllSparK, SingleScaleSparK, ZeroedSparK
from sparkme.methods.spark import SparK
from sparkme.pretrain import create_parser, main
from sparkme.settings.pretrain import ABLATIONS, RECIPES, PretrainSettings
from sparkme.training.build import build_network
from sparkme.weights.checkpoint import load_checkpoint

ENGINES = ("cuda_ext", "minkowski", "masked-dense")


def dense_network() -> nn.Module:
    torch.manual_seed(0)
    network = ResNet(BasicBlock, (1, 1, 1, 1), channels=(6, 8, 10, 12), num_classes=0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that what no convolution reaches is not zero behind a norm
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 1)
    return network.double()


def case(method: type[SparK], patch: int = 32, visible: int = 3) -> tuple[SparK, Tensor, Tensor]:
    """A network in training mode, images (2, 3, H, W) and a mask."""
    network = dense_network()
    size = (2 * patch, 96 if patch == 32 else 128)
    model = method(sparkme.sparsify(network), input_size=size, mask_ratio=0.5, decoder_width=32, patch=patch).double()
    with torch.no_grad():
        for weight in (model.decoder.proj.weight, *model.mask_tokens):  # so that each has a say in the loss
            weight.normal_()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model.train(), images, oracle.random_active(2, model.num_patches, visible, seed=2)


def own_parameters(model: SparK) -> dict[str, Tensor]:
    """What is trained beside the encoder."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("encoder.")}


def restated(model: SparK, encoder: dict[str, Tensor]) -> oracle.OracleSparK:
    """The reference on copies of the model's weights, of which `encoder` are under the names of the dense network."""
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    rest = {name.replace("decoder.", "dense_decoder.", 1): value for name, value in oracle.trainable(rest).items()}
    state = {oracle.ENCODER_PREFIX + name: value for name, value in encoder.items()} | rest
    return oracle.OracleSparK(state, "resnet", model.input_size, patch=model.patch)


def dense_gradients(encoder: sparkme.SparseEncoder) -> dict[str, Tensor]:
    """The gradients of an encoder under the names and in the layout of its dense network."""
    twin = copy.deepcopy(encoder)
    for ours, other in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        other.data = ours.grad.clone()
    return twin.dense_state_dict()


def check_gradients(model: SparK, loss: Tensor, reference: oracle.OracleSparK, expected: Tensor) -> None:
    """Loss, and the gradients of all that is trained."""
    assert oracle.relative_error(loss, expected) < 1e-10
    loss.backward()
    expected.backward()
    ours = {oracle.ENCODER_PREFIX + name: value for name, value in dense_gradients(model.encoder).items()}
    ours |= {name.replace("decoder.", "dense_decoder.", 1): p.grad for name, p in own_parameters(model).items()}
    theirs = {name: value.grad for name, value in reference.state.items() if value.requires_grad}
    assert theirs.keys() <= ours.keys() and {"mask_tokens.0", "sparse_encoder.sp_cnn.conv1.weight"} <= theirs.keys()
    for name, gradient in theirs.items():
        assert gradient is not None and gradient.any(), name
        assert oracle.relative_error(ours[name], gradient) < 1e-8, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("patch", "visible"), [(32, 1), (32, 3), (64, 2)])
def test_zeroed_is_the_dense_network_on_an_image_with_zeros(patch: int, visible: int, engine: str) -> None:
    model, images, active = case(ZeroedSparK, patch, visible)
    model.encoder.set_engine(engine)
    pixels = oracle.upsample_mask(active, *images.shape[2:])
    network = dense_network().train()
    maps: list[Tensor] = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        network.get_submodule(name).register_forward_hook(lambda _module, _args, out: maps.append(out))
    network(images * pixels)
    assert all(x.masked_select(~oracle.upsample_mask(active, *x.shape[2:])).any() for x in maps)  # the mask is gone

    reference = restated(model, dict(network.state_dict(keep_vars=True)))
    prediction = reference.decode(reference.densify(maps, active, training=True), training=True)
    spoiled = images.masked_fill(~pixels, torch.nan)  # which nothing may read
    statistics = copy.deepcopy(model.state_dict())
    assert oracle.relative_error(model.predict(spoiled, model.grid(spoiled, active)), prediction) < 1e-10
    model.load_state_dict(statistics)
    check_gradients(model, model(images, active), reference, reference.loss_of(prediction, images, active))


@pytest.mark.parametrize("engine", ENGINES)
def test_single_scale_decodes_the_deepest_map_alone(engine: str) -> None:
    model, images, active = case(SingleScaleSparK)
    model.encoder.set_engine(engine)
    reference = restated(model, oracle.trainable(model.encoder.dense_state_dict()))
    deepest = reference.features(images, active, training=True)[-1:]
    prediction = reference.decode(reference.densify(deepest, active, training=True), training=True)
    check_gradients(model, model(images, active), reference, reference.loss_of(prediction, images, active))


def test_single_scale_has_nothing_for_finer_maps() -> None:
    """Nothing is left without a gradient, which DistributedDataParallel would wait for; and what is left is SparK's."""
    whole, single = case(SparK)[0], case(SingleScaleSparK)[0]
    names = {name for name in own_parameters(whole) if not name.startswith(("densify_", "mask_tokens."))}
    deepest = {name for name in own_parameters(whole) if name.startswith(("densify_norms.0.", "densify_projs.0."))}
    assert own_parameters(single).keys() == names | deepest | {"mask_tokens.0"}
    weights = dict(whole.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in single.named_parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_on_all_is_the_mean_over_all_patches(engine: str) -> None:
    model, images, active = case(LossOnAllSparK)
    model.encoder.set_engine(engine)
    reference = restated(model, oracle.trainable(model.encoder.dense_state_dict()))
    prediction = reference.predict(images, active, training=True)
    target, predicted = (F.unfold(x, 32, stride=32) for x in (images, prediction))  # (B, 3 * 32 * 32, patches)
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    expected = (predicted - target).square().mean()
    assert oracle.relative_error(expected, reference.loss_of(prediction, images, active)) > 1e-3  # of the hidden patches
    check_gradients(model, model(images, active), reference, expected)


def test_recipes_are_small_but_for_the_method() -> None:
    for name, method in zip(ABLATIONS, (ZeroedSparK, SingleScaleSparK, LossOnAllSparK), strict=True):
        recipe = RECIPES[name]
        assert recipe.defaults == RECIPES["small"].defaults and recipe.largest_batch == RECIPES["small"].largest_batch
        settings = recipe.defaults | {"recipe": name, "model": "timm:test_resnet", "drop_path": 0.0}
        assert type(build_network(PretrainSettings(**settings))) is method
    help_text = " ".join(create_parser().format_help().split())
    assert "epochs to train for (default: 1600 / by the number of images / 800)" in help_text  # each value once
    assert "spark-*: small without one part of SparK" in help_text


@pytest.mark.parametrize("recipe", ABLATIONS)
def test_a_run_resumes_and_its_encoder_is_used_as_sparks(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "--recipe",
        recipe,
        "--model",
        "timm:test_resnet",
        "--input-size",
        "64",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--samples-per-epoch",
        "8",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--mask-ratio",
        "0.5",
        "--decoder-width",
        "32",
    ]
    assert main(words) == 0
    run = Path("runs", f"{recipe}-timm-test_resnet-64")
    checkpoint = run / "checkpoints" / "last.pt"
    assert f"recipe    {RECIPES[recipe].name}" in capsys.readouterr().out
    assert (run / "reconstructions" / "epoch_0002.png").is_file()
    assert main([*words, "--epochs", "3"]) == 0
    assert "resumed after step 4" in capsys.readouterr().out
    assert load_checkpoint(checkpoint)["config"]["recipe"] == recipe
    assert f"--recipe {recipe}, now it is small" in fails(capsys, *words, "--recipe", "small", "--output", run)

    assert visualize.main([str(checkpoint), "--output", "picture.png"]) == 0
    assert export.main([str(checkpoint), "--to", "timm", "--output", "weights.pth"]) == 0
    missing, unexpected = timm.create_model("test_resnet").load_state_dict(torch.load("weights.pth"), strict=False)
    assert not unexpected and all(name.startswith("fc.") for name in missing)
    assert "an ablation of SparK" in json.loads(Path("weights.pth.json").read_text())["method"]
    data = make_labelled(tmp_path / "labelled", {"red": 6, "blue": 6})
    assert probe.main([str(checkpoint), "--data", str(data), "--input-size", "64", "--workers", "0"]) == 0
