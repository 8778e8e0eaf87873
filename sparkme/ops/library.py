"""The operators as torch knows them: schema, and shapes without data (fake).

The kernels are registered from elsewhere: for the CPU and, but for the convolution, for CUDA by the extension
`sparkme._C` (cuda_ext/csrc), for CUDA's convolution by `sparkme.ops.triton_conv`. So are the gradients, by autograd.cpp. Call
the functions of `sparkme.ops`, which check their arguments; those here are what they, autograd and torch.compile arrive at.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sparkme", "DEF")

_PATCH_GEOMETRY = "Tensor slots, Tensor patches, int pixels, int[2] kernel_size, int stride, int dilation"
_NORM = "Tensor mean, Tensor inverse_deviation, Tensor? weight, Tensor? bias"
for _schema in (
    f"neighbour_table({_PATCH_GEOMETRY}, bool transposed) -> Tensor",
    "sparse_conv(Tensor rows, Tensor kernel, Tensor table, Tensor? inverse, int groups) -> Tensor",
    "sparse_conv_grad_rows(Tensor grad, Tensor kernel, Tensor table, Tensor inverse, int groups) -> Tensor",
    "sparse_conv_grad_kernel(Tensor rows, Tensor grad, Tensor table, int groups) -> Tensor",
    f"depthwise_conv(Tensor rows, Tensor kernel, Tensor? bias, {_PATCH_GEOMETRY}) -> Tensor",
    f"depthwise_conv_grad_rows(Tensor grad, Tensor kernel, {_PATCH_GEOMETRY}) -> Tensor",
    f"depthwise_conv_grad_kernel(Tensor rows, Tensor grad, {_PATCH_GEOMETRY}) -> Tensor",
    "max_pool(Tensor rows, Tensor table, Tensor inverse) -> (Tensor, Tensor)",
    "max_pool_grad_rows(Tensor grad, Tensor taken, Tensor inverse) -> Tensor",
    "avg_pool(Tensor rows, Tensor table, Tensor inverse) -> Tensor",
    "voxelise(Tensor dense, Tensor slots, Tensor patches, int pixels) -> Tensor",
    "densify(Tensor rows, Tensor slots, Tensor patches, int pixels, Tensor? fill) -> Tensor",
    "linear(Tensor rows, Tensor kernel, Tensor? bias) -> Tensor",
    "batch_statistics(Tensor rows) -> (Tensor, Tensor)",
    "norm_statistics(Tensor rows, float epsilon, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) -> "
    "(Tensor, Tensor)",
    f"batch_norm(Tensor rows, {_NORM}, Tensor? factor, Tensor? residual, float? ceiling, bool training) -> Tensor",
    f"batch_norm_grad_sums(Tensor grad, Tensor rows, Tensor? out, {_NORM}, Tensor? factor, float? ceiling) -> (Tensor, Tensor)",
    f"batch_norm_grad_rows(Tensor grad, Tensor rows, {_NORM}, Tensor? factor, float? ceiling, Tensor? sums, "
    "float? count) -> Tensor",
    "product_statistics(Tensor rows, Tensor kernel) -> (Tensor, Tensor, Tensor, Tensor)",
    f"linear_batch_norm(Tensor rows, Tensor kernel, Tensor row_mean, Tensor gram, {_NORM}, Tensor? factor, Tensor? residual, "
    "float? ceiling) -> Tensor",
    "linear_batch_norm_grad(Tensor grad, Tensor rows, Tensor kernel, Tensor? out, Tensor row_mean, Tensor gram, Tensor mean, "
    "Tensor inverse_deviation, Tensor? weight, Tensor? factor, float? ceiling) -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm(Tensor rows, Tensor? weight, Tensor? bias, float epsilon) -> (Tensor, Tensor)",
    "layer_norm_grad(Tensor grad, Tensor rows, Tensor statistics, Tensor? weight) -> (Tensor, Tensor)",
    "mlp(Tensor rows, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? scale, Tensor? factor, "
    "Tensor? residual) -> (Tensor, Tensor)",
    "mlp_grad(Tensor grad, Tensor rows, Tensor hidden, Tensor weight1, Tensor weight2, Tensor? bias2, Tensor? scale, "
    "Tensor? factor) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    LIBRARY.define(_schema)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """In which sums over rows of a type are kept, and numbers per channel."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    rows: Tensor, kernel: Tensor, bias: Tensor | None, slots: Tensor, patches: Tensor, pixels: int, kernel_size: list[int],
    stride: int, dilation: int,
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


