"""The operators of cuda_ext on the CPU, against their plain references: values, gradients, types, layouts, errors."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from operator_calls import DIFFERENTIABLE, NAMES, calls, detached, overload, results, without_rows
from torch import Tensor

from sparkme import _C, Grid, ops

# Relative to the reference in float64 on the same, already rounded numbers.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 4.5e-3,
}  # a single rounding to bfloat16 is at most 3.9e-3
WINDOWS = {  # kernel size, stride, dilation
    "1x1": ((1, 1), 1, 1),
    "1x1 s2": ((1, 1), 2, 1),
    "3x3": ((3, 3), 1, 1),
    "3x3 s2": ((3, 3), 2, 1),
    "7x7": ((7, 7), 1, 1),
    "7x7 s2": ((7, 7), 2, 1),
    "3x5": ((3, 5), 1, 1),
    "5x5 dilated": ((5, 5), 1, 2),
    "2x2 s2": ((2, 2), 2, 1),
    "4x4 s4": ((4, 4), 4, 1),
    "3x1 s2": ((3, 1), 2, 1),
}
FITS = {  # a stride has to divide the patch
    pixels: [name for name, (_, stride, _) in WINDOWS.items() if pixels % stride == 0] for pixels in (1, 2, 4, 8)
}
ODD = [name for name, (size, _, _) in WINDOWS.items() if size[0] % 2]
VISIBLE = {"one patch": 1, "some": 3, "all": 6}


def test_the_extension_is_built() -> None:
    assert not ops.unavailable(on_gpu=False), "build it with: pip install --no-build-isolation -e ."


def grid_of(visible: str = "some", batch: int = 2) -> Grid:
    return Grid(oracle.random_active(batch, (2, 3), VISIBLE[visible], seed=VISIBLE[visible]), 32)


def tables(grid: Grid, pixels: int, window: str) -> tuple[Tensor, Tensor]:
    size, stride, dilation = WINDOWS[window]
    both = (
        ops.neighbour_table(grid.slots, grid.patches, pixels, size, stride=stride, dilation=dilation, transposed=transposed)
        for transposed in (False, True)
    )
    return tuple(both)  # type: ignore[return-value]


def compare(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype, atol: float | None = None
) -> None:
    """Values and gradients of all inputs. The reference runs in float64 on the inputs as rounded to `dtype`."""
    a = [x.to(dtype).detach().requires_grad_() for x in inputs]
    b = [x.detach().double().requires_grad_() for x in a]
    out, expected = ours(*a), theirs(*b)
    assert out.dtype == dtype and out.shape == expected.shape
    weights = torch.randn_like(expected).to(dtype)
    out.backward(weights)
    expected.backward(weights.double())
    for x, y in ((out, expected), *((x.grad, y.grad) for x, y in zip(a, b, strict=True))):
        assert oracle.relative_error(x.double(), y) < (atol or TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize(("pixels", "window"), [(p, w) for p, windows in FITS.items() for w in windows])
def test_neighbour_table(window: str, pixels: int, visible: str) -> None:
    size, stride, dilation = WINDOWS[window]
    grid = grid_of(visible)
    for transposed, table in zip((False, True), tables(grid, pixels, window), strict=True):
        expected = ops.neighbour_table_reference(grid.slots, grid.patches, pixels, list(size), stride, dilation, transposed)
        assert table.dtype == torch.int32 and torch.equal(table, expected)


def test_the_tables_are_each_others_inverse() -> None:
    table, inverse = tables(grid_of(), 8, "7x7 s2")
    pairs = {(n, int(source), tap) for n, row in enumerate(table.tolist()) for tap, source in enumerate(row) if source >= 0}
    assert pairs == {(int(n), i, tap) for i, row in enumerate(inverse.tolist()) for tap, n in enumerate(row) if n >= 0}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("window", WINDOWS)
def test_sparse_conv(window: str, visible: str, groups: int, dtype: torch.dtype) -> None:
    grid, taps = grid_of(visible), WINDOWS[window][0][0] * WINDOWS[window][0][1]
    table, inverse = tables(grid, 4, window)
    compare(
        lambda rows, kernel: ops.sparse_conv(rows, kernel, table, inverse, groups),
        lambda rows, kernel: ops.sparse_conv_reference(rows, kernel, table, inverse, groups),
        torch.randn(len(inverse), 6),
        torch.randn(taps, 6 // groups, 4),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [(32, 140), (72, 36), (66, 70)])  # of a group: even; even; odd
@pytest.mark.parametrize("window", ["3x3", "3x3 s2", "1x1 s2", "5x5 dilated"])
def test_sparse_conv_of_many_channels(window: str, channels: tuple[int, int], groups: int, dtype: torch.dtype) -> None:
    """So many that products are made straight from the rows."""
    table, inverse = tables(grid_of(batch=5), 4, window)
    inside, outside = channels
    compare(
        lambda rows, kernel: ops.sparse_conv(rows, kernel, table, inverse, groups),
        lambda rows, kernel: ops.sparse_conv_reference(rows, kernel, table, inverse, groups),
        torch.randn(len(inverse), inside),
        torch.randn(table.shape[1], inside // groups, outside),
        dtype=dtype,
    )


def test_sparse_conv_in_several_blocks_of_columns() -> None:
    grid = Grid(oracle.random_active(2, (4, 4), 16), 32)
    table, inverse = tables(grid, 16, "7x7")
    assert len(inverse) * 49 * 8 * 8 > 2 * 2**23  # bytes of columns, over two blocks of cuda_ext/csrc/cpu/convolution.cpp
    compare(
        lambda rows, kernel: ops.sparse_conv(rows, kernel, table, inverse),
        lambda rows, kernel: ops.sparse_conv_reference(rows, kernel, table, inverse, 1),
        torch.randn(len(inverse), 8),
        torch.randn(49, 8, 5),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [5, 16, 70, 140])  # less than a vector; one; several and a rest
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize(("pixels", "window"), [(p, w) for p in FITS for w in FITS[p] if w in ODD])
def test_depthwise_conv(window: str, pixels: int, visible: str, channels: int, dtype: torch.dtype) -> None:
    size, stride, dilation = WINDOWS[window]
    grid = grid_of(visible)
    sites = grid.slots, grid.patches, pixels
    compare(
        lambda r, k, b=None: ops.depthwise_conv(r, k, b, *sites, size, stride=stride, dilation=dilation),
        lambda r, k, b=None: ops.depthwise_conv_reference(r, k, b, *sites, list(size), stride, dilation),
        torch.randn(len(grid.patches) * pixels**2, channels),
        torch.randn(size[0] * size[1], channels),
        *([torch.randn(channels)] if visible == "some" else []),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pool", ["max_pool", "avg_pool"])
def test_pooling(pool: str, window: str, visible: str, dtype: torch.dtype) -> None:
    table, inverse = tables(grid_of(visible), 4, window)
    rows = torch.randperm(len(inverse) * 7).view(-1, 7) / 16 - 9  # no two are equal, also in bfloat16
    rows = rows if pool == "avg_pool" or dtype != torch.bfloat16 else rows[:36].repeat(len(rows) // 36 + 1, 1)[: len(rows)]
    compare(
        lambda r: getattr(ops, pool)(r, table, inverse),
        lambda r: getattr(ops, f"{pool}_reference")(r, table, inverse),
        rows,
        dtype=dtype,
    )


def test_max_pool_takes_the_first_of_equals_and_lets_nan_through() -> None:
    table, inverse = tables(grid_of("all"), 4, "3x3 s2")
    rows = torch.ones(len(inverse), 2).requires_grad_()
    ops.max_pool(rows, table, inverse).sum().backward()
    first = torch.zeros(len(inverse)).index_add_(0, first_neighbour(table), torch.ones(len(table)))
    assert torch.equal(rows.grad, first.unsqueeze(1).expand(-1, 2))
    broken = torch.full_like(rows, torch.nan)
    assert ops.max_pool(broken, table, inverse).isnan().all()


def first_neighbour(table: Tensor) -> Tensor:
    return table.gather(1, (table >= 0).int().argmax(1, keepdim=True)).flatten().long()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("visible", VISIBLE)
def test_voxelise_and_densify(visible: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    grid = grid_of(visible)
    sites = grid.slots, grid.patches, 4
    compare(
        lambda x: ops.voxelise(x.contiguous(memory_format=layout), *sites),
        lambda x: ops.voxelise_reference(x, *sites),
        torch.randn(2, 5, 8, 12),
        dtype=dtype,
    )
    rows = torch.randn(grid.num_rows(8), 5)
    compare(lambda r: ops.densify(r, *sites), lambda r: ops.densify_reference(r, *sites, None), rows, dtype=dtype)
    compare(
        lambda r, fill: ops.densify(r, *sites, fill),
        lambda r, fill: ops.densify_reference(r, *sites, fill),
        rows,
        torch.randn(5),
        dtype=dtype,
    )
    assert ops.densify(rows, *sites).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 5, 9), (300, 64, 256)])
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, m = shape
    inputs = torch.randn(n, k), torch.randn(k, m)
    compare(ops.linear, lambda r, w: ops.linear_reference(r, w, None), *inputs, dtype=dtype)
    compare(ops.linear, ops.linear_reference, *inputs, torch.randn(m), dtype=dtype)
    every_other = torch.randn(2 * n, 2 * k)[::2, ::2]
    expected = every_other.double() @ inputs[1].double()
    assert oracle.relative_error(ops.linear(every_other, inputs[1]).double(), expected) < 1e-5


FOLLOWS = {  # a batch norm
    "nothing": {},
    "relu": {"ceiling": inf},
    "residual": {"residual": True},
    "all": {"factor": True, "residual": True, "ceiling": inf},
    "factor": {"factor": True, "ceiling": inf},
    "relu6": {"ceiling": 1.25},
    "all, relu6": {"residual": True, "ceiling": 1.25},
}


def norm_inputs(
    n: int, c: int, follows: dict[str, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Rows, weight, bias, factor, residual. Rounded, so that a ReLU's input is nowhere within rounding of zero."""
    factor = torch.tensor([0.0, 1.25] if n > 6 else [1.25]) if "factor" in follows else None
    return 3 + torch.randn(n, c), torch.rand(c) + 0.5, torch.randn(c), factor, torch.randn(n, c)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize(("n", "c"), [(6, 3), (96, 70), (2600, 33)])
