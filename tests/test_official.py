"""The official algorithm of the benchmarks computes what SparK computes."""

import oracle
import pytest
import torch
from torch import Tensor

from benchmarks.official import OfficialSparK
from sparkme.models import create_encoder
from sparkme.spark import SparK


def small_spark(name: str, drop_path: float = 0.0) -> SparK:
    """In float64, with norm weights and layer scales that let every branch through."""
    torch.manual_seed(0)
    model = SparK(create_encoder(name, drop_path=drop_path), input_size=(64, 96), mask_ratio=0.5, decoder_width=32).double()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.numel() == max(parameter.shape):
                parameter.uniform_(0.5, 1.5)
    model.encoder.set_engine("masked-dense")
    return model


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return images, oracle.random_active(3, (2, 3), 3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_loss_and_gradients_equal_sparks(name: str, training: bool, batch: tuple[Tensor, Tensor]) -> None:
    model = small_spark(name).train(training)
    official = OfficialSparK(name, model)
    expected, got = model(*batch), official(*batch)
    assert got.item() == pytest.approx(expected.item(), rel=1e-8)  # the official code adds 1e-8 to the number of patches
    expected.backward()
    got.backward()
    gradients = official.gradients(model)
    for key, parameter in model.named_parameters():
        assert oracle.relative_error(gradients[key], parameter.grad) < 1e-8, key


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_maps_equal_the_encoders_and_everything_may_be_visible(name: str, batch: tuple[Tensor, Tensor]) -> None:
    model = small_spark(name)
    for active in (batch[1], torch.ones(3, 1, 2, 3, dtype=torch.bool)):
        maps = OfficialSparK(name, model).encode(batch[0], active)
        for x, expected in zip(maps, model.encoder(batch[0], active), strict=True):
            assert oracle.relative_error(x, expected.dense()) < 1e-10


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_drop_path_draws_the_same(name: str, batch: tuple[Tensor, Tensor]) -> None:
    model = small_spark(name, drop_path=0.5)
    losses = []
    for network in (model, OfficialSparK(name, model, drop_path=0.5)):
        torch.manual_seed(1)
        losses.append(network(*batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


def test_everything_lies_in_nchw_memory(batch: tuple[Tensor, Tensor]) -> None:
    model = small_spark("convnext_tiny")
    model.to(memory_format=torch.channels_last)
    official = OfficialSparK("convnext_tiny", model)
    assert all(p.stride() == torch.empty(p.shape).stride() for p in official.parameters())
    assert all(x.is_contiguous() for x in official.encode(*batch))


def test_another_network_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        OfficialSparK("convnext_tiny", small_spark("resnet18"))
