"""The operators on a GPU: numbers, gradients, no waiting for the device, CUDA graphs, and the same result twice."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_calls import DIFFERENTIABLE, NAMES, calls, detached, overload, results, without_rows
from sites import make_sites, normal, relative_error
from torch import Tensor

from sparkme import ops

_REASON = "torch sees no GPU" if not torch.cuda.is_available() else ops.unavailable(on_gpu=True)
if _REASON:
    pytest.skip(f"{_REASON}: this file's tests are not made", allow_module_level=True)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
# pixels, kernel_size, stride, dilation
WINDOWS = [
    (8, (1, 1), 1, 1),
    (8, (3, 3), 1, 1),
    (4, (3, 3), 1, 1),
    (2, (3, 3), 1, 1),
    (1, (3, 3), 1, 1),
    (8, (3, 5), 1, 1),
    (4, (5, 5), 1, 2),
    (8, (3, 3), 2, 1),
    (2, (3, 3), 2, 1),
    (4, (1, 1), 2, 1),
    (8, (2, 2), 2, 1),
    (16, (4, 4), 4, 1),
    (16, (7, 7), 2, 1),
]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before
    torch.cuda.synchronize()  # so that an error belongs to the test that made it


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 0.0) -> None:
    """Values and gradients; the reference in float64 on the CPU. Everything twice, for the same bits."""
    leaves = [x.double().requires_grad_() for x in inputs]
    expected = theirs(*leaves)
    weights = normal(9, *expected.shape, dtype=inputs[0].dtype)
    expected_grads = torch.autograd.grad(expected, leaves, weights.double())
    results = []
    for _ in range(2):
        on_gpu = [x.cuda().requires_grad_() for x in inputs]
        out = ours(*on_gpu)
        results.append((out.detach(), *torch.autograd.grad(out, on_gpu, weights.cuda())))
    for got, again, wanted in zip(*results, (expected, *expected_grads), strict=True):
        assert got.dtype == inputs[0].dtype
        assert relative_error(got, wanted) <= (tolerance or TOLERANCE[inputs[0].dtype])
        assert torch.equal(got, again), "another result from the same numbers"


def sites_and_tables(keep: int, pixels: int, size: tuple[int, int], stride: int, dilation: int) -> list[Tensor]:
    """Slots, patches, and both tables, on the CPU."""
    sites = make_sites(keep, keep, batch=4)
    return [*sites, *(ops.neighbour_table_reference(*sites, pixels, size, stride, dilation, t) for t in (False, True))]


@pytest.mark.parametrize("keep", [1, 5, 12])
@pytest.mark.parametrize(("pixels", "size", "stride", "dilation"), WINDOWS)
def test_neighbour_table(pixels: int, size: tuple[int, int], stride: int, dilation: int, keep: int) -> None:
    slots, patches, *tables = sites_and_tables(keep, pixels, size, stride, dilation)
    for transposed, expected in zip((False, True), tables, strict=True):
        options: dict[str, Any] = {"stride": stride, "dilation": dilation, "transposed": transposed}
        assert torch.equal(ops.neighbour_table(slots.cuda(), patches.cuda(), pixels, size, **options).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "groups"), [((64, 128), 1), ((3, 40), 1), ((50, 33), 1), ((64, 32), 8), ((256, 512), 2)])
@pytest.mark.parametrize(("pixels", "size", "stride", "dilation"), WINDOWS)
def test_sparse_conv(
    pixels: int, size: tuple[int, int], stride: int, dilation: int, channels: tuple[int, int], groups: int, dtype: torch.dtype
) -> None:
    _, _, table, inverse = sites_and_tables(5, pixels, size, stride, dilation)
    on_gpu = table.cuda(), inverse.cuda()
    compare(
        lambda rows, kernel: ops.sparse_conv(rows, kernel, *on_gpu, groups),
        lambda rows, kernel: ops.sparse_conv_reference(rows, kernel, table, inverse, groups),
        normal(1, len(inverse), channels[0], dtype=dtype),
        normal(2, size[0] * size[1], channels[0] // groups, channels[1], dtype=dtype),
    )


def test_sparse_conv_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    _, _, table, inverse = sites_and_tables(5, 8, (3, 3), 2, 1)
    on_gpu = table.cuda(), inverse.cuda()
    compare(
        lambda rows, kernel: ops.sparse_conv(rows, kernel, *on_gpu),
        lambda rows, kernel: ops.sparse_conv_reference(rows, kernel, table, inverse, 1),
        normal(1, len(inverse), 64, dtype=torch.float32),
        normal(2, 9, 64, 128, dtype=torch.float32),
        tolerance=2e-3,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 8, 96, 1024])
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (7, 7)])
@pytest.mark.parametrize("pixels", [1, 2, 4, 8, 16, 6])
def test_depthwise_conv(pixels: int, size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    for keep in (1, 5, 12):
        slots, patches = make_sites(keep, keep, batch=2)
        on_gpu = slots.cuda(), patches.cuda(), pixels, size
        compare(
            lambda rows, kernel: ops.depthwise_conv(rows, kernel, None, *on_gpu),  # noqa: B023
            lambda rows, kernel: ops.depthwise_conv_reference(rows, kernel, None, slots, patches, pixels, list(size), 1, 1),  # noqa: B023
            normal(1, len(patches) * pixels**2, channels, dtype=dtype),
            normal(2, size[0] * size[1], channels, dtype=dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pixels", "size", "stride", "dilation"), [w for w in WINDOWS if w[1][0] % 2])
def test_depthwise_conv_of_any_window(
    pixels: int, size: tuple[int, int], stride: int, dilation: int, dtype: torch.dtype
) -> None:
    slots, patches = make_sites(0, 5, batch=4)
    on_gpu, options = (slots.cuda(), patches.cuda(), pixels, size), {"stride": stride, "dilation": dilation}
    compare(
        lambda rows, kernel: ops.depthwise_conv(rows, kernel, None, *on_gpu, **options),
        lambda rows, kernel: ops.depthwise_conv_reference(
            rows, kernel, None, slots, patches, pixels, list(size), stride, dilation
        ),
        normal(1, len(patches) * pixels**2, 72, dtype=dtype),
        normal(2, size[0] * size[1], 72, dtype=dtype),
    )


@pytest.mark.parametrize("pixels", [1, 2, 4, 8])
def test_depthwise_conv_of_many_patches(pixels: int) -> None:
    """So many that every block has several pieces of work, with the weights' gradient in many partial sums."""
    slots, patches = (x.cuda() for x in make_sites(0, 20, batch=64, f_h=7, f_w=7))
    rows, grad = (normal(s, len(patches) * pixels**2, 256, dtype=torch.bfloat16).cuda() for s in (1, 2))
    kernel = normal(3, 49, 256, dtype=torch.bfloat16).cuda()
    geometry = slots, patches, pixels, [7, 7], 1, 1
    # Against the kernels without tiles, which take any number of channels.
    width = slice(0, 255)
    op = torch.ops.sparkme
    cases = [
        (lambda r, k, *g: op.depthwise_conv(r, k, None, *g), rows, kernel),
        (op.depthwise_conv_grad_rows, grad, kernel),
        (op.depthwise_conv_grad_kernel, rows, grad),
    ]
    for operator, a, b in cases:
        fast, plain = operator(a, b, *geometry), operator(a[:, width], b[:, width], *geometry)
        assert relative_error(fast[:, width], plain) < 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 64])
