"""The CUDA kernels on a machine without a GPU: the same sources compiled for the host (cuda_on_host), against the reference."""

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_host import build
from operator_calls import NAMES, calls, detached, overload, results
from sites import make_sites, normal, relative_error
from torch import Tensor

from sparkme.ops import (
    avg_pool_reference,
    batch_norm_reference,
    densify_reference,
    depthwise_conv_reference,
    max_pool_reference,
    neighbour_table_reference,
    norm_statistics_reference,
    voxelise_reference,
)

pytestmark = pytest.mark.skipif(
    build.COMPILER is None, reason="no C++ compiler, so the CUDA sources cannot be compiled for the host"
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = tuple(TOLERANCE)


@pytest.fixture(scope="module")
def ops() -> Any:
    path = os.environ.get("SPARKME_ON_HOST_LIBRARY") or build.kept_library()
    global _LIBRARY  # a library lives as long as its schemas
    _LIBRARY = torch.library.Library("sparkme_on_host", "DEF")
    for name in NAMES:
        _LIBRARY.define(str(overload(name)._schema).removeprefix("sparkme::"))
    ctypes.CDLL(str(path))
    return torch.ops.sparkme_on_host


def test_the_library_is_compiled_again_whatever_changes_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of the system, the project's own files, one that is new, the flags, where headers are looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = Path(shutil.copytree(build.SOURCES.parent, tmp_path / "csrc"))
    monkeypatch.setattr(build, "SOURCES", own / "cuda")
    header = tmp_path / "header.h"
    header.write_text("1")
    compiled: list[Path] = []

    def compile_library(folder: Path) -> Path:
        compiled.append(folder)
        (folder / "operators.d").write_text(f"operators.o: {own / 'cuda' / 'operators.cu'} \\\n {header}\n")
        (folder / "on_host.so").write_bytes(header.read_bytes())
        return folder / "on_host.so"

    monkeypatch.setattr(build, "compile_library", compile_library)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: header.write_text("2"),
        lambda: (own / "geometry.h").write_text("// other"),
        lambda: (own / "cuda" / "new.h").write_text(""),
        lambda: monkeypatch.setenv("CPATH", str(tmp_path)),
        lambda: monkeypatch.setattr(build, "CHECKS", ()),
    ]
    for number, change in enumerate(changes, 1):
        change()
        for _ in range(2):
            assert build.kept_library().read_bytes() == header.read_bytes()
            assert len(compiled) == number


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[actual.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("channels", [4, 24])  # 24: by the widest accesses
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operator_gives_what_it_gives_on_the_cpu(ops: Any, dtype: torch.dtype, channels: int) -> None:
    on_host = [name for name in NAMES if torch._C._dispatch_has_kernel_for_dispatch_key(f"sparkme_on_host::{name}", "CPU")]
    assert len(on_host) >= 15
    for name in on_host:
        of_cpu, of_cuda = (calls(dtype, channels=channels)[name] for _ in range(2))  # what one changes the other has to find
        expected, got = overload(name)(*detached(of_cpu)), getattr(ops, name)(*detached(of_cuda))
        for x, y in zip((*results(got), *of_cuda), (*results(expected), *of_cpu), strict=True):
            if isinstance(x, Tensor):
                assert x.dtype == y.dtype and relative_error(x, y) <= 2 * TOLERANCE[dtype], name


KEEPS = [1, 5, 12]  # of 12 patches
WINDOWS = [  # kernel_size, stride, dilation
    ((1, 1), 1, 1),
    ((3, 3), 1, 1),
    ((7, 7), 1, 1),
    ((3, 5), 1, 1),
    ((5, 5), 1, 2),
    ((1, 1), 2, 1),
    ((3, 3), 2, 1),
    ((7, 7), 2, 1),
    ((2, 2), 2, 1),
    ((4, 4), 4, 1),
]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), WINDOWS)
def test_neighbour_table(ops: Any, keep: int, kernel_size: tuple[int, int], stride: int, dilation: int) -> None:
    sites = make_sites(keep, keep)
    for pixels in (1, 2, 4, 8, 6):
        if pixels % stride:
            continue
        for transposed in (False, True):
            arguments = (*sites, pixels, kernel_size, stride, dilation, transposed)
            assert torch.equal(ops.neighbour_table(*arguments), neighbour_table_reference(*arguments))


