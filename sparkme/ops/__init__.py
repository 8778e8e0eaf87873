"""The operators of the engine `cuda_ext`: sparse layers over patch-major rows, on the CPU and on CUDA.

Two small tables per batch say where everything is:

    slots    (B, f_h, f_w) int32: the number of each patch among the visible ones, or -1 where it is hidden
    patches  (P,) int32: where each visible patch lies in the flattened `slots`; P = B * keep

Rows are sorted by (visible patch, y, x), so a pixel's row is `patch * p * p + y * p + x`, and its neighbours follow from
`slots` without hashing. Kernels have MinkowskiEngine's layout: tap k = y + kh * x.

Every operator takes float64, float32 and bfloat16 (which accumulates in float32), any memory layout, and no rows at all, and
can be differentiated once. Beside each function NAME is `NAME_reference`: the same in plain PyTorch, slow and differentiable,
with the arguments of `torch.ops.sparkme.NAME`. The tests hold the kernels to it. A wrong argument is a ValueError that names
it. What tables, slots and patches hold is checked on the CPU; on CUDA that would mean waiting for the device, so there it is
trusted: make them with `sparkme.Grid` and `neighbour_table`.

The families, each a module here and files of the same name in cuda_ext/csrc:

    patches        between dense maps and rows; neighbour tables
    convolution    over a neighbour table
    depthwise      a filter for each channel, patch by patch
    pooling        over a neighbour table
    norm           batch norm, with what follows it in a residual block, and layer norm
    linear_layers  products with a kernel, alone, with a batch norm, and two of them as an MLP

A new operator of a family touches five files:

    sparkme/ops/FAMILY.py             the schema and the shapes of the results; the function; the reference
    cuda_ext/csrc/FAMILY.cpp          the gradient, for all devices
    cuda_ext/csrc/cpu/FAMILY.cpp      the kernel of the CPU
    cuda_ext/csrc/cuda/FAMILY.cu      the kernel of CUDA
    tests/support/operator_calls.py   a call of it, for the tests that all operators share
"""

# ruff: noqa: F403  (a family's __all__ says what is public)

from __future__ import annotations

import torch

from sparkme.ops.convolution import *
from sparkme.ops.depthwise import *
from sparkme.ops.library import FLOATS as FLOATS
from sparkme.ops.linear_layers import *
from sparkme.ops.norm import *
from sparkme.ops.patches import *
from sparkme.ops.pooling import *

try:
    from sparkme import _C  # type: ignore[attr-defined]  # noqa: F401  (registers the kernels)

    _LOAD_ERROR = ""
except ImportError as _error:
    _LOAD_ERROR = str(_error)


def unavailable(*, on_gpu: bool) -> str:
    """Why the operators cannot run on the CPU or on a GPU; empty where they can."""
    if _LOAD_ERROR:
        return f"the extension sparkme._C was not built or does not load ({_LOAD_ERROR})"
    if on_gpu and not torch._C._dispatch_has_kernel_for_dispatch_key("sparkme::voxelise", "CUDA"):
        return "the extension sparkme._C was built without CUDA"
    return ""
