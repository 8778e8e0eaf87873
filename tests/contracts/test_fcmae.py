"""FCMAE restated densely, in words of its own, and a run of its recipe."""

import copy
import json
import re
from pathlib import Path

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from commands import fails
from timm.models.convnext import ConvNeXt
from torch import Tensor

import sparkme
import sparkme.export
from sparkme.errors import UserError
from sparkme.methods.fcmae import FCMAE
from sparkme.pretrain import main
from sparkme.settings.declare import from_config, to_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training.build import build_network
from sparkme.training.folder import check_same_run
from sparkme.training.optimizer import parameter_groups
from sparkme.weights.checkpoint import load_checkpoint

ENGINES = ("cuda_ext", "minkowski", "masked-dense")


def small_model(normalise: bool, patch: int = 32, size: tuple[int, int] = (64, 96)) -> FCMAE:
    torch.manual_seed(0)
    dense = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 8, 12), use_grn=True, ls_init_value=None, num_classes=0)
    encoder = sparkme.sparsify(dense)
    model = FCMAE(encoder, input_size=size, mask_ratio=0.5, decoder_width=16, patch=patch, normalise_patches=normalise)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():  # so that GRN and biases are not the identity
                parameter.uniform_(0.2, 1)
            else:
                parameter.mul_(0.5 / parameter.std())
    return model.double()


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a ConvNeXt as its authors have them; values and shapes stay."""
    rules = {
        r"stem\.(\d)": r"downsample_layers.0.\1",
        r"stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
        r"\.blocks\.": ".",
        r"conv_dw": "dwconv",
        r"mlp\.fc": "pwconv",
        r"mlp\.grn\.weight": "grn.gamma",
        r"mlp\.grn\.bias": "grn.beta",
    }
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def dense_gradients(encoder: sparkme.SparseEncoder) -> dict[str, Tensor]:
    """The gradients of an encoder under the names and in the layout of its dense network."""
    twin = copy.deepcopy(encoder)
    for ours, other in zip(encoder.parameters(), twin.parameters(), strict=True):
        other.data = torch.zeros_like(ours) if ours.grad is None else ours.grad.clone()
    return twin.dense_state_dict()


def restated(model: FCMAE, deepest: Tensor, images: Tensor, active: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """Loss and prediction (B, C, H, W) from the encoder's deepest map (B, C, h, w)."""
    get = dict(model.named_parameters()).__getitem__
    x = F.conv2d(deepest, get("projection.weight"), get("projection.bias"))
    x = torch.where(oracle.upsample_mask(active, *x.shape[2:]), x, get("mask_token"))
    y = F.conv2d(x, get("decoder.conv_dw.weight"), get("decoder.conv_dw.bias"), padding=3, groups=x.shape[1])
    everywhere = torch.ones_like(active)
    y = oracle.masked_layer_norm(y, everywhere, get("decoder.norm.weight"), get("decoder.norm.bias"))
    y = F.gelu(torch.einsum("bchw,oc->bohw", y, get("decoder.mlp.fc1.weight")) + get("decoder.mlp.fc1.bias")[:, None, None])
    y = oracle.masked_grn(y, everywhere, get("decoder.mlp.grn.weight"), get("decoder.mlp.grn.bias"))
    y = torch.einsum("bchw,oc->bohw", y, get("decoder.mlp.fc2.weight")) + get("decoder.mlp.fc2.bias")[:, None, None]
    values = F.conv2d(x + y, get("prediction.weight"), get("prediction.bias"))
    prediction = torch.zeros_like(images)
    for dy in range(32):
        for dx in range(32):
            prediction[:, :, dy::32, dx::32] = values[:, (dy * 32 + dx) * 3 : (dy * 32 + dx) * 3 + 3]
    errors, patch = [], model.patch
    for b, _, i, j in (~active).nonzero().tolist():
        window = (b, slice(None), slice(i * patch, (i + 1) * patch), slice(j * patch, (j + 1) * patch))
        target = images[window]
        if normalise:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((prediction[window] - target).square().mean())
    return torch.stack(errors).mean(), prediction


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("patch", "visible"), [(32, 1), (32, 3), (64, 1)])
def test_loss_gradients_and_reconstruction_are_the_methods(patch: int, visible: int, normalise: bool, engine: str) -> None:
    """Against the whole method on masked dense maps: the oracle's encoder, and the rest restated above. In training mode."""
    size = (2 * patch, 96 if patch == 32 else 128)
    model = small_model(normalise, patch, size).train()
    model.encoder.set_engine(engine)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    active = oracle.random_active(2, model.num_patches, visible, seed=2)
    loss = model(images, active)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    ours_encoder = official_names(dense_gradients(model.encoder))
    model.zero_grad()

    state = oracle.trainable(official_names(model.encoder.dense_state_dict()))
    deepest = oracle.encoder_features(state, images, active, training=True)[-1]
    expected, prediction = restated(model, deepest, images, active, normalise)
    expected.backward()
    assert oracle.relative_error(loss, expected) < 1e-10
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert theirs.keys() == {name for name in ours if not name.startswith("encoder.")} >= {"mask_token", "prediction.bias"}
    assert all(oracle.relative_error(ours[name], gradient) < 1e-10 for name, gradient in theirs.items())
    assert ours_encoder.keys() == state.keys() >= {"downsample_layers.0.0.weight", "stages.3.0.grn.gamma"}
    for name, value in state.items():
        assert value.grad is not None and value.grad.any(), name
        assert oracle.relative_error(ours_encoder[name], value.grad) < 1e-10, name

    masked, painted = model.reconstruct(images, active)
    pixels = oracle.upsample_mask(active, *size)
    assert torch.equal(masked, images * pixels) and torch.equal(painted.masked_select(pixels), images.masked_select(pixels))
    if normalise:
        prediction = prediction.clone()
        for b, _, i, j in (~active).nonzero().tolist():
            window = (b, slice(None), slice(i * patch, (i + 1) * patch), slice(j * patch, (j + 1) * patch))
            prediction[window] = prediction[window] * (images[window].var() + 1e-6).sqrt() + images[window].mean()
    assert oracle.relative_error(painted * ~pixels, prediction * ~pixels) < 1e-10