@pytest.mark.parametrize(("pixels", "size", "stride"), [(16, (3, 3), 2), (8, (2, 2), 2), (4, (3, 3), 1)])
def test_pooling(pixels: int, size: tuple[int, int], stride: int, channels: int, dtype: torch.dtype) -> None:
    _, _, table, inverse = sites_and_tables(5, pixels, size, stride, 1)
    on_gpu = table.cuda(), inverse.cuda()
    # No two numbers of a channel are equal within reach of each other, also in bfloat16.
    rows = (torch.arange(len(inverse)) * 37 % 251 - 125).view(-1, 1).repeat(1, channels).to(dtype)
    for name in ("max_pool", "avg_pool"):
        ours, theirs = getattr(ops, name), getattr(ops, f"{name}_reference")
        compare(lambda r: ours(r, *on_gpu), lambda r: theirs(r, table, inverse), rows)  # noqa: B023


def test_max_pool_takes_nan_and_the_first_of_equals() -> None:
    nan = float("nan")
    rows = torch.tensor([[1.0, nan, 0.0], [1.0, 2.0, nan], [0.0, nan, nan]], device="cuda")
    table = torch.tensor([[-1, 0, 1, 2]], dtype=torch.int32, device="cuda")
    out, taken = torch.ops.sparkme.max_pool(rows, table, table)
    assert out.isnan().tolist() == [[False, True, True]] and taken.tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("pixels", [1, 4, 32])