def test_batch_norm(n: int, c: int, follows: str, training: bool, dtype: torch.dtype) -> None:
    """Against its formula, whose gradient goes through the statistics where it trains."""
    options = FOLLOWS[follows]
    rows, weight, bias, factor, residual = norm_inputs(n, c, options, dtype)
    rows = rows.to(dtype)
    mean, variance = (x.double() for x in ops.batch_statistics(rows))
    assert oracle.relative_error(mean, rows.double().mean(0)) < 1e-6
    assert oracle.relative_error(variance, rows.double().var(0, correction=0)) < 1e-5
    if dtype == torch.float64:
        assert oracle.relative_error(variance, rows.var(0, correction=0)) < 1e-12
    deviation = (variance + 1e-5).rsqrt() if training else torch.rand(c, dtype=torch.float64) + 0.5
    ceiling = options.get("ceiling")
    if dtype == torch.bfloat16 and "residual" in options and ceiling == 1.25:
        ceiling = None  # the reference does not round, and at a bound that decides over a gradient; see the next test

    def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        given = r if "residual" in options else None
        out = ops.batch_norm(x, mean, deviation, w, b, training=training, factor=factor, residual=given, ceiling=ceiling)
        return out + 0 * r.sum()

    def theirs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        given = r if "residual" in options else None
        out = ops.batch_norm_reference(x, mean, deviation, w, b, factor, given, ceiling, training)
        return out + 0 * r.sum()

    compare(ours, theirs, rows, weight, bias, residual, dtype=dtype, atol=3e-2 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "c"), [(2, 3), (2600, 33)])
