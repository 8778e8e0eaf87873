"""The sites of a batch: the order of rows, their coordinates, and MinkowskiEngine's view of them."""

import oracle
import pytest
import torch

import sparkme
from sparkme.sparse.engines import create_engine
from sparkme.sparse.engines import minkowski as minkowski_engine

STRIDES = (1, 2, 4, 8, 16, 32)


@pytest.fixture
def active() -> torch.Tensor:
    return oracle.random_active(3, (2, 4), 3, seed=5)


@pytest.mark.parametrize("stride", STRIDES)
def test_rows_are_patch_major(active: torch.Tensor, stride: int) -> None:
    grid = sparkme.Grid(active, 32)
    dense = torch.randn(3, 5, *grid.size(stride))
    rows = grid.to_rows(dense, stride)
    assert torch.equal(rows, oracle.rows_of(dense, active, stride))
    assert torch.equal(grid.to_dense(rows, stride), oracle.masked(dense, active))


@pytest.mark.parametrize("stride", [16, 32])
def test_gradients_go_the_way_back(active: torch.Tensor, stride: int) -> None:
    grid = sparkme.Grid(active, 32)
    dense = torch.randn(3, 2, *grid.size(stride), dtype=torch.float64, requires_grad=True)
    rows = torch.randn(grid.num_rows(stride), 2, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: grid.to_rows(x, stride), dense)
    assert torch.autograd.gradcheck(lambda x, f: grid.to_dense(x, stride, fill=f), (rows, fill))


@pytest.mark.parametrize("stride", STRIDES)
def test_coordinates_are_sorted_by_sample_patch_and_pixel(active: torch.Tensor, stride: int) -> None:
    coordinates = sparkme.Grid(active, 32).coordinates(stride)
    assert coordinates.dtype == torch.int32 and coordinates.is_contiguous()
    expected = sorted(
        (b, y // 32, x // 32, y, x)
        for b in range(3)
        for y in range(0, 64, stride)
        for x in range(0, 128, stride)
        if active[b, 0, y // 32, x // 32]
    )
    assert coordinates.tolist() == [[b, y, x] for b, _, _, y, x in expected]


@pytest.mark.parametrize("stride", STRIDES)
def test_minkowski_keeps_the_order_at_every_stride(active: torch.Tensor, stride: int) -> None:
    grid = sparkme.Grid(active, 32)
    sites = minkowski_engine.sites_of(grid, stride)
    assert sites.to_engine is None
    found = minkowski_engine.manager_of(grid).get_coordinates(sites.key)
    assert torch.equal(found, grid.coordinates(stride))


def test_hidden_pixels_are_filled(active: torch.Tensor) -> None:
    grid = sparkme.Grid(active, 32)
    dense = grid.to_dense(torch.zeros(grid.num_rows(16), 2), 16, fill=torch.tensor([3.0, -1.0]))
    mask = oracle.upsample_mask(active, 4, 8)
    assert (dense[:, 0] == torch.where(mask[:, 0].bool(), 0.0, 3.0)).all()
    assert (dense[:, 1] == torch.where(mask[:, 0].bool(), 0.0, -1.0)).all()


def test_images_must_agree_in_the_number_of_visible_patches() -> None:
    active = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    active[0, 0, 0, 0] = False
    with pytest.raises(ValueError, match=r"same number of visible patches.*\[3, 4\]"):
        sparkme.Grid(active, 32)
    with pytest.raises(ValueError, match="at least one"):
        sparkme.Grid(torch.zeros(2, 1, 2, 2, dtype=torch.bool), 32)


def test_random_masks_are_uniform_and_reproducible() -> None:
    draw = lambda seed: sparkme.random_active(4000, (3, 3), 0.6, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    active = draw(0)
    assert (active.flatten(1).sum(1) == 4).all()
    assert torch.equal(active, draw(0)) and not torch.equal(active, draw(1))
    assert (active.float().mean(0) - 4 / 9).abs().max() < 0.05  # six standard deviations of a share of 4000
    with pytest.raises(ValueError, match="leaves none of 9 patches visible"):
        sparkme.random_active(1, (3, 3), 0.97)


def test_a_coordinate_map_in_another_order_changes_nothing(monkeypatch: pytest.MonkeyPatch, active: torch.Tensor) -> None:
    """MinkowskiEngine promises no order on a GPU: its coordinate maps are shuffled here, and the numbers must not change."""
    dense = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(4, 4, 7, padding=3, groups=4),
        torch.nn.Conv2d(4, 6, 2, 2),
        torch.nn.Conv2d(6, 6, 3, 2, 1),
        torch.nn.Conv2d(6, 6, 3, 2, 1),
        torch.nn.AdaptiveAvgPool2d(1),
    )
    encoder = sparkme.sparsify(dense).double().set_engine("minkowski")
    images = torch.randn(3, 3, 64, 128, dtype=torch.float64)
    expected = encoder(images, active)

    insert = minkowski_engine.ME.CoordinateManager.insert_and_map
    shuffled = []

    def insert_shuffled(self, coordinates, *args):  # type: ignore[no-untyped-def]
        order = torch.randperm(len(coordinates), generator=torch.Generator().manual_seed(len(coordinates)))
        key, maps = insert(self, coordinates[order].contiguous(), *args)
        shuffled.append(len(order))
        return key, (order.int(), maps[1])

    monkeypatch.setattr(minkowski_engine.ME.CoordinateManager, "insert_and_map", insert_shuffled)
    for x, y in zip(encoder(images, active), expected, strict=True):
        assert oracle.relative_error(x.rows, y.rows) < 1e-12
    assert len(shuffled) == 6


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'fast'; choose one of auto, cuda_ext, minkowski, masked-dense"):
        create_engine("fast")


def test_a_wrong_number_of_visible_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="keep is 2, but 4 patches are visible"):
        sparkme.Grid(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32, keep=2)
