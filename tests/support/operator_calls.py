"""A call of every operator, for the tests that all of them share: on the CPU, on a GPU, and of CUDA's kernels on the host."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from torch import Tensor

from sparkme import Grid, ops

# What a gradient is checked of numerically. Not linear_batch_norm, whose statistics have to be those of its rows.
DIFFERENTIABLE = (
    "sparse_conv",
    "depthwise_conv",
    "max_pool",
    "avg_pool",
    "voxelise",
    "densify",
    "linear",
    "batch_norm",
    "layer_norm",
    "mlp",
)
# Arguments that have no entry left where there are no rows.
_OF_ROWS = {"rows", "grad", "dense", "out", "residual", "hidden", "table", "inverse", "taken", "slots", "patches", "statistics"}


def calls(dtype: torch.dtype = torch.float64, device: str = "cpu", channels: int = 4) -> dict[str, tuple[Any, ...]]:
    """The arguments of `torch.ops.sparkme.NAME` by NAME, seeded. Those that can have a gradient require one."""
    generator = torch.Generator().manual_seed(0)
    grid = Grid(oracle.random_active(2, (2, 3), 3, seed=3), 32)
    sites = grid.slots.to(device), grid.patches.to(device), 4
    window = [3, 3], 2, 1
    table, inverse = (ops.neighbour_table(*sites, (3, 3), stride=2, transposed=t) for t in (False, True))
    n, n_out, c = len(inverse), len(table), channels

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    def numbers(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.5).to(device, torch.promote_types(dtype, torch.float32))

    def norm(width: int) -> tuple[Tensor, ...]:
        """Mean, inverse deviation, weight, bias."""
        return numbers(width), numbers(width), random(width), random(width)

    rows, like, wide, factor = random(n, c), random(n, c), random(n, 2 * c), numbers(2)
    product = numbers(c), numbers(c, c)  # mean and Gram matrix of the rows
    mlp = random(4 * c, c), random(4 * c), random(c + 1, 4 * c), random(c + 1), random(c + 1)
    kernel, out = random(9, c // 2, 3 * c // 2), random(n_out, 3 * c // 2)  # of two groups
    taken = torch.ops.sparkme.max_pool(rows.detach(), table, inverse)[1]
    inf = float("inf")
    return {
        "neighbour_table": (*sites, *window, False),
        "sparse_conv": (rows, kernel, table, inverse, 2),
        "sparse_conv_grad_rows": (out, kernel, table, inverse, 2),
        "sparse_conv_grad_kernel": (rows, out, table, 2),
        "depthwise_conv": (rows, random(9, c), random(c), *sites, *window),
        "depthwise_conv_grad_rows": (random(n_out, c), random(9, c), *sites, *window),
        "depthwise_conv_grad_kernel": (rows, random(n_out, c), *sites, *window),
        "max_pool": (rows, table, inverse),
        "max_pool_grad_rows": (random(n_out, c), taken, inverse),
        "avg_pool": (rows, table, inverse),
        "voxelise": (random(2, c, 8, 12), *sites),
        "densify": (rows, *sites, random(c)),
        "linear": (rows, random(c, c + 1), random(c + 1)),
        "batch_statistics": (rows,),
        "norm_statistics": (rows, 1e-5, numbers(c), numbers(c), 0.1),
        "batch_norm": (rows, *norm(c), factor, like, inf, False),
        "batch_norm_grad_sums": (random(n, c), rows, like, *norm(c), factor, inf),
        "batch_norm_grad_rows": (random(n, c), rows, *norm(c), factor, 1.0, numbers(2, c), 7.0),
        "product_statistics": (rows, random(c, 2 * c)),
        "linear_batch_norm": (rows, random(c, 2 * c), *product, *norm(2 * c), factor, wide, inf),
        "linear_batch_norm_grad": (random(n, 2 * c), rows, random(c, 2 * c), wide, *product, *norm(2 * c)[:3], factor, inf),
        "layer_norm": (rows, random(c), random(c), 1e-6),
        "layer_norm_grad": (random(n, c), rows, numbers(n, 2), random(c)),
        "mlp": (rows, *mlp, factor, random(n, c + 1)),
        "mlp_grad": (random(n, c + 1), rows, random(n, 4 * c), mlp[0], *mlp[2:], factor),
    }


NAMES = tuple(calls()) if not ops.unavailable(on_gpu=False) else ()


def overload(name: str) -> Any:
    return getattr(torch.ops.sparkme, name).default


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def without_rows(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [argument.name for argument in overload(name)._schema.arguments]
    pairs = zip(names, detached(arguments), strict=True)
    return tuple(a[:0] if isinstance(a, Tensor) and n in _OF_ROWS else a for n, a in pairs)


def results(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operator gives, as a tuple."""
    return value if isinstance(value, tuple) else (value,)
