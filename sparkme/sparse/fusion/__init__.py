"""Fusion of operations. Forms of layers and functions call `fused` and know nothing else of it.

| in the network | what runs | what it saves | file | `cuda_ext` on |
|---|---|---|---|---|
| batch norm, optional factor per sample (drop path), `+` another map, ReLU(6) | `ops.batch_norm` | passes | norm | CPU, CUDA |
| a 1x1 convolution to at least twice as many channels, then the row above | `ops.linear_batch_norm` | memory | product | CPU |
| linear, GELU, linear, optional factors per channel and sample, `+` another map | `ops.mlp` | memory | mlp | CPU |
| factor per channel (layer scale), optional factor per sample, `+` another map | `ops.batch_norm` | passes | scale | CUDA |

A layer returns a map that is not computed yet. The network's next operations join it as long as they fit, and the first reader
of the map has it computed. Blocks run their own code and notice nothing. A dropout that drops nothing may stand in between.
Other operations, and other orders, run one by one.

On the CPU, a batch norm's result is not stored for the gradient of the next convolution, but recomputed from the norm's input.
On CUDA it is stored, since bandwidth is scarcer there than memory. An engine says with `fuses_norms` and `fuses_products` which
fusions it supports.

After the encoder nothing waits, but two more pairs are computed together: mask tokens and SparK's projection of them
(`densified`, on the CPU), and the decoder's batch norms with ReLU6 (`sparkme.sparse.batch_norm.BatchNorm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparkme.sparse.fusion import mlp, norm, product, scale
from sparkme.sparse.fusion.densify import densified
from sparkme.sparse.fusion.waiting import Unwritten

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap

__all__ = ["Unwritten", "densified", "fused"]

# Operations that later ones can join; and for functions that clamp, their further arguments and their ceilings.
_BEGIN: dict[str, Callable[..., Unwritten | None]] = {
    "convolution": product.begin,
    "batch_norm": norm.begin,
    "linear": mlp.begin,
    "mul": scale.begin,
    "multiply": scale.begin,
}
_CLAMPS: dict[str, tuple[tuple[float, ...], float]] = {
    "relu": ((), math.inf), "relu6": ((), 6.0), "hardtanh": ((0.0, 6.0), 6.0),
}  # fmt: skip
_FOLLOWS = {*_CLAMPS, "gelu", "add", "mul", "multiply", "linear", "batch_norm"}


def fused(x: WorkingMap, name: str, *others: Any, **kwargs: Any) -> WorkingMap | None:
    """The result of a layer or function, to be computed later; None if it must be computed now.

    Args:
        x: a map among the arguments.
        name: torch's name, or `convolution` with (kernel, bias, window, groups), `batch_norm` with the layer, `linear` with
            (weight, bias).
        others, kwargs: the other arguments.
    """
    waiting = x.unwritten if name in _FOLLOWS else None
    longer = None if waiting is None else _followed(waiting, x, name, others, kwargs)
    if longer is None and name in _BEGIN:
        longer = _BEGIN[name](x, *others, **kwargs)
    return None if longer is None else x.replace(longer)


def _followed(
    waiting: Unwritten, x: WorkingMap, name: str, others: tuple[Any, ...], kwargs: dict[str, Any]
) -> Unwritten | None:
    """The waiting result with the function appended; None if it does not fit."""
    if name in _CLAMPS:
        arguments, ceiling = _CLAMPS[name]
        return waiting.clamp(ceiling) if (*others, *kwargs.values()) == arguments else None
    if name == "gelu":
        return waiting.gelu() if not others and kwargs.get("approximate", "none") == "none" else None
    if name == "batch_norm":
        return waiting.batch_norm(*others)
    if name == "linear":
        return waiting.linear(*others)
    if len(others) != 1 or kwargs:
        return None
    is_map = type(others[0]) is type(x)
    if name == "add":
        return waiting.plus(x.operand(others[0]).data) if is_map else None
    is_factor = not is_map and isinstance(others[0], Tensor) and others[0].ndim > 0
    return waiting.times(x.operand(others[0])) if is_factor else None