def test_norm_statistics(n: int, c: int, kind: torch.dtype, dtype: torch.dtype) -> None:
    """Against torch's own batch norm: what it normalises with, and how its running statistics move."""
    rows = (torch.randn(n, c, dtype=torch.float64) * 2 + 1).to(dtype)
    bn = torch.nn.BatchNorm1d(c, eps=0.1, momentum=0.3, affine=False).double()
    running = [torch.rand(c, dtype=torch.float64).to(kind) for _ in range(2)]
    bn.running_mean, bn.running_var = (x.double() for x in running)
    expected = bn(rows.double())
    mean, deviation = ops.norm_statistics(rows, 0.1, *running, 0.3)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert oracle.relative_error((rows.double() - mean) * deviation, expected) < limit
    for x, y in zip(running, (bn.running_mean, bn.running_var), strict=True):
        assert x.dtype == kind and oracle.relative_error(x.double(), y) < max(limit, 2e-2 if kind == torch.bfloat16 else 1e-6)
    assert torch.equal(ops.norm_statistics(rows, 0.1)[1], deviation)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_residual", [False, True])
def test_no_gradient_goes_through_what_was_clamped(with_residual: bool, dtype: torch.dtype) -> None:
    rows = torch.tensor([[-1.0], [0.5], [1.2], [7.0]], dtype=dtype, requires_grad=True)
    residual = torch.zeros(4, 1, dtype=dtype) if with_residual else None
    zero, one = torch.zeros(1), torch.ones(1)
    out = ops.batch_norm(rows, zero, one, training=False, residual=residual, ceiling=1.251)  # which bfloat16 does not have
    out.sum().backward()
    assert torch.allclose(out.double().flatten(), torch.tensor([0, 0.5, 1.2, 1.251], dtype=torch.float64), atol=4e-3)
    assert rows.grad is not None and rows.grad.flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize(("n", "k", "c"), [(6, 3, 12), (96, 16, 70), (2600, 64, 256)])
