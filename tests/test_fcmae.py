"""FCMAE restated densely, in words of its own, and a run of its recipe."""

import json
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_pretrain import fails
from timm.models.convnext import ConvNeXt
from torch import Tensor

import sparkme
from sparkme.fcmae import FCMAE
from sparkme.pretrain import main
from sparkme.training.build import build_network
from sparkme.training.checkpoint import load_checkpoint

ENGINES = ("cuda_ext", "minkowski", "masked-dense")


def small_model(normalise: bool, patch: int = 32) -> FCMAE:
    torch.manual_seed(0)
    dense = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 8, 12), use_grn=True, ls_init_value=None, num_classes=0)
    encoder = sparkme.sparsify(dense)
    model = FCMAE(encoder, input_size=(64, 96), mask_ratio=0.5, decoder_width=16, patch=patch, normalise_patches=normalise)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():  # so that GRN and biases are not the identity
                parameter.uniform_(0.2, 1)
            else:
                parameter.mul_(0.5 / parameter.std())
    return model.double()


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
@pytest.mark.parametrize("visible", [1, 3])
def test_loss_gradients_and_reconstruction_are_the_methods(visible: int, normalise: bool, engine: str) -> None:
    model = small_model(normalise)
    model.encoder.set_engine(engine)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    active = oracle.random_active(2, (2, 3), visible, seed=2)
    loss = model(images, active)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected, prediction = restated(model, model.encoder(images, active)[-1].dense(), images, active, normalise)
    expected.backward()
    assert oracle.relative_error(loss, expected) < 1e-12
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() >= {"mask_token", "prediction.bias", "encoder.network.stem.0.kernel"}
    scale = max(g.abs().max() for g in theirs.values())
    assert all((ours[name] - theirs[name]).abs().max() < 1e-10 * scale for name in ours)
    masked, painted = model.reconstruct(images, active)
    pixels = oracle.upsample_mask(active, 64, 96)
    assert torch.equal(masked, images * pixels) and torch.equal(painted.masked_select(pixels), images.masked_select(pixels))
    if not normalise:
        assert oracle.relative_error(painted * ~pixels, prediction * ~pixels) < 1e-12


def test_the_number_of_visible_patches_is_rounded_down() -> None:
    """models/fcmae.py: int(L * (1 - ratio)); of 49 patches 19 at a ratio of 0.6, where SparK keeps 20."""
    model = small_model(True)
    assert model.num_visible(49, 0.6) == 19
    active = model.random_active(5)
    assert active.flatten(1).sum(1).tolist() == [model.keep] * 5 == [3] * 5
    with pytest.raises(ValueError, match="leaves none of 6"):
        model.num_visible(6, 0.9)


def test_initial_values_are_those_of_the_official_code() -> None:
    dense = ConvNeXt(depths=(1, 1, 2, 1), dims=(32, 48, 64, 96), use_grn=True, ls_init_value=None, num_classes=0)
    model = FCMAE(sparkme.sparsify(dense), input_size=64, mask_ratio=0.5, decoder_width=128)
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if name.endswith(("kernel", "linear.weight")) and value.numel() > 1000:
            assert 0.015 < value.std() < 0.025 and abs(value.mean()) < 0.005, name
        if name.startswith("encoder.") and name.endswith("bias"):
            assert not value.any(), name
    assert 0.8 < parameters["projection.weight"].std() < 1 and 0.8 < parameters["prediction.weight"].std() < 1
    assert not parameters["decoder.mlp.grn.weight"].any() and 0.01 < parameters["mask_token"].std() < 0.03


def test_its_recipe_trains_resumes_and_is_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "fcmae", "--model", "timm:test_convnext2", "--input-size", "64", "--batch-size", "4", "--workers", "0",
             "--samples-per-epoch", "8", "--epochs", "2", "--device", "cpu", "--log-steps", "1", "--output", str(tmp_path),
             "--checkpoint-minutes", "0"]  # fmt: skip
    assert main(words) == 0
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["recipe"], config["optimizer"], config["weight_decay_end"], config["beta2"]) == (
        "fcmae",
        "adamw",
        0.05,
        0.95,
    )
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1] == 0 < rates[1]
    network = build_network(saved["config"])
    network.load_state_dict(saved["model"])
    assert isinstance(network, FCMAE) and network.decoder.conv_dw.weight.shape[0] == 512
    assert (tmp_path / "reconstructions" / "epoch_0002.png").is_file()
    assert main([*words, "--epochs", "3"]) == 0
    assert "--recipe fcmae, now it is spark" in fails(capsys, *words, "--recipe", "spark", "--epochs", 4)
    assert "--no-norm-pix-loss is for --recipe fcmae" in fails(capsys, "--no-norm-pix-loss", "--output", tmp_path / "other")
