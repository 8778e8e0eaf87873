"""CUDA's sparse convolution without a GPU: the Triton kernels under Triton's interpreter, on the CPU, against the reference.

The interpreter is chosen when Triton is imported, so the tests run in a process of their own.
"""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from sites import make_sites, normal, relative_error
from torch import Tensor

from sparkme import ops
from sparkme.ops import triton_conv

pytest.importorskip("triton", reason="this torch has no Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# TF32 is not rounded to by the interpreter.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{__file__}::TestInterpreted"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"^{2 * len(GEOMETRIES) + 2} passed", done.stdout, re.MULTILINE), done.stdout


@pytest.fixture(autouse=True)
def interpreter_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as the integers of its bits, and would multiply those."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar.name != "bf16":
            return operand
        return interpreter.TensorHandle((operand.data.astype("uint32") << 16).view("float32"), interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def compare(
    dtype: torch.dtype,
    *,
    pixels: int,
    kernel_size: tuple[int, int],
    channels: tuple[int, int],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    keep: int = 5,
) -> None:
    sites = make_sites(pixels + keep, keep)
    geometry = (*sites, pixels, kernel_size, stride, dilation)
    table, inverse = (ops.neighbour_table_reference(*geometry, transposed) for transposed in (False, True))
    rows = normal(1, len(inverse), channels[0], dtype=dtype)
    kernel = normal(2, kernel_size[0] * kernel_size[1], channels[0] // groups, channels[1], dtype=dtype)
    leaves = [rows.double().requires_grad_(), kernel.double().requires_grad_()]
    expected = ops.sparse_conv_reference(*leaves, table, inverse, groups)
    grad = normal(3, *expected.shape, dtype=dtype)
    expected_rows, expected_kernel = torch.autograd.grad(expected, leaves, grad.double())
    assert_close(triton_conv.sparse_conv(rows, kernel, table, None, groups), expected, dtype)
    assert_close(triton_conv.sparse_conv_grad_rows(grad, kernel, table, inverse, groups), expected_rows, dtype)
    assert_close(triton_conv.sparse_conv_grad_kernel(rows, grad, table, groups), expected_kernel, dtype)


GEOMETRIES: list[dict[str, Any]] = [
    {"pixels": 8, "kernel_size": (3, 3), "channels": (64, 32)},
    {"pixels": 2, "kernel_size": (3, 3), "channels": (72, 150)},  # several blocks, and a rest, along channels
    {"pixels": 1, "kernel_size": (3, 3), "channels": (16, 16), "keep": 1},
    {"pixels": 8, "kernel_size": (3, 3), "stride": 2, "channels": (32, 48), "keep": 7},
    {"pixels": 4, "kernel_size": (1, 1), "stride": 2, "channels": (17, 33), "keep": 12},
    {"pixels": 4, "kernel_size": (2, 2), "stride": 2, "channels": (24, 16)},
    {"pixels": 16, "kernel_size": (7, 7), "stride": 2, "channels": (3, 20), "keep": 2},
    {"pixels": 8, "kernel_size": (4, 4), "stride": 4, "channels": (3, 24)},
    {"pixels": 3, "kernel_size": (3, 5), "channels": (5, 7)},
    {"pixels": 4, "kernel_size": (5, 5), "dilation": 2, "channels": (16, 16)},
    {"pixels": 4, "kernel_size": (3, 3), "channels": (64, 128), "groups": 2},
    {"pixels": 4, "kernel_size": (3, 3), "stride": 2, "channels": (48, 24), "groups": 12},
    {"pixels": 2, "kernel_size": (3, 3), "channels": (6, 12), "groups": 6},
    {"pixels": 2, "kernel_size": (2, 2), "channels": (1, 1)},
]


if INTERPRETED:

    class TestInterpreted:
        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
        def test_values_and_gradients(self, geometry: dict[str, Any], dtype: torch.dtype) -> None:
            assert triton_conv._kernels() is not None
            compare(dtype, **geometry)

        def test_wide_offsets(self, monkeypatch: pytest.MonkeyPatch) -> None:
            monkeypatch.setattr(triton_conv, "_wide", lambda *_: True)
            for geometry in (GEOMETRIES[0], GEOMETRIES[3], GEOMETRIES[6]):
                compare(torch.float32, **geometry)

        def test_rows_are_kept_apart_and_every_one_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
            """With small blocks, so that few rows make all the 64 residues."""
            monkeypatch.setattr(triton_conv, "convolution_blocks", lambda *_: triton_conv.Blocks(16, 16, 16, warps=4))
            compare(torch.float32, pixels=16, kernel_size=(3, 3), stride=2, channels=(16, 16), keep=5)


def test_rows_that_lie_apart_have_the_same_taps() -> None:
    """The blocks that `_convolve` makes for the gradient of a strided convolution are worth it: see its docstring."""
    for pixels in (2, 4, 8, 16, 32):
        row = torch.arange(4096)
        y, x = row // pixels % pixels, row % pixels
        parity = (y % 2 * 2 + x % 2).view(-1, triton_conv.APART)
        assert (parity == parity[0]).all()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gathered(geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_conv, "GATHERED_BYTES", 10000)
    compare(torch.float64, **geometry)
    monkeypatch.setattr(triton_conv, "_kernels", lambda: None)
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 1.5e-2)  # parts are rounded before they are added
    compare(torch.bfloat16, **geometry)


def test_without_triton_a_warning_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_conv._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "sparkme.ops.triton_kernels", None)
    with pytest.warns(UserWarning, match="several times slower"):
        assert triton_conv._kernels() is None
    triton_conv._kernels.cache_clear()


def test_no_rows() -> None:
    table, inverse = torch.zeros(0, 9, dtype=torch.int32), torch.zeros(0, 9, dtype=torch.int32)
    rows, kernel = torch.zeros(0, 16), torch.ones(9, 16, 32)
    assert triton_conv.sparse_conv(rows, kernel, table, inverse, 1).shape == (0, 32)
    assert triton_conv.sparse_conv_grad_rows(torch.zeros(0, 32), kernel, table, inverse, 1).shape == (0, 16)
    assert triton_conv.sparse_conv_grad_kernel(rows, torch.zeros(0, 32), table, 1).equal(torch.zeros(9, 16, 32))


def test_wrong_arguments_are_refused() -> None:
    table, rows, kernel = torch.zeros(4, 9, dtype=torch.int32), torch.zeros(4, 16), torch.ones(9, 16, 32)
    cases = [
        (rows[:, 1:], kernel, table, 1),
        (rows, kernel[1:], table, 1),
        (rows, kernel, table.long(), 1),
        (rows, kernel, table, 0),
        (rows.double(), kernel, table, 1),
        (rows, kernel.flatten(1), table, 1),
        (torch.zeros(4, 48), kernel, table, 3),
    ]
    for arguments in cases:
        with pytest.raises(ValueError):
            triton_conv.sparse_conv(arguments[0], arguments[1], arguments[2], None, arguments[3])
    with pytest.raises(ValueError):
        triton_conv.sparse_conv_grad_kernel(rows, torch.zeros(3, 32), table, 1)
    with pytest.raises(ValueError):
        triton_conv.sparse_conv_grad_kernel(rows, torch.zeros(4, 32), table, 3)


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_follows_the_flag_of_dense_convolutions(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert triton_conv._precision(torch.float32) == ("tf32" if allowed else "ieee")
