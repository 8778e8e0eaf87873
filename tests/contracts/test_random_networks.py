"""Whatever cuts a graph in a network cuts it in the sparse one at the same place, on every engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import random_networks
import torch
from torch import Tensor, nn

import sparkme
from sparkme.sparse.fusion import Unwritten

SEEDS = 40  # more of them: tests/whole/test_fuzz.py


def test_random_networks_have_the_dense_ones_gradients() -> None:
    outcomes = Counter(random_networks.compare(seed).partition(":")[0] for seed in range(SEEDS))
    assert outcomes["equal"] >= 0.8 * SEEDS and not outcomes["refused"], outcomes


class Watching(nn.Module):
    """Shows its map to somebody who wants no gradients, before the next layer reads it."""

    def __init__(self, before: int, width: int, look: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.mix, self.look = nn.Conv2d(width, width, 3, padding=1), look

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = x if self.look is in_place else torch.relu(x)  # of a ReLU that is changed torch has no gradient
        self.look(x)
        return self.mix(x)


@torch.no_grad()
def without_gradients(x: Tensor) -> object:
    return x.mean((0, 2, 3))


@torch.inference_mode()
def in_inference_mode(x: Tensor) -> object:
    return x.mean((2, 3))


@torch.no_grad()
def in_place(x: Tensor) -> object:
    return x.mul_(0.5)


@torch.no_grad()
def a_view(x: Tensor) -> object:
    return x[:, :2].sum((2, 3))


def detached(x: Tensor) -> object:
    return x.detach().mean((2, 3))


@pytest.mark.parametrize("look", [without_gradients, in_inference_mode, in_place, a_view, detached])
def test_a_reader_without_gradients_takes_none_from_others(look: Callable[[Tensor], object]) -> None:
    widths = (3, 4, 6, 8)
    network = nn.Sequential(*[Watching(a, b, look) for a, b in pairwise(widths)])
    encoder = sparkme.sparsify(network)
    for engine in random_networks.ENGINES:
        encoder.set_engine(engine).train().zero_grad()
        maps = encoder(torch.randn(2, 3, 16, 24), torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool).expand(2, 1, 2, 3))
        torch.stack([x.rows.square().mean() for x in maps]).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters()), engine


def test_what_waits_keeps_the_precision_of_its_place() -> None:
    """A map that autocast makes bf16 is read where autocast is off."""

    def read(x: Tensor) -> object:
        with torch.autocast("cpu", enabled=False):
            return x.float().mean((2, 3))

    encoder = sparkme.sparsify(nn.Sequential(Watching(3, 8, read), Watching(8, 16, read))).set_engine("cuda_ext").eval()
    blind = sparkme.sparsify(nn.Sequential(Watching(3, 8, id), Watching(8, 16, id))).set_engine("cuda_ext").eval()
    blind.load_dense_state_dict(encoder.dense_state_dict())
    images, active = torch.randn(1, 3, 8, 8), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(encoder(images, active), blind(images, active), strict=True):
            assert torch.equal(ours.rows, theirs.rows) and ours.rows.dtype == torch.bfloat16


def test_the_trial_finds_a_cut_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written as its first reader has it loses the gradients of the others: such an engine is refused."""
    monkeypatch.setattr(Unwritten, "write", lambda self: self._write())
    with pytest.raises(sparkme.UnsupportedLayerError, match="gets no gradient in the sparse network"):
        sparkme.sparsify(nn.Sequential(Watching(3, 4, without_gradients), Watching(4, 6, without_gradients)))


def test_a_dropout_that_drops_nothing_is_its_input() -> None:
    """As in torch, so that an operation in place behind it changes both."""

    class Kept(Watching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            y = nn.functional.dropout(x, 0.0, self.training)
            return self.mix(y.add_(1) + x)

    network = nn.Sequential(Kept(3, 4, id), Kept(4, 6, id)).double().eval()
    encoder = sparkme.sparsify(network)
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    found = encoder(images, torch.ones(1, 1, 2, 2, dtype=torch.bool))[-1].dense()
    torch.testing.assert_close(found, network(images))