def test_voxelise_and_densify(pixels: int, channels: int, dtype: torch.dtype) -> None:
    slots, patches = make_sites(0, 5)
    sites = slots, patches, pixels
    on_gpu = slots.cuda(), patches.cuda(), pixels
    dense = normal(1, 3, channels, 3 * pixels, 4 * pixels, dtype=dtype)
    for memory in (torch.contiguous_format, torch.channels_last):
        compare(
            lambda x: ops.voxelise(x.contiguous(memory_format=memory), *on_gpu),  # noqa: B023
            lambda x: ops.voxelise_reference(x, *sites),
            dense,
        )
    rows, fill = normal(2, len(patches) * pixels**2, channels, dtype=dtype), normal(3, channels, dtype=dtype)
    compare(lambda r: ops.densify(r, *on_gpu), lambda r: ops.densify_reference(r, *sites, None), rows)
    compare(lambda r, f: ops.densify(r, *on_gpu, f), lambda r, f: ops.densify_reference(r, *sites, f), rows, fill)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype) -> None:
    rows, kernel, bias = normal(1, 300, 64, dtype=dtype), normal(2, 64, 96, dtype=dtype), normal(3, 96, dtype=dtype)
    compare(lambda r, k: ops.linear(r, k), lambda r, k: ops.linear_reference(r, k, None), rows, kernel)
    compare(ops.linear, ops.linear_reference, rows, kernel, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"ceiling": float("inf")}, {"factor": 2}, {"residual": 1}, {"residual": 1, "ceiling": 6.0}]
)
@pytest.mark.parametrize(("count", "channels"), [(6, 3), (96, 72), (100_000, 64), (5000, 2048), (3001, 17)])
def test_batch_norm(count: int, channels: int, options: dict[str, Any], training: bool, dtype: torch.dtype) -> None:
    rows = normal(1, count, channels, dtype=dtype) * 2 + normal(2, channels, dtype=dtype)
    mean, variance = ops.batch_statistics(rows.cuda())
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(mean, rows.double().mean(0)) < exact
    assert relative_error(variance, rows.double().var(0, correction=0)) < exact
    numbers = rows.double().mean(0), (rows.double().var(0, correction=0) + 1e-5).rsqrt()
    factor = normal(3, 2, dtype=torch.float64).abs() if "factor" in options and count % 2 == 0 else None
    ceiling = options.get("ceiling")
    # The reference does not round, and at a bound that decides over a gradient.
    loose = 0.1 if dtype == torch.bfloat16 and ceiling is not None else 1e-3 if ceiling is not None else 0.0

    def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        on_gpu = [x.cuda() for x in numbers]
        given, each = r if "residual" in options else None, None if factor is None else factor.cuda()
        out = ops.batch_norm(x, *on_gpu, w, b, training=training, factor=each, residual=given, ceiling=ceiling)
        return out + 0 * r

    def theirs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        given = r if "residual" in options else None
        return ops.batch_norm_reference(x, *numbers, w, b, factor, given, ceiling, training) + 0 * r

    affine = normal(4, channels, dtype=dtype), normal(5, channels, dtype=dtype)
    compare(ours, theirs, rows, *affine, normal(6, count, channels, dtype=dtype), tolerance=max(loose, 2 * TOLERANCE[dtype]))


ON_CUDA = [name for name in NAMES if torch._C._dispatch_has_kernel_for_dispatch_key(f"sparkme::{name}", "CUDA")]


def call_on_gpu(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, tuple[Any, ...]]:
    """The operator and its arguments. Gradients are not differentiated again."""
    arguments = calls(dtype, "cuda", channels=32)[name]
    return overload(name), arguments if name in DIFFERENTIABLE else detached(arguments)


@pytest.mark.parametrize("name", ON_CUDA)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(*call_on_gpu(name))


