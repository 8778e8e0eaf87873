"""The sparse convolution over a neighbour table. CUDA's kernels are Triton's, in `sparkme.ops.triton_conv`."""

import torch
from torch import Tensor

from sparkme.ops import triton_conv
from sparkme.ops.library import LIBRARY, check_same, check_tables, define
from sparkme.ops.patches import gather

__all__ = ["sparse_conv", "sparse_conv_reference"]


@define()
def _sparse_conv(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int) -> Tensor:
    return rows.new_empty(table.shape[0], kernel.shape[2])


@define()
def _sparse_conv_grad_rows(grad: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor, groups: int) -> Tensor:
    return grad.new_empty(inverse.shape[0], kernel.shape[1] * groups)


@define()
def _sparse_conv_grad_kernel(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    return grad.new_empty(table.shape[1], rows.shape[1] // groups, grad.shape[1])


for _kernel in (triton_conv.sparse_conv, triton_conv.sparse_conv_grad_rows, triton_conv.sparse_conv_grad_kernel):
    LIBRARY.impl(_kernel.__name__, _kernel, "CUDA")


def sparse_conv(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int = 1) -> Tensor:
    """Convolution over a neighbour table; a missing neighbour counts as zero.

    Args:
        rows: (N_in, C_in).
        kernel: (K, C_in / groups, C_out).
        table, inverse: (N_out, K) and (N_in, K) int32, from `neighbour_table`, plain and transposed. The inverse is for
            the gradient of the rows; None if that is not needed.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        (N_out, C_out).
    """
    check_tables(rows, table, inverse)
    if kernel.ndim != 3 or kernel.shape[0] != table.shape[1] or kernel.shape[1] * groups != rows.shape[1]:
        raise ValueError(
            f"kernel must be ({table.shape[1]}, {rows.shape[1]} / groups={groups}, C_out), got {tuple(kernel.shape)}"
        )
    if inverse is None and rows.requires_grad and torch.is_grad_enabled():
        raise ValueError("inverse is None, but the gradient of the rows needs it")
    if groups < 1 or kernel.shape[2] % groups:
        raise ValueError(f"groups={groups} must divide the kernel's {kernel.shape[2]} output channels")
    check_same("kernel", kernel, rows)
    return torch.ops.sparkme.sparse_conv(rows, kernel, table, inverse, groups)


def sparse_conv_reference(rows: Tensor, kernel: Tensor, table: Tensor, inverse: Tensor | None, groups: int) -> Tensor:
    taps, width, out_channels = kernel.shape
    neighbours = gather(rows, table).view(-1, taps, groups, width)
    kernels = kernel.view(taps, width, groups, out_channels // groups)
    return torch.einsum("nkgi,kigo->ngo", neighbours, kernels).reshape(-1, out_channels)
