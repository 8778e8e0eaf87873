"""Pooling over a neighbour table."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparkme.ops.library import check_tables, define
from sparkme.ops.patches import gather

__all__ = ["Pooling", "avg_pool", "avg_pool_reference", "max_pool", "max_pool_reference"]

Pooling = Callable[[Tensor, Tensor, Tensor], Tensor]


@define()
def _max_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    out = rows.new_empty(table.shape[0], rows.shape[1])
    return out, torch.empty_like(out, dtype=torch.uint8)


@define()
def _max_pool_grad_rows(grad: Tensor, taken: Tensor, inverse: Tensor) -> Tensor:
    return grad.new_empty(inverse.shape[0], grad.shape[1])


@define()
def _avg_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return rows.new_empty(table.shape[0], rows.shape[1])


def max_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """Maximum over the visible neighbours, (N_out, C); tables as for `sparse_conv`. NaN is larger than everything."""
    check_tables(rows, table, inverse)
    if table.shape[1] > 255:
        raise ValueError(f"table has {table.shape[1]} offsets; at most 255 can be pooled")
    return torch.ops.sparkme.max_pool(rows, table, inverse)[0]


def avg_pool(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """Sum over the visible neighbours divided by the number of offsets, (N_out, C), as in masked dense pooling; tables as for
    `sparse_conv`."""
    check_tables(rows, table, inverse)
    return torch.ops.sparkme.avg_pool(rows, table, inverse)


def max_pool_reference(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return gather(rows, table).masked_fill((table < 0).unsqueeze(2), float("-inf")).max(1).values


def avg_pool_reference(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return gather(rows, table).sum(1) / table.shape[1]
