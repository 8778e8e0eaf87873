"""Random small networks against themselves: the sparse one on whole images has the dense one's maps, gradients and buffers.

    python tests/support/random_networks.py FIRST COUNT     # seeds FIRST to FIRST + COUNT - 1, on every engine, in both modes

What the blocks do is drawn by a seed, with what cuts graphs among it: regions without gradients, detached readers, hooks,
running means, frozen layers, operations in place, layers that are used twice.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.errors import UnsupportedLayerError
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.hierarchy import dense_features, find_hierarchy
from sparkme.sparse.sparsify import _sparse_network

ENGINES = ("cuda_ext", "minkowski", "masked-dense")
MAPS, GRADIENTS = 1e-9, 1e-7  # largest relative difference, in float64; batch norms of few pixels amplify rounding


class Linears(nn.Module):
    """The MLP of a ConvNeXt block, channels last."""

    def __init__(self, width: int, *, normed: bool, scaled: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if normed else nn.Identity()
        self.first, self.act, self.second = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5) if scaled else None

    def forward(self, x: Any) -> Any:
        x = self.second(self.act(self.first(self.norm(x.permute(0, 2, 3, 1)))))
        return (x if self.scale is None else x * self.scale).permute(0, 3, 1, 2)


class Gate(nn.Module):
    def __init__(self, width: int, *, frozen: bool) -> None:
        super().__init__()
        self.conv, self.frozen = nn.Conv2d(width, width, 1), frozen

    def forward(self, x: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            gate = torch.sigmoid(self.conv(x.mean((2, 3), keepdim=True)))
        return x * gate


def make_layer(rng: random.Random, width: int) -> nn.Module:
    """From `width` channels to as many."""
    wide = rng.choice((2, 3)) * width
    layers: list[Callable[[], nn.Module]] = [
        lambda: nn.Conv2d(width, width, 3, padding=1, bias=rng.random() < 0.5),
        lambda: nn.Conv2d(width, width, 3, padding=1, groups=width),
        lambda: nn.Conv2d(width, width, 1, bias=rng.random() < 0.5),
        lambda: nn.BatchNorm2d(width),
        lambda: nn.BatchNorm2d(width),
        lambda: nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        lambda: nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(rng.random() < 0.5), nn.Conv2d(wide, width, 1)
        ),
        lambda: Linears(width, normed=rng.random() < 0.5, scaled=rng.random() < 0.5),
        lambda: Gate(width, frozen=rng.random() < 0.3),
        lambda: nn.Dropout(0.0),
        lambda: nn.GroupNorm(1, width),
    ]
    return rng.choice(layers)()


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
}


CUTS = (
    "detached reader",
    "without gradients",
    "in place without gradients",
    "added without gradients",
    "reader in inference mode",
    "frozen branch",
    "asks for gradients",
)


class Block(nn.Module):
    """A random program over the values that it has made so far.

    Each step is (operation, numbers of values, what it does besides), drawn when the block is made.
    """

    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.register_buffer("seen", torch.zeros(width))
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.steps: list[tuple[str, int, int, str]] = []
        for number in range(1, rng.randint(4, 9)):
            kind = rng.choice(
                ("layer",) * 6
                + ("again", "add", "add", "add in place", "scale", "activation", "activation", "cut", "cut", "halves", "look")
            )
            last = number - 1
            more = ""
            if kind == "layer":
                self.layers.append(make_layer(rng, width))
                more = str(len(self.layers) - 1)
            elif kind == "again":
                kind, more = "layer", str(rng.randrange(len(self.layers))) if len(self.layers) else ""
            elif kind == "activation":
                more = rng.choice([*ACTIVATIONS])
            elif kind == "cut":
                more = rng.choice(CUTS)
            self.steps.append((kind, last if rng.random() < 0.8 else rng.randrange(number), rng.randrange(number), more))
        self._add_hooks(rng)

    def _add_hooks(self, rng: random.Random) -> None:
        for layer in self.layers:
            drawn = rng.random()
            if drawn < 0.1:
                layer.register_forward_hook(self._watch)
            elif drawn < 0.15:
                layer.register_forward_hook(lambda _m, _a, out: out.detach() + out)
            elif drawn < 0.2:
                layer.register_forward_pre_hook(lambda _m, args: (F.relu(args[0]),))
            elif drawn < 0.3:
                layer.requires_grad_(False)

    def _watch(self, module: nn.Module, args: Any, out: Any) -> None:
        self._look(out)

    @torch.no_grad()
    def _look(self, x: Any) -> None:
        self.seen.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))

    def forward(self, x: Any) -> Any:
        values = [x]
        for kind, first, second, more in self.steps:
            values.append(self._step(kind, values[first], values[second], more))
        return values[-1] + x

    def _step(self, kind: str, x: Any, y: Any, more: str) -> Any:
        if kind == "layer":
            return self.layers[int(more)](x) if more else x
        if kind == "activation":
            return ACTIVATIONS[more](x)
        if kind == "add":
            return x + y
        if kind == "add in place":
            out = x * 1.5
            out += y
            return out
        if kind == "scale":
            return x * self.scale
        if kind == "halves":
            a, b = x.chunk(2, 1)
            return torch.cat([F.relu(b), a], 1)
        if kind == "look":
            self._look(x)
            return x
        return self._cut(x, y, more)

    def _cut(self, x: Any, y: Any, more: str) -> Any:
        layer = self.layers[-1] if len(self.layers) else nn.Identity()
        if more == "detached reader":
            return x + layer(y.detach())
        if more == "asks for gradients":
            return x + y if x.requires_grad else x
        if more == "reader in inference mode":
            with torch.inference_mode():
                float(x.mean((2, 3)).sum())
            return x
        with torch.no_grad():
            if more == "in place without gradients":
                out = x
                out.mul_(0.75)
            elif more == "frozen branch":
                out = layer(F.relu(y))
            elif more == "added without gradients":
                out = x + y
            else:
                out = F.relu(x)
        return out if more == "in place without gradients" else out + x


class RandomNetwork(nn.Module):
    """Two or three stages of random blocks, and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        widths = [2 * rng.randint(2, 5) for _ in range(rng.randint(2, 3))]
        stages: list[nn.Module] = []
        for before, width in zip((3, *widths), widths):
            down = rng.choice(
                (
                    lambda a, b: [nn.Conv2d(a, b, 3, 2, 1)],
                    lambda a, b: [nn.Conv2d(a, b, 2, 2)],
                    lambda a, b: [nn.Conv2d(a, b, 1), nn.MaxPool2d(3, 2, 1)],
                    lambda a, b: [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)],
                )
            )
            blocks = [Block(rng, width) for _ in range(rng.randint(1, 2))]
            stages.append(nn.Sequential(*down(before, width), *blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 2))
        self.frozen = rng.randrange(len(widths)) if rng.random() < 0.15 else None

    def forward(self, x: Any) -> Any:
        for i, stage in enumerate(self.stages):
            context: AbstractContextManager[Any] = torch.no_grad() if i == self.frozen else nullcontext()
            with context:
                x = stage(x)
        return self.head(x)