# pixels, channels, kernel_size, stride, dilation
DEPTHWISE = [
    *((p, c, (k, k), 1, 1) for p, k, c in ((2, 3, 8), (2, 5, 96), (2, 7, 96), (4, 3, 96), (4, 5, 8), (4, 7, 72), (8, 3, 40))),
    *((p, c, (k, k), 1, 1) for p, k, c in ((8, 5, 8), (8, 7, 96), (16, 7, 40), (6, 7, 24), (12, 3, 16), (1, 7, 64))),
    *((p, 72, (3, 5), 1, 1) for p in (2, 4)),
    (8, 40, (5, 5), 1, 2),
    (4, 7, (7, 7), 1, 1),
    (1, 1032, (3, 3), 1, 1),
    *((p, c, (3, 3), 2, 1) for p, c in ((2, 5), (4, 64), (8, 5))),
    (4, 8, (7, 7), 4, 1),
    (2, 3, (5, 3), 2, 3),
    (2, 2, (31, 33), 1, 1),
    (4, 8, (1, 1), 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pixels", "channels", "kernel_size", "stride", "dilation"), DEPTHWISE)
def test_depthwise(
    ops: Any, pixels: int, channels: int, kernel_size: tuple[int, int], stride: int, dilation: int, dtype: torch.dtype
) -> None:
    for keep in KEEPS if pixels < 8 else (1, 7):
        slots, patches = make_sites(pixels + keep, keep)
        rows = normal(1, len(patches) * pixels**2, channels, dtype=dtype)
        kernel = normal(2, kernel_size[0] * kernel_size[1], channels, dtype=dtype)
        geometry = (slots, patches, pixels, kernel_size, stride, dilation)
        leaves = [rows.double().requires_grad_(), kernel.double().requires_grad_()]
        expected = depthwise_conv_reference(*leaves, None, *geometry)
        grad = normal(3, *expected.shape, dtype=dtype)
        expected_rows, expected_kernel = torch.autograd.grad(expected, leaves, grad.double())
        assert_close(ops.depthwise_conv(rows, kernel, None, *geometry), expected)
        bias = normal(4, channels, dtype=dtype)
        assert_close(ops.depthwise_conv(rows, kernel, bias, *geometry), expected + bias.double())
        assert_close(ops.depthwise_conv_grad_rows(grad, kernel, *geometry), expected_rows)
        assert_close(ops.depthwise_conv_grad_kernel(rows, grad, *geometry), expected_kernel)


@pytest.mark.parametrize("pixels", [1, 2, 4, 8])
def test_barriers_suffice(ops: Any, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last thread first or the first thread first, it is the same."""
    slots, patches = make_sites(0, 7)
    geometry = (slots, patches, pixels, (7, 7), 1, 1)
    rows, grad = (normal(seed, len(patches) * pixels**2, 72, dtype=torch.bfloat16) for seed in (1, 2))
    kernel, dense = normal(3, 49, 72, dtype=torch.bfloat16), normal(4, 3, 72, 3 * pixels, 4 * pixels, dtype=torch.bfloat16)
    cases: list[Callable[[], Tensor]] = [
        lambda: ops.depthwise_conv(rows, kernel, None, *geometry),
        lambda: ops.depthwise_conv_grad_kernel(rows, grad, *geometry),
        lambda: ops.depthwise_conv(rows[:, :71], kernel[:, :71], None, *geometry),
        lambda: ops.depthwise_conv_grad_kernel(rows[:, :71], grad[:, :71], *geometry),
        lambda: ops.voxelise(dense, slots, patches, pixels),
        lambda: torch.stack(ops.batch_statistics(rows)),
        lambda: ops.batch_norm_grad_sums(grad, rows, None, *torch.ones(2, 72), None, None, None, None)[1],
    ]
    forwards = [case() for case in cases]
    monkeypatch.setenv("SPARKME_THREADS_BACKWARDS", "1")
    for case, expected in zip(cases, forwards):
        assert torch.equal(case(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 24, 64])
@pytest.mark.parametrize(("pixels", "kernel_size", "stride"), [(4, (3, 3), 2), (2, (2, 2), 2), (3, (3, 3), 1), (1, (1, 1), 1)])
def test_pooling(ops: Any, pixels: int, kernel_size: tuple[int, int], stride: int, channels: int, dtype: torch.dtype) -> None:
    for keep in KEEPS:
        sites = make_sites(keep, keep)
        table, inverse = (neighbour_table_reference(*sites, pixels, kernel_size, stride, 1, t) for t in (False, True))
        # Different values: where several are largest, the reference shares the gradient and the operator takes the first.
        order = torch.randperm(len(inverse) * channels, generator=torch.Generator().manual_seed(0))
        rows = (order.view(-1, channels) - 100).to(dtype)
        leaf = rows.double().requires_grad_()
        largest, average = max_pool_reference(leaf, table, inverse), avg_pool_reference(leaf, table, inverse)
        out, taken = ops.max_pool(rows, table, inverse)
        assert torch.equal(out.double(), largest)
        grad = normal(1, *out.shape, dtype=dtype)
        if dtype != torch.bfloat16:  # whose numbers are not all different
            (expected,) = torch.autograd.grad(largest, leaf, grad.double())
            assert_close(ops.max_pool_grad_rows(grad, taken, inverse), expected)
        assert_close(ops.avg_pool(rows, table, inverse), average)
        (expected,) = torch.autograd.grad(average, leaf, grad.double())
        assert_close(ops.avg_pool(grad, inverse, table), expected)


def test_max_pool_takes_nan_and_the_first_of_equals(ops: Any) -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[1.0, nan, 0.0, -inf], [1.0, 2.0, nan, -inf], [0.0, nan, nan, -inf]])
    table = torch.tensor([[-1, 0, 1, 2]], dtype=torch.int32)
    inverse = torch.tensor([[-1, 0, -1, -1], [-1, -1, 0, -1], [-1, -1, -1, 0]], dtype=torch.int32)
    out, taken = ops.max_pool(rows, table, inverse)
    assert torch.equal(out.nan_to_num(7, neginf=-8), torch.tensor([[1.0, 7, 7, -8]]))
    assert taken.tolist() == [[1, 1, 2, 1]]
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert ops.max_pool_grad_rows(grad, taken, inverse).tolist() == [[1, 2, 0, 4], [0, 0, 3, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 40])
@pytest.mark.parametrize("pixels", [1, 2, 7, 8])
def test_voxelise_and_densify(ops: Any, pixels: int, channels: int, dtype: torch.dtype) -> None:
    for keep in KEEPS:
        slots, patches = make_sites(keep, keep)
        batch, f_h, f_w = slots.shape
        dense = normal(1, batch, channels, f_h * pixels, f_w * pixels, dtype=dtype)
        expected = voxelise_reference(dense, slots, patches, pixels)
        memories = [
            dense,
            dense.contiguous(memory_format=torch.channels_last),
            dense.transpose(2, 3).contiguous().transpose(2, 3),
        ]
        memories.append(torch.cat([dense, dense], 1).contiguous(memory_format=torch.channels_last)[:, channels:])
        odd = normal(1, batch, channels + 1, f_h * pixels, f_w * pixels, dtype=dtype)
        memories.append(odd.contiguous(memory_format=torch.channels_last)[:, :channels])
        memories.append(normal(1, 1, channels, 1, 1, dtype=dtype).expand_as(dense))
        for memory in memories:
            assert torch.equal(
                ops.voxelise(memory, slots, patches, pixels), voxelise_reference(memory.contiguous(), slots, patches, pixels)
            )
        for fill in (None, normal(2, channels, dtype=dtype), normal(2, channels, dtype=torch.float32)):
            map_ = ops.densify(expected, slots, patches, pixels, fill)
            assert torch.equal(map_, densify_reference(expected, slots, patches, pixels, fill))
            assert map_.permute(0, 2, 3, 1).is_contiguous()


FOLLOWS: dict[str, dict[str, Any]] = {  # a batch norm
    "nothing": {},
    "relu": {"ceiling": float("inf")},
    "relu6": {"ceiling": 1.25, "factor": 2},
    "residual": {"residual": True},
    "all": {"residual": True, "ceiling": float("inf"), "factor": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize(("count", "channels"), [(6, 3), (2, 8), (96, 72), (2600, 40), (1400, 17), (130, 264)])
def test_batch_norm(ops: Any, count: int, channels: int, follows: str, dtype: torch.dtype) -> None:
    """In float64 by its formula, whose gradient goes through the statistics."""
    options = FOLLOWS[follows]
    rows = normal(1, count, channels, dtype=dtype) * 3 + 20 * normal(2, channels, dtype=dtype)
    mean, variance = ops.batch_statistics(rows)
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    assert relative_error(mean, rows.double().mean(0)) <= exact
    assert relative_error(variance, rows.double().var(0, correction=0)) <= exact
    for kind in (torch.float32, torch.float64):
        running = [normal(seed, channels, dtype=kind).abs() for seed in (8, 9)]
        moved = [x.double().clone() for x in running]
        got, expected = (
            ops.norm_statistics(rows, 0.1, *running, 0.3),
            norm_statistics_reference(rows.double(), 0.1, *moved, 0.3),
        )
        for x, y in zip((*got, *running), (*expected, *moved), strict=True):
            assert relative_error(x, y) <= max(exact, 1e-7 if kind == torch.float32 else 0.0)
        assert torch.equal(got[0], ops.norm_statistics(rows, 0.1, None, None, 0.3)[0])
    ceiling, samples = options.get("ceiling"), options.get("factor")
    factor = None if samples is None else normal(3, samples, dtype=torch.float64).abs() + 0.5
    affine = normal(4, channels, dtype=torch.float64), normal(5, channels, dtype=torch.float64)
    residual, grad = normal(6, count, channels, dtype=dtype), normal(7, count, channels, dtype=dtype)
    leaves = [x.double().clone().requires_grad_() for x in (rows, *affine, residual)]
    given, own_mean = leaves[3] if "residual" in options else None, rows.double().mean(0)
    deviation = (rows.double().var(0, correction=0) + 1e-5).rsqrt()
    for training in (True, False):
        expected, unclamped = (
            batch_norm_reference(leaves[0], own_mean, deviation, leaves[1], leaves[2], factor, given, end, training)
            for end in (ceiling, None)
        )
        numbers = mean, deviation, *affine
        added = residual if "residual" in options else None
        out = ops.batch_norm(rows, *numbers, factor, added, ceiling, training)
        assert_close(out, expected)
        # What was clamped is taken from the result after a residual, which is rounded.
        decides = out if added is not None else unclamped
        inside = torch.ones_like(out, dtype=torch.bool) if ceiling is None else (decides > 0) & (decides < ceiling)
        found = torch.autograd.grad(unclamped, leaves, grad.double() * inside, allow_unused=True)
        kept = out if ceiling is not None and added is not None else None
        masked, sums = ops.batch_norm_grad_sums(grad, rows, kept, *numbers, factor, ceiling)
        assert_close(sums[1].to(dtype), found[1])
        assert_close(sums[0].to(dtype), found[2])
        if kept is not None:
            assert torch.equal(masked, grad * inside)
        passed, left = (grad, ceiling) if kept is None else (masked, None)
        statistics = sums if training else None
        grad_rows = ops.batch_norm_grad_rows(passed, rows, *numbers, factor, left, statistics, None)
        if count > 2:  # two rows give the same, whatever they hold
            assert_close(grad_rows, found[0])
        if training:  # as if the sums were those of two processes
            half = ops.batch_norm_grad_rows(passed, rows, *numbers, factor, left, sums * 2, count * 2.0)
            assert_close(half, grad_rows)


def test_batch_norm_of_rows_that_are_not_numbers_or_not_there(ops: Any) -> None:
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])
    mean, variance = ops.batch_statistics(rows)
    assert mean.isnan().tolist() == variance.isnan().tolist() == [True, False]
    zero, one = torch.zeros(2), torch.ones(2)
    out = ops.batch_norm(rows, zero, one, None, None, None, None, 3.0, False)
    assert out.nan_to_num(7.0).tolist() == [[1, 2], [7, 3]]
    none = rows[:0]
    assert [x.tolist() for x in ops.batch_statistics(none)] == [[0, 0], [0, 0]]
    assert ops.batch_norm(none, zero, one, None, None, None, None, None, False).shape == (0, 2)
    assert ops.batch_norm_grad_sums(none, none, None, zero, one, None, None, None, None)[1].tolist() == [[0, 0], [0, 0]]
    assert ops.batch_norm_grad_rows(none, none, zero, one, None, None, None, None, None, None).shape == (0, 2)


def test_statistics_of_numbers_far_from_zero(ops: Any) -> None:
    """In float32 a variance of 1 around 1e4 is lost where squares are summed; here also where the parts differ."""
    rows = (normal(1, 3000, 8, dtype=torch.float64) + 1e4 + torch.arange(3000).unsqueeze(1) / 300).float()
    mean, variance = ops.batch_statistics(rows)
    assert relative_error(mean, rows.double().mean(0)) < 1e-6
    assert relative_error(variance, rows.double().var(0, correction=0)) < 1e-4


def test_no_visible_patch(ops: Any) -> None:
    slots, patches = torch.full((2, 3, 4), -1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    geometry = (slots, patches, 4, (7, 7), 1, 1)
    rows, kernel = torch.zeros(0, 8), torch.ones(49, 8)
    table = ops.neighbour_table(*geometry, False)
    assert table.shape == (0, 49)
    assert ops.depthwise_conv(rows, kernel, None, *geometry).shape == (0, 8)
    assert ops.depthwise_conv_grad_rows(rows, kernel, *geometry).shape == (0, 8)
    for channels in (8, 5):
        assert ops.depthwise_conv_grad_kernel(rows[:, :channels], rows[:, :channels], *geometry).equal(
            torch.zeros(49, channels)
        )
    assert ops.max_pool(rows, table, table)[0].shape == (0, 8)
    assert ops.avg_pool(rows, table, table).shape == (0, 8)
    assert ops.voxelise(torch.ones(2, 8, 12, 16), slots, patches, 4).shape == (0, 8)
    assert ops.densify(rows, slots, patches, 4, torch.ones(8)).equal(torch.ones(2, 8, 12, 16))


def test_memory_that_is_not_contiguous_or_not_aligned(ops: Any) -> None:
    slots, patches = make_sites(0, 5)
    geometry = (slots, patches, 4, (7, 7), 1, 1)
    rows, kernel = normal(1, len(patches) * 16, 64, dtype=torch.float32), normal(2, 49, 64, dtype=torch.float32)
    expected = depthwise_conv_reference(rows.double(), kernel.double(), None, *geometry)
    assert_close(ops.depthwise_conv(rows.t().contiguous().t(), kernel.t().contiguous().t(), None, *geometry), expected)
    shifted = torch.cat([torch.zeros(1), rows.flatten()])[1:].view_as(rows)  # contiguous, 4 bytes off
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    assert_close(ops.depthwise_conv(shifted, kernel, None, *geometry), expected)
    spread = slots.repeat_interleave(2, 2)[:, :, ::2]
    assert not spread.is_contiguous()
    assert_close(ops.depthwise_conv(rows, kernel, None, spread, *geometry[1:]), expected)


def test_wrong_arguments_are_refused(ops: Any) -> None:
    slots, patches = make_sites(0, 5)
    geometry = (slots, patches, 4, (3, 3), 1, 1)
    rows, kernel = torch.zeros(len(patches) * 16, 8), torch.zeros(9, 8)
    table = torch.zeros(3, 4, dtype=torch.int32)
    cases: list[Callable[[], Any]] = [
        lambda: ops.depthwise_conv(rows[1:], kernel, None, *geometry),
        lambda: ops.depthwise_conv(rows, kernel[1:], None, *geometry),
        lambda: ops.depthwise_conv(rows, kernel[:, 1:], None, *geometry),
        lambda: ops.depthwise_conv(rows, kernel.double(), None, *geometry),
        lambda: ops.depthwise_conv(rows.half(), kernel.half(), None, *geometry),
        lambda: ops.depthwise_conv(rows, torch.zeros(4, 8), None, slots, patches, 4, (2, 2), 1, 1),
        lambda: ops.depthwise_conv(rows, kernel, None, slots.long(), *geometry[1:]),
        lambda: ops.depthwise_conv_grad_rows(rows[1:], kernel, *geometry),
        lambda: ops.depthwise_conv_grad_kernel(rows, rows[1:], *geometry),
        lambda: ops.neighbour_table(slots, patches, 4, (3, 3), 3, 1, False),
        lambda: ops.neighbour_table(slots, patches, 4, (3, 3), 1, 0, False),
        lambda: ops.max_pool(rows, table.long(), table),
        lambda: ops.max_pool(rows, torch.zeros(1, 256, dtype=torch.int32), table),
        lambda: ops.max_pool_grad_rows(rows, torch.zeros(1, 8, dtype=torch.uint8), table),
        lambda: ops.voxelise(torch.zeros(3, 8, 12, 15), slots, patches, 4),
        lambda: ops.densify(rows[1:], slots, patches, 4, None),
        lambda: ops.densify(rows, slots, patches, 4, torch.zeros(7)),
    ]
    for case in cases:
        with pytest.raises(ValueError):
            case()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_keeps_its_type_under_autocast(ops: Any, dtype: torch.dtype) -> None:
    rows, kernel, bias = (normal(i, *shape, dtype=dtype) for i, shape in enumerate([(50, 12), (12, 7), (7,)]))
    expected = rows.double() @ kernel.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(ops.linear(rows, kernel, None), expected)
        assert_close(ops.linear(rows, kernel, bias), expected + bias.double())
