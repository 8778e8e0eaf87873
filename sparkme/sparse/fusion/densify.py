"""Mask tokens and the following convolution: all hidden pixels are equal, so most products can be skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap


def densified(x: WorkingMap, rows: Tensor, fill: Tensor, projection: nn.Module) -> Tensor:
    """A dense map of rows at visible pixels and a mask token at hidden ones, projected.

    Args:
        x: the map that the rows lie on.
        rows: (N, C).
        fill: the token (C,).
        projection: a convolution with `same` padding, or any other module on dense maps.

    Returns:
        (B, C_out, H / stride, W / stride).
    """
    if isinstance(projection, nn.Conv2d) and x.engine.fuses_products(rows.dtype, rows.device):
        return x.engine.densify_convolution(rows, x.grid, x.stride, fill, projection.weight, projection.bias)
    out: Tensor = projection(x.engine.densify(rows, x.grid, x.stride, fill))
    return out