def _gradients(maps: list[Tensor], module: nn.Module) -> dict[str, Tensor]:
    total = torch.stack([(x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).mean() for x in maps]).sum()
    if total.requires_grad:
        total.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def compare(seed: int, engines: tuple[str, ...] = ENGINES) -> str:
    """What becomes of a network, in every engine and both modes: `equal`, or `refused: ...` or `cannot be trained: ...`.

    Raises:
        AssertionError: a map, gradient or buffer differs, or a gradient is missing.
    """
    made = RandomNetwork(seed).double()
    try:
        hierarchy = find_hierarchy(copy.deepcopy(made))
        sparse = _sparse_network(copy.deepcopy(made), hierarchy)
    except (ValueError, UnsupportedLayerError) as error:
        return f"refused: {error}"
    patch = hierarchy.patch
    images = torch.randn(2, 3, 2 * patch, 3 * patch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    for training in (True, False):
        dense = copy.deepcopy(made)
        try:
            expected = dense_features(dense, hierarchy.taps, images.clone(), training=training)
            needed = _gradients(expected, dense)
        except RuntimeError as error:
            return f"cannot be trained: {error}"
        for engine in engines:
            encoder = SparseEncoder(copy.deepcopy(sparse), hierarchy).set_engine(engine).train(training)
            where = f"seed {seed}, {engine}, {'training' if training else 'eval'} mode"
            try:
                maps = encoder(images.clone(), whole)
            except NotImplementedError as error:
                return f"refused: {error}"
            for x, y in zip(maps, expected, strict=True):
                assert_close(x.dense(), y, MAPS, f"{where}: map of stride {x.stride}")
            _gradients([x.dense() for x in maps], encoder)
            compare_gradients(encoder, needed, where)
            found, buffers = encoder.dense_state_dict(), dict(dense.named_buffers())
            for name in found.keys() & buffers.keys():
                assert_close(found[name].double(), buffers[name].double(), MAPS, f"{where}: buffer {name}")
    return "equal"


def compare_gradients(encoder: SparseEncoder, needed: dict[str, Tensor], where: str) -> None:
    largest = max((float(g.norm()) for g in needed.values()), default=0.0)
    found = {}
    for parameter in encoder.parameters():
        found[id(parameter)] = parameter.grad is not None
        parameter.data = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
    for name, value in encoder.dense_state_dict().items():
        if name in needed:
            assert not value.isnan().any(), f"{where}: no gradient comes to {name}"
            assert_close(value, needed[name], GRADIENTS, f"{where}: gradient of {name}", least=1e-9 * largest)
        elif not value.isnan().all() and "running" not in name and "seen" not in name and "tracked" not in name:
            assert not value.any(), f"{where}: a gradient comes to {name}, which has none in the dense network"


def assert_close(value: Tensor, expected: Tensor, tolerance: float, what: str, *, least: float = 1e-12) -> None:
    assert value.shape == expected.shape, what
    value, expected = value.detach(), expected.detach()
    error = float((value - expected).norm())
    assert error <= tolerance * float(expected.norm()) + least, (
        f"{what} differs by {error / max(float(expected.norm()), 1e-300):.1e}"
    )


def main() -> None:
    first, count = map(int, sys.argv[1:])
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            outcome = compare(seed)
        except AssertionError as error:
            outcome = "DIFFERS"
            print(error, flush=True)
        except Exception as error:
            outcome = "CRASHES"
            print(f"seed {seed}: {type(error).__name__}: {error}"[:300], flush=True)
        outcomes[outcome[:110]] += 1
    for outcome, number in outcomes.most_common():
        print(f"{number:6,}  {outcome}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