def test_linear_batch_norm(n: int, k: int, c: int, follows: str, dtype: torch.dtype) -> None:
    """Against a product and a batch norm, one after the other."""
    options = FOLLOWS[follows]
    _, weight, bias, factor, residual = norm_inputs(n, c, options, dtype)
    rows, kernel, ceiling = torch.randn(n, k).relu() + 0.1, torch.randn(k, c), options.get("ceiling")
    statistics = ops.product_statistics(rows.to(dtype), kernel.to(dtype))
    expected = ops.product_statistics_reference(rows.to(dtype).double(), kernel.to(dtype).double())
    for x, y in zip(statistics, expected, strict=True):
        assert oracle.relative_error(x.double(), y) < TOLERANCE[dtype]

    def ours(x: Tensor, k: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        given = r if "residual" in options else None
        out = ops.linear_batch_norm(x, k, statistics, 1e-5, w, b, factor=factor, residual=given, ceiling=ceiling)
        return out + 0 * r.sum()

    def theirs(x: Tensor, k: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        given, (row_mean, gram, mean, variance) = r if "residual" in options else None, expected
        deviation = (variance + 1e-5).rsqrt()
        out = ops.linear_batch_norm_reference(x, k, row_mean, gram, mean, deviation, w, b, factor, given, ceiling)
        return out + 0 * r.sum()

    compare(ours, theirs, rows, kernel, weight, bias, residual, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "c", "h"), [(1, 3, 12), (700, 96, 384), (1300, 17, 33)])
def test_mlp(n: int, c: int, h: int, dtype: torch.dtype) -> None:
    inputs = torch.randn(n, c), torch.randn(h, c) / c**0.5, torch.randn(h), torch.randn(c, h) / h**0.5, torch.randn(c)
    atol = 1.5e-2 if dtype == torch.bfloat16 else None  # three roundings one after the other
    factor, residual = torch.rand(2 if n % 2 == 0 else 1), torch.randn(n, c)
    compare(ops.mlp, lambda *a: ops.mlp_reference(*a, None, None, None)[0], *inputs, dtype=dtype, atol=atol)
    compare(ops.mlp, lambda *a: ops.mlp_reference(*a, None, None)[0], *inputs, torch.rand(c), dtype=dtype, atol=atol)
    compare(
        lambda *a: ops.mlp(*a[:-1], factor=factor, residual=a[-1]),
        lambda *a: ops.mlp_reference(*a[:-1], factor, a[-1])[0],
        *inputs,
        torch.rand(c),
        residual,
        dtype=dtype,
        atol=atol,
    )
    compare(
        lambda *a: ops.mlp(*a[:-1], residual=a[-1].view(n, 1, c)),
        lambda *a: ops.mlp_reference(*a[:-1], None, None, a[-1])[0],
        *inputs,
        residual,
        dtype=dtype,
        atol=atol,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "c"), [(1, 1), (70, 33), (1300, 96)])
