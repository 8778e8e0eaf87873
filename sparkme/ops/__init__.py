"""The operators of the engine `cuda_ext`: sparse layers over patch-major rows, on the CPU and on CUDA.

Two small tables per batch say where everything is:

    slots    (B, f_h, f_w) int32: the number of each patch among the visible ones, or -1 if hidden
    patches  (P,) int32: the index of each visible patch in the flattened `slots`; P = B * keep

Rows are sorted by (visible patch, y, x), so a pixel's row is `patch * p * p + y * p + x`, and its neighbours follow from
`slots` without hashing. Kernels have MinkowskiEngine's layout: offset k = y + kh * x.

Every operator takes float64, float32 and bfloat16 (which accumulates in float32), any memory layout, and zero rows, and can be
differentiated once. For each function NAME there is `NAME_reference` in plain PyTorch, slow and differentiable, with the
arguments of `torch.ops.sparkme.NAME`; tests compare the kernels with it. A wrong argument raises a ValueError that names it.
The contents of tables, slots and patches are checked on the CPU only, since a check on CUDA would wait for the device: make
them with `sparkme.Grid` and `neighbour_table`.

The families, each a module here and files of the same name in cuda_ext/csrc:

    patches        between dense maps and rows; neighbour tables
    convolution    over a neighbour table
    depthwise      a filter for each channel, patch by patch
    pooling        over a neighbour table
    norm           batch norm, fused with the rest of a residual block, and layer norm
    linear_layers  linear layers, alone, with a batch norm, or two as an MLP

A new operator of a family touches five files:

    sparkme/ops/FAMILY.py             the schema and the shapes of the results; the function; the reference
    cuda_ext/csrc/FAMILY.cpp          the gradient, for all devices
    cuda_ext/csrc/cpu/FAMILY.cpp      the kernel of the CPU
    cuda_ext/csrc/cuda/FAMILY.cu      the kernel of CUDA
    tests/support/operator_calls.py   a call of it, for the tests of all operators
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
    """Why the operators cannot run on the CPU or on a GPU; "" if they can."""
    if _LOAD_ERROR:
        return f"the extension sparkme._C was not built or does not load ({_LOAD_ERROR})"
    if on_gpu and not torch._C._dispatch_has_kernel_for_dispatch_key("sparkme::voxelise", "CUDA"):
        return "the extension sparkme._C was built without CUDA"
    return ""
