"""Compiles the CUDA sources for the host, where blocks and threads are emulated by on_host.h.

The operators arrive in a library of their own, `torch.ops.sparkme_on_host`, under the schemas of `torch.ops.sparkme`, and take
tensors on the CPU. By hand, with the address sanitizer:

    python tests/support/cuda_on_host/build.py /tmp/on_host -fsanitize=address -g
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    SPARKME_ON_HOST_LIBRARY=/tmp/on_host/on_host.so ASAN_OPTIONS=detect_leaks=0 \\
        python -m pytest tests/whole/test_cuda_on_host.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "cuda_ext" / "csrc" / "cuda"
# Outside of an array, not aligned for a vector: the process ends there.
CHECKS = ("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def compile_library(folder: Path, *flags: str) -> Path:
    """Compiles every .cu file as C++. Raises CalledProcessError with the compiler's words on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [str(COMPILER), "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", abi, *CHECKS, *flags]
    headers = ["-DSPARKME_ON_HOST", f"-I{HERE}", *(f"-isystem{path}" for path in include_paths("cpu"))]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*common, *headers, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        # The slowest to compile are the largest, and start first.
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cu"), key=lambda path: -path.stat().st_size)))
    library = folder / "on_host.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", *objects, f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_libraries}"]
    subprocess.run([*common, *link, "-o", str(library)], check=True)
    return library


if __name__ == "__main__":
    print(compile_library(Path(sys.argv[1]), *sys.argv[2:]))
