"""Compiles the CUDA sources for the host, where blocks and threads are emulated by on_host.h.

The operators arrive in a library of their own, `torch.ops.sparkme_on_host`, under the schemas of `torch.ops.sparkme`, and take
tensors on the CPU. By hand, with the address sanitizer:

    python tests/support/cuda_on_host/build.py build/on_host -fsanitize=address -g
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    SPARKME_ON_HOST_LIBRARY=build/on_host/on_host.so ASAN_OPTIONS=detect_leaks=0 \\
        python -m pytest tests/whole/test_cuda_on_host.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from compiled import cache_folder, digest, write_whole
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "cuda_ext" / "csrc" / "cuda"
# Outside of an array, not aligned for a vector: the process ends there.
CHECKS = ("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def commands(folder: Path, *flags: str) -> tuple[dict[Path, list[str]], list[str]]:
    """What compiles the .cu files as C++, and what links the objects to folder/on_host.so."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [str(COMPILER), "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", abi, *CHECKS, *flags]
    headers = ["-DSPARKME_ON_HOST", f"-I{HERE}", *(f"-isystem{path}" for path in include_paths("cpu"))]
    # Those that setup.py compiles. The slowest start first.
    sources = [SOURCES / "operators.cu", *sorted(SOURCES.glob("depthwise_*.cu"), key=lambda path: -path.stat().st_size)]
    objects = {source: str(folder / f"{source.stem}.o") for source in sources}
    compiling = {x: [*common, *headers, "-MD", "-x", "c++", "-c", str(x), "-o", to] for x, to in objects.items()}
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", *objects.values(), f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_libraries}"]
    return compiling, [*common, *link, "-o", str(folder / "on_host.so")]


def compile_library(folder: Path, *flags: str) -> Path:
    """Raises CalledProcessError with the compiler's words on stderr. Beside each object is a .d file: what was read for it."""
    folder.mkdir(parents=True, exist_ok=True)
    compiling, linking = commands(folder, *flags)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), compiling.values()))
    subprocess.run(linking, check=True)
    return folder / "on_host.so"


def kept_library() -> Path:
    """The library from the cache, or compiled into it.

    Its name has the hash of all that the compiler read, headers of torch and of the system too; which files those are
    stands in a list beside it, from the compiler itself. A change of any of them, of the commands or of the compiler
    gives another name. The project's own files are read before the compiler reads them, so that one that changes meanwhile
    is not taken for what was compiled.
    """
    place = digest(repr(commands(Path())))  # of a checkout and a torch; it has one library at a time
    version = subprocess.run([str(COMPILER), "--version"], capture_output=True, text=True, check=True).stdout
    own = sorted(path for top in (SOURCES.parent, HERE) for path in top.rglob("*") if path.is_file() and path.suffix != ".pyc")
    searched = [os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH")]
    key = digest(version, str(torch.version.git_version), *searched, *map(str, own), *(path.read_bytes() for path in own))
    folder = cache_folder()
    listing = folder / f"on_host-{place}-{key}.json"

    def library(inputs: list[str]) -> Path:
        return folder / f"on_host-{place}-{digest(key, *(Path(path).read_bytes() for path in inputs))}.so"

    try:
        found = library(json.loads(listing.read_text()))
        if found.exists():
            return found
    except (OSError, ValueError):  # no list yet, or a header is gone
        pass
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = compile_library(Path(temporary))
        inputs = sorted({path for file in Path(temporary).glob("*.d") for path in read_dependencies(file)})
        for old in folder.glob(f"on_host-{place}-*"):
            old.unlink(missing_ok=True)
        found = library(inputs)
        os.replace(made, found)
    write_whole(listing, json.dumps(inputs).encode())
    return found


def read_dependencies(file: Path) -> list[str]:
    """The files that a make rule `object: file file \\ file` names."""
    return file.read_text().partition(": ")[2].replace("\\\n", " ").split()


if __name__ == "__main__":
    print(compile_library(Path(sys.argv[1]), *sys.argv[2:]))
