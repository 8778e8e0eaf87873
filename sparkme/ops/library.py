"""The operators as torch knows them: schema, shapes without data (fake), and gradients.

The kernels are registered from elsewhere: for the CPU and, but for the convolution, for CUDA by the extension
`sparkme._C` (cuda_ext/csrc), for CUDA's convolution by `sparkme.ops.triton_conv`. Call the functions of `sparkme.ops`,
which check their arguments; those here are what they, autograd and torch.compile arrive at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sparkme", "DEF")
_OPS = torch.ops.sparkme

_PATCH_GEOMETRY = "Tensor slots, Tensor patches, int pixels, int[2] kernel_size, int stride, int dilation"
for _schema in (
    f"neighbour_table({_PATCH_GEOMETRY}, bool transposed) -> Tensor",
    "sparse_conv(Tensor rows, Tensor kernel, Tensor table, Tensor? inverse, int groups) -> Tensor",
    "sparse_conv_grad_rows(Tensor grad, Tensor kernel, Tensor table, Tensor inverse, int groups) -> Tensor",
    "sparse_conv_grad_kernel(Tensor rows, Tensor grad, Tensor table, int groups) -> Tensor",
    f"depthwise_conv(Tensor rows, Tensor kernel, {_PATCH_GEOMETRY}) -> Tensor",
    f"depthwise_conv_grad_rows(Tensor grad, Tensor kernel, {_PATCH_GEOMETRY}) -> Tensor",
    f"depthwise_conv_grad_kernel(Tensor rows, Tensor grad, {_PATCH_GEOMETRY}) -> Tensor",
    "max_pool(Tensor rows, Tensor table, Tensor inverse) -> (Tensor, Tensor)",
    "max_pool_grad_rows(Tensor grad, Tensor taken, Tensor inverse) -> Tensor",
    "avg_pool(Tensor rows, Tensor table, Tensor inverse) -> Tensor",
    "voxelise(Tensor dense, Tensor slots, Tensor patches, int pixels) -> Tensor",
    "densify(Tensor rows, Tensor slots, Tensor patches, int pixels, Tensor? fill) -> Tensor",
    "linear(Tensor rows, Tensor kernel, Tensor? bias) -> Tensor",
):
    LIBRARY.define(_schema)


# Shapes, without data.


@torch.library.register_fake("sparkme::neighbour_table", lib=LIBRARY)
def _(
    slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int, dilation: int, transposed: bool
) -> Tensor:
    target = pixels if transposed else pixels // stride
    return slots.new_empty(patches.shape[0] * target**2, kernel_size[0] * kernel_size[1], dtype=torch.int32)


@torch.library.register_fake("sparkme::sparse_conv", lib=LIBRARY)
def _(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int) -> Tensor:
    return rows.new_empty(table.shape[0], kernel.shape[2])


@torch.library.register_fake("sparkme::sparse_conv_grad_rows", lib=LIBRARY)
def _(grad: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor, groups: int) -> Tensor:
    return grad.new_empty(inverse.shape[0], kernel.shape[1] * groups)


@torch.library.register_fake("sparkme::sparse_conv_grad_kernel", lib=LIBRARY)
def _(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    return grad.new_empty(table.shape[1], rows.shape[1] // groups, grad.shape[1])


@torch.library.register_fake("sparkme::depthwise_conv", lib=LIBRARY)
def _(
    rows: Tensor, kernel: Tensor, slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int,
    dilation: int,
) -> Tensor:  # fmt: skip
    return rows.new_empty(patches.shape[0] * (pixels // stride) ** 2, rows.shape[1])


@torch.library.register_fake("sparkme::depthwise_conv_grad_rows", lib=LIBRARY)
def _(
    grad: Tensor, kernel: Tensor, slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int,
    dilation: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty(patches.shape[0] * pixels**2, grad.shape[1])


@torch.library.register_fake("sparkme::depthwise_conv_grad_kernel", lib=LIBRARY)
def _(
    rows: Tensor, grad: Tensor, slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int], stride: int,
    dilation: int,
) -> Tensor:  # fmt: skip
    return rows.new_empty(kernel_size[0] * kernel_size[1], rows.shape[1])


@torch.library.register_fake("sparkme::max_pool", lib=LIBRARY)
def _(rows: Tensor, table: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    out = rows.new_empty(table.shape[0], rows.shape[1])
    return out, torch.empty_like(out, dtype=torch.uint8)


@torch.library.register_fake("sparkme::max_pool_grad_rows", lib=LIBRARY)
def _(grad: Tensor, taken: Tensor, inverse: Tensor) -> Tensor:
    return grad.new_empty(inverse.shape[0], grad.shape[1])


@torch.library.register_fake("sparkme::avg_pool", lib=LIBRARY)
def _(rows: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return rows.new_empty(table.shape[0], rows.shape[1])


@torch.library.register_fake("sparkme::voxelise", lib=LIBRARY)
def _(dense: Tensor, slots: Tensor, patches: Tensor, pixels: int) -> Tensor:
    return dense.new_empty(patches.shape[0] * pixels**2, dense.shape[1])


@torch.library.register_fake("sparkme::densify", lib=LIBRARY)
def _(rows: Tensor, slots: Tensor, patches: Tensor, pixels: int, fill: Tensor | None) -> Tensor:
    batch, f_h, f_w = slots.shape
    return rows.new_empty(batch, f_h * pixels, f_w * pixels, rows.shape[1]).permute(0, 3, 1, 2)


@torch.library.register_fake("sparkme::linear", lib=LIBRARY)
def _(rows: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], kernel.shape[1])


# Gradients.


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, kernel, table, inverse = ctx.saved_tensors
    need_rows, need_kernel, *_ = ctx.needs_input_grad
    grad_rows = _OPS.sparse_conv_grad_rows(grad, kernel, table, inverse, ctx.groups) if need_rows else None
    grad_kernel = _OPS.sparse_conv_grad_kernel(rows, grad, table, ctx.groups) if need_kernel else None
    return grad_rows, grad_kernel, None, None, None


def _save_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, kernel, slots, patches, *ctx.geometry = inputs
    ctx.save_for_backward(rows, kernel, slots, patches)


def _depthwise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, kernel, slots, patches = ctx.saved_tensors
    need_rows, need_kernel, *_ = ctx.needs_input_grad
    sites = slots, patches, *ctx.geometry
    grad_rows = _OPS.depthwise_conv_grad_rows(grad, kernel, *sites) if need_rows else None
    grad_kernel = _OPS.depthwise_conv_grad_kernel(rows, grad, *sites) if need_kernel else None
    return grad_rows, grad_kernel, *(None,) * 6


def _save_max_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[2])


def _max_pool_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _OPS.max_pool_grad_rows(grad, *ctx.saved_tensors), None, None


def _save_avg_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _avg_pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, inverse = ctx.saved_tensors
    return _OPS.avg_pool(grad, inverse, table), None, None


def _save_voxelise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, patches, ctx.pixels = inputs
    ctx.save_for_backward(slots, patches)


def _voxelise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slots, patches = ctx.saved_tensors
    return _OPS.densify(grad, slots, patches, ctx.pixels, None), None, None, None


def _save_densify(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, patches, ctx.pixels, fill = inputs
    ctx.fill_dtype = None if fill is None else fill.dtype
    ctx.save_for_backward(slots, patches)


def _densify_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slots, patches = ctx.saved_tensors
    need_rows, *_, need_fill = ctx.needs_input_grad
    grad_rows = _OPS.voxelise(grad, slots, patches, ctx.pixels) if need_rows or need_fill else None
    grad_fill = None
    if need_fill and grad_rows is not None:  # of all pixels, less the visible ones
        wide = torch.promote_types(grad.dtype, torch.float32)
        pixels = grad.permute(0, 2, 3, 1).flatten(0, 2)
        grad_fill = (pixels.sum(0, dtype=wide) - grad_rows.sum(0, dtype=wide)).to(ctx.fill_dtype)
    return grad_rows if need_rows else None, None, None, None, grad_fill


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, kernel = ctx.saved_tensors
    need_rows, need_kernel, need_bias = ctx.needs_input_grad
    grad_rows = _OPS.linear(grad, kernel.t(), None) if need_rows else None
    grad_kernel = None
    if need_kernel:
        # A product with fewer rows than columns is up to twice as fast as its transpose (oneDNN, measured); but a transposed
        # gradient has to be copied, which costs as much where there are few rows.
        wide = rows.shape[1] <= grad.shape[1] or rows.shape[0] < rows.shape[1]
        grad_kernel = _OPS.linear(rows.t(), grad, None) if wide else _OPS.linear(grad.t(), rows, None).t()
    return grad_rows, grad_kernel, grad.sum(0) if need_bias else None


for _name, _backward, _save in (
    ("sparse_conv", _conv_backward, _save_conv),
    ("depthwise_conv", _depthwise_backward, _save_depthwise),
    ("max_pool", _max_pool_backward, _save_max_pool),
    ("avg_pool", _avg_pool_backward, _save_avg_pool),
    ("voxelise", _voxelise_backward, _save_voxelise),
    ("densify", _densify_backward, _save_densify),
    ("linear", _linear_backward, _save_linear),
):
    torch.library.register_autograd(f"sparkme::{_name}", _backward, setup_context=_save, lib=LIBRARY)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("sparkme's operators can be differentiated once, not twice")


for _name in (
    "sparse_conv_grad_rows", "sparse_conv_grad_kernel", "depthwise_conv_grad_rows", "depthwise_conv_grad_kernel",
    "max_pool_grad_rows",
):  # fmt: skip
    torch.library.register_autograd(f"sparkme::{_name}", _refuse, lib=LIBRARY)
