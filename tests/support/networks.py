"""Networks that tests make, and how they are compared with the oracle."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparkme

ENGINES = ("cuda_ext", "minkowski", "masked-dense")


ACTIVE = oracle.random_active(2, (2, 3), 3, seed=1)


class Block(nn.Module):
    """3x3 convolution by 2, and whatever is under test."""

    def __init__(self, channels_in: int, channels: int, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels_in, channels, 3, 2, 1)
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.down(x))


class Network(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor], blocks: int = 4) -> None:
        super().__init__()
        widths = [3, *range(4, 4 + 2 * blocks, 2)]
        self.blocks = nn.Sequential(*(Block(a, b, body) for a, b in pairwise(widths)))
        self.fc = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def make(body: Callable[[nn.Module, Tensor], Tensor], blocks: int = 4) -> Network:
    torch.manual_seed(0)
    network = Network(body, blocks).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2), nn.init.normal_(module.bias, std=0.3)
    return network


def images(size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Masked:
    """Runs a network's own blocks on dense maps, setting hidden pixels to zero after every function, as the oracle does."""

    def __init__(self, network: Network, active: Tensor) -> None:
        self.network, self.active = network, active

    def __call__(self, x: Tensor, body: Callable[[Block, Tensor], Tensor]) -> list[Tensor]:
        found, x = [], oracle.masked(x, self.active)
        for block in self.network.blocks:
            x = oracle.masked_conv2d(x, self.active, block.down.weight, block.down.bias, 2, 1)
            x = body(block, x)
            found.append(x)
        return found

    def conv(self, block: Block, x: Tensor) -> Tensor:
        return oracle.masked_conv2d(x, self.active, block.conv.weight, block.conv.bias, padding=1)

    def norm(self, block: Block, x: Tensor) -> Tensor:
        norm = block.norm
        return oracle.masked_batch_norm(
            x, self.active, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training
        )[0]

    def hide(self, x: Tensor) -> Tensor:
        return oracle.masked(x, self.active)


def check(network: Network, expected: list[Tensor], active: Tensor = ACTIVE, taps: list[str] | None = None) -> None:
    """All engines give the expected maps, in training mode; gradients of the weights agree with autograd through them."""
    dense = dict(network.named_parameters())
    loss = sum((y * y.detach().cos()).sum() for y in expected)
    names = [name for name in dense if not name.startswith("fc.")]
    gradients = torch.autograd.grad(loss, [dense[name] for name in names], allow_unused=True)
    encoder = sparkme.sparsify(network, taps=taps).train(network.training)
    for engine in ENGINES:
        encoder.set_engine(engine).zero_grad()
        maps = encoder(images(), active)
        for x, y in zip(maps, expected, strict=True):
            assert oracle.relative_error(x.dense(), y) < 1e-10, engine
        sum((x.dense() * y.detach().cos()).sum() for x, y in zip(maps, expected, strict=True)).backward()
        values = [p.detach().clone() for p in encoder.parameters()]
        with torch.no_grad():
            for p in encoder.parameters():
                p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            found = {name: value.clone() for name, value in encoder.dense_state_dict().items()}
            for p, value in zip(encoder.parameters(), values, strict=True):
                p.copy_(value)
        scale = max(g.abs().max() for g in gradients if g is not None)
        for name, gradient in zip(names, gradients, strict=True):
            expected_gradient = torch.zeros_like(dense[name]) if gradient is None else gradient
            assert (found[name] - expected_gradient).abs().max() <= 1e-10 * scale, (engine, name)


class Count(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func).removeprefix("sparkme.").removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def images_and_mask(patches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    side = 32 * patches
    return torch.randn(2, 3, side, side, generator=generator), oracle.random_active(2, (patches, patches), patches**2 // 2)
