"""The official algorithms of the benchmarks compute what SparK and FCMAE compute."""

from typing import Any

import oracle
import pytest
import torch
from official_networks import V1, V2
from torch import Tensor

from benchmarks.official import OfficialSparK, create_official
from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.fcmae import FCMAE
from sparkme.methods.spark import SparK
from sparkme.networks.create import create_encoder

ATTO = "timm:convnextv2_atto"  # whose linear layers are convolutions, other than those of the larger ones


def small(
    method: type[MaskedAutoencoder],
    name: str,
    *,
    drop_path: float = 0.0,
    input_size: tuple[int, int] = (64, 96),
    **options: Any,
) -> MaskedAutoencoder:
    """In float64, with norm weights, GRN and layer scales that let every branch through."""
    torch.manual_seed(0)
    encoder = create_encoder(name, drop_path=drop_path)
    model = method(encoder, input_size=input_size, mask_ratio=0.5, decoder_width=32, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape):
                parameter.uniform_(0.5, 1.5)
    model.encoder.set_engine("masked-dense")
    return model


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return images, oracle.random_active(3, (2, 3), 3)


def agrees(name: str, model: MaskedAutoencoder, batch: tuple[Tensor, Tensor]) -> None:
    official = create_official(name, model)
    expected, got = model(*batch), official(*batch)
    assert got.item() == pytest.approx(expected.item(), rel=1e-8)  # the official code adds 1e-8 to the number of patches
    expected.backward()
    got.backward()
    gradients = official.gradients(model)
    reached = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, gradient in reached.items():
        assert oracle.relative_error(gradients[key], gradient) < 1e-8, key
    assert reached.keys() == dict(model.named_parameters()).keys() == gradients.keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet18", V1, V2])
def test_loss_and_gradients_equal_sparks(name: str, training: bool, batch: tuple[Tensor, Tensor]) -> None:
    agrees(name, small(SparK, name).train(training), batch)


@pytest.mark.parametrize(
    ("name", "normalise"),
    [(V2, True), (V2, False), (ATTO, True), (V1, True), ("timm:convnext_atto", True), ("resnet18", True)],
)
def test_loss_and_gradients_equal_fcmaes(name: str, normalise: bool, batch: tuple[Tensor, Tensor]) -> None:
    agrees(name, small(FCMAE, name, normalise_patches=normalise), batch)


def test_patches_of_fcmae_may_be_larger_than_the_stride() -> None:
    model = small(FCMAE, V2, patch=64, input_size=(128, 128))
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    agrees(V2, model, (images, oracle.random_active(2, (2, 2), 2)))


@pytest.mark.parametrize(("method", "name"), [(SparK, "resnet18"), (SparK, V1), (FCMAE, V2)])
def test_maps_equal_the_encoders_and_everything_may_be_visible(
    method: type[MaskedAutoencoder], name: str, batch: tuple[Tensor, Tensor]
) -> None:
    model = small(method, name)
    for active in (batch[1], torch.ones(3, 1, 2, 3, dtype=torch.bool)):
        maps = create_official(name, model).encode(batch[0], active)
        for x, expected in zip(maps, model.encoder(batch[0], active), strict=True):
            assert oracle.relative_error(x, expected.dense()) < 1e-10


@pytest.mark.parametrize("name", ["resnet18", V1, V2])
def test_drop_path_draws_the_same(name: str, batch: tuple[Tensor, Tensor]) -> None:
    model = small(SparK, name, drop_path=0.5)
    assert isinstance(model, SparK)
    losses = []
    for network in (model, OfficialSparK(name, model, drop_path=0.5)):
        torch.manual_seed(1)
        losses.append(network(*batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


@pytest.mark.parametrize(("method", "name"), [(SparK, V1), (FCMAE, V2)])
def test_everything_lies_in_nchw_memory(method: type[MaskedAutoencoder], name: str, batch: tuple[Tensor, Tensor]) -> None:
    model = small(method, name)
    model.to(memory_format=torch.channels_last)
    official = create_official(name, model)
    assert all(p.stride() == torch.empty(p.shape).stride() for p in official.parameters())
    assert all(x.is_contiguous() for x in official.encode(*batch))


def test_fcmaes_convolutions_read_no_hidden_pixel_and_write_none(batch: tuple[Tensor, Tensor]) -> None:
    """The mask is before and after them; from the loss alone one could not tell, since the other layers hide pixels, too."""
    official = create_official(V2, small(FCMAE, V2))
    images, active = batch
    official.encode(images, active)  # from which on this mask counts
    shown = oracle.upsample_mask(active, 16, 24)
    convolution = official.get_submodule("network.stages.0.blocks.0.depthwise")
    x = torch.randn(3, 8, 16, 24, dtype=torch.float64)
    out = convolution(x)
    assert torch.equal(out, convolution(x * shown)) and torch.equal(out, out * shown) and out.any()


def test_another_network_is_refused() -> None:
    for method in (SparK, FCMAE):
        with pytest.raises((ValueError, RuntimeError)):
            create_official(V1, small(method, "resnet18"))