def test_the_number_of_visible_patches_is_rounded_down() -> None:
    """models/fcmae.py: int(L * (1 - ratio)); of 49 patches 19 at a ratio of 0.6, where SparK keeps 20."""
    model = small_model(True)
    assert model.num_visible(49, 0.6) == 19
    active = model.random_active(5)
    assert active.flatten(1).sum(1).tolist() == [model.keep] * 5 == [3] * 5
    with pytest.raises(ValueError, match="leaves none of 6"):
        model.num_visible(6, 0.9)


def test_initial_values() -> None:
    """.02 in the encoder, whatever its own library makes; in the decoder torch's truncated normal, of deviation .88."""
    model = build_network(
        PretrainSettings(
            recipe="fcmae",
            model="resnet18",
            drop_path=0.0,
            mask_ratio=0.5,
            decoder_width=128,
            input_size=(64, 64),
            norm_pix_loss=True,
        )
    )
    for name, value in model.encoder.dense_state_dict().items():
        if value.ndim == 4:
            assert 0.019 < value.std() < 0.021 and value.abs().max() < 0.2, name
        elif name.endswith("bias"):
            assert not value.any(), name
    parameters = dict(model.named_parameters())
    for name in ("projection", "decoder.conv_dw", "prediction"):
        weight = parameters[f"{name}.weight"]
        assert 0.85 < weight.std() < 0.91 and weight.abs().max() <= 2 and not parameters[f"{name}.bias"].any(), name
    assert 1 / 128**0.5 >= parameters["decoder.mlp.fc1.weight"].abs().max() > 0.08  # torch's own for a linear layer
    assert not parameters["decoder.mlp.grn.weight"].any() and 0.01 < parameters["mask_token"].std() < 0.03