@pytest.mark.parametrize("name", ON_CUDA)
def test_no_rows(name: str) -> None:
    operator, arguments = call_on_gpu(name)
    for value in results(operator(*without_rows(name, arguments))):
        assert not value.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ON_CUDA)
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    operator, arguments = call_on_gpu(name, dtype)

    def run() -> None:
        first = results(operator(*arguments))[0]
        if first.requires_grad:
            first.backward(torch.ones_like(first))

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_and_another_device() -> None:
    """Kernels are queued where torch says: after a long piece of work on the same stream they see its result."""
    operator, arguments = call_on_gpu("depthwise_conv", torch.bfloat16)
    rows, *rest = detached(arguments)
    expected = operator(rows * 2, *rest)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = operator(rows * 2, *rest)
    stream.synchronize()
    assert torch.equal(got, expected)
    if torch.cuda.device_count() > 1:
        other = [a.to("cuda:1") if isinstance(a, Tensor) else a for a in (rows * 2, *rest)]
        assert torch.equal(operator(*other).to("cuda:0"), expected)


def test_a_captured_training_step_equals_an_eager_one() -> None:
    """Tables, convolutions, pooling and densify, forward and backward, in one CUDA graph, replayed with new numbers."""
    slots, patches = (x.cuda() for x in make_sites(0, 5, batch=4))
    images = normal(1, 4, 3, 48, 64, dtype=torch.bfloat16).cuda()
    shapes = [(49, 3, 64), (9, 64, 64), (49, 64), (64, 96), (9, 96, 32), (32,)]
    weights = [(normal(i, *shape, dtype=torch.bfloat16) / 8).cuda().requires_grad_() for i, shape in enumerate(shapes)]

    def step() -> list[Tensor]:
        stem, conv, depthwise, pointwise, down, fill = weights
        rows = ops.voxelise(images, slots, patches, 16)
        rows = ops.sparse_conv(rows, stem, ops.neighbour_table(slots, patches, 16, (7, 7), stride=2), None)
        tables = [ops.neighbour_table(slots, patches, 8, (3, 3), stride=2, transposed=t) for t in (False, True)]
        rows = ops.max_pool(rows, *tables)
        same = [ops.neighbour_table(slots, patches, 4, (3, 3), transposed=t) for t in (False, True)]
        rows = ops.sparse_conv(rows, conv, *same)
        rows = ops.linear(ops.depthwise_conv(rows, depthwise, None, slots, patches, 4, (7, 7)), pointwise)
        tables = [ops.neighbour_table(slots, patches, 4, (3, 3), stride=2, transposed=t) for t in (False, True)]
        rows = ops.sparse_conv(rows, down, *tables)
        loss = ops.densify(rows, slots, patches, 2, fill).float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (2, 3):
        images.copy_(normal(seed, *images.shape, dtype=torch.bfloat16))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.isfinite(expected).all() and torch.equal(got, expected)


def test_compiled_equals_eager() -> None:
    operator, arguments = call_on_gpu("depthwise_conv")

    def layer(rows: Tensor, *rest: Any) -> Tensor:
        return torch.relu(operator(rows, *rest)) * 2

    assert relative_error(torch.compile(layer, fullgraph=True)(*arguments), layer(*arguments)) < 1e-6


def encoder_step(name: str) -> tuple[Callable[[], Tensor], Any]:
    """A forward and backward pass of a whole encoder on the engine cuda_ext, in bf16, and the encoder."""
    import sparkme
    from sparkme.networks.create import create_encoder

    torch.manual_seed(0)
    encoder = create_encoder(name, drop_path=0.0).cuda().set_engine("cuda_ext").train()
    images = torch.randn(4, 3, 64, 96, device="cuda")
    active = sparkme.random_active(4, (2, 3), 0.5, generator=torch.Generator().manual_seed(0)).cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            maps = encoder(images, active, 3)
        loss = sum((x.rows.float().square().mean() for x in maps), torch.zeros((), device="cuda"))
        loss.backward()
        return loss.detach()

    return step, encoder


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_an_encoder_step_does_not_wait_for_the_device(name: str) -> None:
    step, _ = encoder_step(name)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_a_captured_encoder_step_equals_an_eager_one(name: str) -> None:
    step, encoder = encoder_step(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            encoder.zero_grad(set_to_none=True)
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert relative_error(captured, expected) < 1e-6
    for ours, theirs in zip((p.grad for p in encoder.parameters() if p.grad is not None), gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-2
