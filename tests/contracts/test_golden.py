"""The official code's numbers: losses, features and gradients, on every engine, through `load_official_state_dict`."""

import copy
import re
from functools import lru_cache

import pytest
import torch
from golden import GoldenCase, feature_statistics, golden_case, golden_cases
from torchvision.models import get_model

import sparkme
from sparkme.weights.spark import ENCODER
from sparkme.weights.torchvision import CONVNEXT

ENGINES = ("cuda_ext", "minkowski", "masked-dense")


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@lru_cache(maxsize=1)  # the engines of a case follow each other
def build(name: str) -> sparkme.SparK:
    """The case's network with its weights; tests change a copy."""
    case = golden_case(name)
    no_drop = {"stochastic_depth_prob": 0.0} if case.model.startswith("convnext") else {}
    model = sparkme.SparK(
        sparkme.sparsify(get_model(case.model, **no_drop)),
        input_size=case.input_size,
        mask_ratio=case.mask_ratio,
        decoder_width=case.decoder_width,
        densify_norm=case.densify_norm,
    )
    model.load_official_state_dict(case.state())
    return model.to(case.dtype)


@pytest.mark.skipif("cuda" in DEVICES, reason="the tests on the GPU are made")
def test_a_gpu_gives_the_official_codes_numbers() -> None:
    pytest.skip("torch sees no GPU: the cases of this file are made for the CPU alone")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_equals_the_official_code(case: GoldenCase, engine: str, device: str) -> None:
    double = case.dtype == torch.float64
    tolerance = 1e-8 if double else 1e-5
    torch.backends.cudnn.allow_tf32 = False
    values, images, active = case.values, case.images().to(device), case.active().to(device)

    model = copy.deepcopy(build(case.name)).to(device)
    model.encoder.set_engine(engine)
    statistics = copy.deepcopy(model.state_dict())  # which a pass in training moves
    maps = model.train().encoder(images, active)
    for x, expected in zip(maps, values["train_features"], strict=True):
        got = feature_statistics(x.rows.detach())
        assert (x.stride, x.channels, len(x.rows)) == (expected["stride"], expected["channels"], expected["rows"])
        for name in ("mean", "abs_mean", "l2"):
            assert got[name] == pytest.approx(expected[name], rel=tolerance), (x.stride, name)

    model.load_state_dict(statistics)
    loss = model(images, active)
    assert loss.item() == pytest.approx(values["train_loss"], rel=tolerance)
    loss.backward()
    gradients = {official_name(n, case.model): p.grad.norm().item() for n, p in model.named_parameters()}
    # ReLU passes or blocks a gradient whose activation is within rounding of zero, so in float32 the gradient norms of
    # the official code itself move by some 1e-4 with the number of threads; float64 holds them to 1e-8.
    for name, expected in values["grad_l2"].items():
        assert gradients[name] == pytest.approx(expected, rel=tolerance if double else 2e-3), name
    total = sum(g**2 for g in gradients.values()) ** 0.5
    assert total == pytest.approx(values["grad_l2_total"], rel=tolerance if double else 2e-3)

    model.load_state_dict(statistics)
    with torch.no_grad():
        assert model.eval()(images, active).item() == pytest.approx(values["eval_loss"], rel=tolerance)
    _, reconstruction = model.reconstruct(images, active)
    got = feature_statistics(reconstruction)
    for name, expected in values["eval_reconstruction"].items():
        assert got[name] == pytest.approx(expected, rel=tolerance), name


def official_name(name: str, model: str) -> str:
    """The official name of one of `SparK`'s parameters, such as `sparse_encoder.sp_cnn.conv1.weight`.

    Args:
        name: as in `SparK.named_parameters()`.
        model: torchvision's name of the encoder.
    """
    if not name.startswith("encoder.network."):
        return name.replace("decoder.", "dense_decoder.", 1)
    name = name.removeprefix("encoder.network.")
    name = re.sub(r"\.(bn|linear)\.(weight|bias)$", r".\2", name).removesuffix("kernel")
    name += "weight" if name.endswith(".") else ""
    if model.startswith("convnext"):
        (name,) = CONVNEXT.to_hub({name: torch.zeros(1)})
    return ENCODER + name
