"""The Triton kernels compiled for GPUs that are not here: tensor cores are used and registers suffice."""

import gzip
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import cache_folder, digest, write_whole

from sparkme.ops import triton_conv

triton = pytest.importorskip("triton", reason="this torch has no Triton")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = [
    pytest.mark.skipif(
        not CUOBJDUMP.exists() and not shutil.which("cuobjdump"), reason="no cuobjdump to read machine code with"
    ),
]
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
SHARED_BYTES = 99 << 10  # of a block on the smaller GPUs of compute capability 8.6 and 8.9

Launch = tuple[str, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands for the kernels' module and keeps what would be launched."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getattr__(self, name: str) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *arguments, **options: recorder.launches.append((name, arguments, options))

        return Kernel()


def machine_code(launch: Launch, architecture: int, folder: Path) -> str:
    """Compiles as Triton's launcher would: pointers and integers that 16 divides, and the integer 1, are known."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import sparkme.ops.triton_kernels as kernels

    name, arguments, options = launch
    kernel = getattr(kernels, name)
    compiler = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, dict(options), {}
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
    for i, parameter in enumerate(kernel.arg_names):
        value = arguments[i] if i < len(arguments) else None
        if isinstance(value, torch.Tensor):
            signature[parameter] = types[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or value == 1:
            signature[parameter] = "constexpr"
            constants.setdefault(parameter, value)
        else:
            signature[parameter] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=compiler)  # Triton keeps it itself
    assert compiled.metadata.shared <= SHARED_BYTES, f"{name}: {compiled.metadata.shared} bytes of shared memory"
    return disassembled(compiled.asm["cubin"], folder)


def disassembled(binary: bytes, folder: Path) -> str:
    """What cuobjdump makes of it, from the cache where this cuobjdump has done so before."""
    tool = str(CUOBJDUMP) if CUOBJDUMP.exists() else str(shutil.which("cuobjdump"))
    kept = cache_folder() / f"sass-{digest(binary, Path(tool).read_bytes())}.gz"
    if not kept.exists():
        (folder / "kernel.cubin").write_bytes(binary)
        done = subprocess.run([tool, "-sass", folder / "kernel.cubin"], capture_output=True, check=True)
        write_whole(kept, gzip.compress(done.stdout))
    return gzip.decompress(kept.read_bytes()).decode()


def launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: tuple[int, int], taps: int, stride: int
) -> list[Launch]:
    """A convolution and its gradients."""
    recorder = Recorder()
    monkeypatch.setattr(triton_conv, "_kernels", lambda: recorder)
    inputs, outputs = 8192, 8192 // stride**2
    table, inverse = (torch.zeros(n, taps, dtype=torch.int32) for n in (outputs, inputs))
    rows, grad = torch.zeros(inputs, channels[0], dtype=dtype), torch.zeros(outputs, channels[1], dtype=dtype)
    kernel = torch.zeros(taps, *channels, dtype=dtype)
    triton_conv.sparse_conv(rows, kernel, table, None, 1)
    if channels[0] > 3:  # images need no gradient
        triton_conv.sparse_conv_grad_rows(grad, kernel, table, inverse, 1)
    triton_conv.sparse_conv_grad_kernel(rows, grad, table, 1)
    return recorder.launches


@pytest.mark.parametrize("architecture", TENSOR_CORES)
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("channels", "taps", "stride"),
    [((64, 64), 9, 1), ((512, 512), 9, 1), ((256, 256), 9, 2), ((3, 64), 49, 2), ((128, 256), 4, 2)],
)
def test_compiles(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    channels: tuple[int, int],
    taps: int,
    stride: int,
    dtype: torch.dtype,
    tf32: bool,
    architecture: int,
) -> None:
    if dtype == torch.bfloat16 and not tf32:
        pytest.skip("bfloat16 does not depend on TF32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    for launch in launches(monkeypatch, dtype, channels, taps, stride):
        skips, precision = launch[2].get("SKIP", False), launch[2].get("PRECISION")
        code = machine_code(launch, architecture, tmp_path)
        counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA", "FFMA", "LDGSTS", "LDL", "STL")}
        # With four warps two of them spill a few, and took up to a third and a tenth less time on an H200 than with eight.
        few = 0 if precision == "ieee" else 50 if skips else 8 if launch[0] == "correlate" else 0
        assert max(counts["STL"], counts["LDL"]) <= few, f"{launch[0]} spills registers"
        if (tf32 or dtype == torch.bfloat16) and launch[0] != "gather_columns":
            assert counts[TENSOR_CORES[architecture]] > 0, "no tensor cores"
            assert counts["LDGSTS"] > 0, "rows are not copied to shared memory asynchronously"