def test_layer_norm(n: int, c: int, dtype: torch.dtype) -> None:
    """Against torch's own, also where the mean is large."""
    rows = torch.randn(n, c) + torch.linspace(-20, 20, n).unsqueeze(1)
    expected = torch.nn.functional.layer_norm
    atol = 3e-2 if dtype == torch.bfloat16 else None
    compare(
        lambda r, w, b: ops.layer_norm(r, w, b, 1e-6),
        lambda r, w, b: expected(r, (c,), w, b, 1e-6),
        rows,
        torch.rand(c) + 0.5,
        torch.randn(c),
        dtype=dtype,
        atol=atol,
    )
    compare(lambda r: ops.layer_norm(r, None, None, 1e-3), lambda r: expected(r, (c,), eps=1e-3), rows, dtype=dtype, atol=atol)


def test_gelu_of_large_numbers_and_nan() -> None:
    x = torch.tensor([-1e30, -40.0, -9.0, -1.0, -1e-20, 0.0, 1e-20, 1.0, 9.0, 40.0, 1e30, float("nan")]).repeat(4)
    eye = torch.eye(1)
    out = ops.mlp(x[:, None], eye, None, eye, None).flatten()
    assert torch.allclose(out, torch.nn.functional.gelu(x), atol=1e-6, equal_nan=True)


