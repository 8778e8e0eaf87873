"""Registers operators with torch, and checks their arguments.

Schemas and shapes are in Python. The CPU and CUDA kernels and the gradients are registered by the extension `sparkme._C`
(cuda_ext/csrc), CUDA's convolution by `sparkme.ops.convolution`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Shapes = TypeVar("Shapes", bound=Callable[..., Any])

LIBRARY = torch.library.Library("sparkme", "DEF")
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


def define(*mutates: str) -> Callable[[Shapes], Shapes]:
    """Defines the operator `torch.ops.sparkme.NAME` by a function `_NAME`: its annotations are the schema, and it is the fake
    implementation, which gives shapes and dtypes of the results. `mutates` names arguments that change in place."""

    def decorate(shapes: Shapes) -> Shapes:
        name = shapes.__name__.removeprefix("_")
        # The kernels take plain integers, so torch.compile must not keep them symbolic.
        LIBRARY.define(name + torch.library.infer_schema(shapes, mutates_args=mutates).replace("SymInt", "int"))
        torch.library.register_fake(f"sparkme::{name}", shapes, lib=LIBRARY)
        return shapes

    return decorate


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over rows and of numbers per channel."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32 or bfloat16, got {value.dtype}")


def check_rows(name: str, value: Tensor) -> None:
    check_float(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name} must be (N, C), got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, the rest on {other.device}")


def check_same(name: str, value: Tensor, rows: Tensor) -> None:
    if value.dtype != rows.dtype:
        raise ValueError(f"{name} is {value.dtype}, rows are {rows.dtype}")
    check_device(name, value, rows)


def check_channels(name: str, value: Tensor | None, channels: int, rows: Tensor, *, same: bool = False) -> None:
    """Checks that `value` is None or one number per channel, on the rows' device, and with `same` of the rows' dtype."""
    if value is None:
        return
    if value.shape != (channels,):
        raise ValueError(f"{name} must be ({channels},), got {tuple(value.shape)}")
    (check_same if same else check_device)(name, value, rows)


def check_sites(slots: Tensor, patches: Tensor) -> None:
    for name, value, ndim in (("slots", slots, 3), ("patches", patches, 1)):
        if value.dtype != torch.int32 or value.ndim != ndim:
            raise ValueError(f"{name} must be int32 with {ndim} dimensions, got {value.dtype} {tuple(value.shape)}")
    check_device("patches", patches, slots)


def check_patches(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> None:
    """Checks that `rows` belong to the visible patches."""
    check_rows("rows", rows)
    check_sites(slots, patches)
    check_device("slots", slots, rows)
    if pixels < 1 or len(rows) != len(patches) * pixels**2:
        raise ValueError(f"rows must be {len(patches)} patches x {pixels}^2 pixels, got {len(rows)}")


def check_tables(rows: Tensor, table: Tensor, inverse: Tensor | None) -> None:
    check_rows("rows", rows)
    for name, value in (("table", table), ("inverse", inverse)):
        if value is None:
            continue
        if value.dtype != torch.int32 or value.ndim != 2:
            raise ValueError(f"{name} must be (N, K) int32, got {value.dtype} {tuple(value.shape)}")
        check_device(name, value, rows)
    if inverse is not None and inverse.shape != (len(rows), table.shape[1]):
        raise ValueError(f"inverse must be ({len(rows)}, {table.shape[1]}), got {tuple(inverse.shape)}")
