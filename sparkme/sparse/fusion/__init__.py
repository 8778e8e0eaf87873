"""What is computed together. The forms of layers and functions ask `fused`, and know nothing else of it.

| in the network | what runs | what it saves | file | `cuda_ext` on |
|---|---|---|---|---|
| batch norm, perhaps factors for samples (drop path), `+` another map, ReLU(6) | `ops.batch_norm` | passes | norm | CPU, CUDA |
| a 1x1 convolution to at least twice as many channels, then the row above | `ops.linear_batch_norm` | memory | product | CPU |
| linear, GELU, linear, perhaps factors for channels and samples, `+` another map | `ops.mlp` | memory | mlp | CPU |
| factors for channels (layer scale), perhaps for samples, `+` another map | `ops.batch_norm` | passes | scale | CUDA |

A layer hands out a map that is still to be written. What the network does with it next becomes part of it, as long as it fits,
and the first one who reads the map has it written. Blocks run their own code and notice nothing. In the middle there may be a
dropout that drops nothing. Everything else, and whatever stands in another order, runs as it is.

On the CPU a batch norm's result is not kept for the gradient of the convolution that reads it, but computed again from the
norm's rows. On CUDA it is kept, since bandwidth is short there sooner than memory. An engine says with `fuses_norms` and
`fuses_products` what it takes part in.

Behind the encoder nothing waits, but two more things are computed together: mask tokens and SparK's projection of them
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

# What can wait for what follows it, and the further arguments and the ceilings of functions that clamp.
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
    """A layer's or a function's result, still to be written; None where it is to be computed at once.

    Args:
        x: a map that it is called with.
        name: torch's, or `convolution` with (kernel, bias, window, groups), `batch_norm` with the layer, `linear` with (weight,
            bias).
        others: the other arguments, in their order.
        kwargs: those that were named.
    """
    waiting = x.unwritten if name in _FOLLOWS else None
    longer = None if waiting is None else _followed(waiting, x, name, others, kwargs)
    if longer is None and name in _BEGIN:
        longer = _BEGIN[name](x, *others, **kwargs)
    return None if longer is None else x.replace(longer)


def _followed(
    waiting: Unwritten, x: WorkingMap, name: str, others: tuple[Any, ...], kwargs: dict[str, Any]
) -> Unwritten | None:
    """What waits, with the function at its end; None where it does not fit."""
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