def test_every_operator_is_called() -> None:
    defined = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparkme::")}
    assert defined == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    arguments = calls()[name]
    torch.library.opcheck(overload(name), arguments if name in DIFFERENTIABLE else detached(arguments))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(lambda *a: results(overload(name)(*a))[0], calls()[name], atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_input_gives_the_same(name: str, dtype: torch.dtype) -> None:
    arguments = calls(dtype)[name]

    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        wide = value.detach().new_zeros(*value.shape[:-1], 2 * value.shape[-1])
        wide[..., ::2] = value.detach()
        return wide[..., ::2]

    expected, got = overload(name)(*arguments), overload(name)(*map(spread, arguments))
    for x, y in zip(results(got), results(expected), strict=True):
        assert torch.equal(x, y) if not x.is_floating_point() else oracle.relative_error(x, y) < TOLERANCE[dtype] / 10


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_no_rows_at_all(name: str, dtype: torch.dtype) -> None:
    for value in results(overload(name)(*without_rows(name, calls(dtype)[name]))):
        assert not value.any()  # of no rows, or the gradient of a weight


def test_the_extension_uses_threads() -> None:
    """Without OpenMP at::parallel_for compiles, and runs everything in one thread."""
    assert b"GOMP_parallel" in Path(_C.__file__).read_bytes()


def test_a_second_derivative_is_refused() -> None:
    table, inverse = tables(grid_of(), 4, "3x3")
    rows, kernel = torch.randn(len(inverse), 2, requires_grad=True), torch.randn(9, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.sparse_conv(rows, kernel, table, inverse).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for sparkme::sparse_conv_grad_rows is not implemented"):
        grad.square().sum().backward()


def test_linear_keeps_its_type_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(torch.randn(0, 3), torch.randn(3, 4)).dtype == torch.float32
        assert ops.linear(torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64


def test_the_number_of_threads_changes_no_gradient_of_a_depthwise_kernel() -> None:
    grid = Grid(oracle.random_active(4, (4, 4), 9), 32)
    rows, grad = torch.randn(grid.num_rows(8), 24), torch.randn(grid.num_rows(8), 24)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            arguments = rows, grad, grid.slots, grid.patches, 4, [7, 7], 1, 1
            results.append(torch.ops.sparkme.depthwise_conv_grad_kernel(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def wrong_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    grid = grid_of()
    slots, patches = grid.slots, grid.patches
    table, inverse = tables(grid, 4, "3x3")
    rows, kernel = torch.randn(len(inverse), 4), torch.randn(9, 4, 6)
    far = table.clone()
    far[0, 0] = len(rows)
    raw, norm = torch.ops.sparkme, (torch.zeros(4), torch.ones(4))
    return {
        "type of slots": ("slots must be int32", lambda: ops.neighbour_table(slots.long(), patches, 4, (3, 3))),
        "stride": ("stride 3 does not divide", lambda: ops.neighbour_table(slots, patches, 4, (3, 3), stride=3)),
        "negative dilation": ("dilation -1", lambda: ops.neighbour_table(slots, patches, 4, (3, 3), dilation=-1)),
        "type of rows": ("rows must be float64", lambda: ops.sparse_conv(rows.half(), kernel.half(), table, inverse)),
        "shape of rows": (r"rows must be \(N, C\)", lambda: ops.sparse_conv(rows[None], kernel, table, inverse)),
        "shape of kernel": ("kernel must be", lambda: ops.sparse_conv(rows, kernel[1:], table, inverse)),
        "type of kernel": ("kernel is torch.float64", lambda: ops.sparse_conv(rows, kernel.double(), table, inverse)),
        "groups": ("groups=4 must divide", lambda: ops.sparse_conv(rows, kernel[:, :1], table, inverse, 4)),
        "type of table": ("table must be", lambda: ops.sparse_conv(rows, kernel, table.long(), inverse)),
        "shape of inverse": ("inverse must be", lambda: ops.sparse_conv(rows, kernel, table, inverse[1:])),
        "no inverse": ("inverse is None", lambda: ops.sparse_conv(rows.clone().requires_grad_(), kernel, table, None)),
        "entry of pooled table": ("table names", lambda: ops.max_pool(rows, far, inverse)),
        "entry of slots": ("slots names 65", lambda: ops.voxelise(torch.zeros(2, 3, 8, 12), slots + 60, patches, 4)),
        "entry of patches": (
            "patches names 1073741824",
            lambda: ops.voxelise(torch.zeros(2, 3, 8, 12), slots, patches + 2**30 - patches, 4),
        ),
        "negative kernel": ("kernel_size", lambda: ops.depthwise_conv(rows, kernel[:1, 0], None, slots, patches, 4, (-1, -1))),
        "negative pixels": ("pixels|patches", lambda: ops.densify(rows, slots, patches, -4)),
        "entry of table": (f"table names {len(rows)}", lambda: ops.sparse_conv(rows, kernel, far, inverse)),
        "even depthwise kernel": (
            "kernel_size .* must be odd",
            lambda: ops.depthwise_conv(rows, kernel[:4, 0], None, slots, patches, 4, (2, 2), stride=2),
        ),
        "depthwise rows": (
            "rows must be 6 patches",
            lambda: ops.depthwise_conv(rows[1:], kernel[:, 0], None, slots, patches, 4, (3, 3)),
        ),
        "depthwise kernel": (
            "kernel must be",
            lambda: ops.depthwise_conv(rows, kernel[1:, 0], None, slots, patches, 4, (3, 3)),
        ),
        "depthwise bias": (
            "bias must be",
            lambda: ops.depthwise_conv(rows, kernel[:, 0, :4], kernel[0, 0, 1:], slots, patches, 4, (3, 3)),
        ),
        "raw depthwise rows": (
            "rows must be",
            lambda: raw.depthwise_conv(rows[1:], kernel[:, :, 0], None, slots, patches, 4, [3, 3], 1, 1),
        ),
        "dense": (r"dense must be \(2, C, 8, 12\)", lambda: ops.voxelise(torch.zeros(2, 3, 8, 13), slots, patches, 4)),
        "raw dense": ("does not fit", lambda: raw.voxelise(torch.zeros(2, 3, 8, 13), slots, patches, 4)),
        "densify rows": ("rows must be 6 patches", lambda: ops.densify(rows, slots, patches, 3)),
        "fill": ("fill must be", lambda: ops.densify(rows, slots, patches, 4, torch.zeros(3))),
        "linear kernel": ("kernel must be", lambda: ops.linear(rows, torch.zeros(5, 4))),
        "linear bias": ("bias must be", lambda: ops.linear(rows, torch.zeros(4, 5), torch.zeros(4))),
        "mean": (r"mean must be \(4,\)", lambda: ops.batch_norm(rows, torch.zeros(3), torch.ones(4), training=True)),
        "factor": ("factor must be", lambda: ops.batch_norm(rows, *norm, training=True, factor=torch.ones(7))),
        "gradient of factor": (
            "factor must not require a gradient",
            lambda: ops.batch_norm(rows, *norm, training=True, factor=torch.ones(2, requires_grad=True)),
        ),
        "residual": ("residual must be", lambda: ops.batch_norm(rows, *norm, training=True, residual=rows[1:])),
        "type of residual": (
            "residual is torch.float64",
            lambda: ops.batch_norm(rows, *norm, training=True, residual=rows.double()),
        ),
        "raw factor": ("factor", lambda: raw.batch_norm(rows, *norm, None, None, torch.ones(7), None, None, True)),
        "raw residual": ("residual must be", lambda: raw.batch_norm(rows, *norm, None, None, None, rows[1:], None, True)),
        "bf16 product": (
            "rows must be float64 or float32",
            lambda: ops.product_statistics(rows.bfloat16(), rows.bfloat16().t()),
        ),
        "product": ("kernel must be", lambda: ops.product_statistics(rows, torch.zeros(5, 8))),
        "weight2": (
            r"weight2 must be \(channels, 8\)",
            lambda: ops.mlp(rows, torch.zeros(8, 4), None, torch.zeros(4, 9), None),
        ),
        "bias1": (r"bias1 must be \(8,\)", lambda: ops.mlp(rows, torch.zeros(8, 4), torch.zeros(7), torch.zeros(4, 8), None)),
        "scale": (
            r"scale must be \(4,\)",
            lambda: ops.mlp(rows, torch.zeros(8, 4), None, torch.zeros(4, 8), None, torch.zeros(8)),
        ),
        "raw weights": (
            "do not fit rows",
            lambda: raw.mlp(rows, torch.zeros(8, 5), None, torch.zeros(4, 8), None, None, None, None),
        ),
        "device": ("is on meta", lambda: ops.linear(rows, torch.zeros(4, 5, device="meta"))),
    }


@pytest.mark.parametrize("case", wrong_calls())
def test_a_wrong_argument_is_a_value_error_that_names_it(case: str) -> None:
    message, call = wrong_calls()[case]
    with pytest.raises(ValueError, match=message):
        call()
