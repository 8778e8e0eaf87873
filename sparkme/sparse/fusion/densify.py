"""Mask tokens and the convolution behind them: all hidden pixels hold the same, so most products need not be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap


def densified(x: WorkingMap, rows: Tensor, fill: Tensor, projection: nn.Module) -> Tensor:
    """Rows of visible pixels with a mask token at hidden ones, projected.

    Args:
        x: the map that the rows lie on.
        rows: (N, C).
        fill: (C,), the token.
        projection: a convolution that keeps the size, or any other module of dense maps.

    Returns:
        (B, C_out, H / stride, W / stride).
    """
    if isinstance(projection, nn.Conv2d) and x.engine.fuses_products(rows.dtype, rows.device):
        return x.engine.densify_convolution(rows, x.grid, x.stride, fill, projection.weight, projection.bias)
    out: Tensor = projection(x.engine.densify(rows, x.grid, x.stride, fill))
    return out