def test_an_encoder_keeps_the_weights_it_comes_with() -> None:
    encoder = sparkme.sparsify(timm.create_model("test_convnext2"))
    before = {name: value.clone() for name, value in encoder.dense_state_dict().items()}
    model = sparkme.FCMAE(encoder, input_size=64)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.dense_state_dict().items())


def test_vectors_are_not_decayed() -> None:
    model = small_model(True)
    free = {id(p) for p in parameter_groups(model)[1]["params"]}  # type: ignore[attr-defined]
    decayed = {name for name, p in model.named_parameters() if id(p) not in free}
    assert not any(re.search(r"mask_token|grn|norm|bias", name) for name in decayed)
    assert {"projection.weight", "prediction.weight", "decoder.conv_dw.weight", "decoder.mlp.fc1.weight"} <= decayed


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_nano"])
def test_the_papers_networks_pretrain(name: str) -> None:
    torch.manual_seed(0)
    model = sparkme.FCMAE(sparkme.sparsify(timm.create_model(name, num_classes=0)), input_size=64, mask_ratio=0.5)
    loss = model(torch.randn(2, 3, 64, 64))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(n.endswith("grn.weight") and p.grad.any() for n, p in model.encoder.named_parameters() if p.grad is not None)


def test_its_recipe_trains_resumes_and_is_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--recipe",
        "fcmae",
        "--model",
        "timm:test_convnext2",
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
        "--log-steps",
        "1",
        "--output",
        str(tmp_path),
        "--checkpoint-minutes",
        "0",
        "--mask-ratio",
        "0.5",
    ]  # what a user says wins
    assert main(words) == 0
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "recipe": "fcmae",
        "optimizer": "adamw",
        "beta2": 0.95,
        "base_lr": 1.5e-4,
        "weight_decay": 0.05,
        "drop_path": 0,
        "weight_decay_end": 0.05,
        "clip_grad": 0,
        "mask_ratio": 0.5,
        "norm_pix_loss": True,
    }
    assert {name: config[name] for name in expected} == expected
    assert "recipe    FCMAE" in capsys.readouterr().out
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1] == 0 < rates[1]
    network = build_network(from_config(PretrainSettings, saved["config"]))
    network.load_state_dict(saved["model"])
    assert isinstance(network, FCMAE) and network.decoder.conv_dw.weight.shape[0] == 512
    assert (tmp_path / "reconstructions" / "epoch_0002.png").is_file()
    assert main([*words, "--epochs", "3"]) == 0
    assert "resumed after step 4" in capsys.readouterr().out
    assert "--recipe fcmae, now it is spark" in fails(capsys, *words, "--recipe", "spark", "--epochs", 4)
    weights = tmp_path / "weights.pth"
    assert sparkme.export.main([str(tmp_path / "checkpoints" / "last.pt"), "--to", "timm", "--output", str(weights)]) == 0
    missing, unexpected = timm.create_model("test_convnext2").load_state_dict(torch.load(weights), strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing)
    assert "FCMAE" in json.loads((tmp_path / "weights.pth.json").read_text())["method"]


def test_flags_of_the_other_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--no-norm-pix-loss is for --recipe fcmae" in fails(capsys, "--no-norm-pix-loss", "--output", tmp_path)
    flags = ("--recipe", "fcmae", "--densify-norm", "bn", "--output", tmp_path)
    assert "--densify-norm bn is for SparK" in fails(capsys, *flags)


def test_a_checkpoint_that_names_no_recipe_is_of_spark() -> None:
    older = to_config(PretrainSettings())
    del older["recipe"]
    check_same_run(older, PretrainSettings(recipe="spark"), None)
    with pytest.raises(UserError, match="was trained with --recipe spark, now it is fcmae"):
        check_same_run(older, PretrainSettings(recipe="fcmae"), None)
