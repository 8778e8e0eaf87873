"""Linear layers, alone, fused with a batch norm, and as the MLP of a ConvNeXt block."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.ops.library import check_channels, check_rows, check_same, define, sum_type
from sparkme.ops.norm import batch_norm_reference, batch_statistics_reference, check_norm, follow

__all__ = [
    "ProductStatistics",
    "linear",
    "linear_batch_norm",
    "linear_batch_norm_reference",
    "linear_reference",
    "mlp",
    "mlp_reference",
    "product_statistics",
    "product_statistics_reference",
]


@define()
def _linear(rows: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], kernel.shape[1])


@define()
def _product_statistics(rows: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inside, outside = kernel.shape
    like = rows.new_empty(0, dtype=sum_type(rows.dtype))
    return like.new_empty(inside), like.new_empty(inside, inside), like.new_empty(outside), like.new_empty(outside)


@define()
def _linear_batch_norm(
    rows: Tensor,
    kernel: Tensor,
    row_mean: Tensor,
    gram: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    ceiling: float | None,
) -> Tensor:
    return rows.new_empty(rows.shape[0], kernel.shape[1])


@define()
def _linear_batch_norm_grad(
    grad: Tensor,
    rows: Tensor,
    kernel: Tensor,
    out: Tensor | None,
    row_mean: Tensor,
    gram: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    factor: Tensor | None,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = rows.new_empty(2, kernel.shape[1], dtype=sum_type(rows.dtype))
    return rows.new_empty(rows.shape), kernel.new_empty(kernel.shape), sums, grad.new_empty(0 if out is None else grad.shape)


@define()
def _mlp(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0], weight2.shape[0]), rows.new_empty(rows.shape[0], weight1.shape[0])


@define()
def _mlp_grad(
    grad: Tensor,
    rows: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape),
        weight1.new_empty(weight1.shape),
        weight1.new_empty(weight1.shape[0]),
        weight2.new_empty(weight2.shape),
        weight2.new_empty(weight2.shape[0]),
        rows.new_empty(0, dtype=sum_type(rows.dtype)) if scale is None else scale.new_empty(scale.shape),
    )


def linear(rows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, C_in) rows times a (C_in, C_out) kernel, plus (C_out,): the 1x1 convolution, by the device's fastest GEMM."""
    check_rows("rows", rows)
    _check_kernel(rows, kernel)
    check_channels("bias", bias, kernel.shape[1], rows, same=True)
    return torch.ops.sparkme.linear(rows, kernel, bias)


class ProductStatistics(NamedTuple):
    """Statistics of x = rows @ kernel, see `product_statistics`."""

    row_mean: Tensor
    gram: Tensor
    mean: Tensor
    variance: Tensor


def product_statistics(rows: Tensor, kernel: Tensor) -> ProductStatistics:
    """Mean and (biased) variance of each channel of x = rows @ kernel, from the rows' means and Gram matrix.

    Args:
        rows: (N, K).
        kernel: (K, C).

    Returns:
        The rows' mean (K,) and Gram matrix (K, K), the sum of (row - mean)' (row - mean), and x's mean and variance (C,), in
        float32 or, for float64 rows, float64. They are for `linear_batch_norm` and have no gradient.
    """
    check_rows("rows", rows)
    if rows.dtype == torch.bfloat16:
        raise ValueError("rows must be float64 or float32, since products rounded to bfloat16 have other statistics")
    _check_kernel(rows, kernel)
    return ProductStatistics(*torch.ops.sparkme.product_statistics(rows.detach(), kernel.detach()))


def linear_batch_norm(
    rows: Tensor,
    kernel: Tensor,
    statistics: ProductStatistics,
    epsilon: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    ceiling: float | None = None,
) -> Tensor:
    """`batch_norm` of rows @ kernel in training mode, without ever storing the product; for kernels with more columns than
    rows. Autograd keeps the rows and, with a ceiling, the result.

    Args:
        rows: (N, K).
        kernel: (K, C).
        statistics: `product_statistics` of both.
        epsilon: of the variance.
        weight, bias, factor, residual, ceiling: as for `batch_norm`.

    Returns:
        (N, C).
    """
    check_rows("rows", rows)
    _check_kernel(rows, kernel)
    row_mean, gram, mean, variance = statistics
    check_norm(rows, kernel.shape[1], {"mean": mean, "weight": weight, "bias": bias}, factor, residual)
    deviation = (variance + epsilon).rsqrt()
    return torch.ops.sparkme.linear_batch_norm(
        rows, kernel, row_mean, gram, mean, deviation, weight, bias, factor, residual, ceiling
    )


def mlp(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    scale: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """factor * scale * (gelu(rows @ weight1' + bias1) @ weight2' + bias2) + residual. Autograd keeps only the first layer's
    result of those in between.

    Args:
        rows: (N, C).
        weight1, bias1: (H, C) and (H,) or None, as in torch.nn.Linear.
        weight2, bias2: (C_out, H) and (C_out,) or None.
        scale: (C_out,) or None, of any floating type.
        factor, residual: as for `batch_norm`.

    Returns:
        (N, C_out).
    """
    check_rows("rows", rows)
    for name, weight, inside in (("weight1", weight1, rows.shape[1]), ("weight2", weight2, len(weight1))):
        if weight.ndim != 2 or weight.shape[1] != inside:
            raise ValueError(f"{name} must be (channels, {inside}), got {tuple(weight.shape)}")
        check_same(name, weight, rows)
    check_channels("bias1", bias1, len(weight1), rows, same=True)
    check_channels("bias2", bias2, len(weight2), rows, same=True)
    check_norm(rows, len(weight2), {"scale": scale}, factor, residual)
    return torch.ops.sparkme.mlp(rows, weight1, bias1, weight2, bias2, scale, factor, residual)[0]


def _check_kernel(rows: Tensor, kernel: Tensor) -> None:
    if kernel.ndim != 2 or kernel.shape[0] != rows.shape[1]:
        raise ValueError(f"kernel must be ({rows.shape[1]}, C_out), got {tuple(kernel.shape)}")
    check_same("kernel", kernel, rows)


def linear_reference(rows: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ kernel if bias is None else rows @ kernel + bias


def product_statistics_reference(rows: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
    mean = rows.mean(0)
    return mean, (rows - mean).t() @ (rows - mean), *batch_statistics_reference(rows @ kernel)


def linear_batch_norm_reference(
    rows: Tensor,
    kernel: Tensor,
    row_mean: Tensor,
    gram: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    ceiling: float | None,
) -> Tensor:
    return batch_norm_reference(rows @ kernel, mean, inverse_deviation, weight, bias, factor, residual, ceiling, True)


def mlp_reference(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    hidden = F.linear(rows, weight1, bias1)
    out = F.linear(F.gelu(hidden), weight2, bias2)
    return follow(out if scale is None else out * scale, factor, residual), hidden