@torch.library.register_fake("sparkme::batch_statistics", lib=LIBRARY)
def _(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.new_empty(rows.shape[1], dtype=sum_type(rows.dtype))
    return mean, torch.empty_like(mean)


@torch.library.register_fake("sparkme::norm_statistics", lib=LIBRARY)
def _(
    rows: Tensor, epsilon: float, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    like = rows.new_empty(0, dtype=sum_type(rows.dtype))
    return like.new_empty(rows.shape[1]), like.new_empty(rows.shape[1])


@torch.library.register_fake("sparkme::batch_norm", lib=LIBRARY)
def _(
    rows: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Tensor | None,
    residual: Tensor | None, ceiling: float | None, training: bool,
) -> Tensor:  # fmt: skip
    return rows.new_empty(rows.shape)


@torch.library.register_fake("sparkme::batch_norm_grad_sums", lib=LIBRARY)
def _(
    grad: Tensor, rows: Tensor, out: Tensor | None, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None,
    bias: Tensor | None, factor: Tensor | None, ceiling: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = rows.new_empty(2, rows.shape[1], dtype=sum_type(rows.dtype))
    return grad.new_empty(0 if out is None else grad.shape), sums


@torch.library.register_fake("sparkme::batch_norm_grad_rows", lib=LIBRARY)
def _(
    grad: Tensor, rows: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None, bias: Tensor | None,
    factor: Tensor | None, ceiling: float | None, sums: Tensor | None, count: float | None,
) -> Tensor:  # fmt: skip
    return rows.new_empty(rows.shape)


@torch.library.register_fake("sparkme::product_statistics", lib=LIBRARY)
def _(rows: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inside, outside = kernel.shape
    like = rows.new_empty(0, dtype=sum_type(rows.dtype))
    return like.new_empty(inside), like.new_empty(inside, inside), like.new_empty(outside), like.new_empty(outside)


@torch.library.register_fake("sparkme::linear_batch_norm", lib=LIBRARY)
def _(
    rows: Tensor, kernel: Tensor, row_mean: Tensor, gram: Tensor, mean: Tensor, inverse_deviation: Tensor,
    weight: Tensor | None, bias: Tensor | None, factor: Tensor | None, residual: Tensor | None, ceiling: float | None,
) -> Tensor:  # fmt: skip
    return rows.new_empty(rows.shape[0], kernel.shape[1])


@torch.library.register_fake("sparkme::linear_batch_norm_grad", lib=LIBRARY)
def _(
    grad: Tensor, rows: Tensor, kernel: Tensor, out: Tensor | None, row_mean: Tensor, gram: Tensor, mean: Tensor,
    inverse_deviation: Tensor, weight: Tensor | None, factor: Tensor | None,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sums = rows.new_empty(2, kernel.shape[1], dtype=sum_type(rows.dtype))
    return rows.new_empty(rows.shape), kernel.new_empty(kernel.shape), sums, grad.new_empty(0 if out is None else grad.shape)


@torch.library.register_fake("sparkme::layer_norm", lib=LIBRARY)
def _(rows: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[0], 2, dtype=sum_type(rows.dtype))


@torch.library.register_fake("sparkme::layer_norm_grad", lib=LIBRARY)
def _(grad: Tensor, rows: Tensor, statistics: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(2, rows.shape[1], dtype=sum_type(rows.dtype))


@torch.library.register_fake("sparkme::mlp", lib=LIBRARY)
def _(
    rows: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, scale: Tensor | None,
    factor: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return rows.new_empty(rows.shape[0], weight2.shape[0]), rows.new_empty(rows.shape[0], weight1.shape[0])


@torch.library.register_fake("sparkme::mlp_grad", lib=LIBRARY)
def _(
    grad: Tensor, rows: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, bias2: Tensor | None, scale: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    biases = weight1.new_empty(weight1.shape[0]), weight2.new_empty(weight2.shape[0])
    none = rows.new_empty(0, dtype=sum_type(rows.dtype))
    return (
        rows.new_empty(rows.shape), weight1.new_empty(weight1.shape), biases[0], weight2.new_empty(weight2.shape), biases[1],
        none if scale is None else scale.new_empty(scale.shape),
    )  # fmt: skip
