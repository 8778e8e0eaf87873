"""Batch norm and layer norm of rows."""

import torch
from torch import Tensor

from sparkme.ops.library import check_channels, check_device, check_rows, check_same, define, sum_type

__all__ = [
    "batch_norm",
    "batch_norm_reference",
    "batch_statistics",
    "batch_statistics_reference",
    "layer_norm",
    "layer_norm_reference",
    "norm_statistics",
    "norm_statistics_reference",
]


@define()
def _batch_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.new_empty(rows.shape[1], dtype=sum_type(rows.dtype))
    return mean, torch.empty_like(mean)


@define("running_mean", "running_var")
def _norm_statistics(
    rows: Tensor, epsilon: float, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    return _batch_statistics(rows)


@define()
def _batch_norm(
    rows: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    ceiling: float | None,
    training: bool,
) -> Tensor:
    return rows.new_empty(rows.shape)


@define()
def _batch_norm_grad_sums(
    grad: Tensor,
    rows: Tensor,
    out: Tensor | None,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    ceiling: float | None,
) -> tuple[Tensor, Tensor]:
    sums = rows.new_empty(2, rows.shape[1], dtype=sum_type(rows.dtype))
    return grad.new_empty(0 if out is None else grad.shape), sums


@define()
def _batch_norm_grad_rows(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    ceiling: float | None,
    sums: Tensor | None,
    count: float | None,
) -> Tensor:
    return rows.new_empty(rows.shape)


@define()
def _layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[0], 2, dtype=sum_type(rows.dtype))


@define()
def _layer_norm_grad(grad: Tensor, rows: Tensor, statistics: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(2, rows.shape[1], dtype=sum_type(rows.dtype))


def batch_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of (N, C) rows: two (C,), float32 or, for float64 rows, float64. They are for
    `batch_norm`, whose gradient accounts for them, and have no gradient."""
    check_rows("rows", rows)
    mean, variance = torch.ops.sparkme.batch_statistics(rows.detach())
    return mean, variance


def norm_statistics(
    rows: Tensor, epsilon: float, running_mean: Tensor | None = None, running_var: Tensor | None = None, momentum: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + epsilon) of (N, C) rows, for `batch_norm`; zeros for zero rows.

    Args:
        rows: (N, C).
        epsilon: added to the (biased) variance.
        running_mean, running_var: (C,), updated in place with mean and unbiased variance by `momentum`; or None.
        momentum: in [0, 1].
    """
    check_rows("rows", rows)
    mean, deviation = torch.ops.sparkme.norm_statistics(rows.detach(), epsilon, running_mean, running_var, momentum)
    return mean, deviation


def batch_norm(
    rows: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    ceiling: float | None = None,
) -> Tensor:
    """Batch norm fused with the rest of a residual block: factor * (weight * (rows - mean) * inverse_deviation + bias) +
    residual, clamped to [0, ceiling]. Autograd keeps the rows and, with ceiling and residual, the result.

    Args:
        rows: (N, C).
        mean, inverse_deviation, weight, bias: (C,), of any floating type.
        training: whether mean and deviation are `batch_statistics` of these rows, so that the gradient goes through them.
        factor: (B,), one per sample, without gradient; N is a multiple of B, and a sample's rows are adjacent.
        residual: (N, C) or (..., C) with as many rows, in the rows' dtype.
        ceiling: above zero: infinity for a ReLU, 6 for a ReLU6; None for no clamp.

    Returns:
        (N, C).
    """
    check_rows("rows", rows)
    numbers = {"mean": mean, "inverse_deviation": inverse_deviation, "weight": weight, "bias": bias}
    check_norm(rows, rows.shape[1], numbers, factor, residual)
    return torch.ops.sparkme.batch_norm(rows, mean, inverse_deviation, weight, bias, factor, residual, ceiling, training)


def layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer norm of every row, as torch.nn.functional.layer_norm computes it. Statistics are float32 or, for float64 rows,
    float64.

    Args:
        rows: (N, C).
        weight, bias: (C,) or None, of any floating type.
        epsilon: of the variance.

    Returns:
        (N, C).
    """
    check_rows("rows", rows)
    check_norm(rows, rows.shape[1], {"weight": weight, "bias": bias}, None, None)
    return torch.ops.sparkme.layer_norm(rows, weight, bias, epsilon)[0]


def check_norm(
    rows: Tensor, channels: int, numbers: dict[str, Tensor | None], factor: Tensor | None, residual: Tensor | None
) -> None:
    """`numbers`: of each channel. `factor` and `residual` as for `batch_norm`."""
    for name, value in numbers.items():
        check_channels(name, value, channels, rows)
    if factor is not None:
        if factor.ndim != 1 or not len(factor) or len(rows) % len(factor):
            raise ValueError(f"factor must be a number for each sample of {len(rows)} rows, got {tuple(factor.shape)}")
        if factor.requires_grad and torch.is_grad_enabled():
            raise ValueError("factor must not require a gradient")
        check_device("factor", factor, rows)
    if residual is not None:
        if residual.ndim < 2 or residual.shape[-1] != channels or residual.numel() != len(rows) * channels:
            raise ValueError(f"residual must be {(len(rows), channels)}, got {tuple(residual.shape)}")
        check_same("residual", residual, rows)


def batch_statistics_reference(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.var(0, correction=0)


def norm_statistics_reference(
    rows: Tensor, epsilon: float, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    mean, variance = batch_statistics_reference(rows)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
    if running_var is not None:
        running_var.lerp_(variance * len(rows) / max(1, len(rows) - 1), momentum)
    return mean, (variance + epsilon).rsqrt()


def batch_norm_reference(
    rows: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    ceiling: float | None,
    training: bool,
) -> Tensor:
    if training:  # the same values with a gradient; epsilon follows from them
        own_mean, own_variance = batch_statistics_reference(rows)
        epsilon = inverse_deviation**-2 - own_variance.detach()
        mean, inverse_deviation = own_mean, (own_variance + epsilon).rsqrt()
    out = (rows - mean) * inverse_deviation
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    out = follow(out, factor, residual)
    return out if ceiling is None else out.clamp(0, ceiling)


def layer_norm_reference(rows: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    deviation = (variance + epsilon).rsqrt()
    out = (rows - mean) * deviation
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, torch.cat([mean, deviation], 1)


def follow(out: Tensor, factor: Tensor | None, residual: Tensor | None) -> Tensor:
    """factor * out + residual, for references."""
    out = out if factor is None else out * factor.repeat_interleave(len(out) // len(factor)).unsqueeze(1)
    return out if residual is None else out + residual.flatten(0, -2)
