#!/usr/bin/env python3
"""Builds MinkowskiEngine 0.5.4 for the torch of the Python that runs this file.

MinkowskiEngine's last release is a source archive of 2021. This script takes that archive from the package index,
checks that it is the published one, applies the few edits in `edits.py`, compiles it, compares its convolutions with
dense ones and keeps the wheel, so that a machine pays for the compilation once:

    python cuda_ext/minkowski/build.py --install          # build, or find in the cache, and install
    python cuda_ext/minkowski/build.py --sdist FILE       # without a network
    FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 python cuda_ext/minkowski/build.py    # for a GPU that is not in this machine

Needed beside torch: setuptools and a C++ compiler; for CUDA also nvcc, from CUDA_HOME, from PATH or from NVIDIA's pip
packages. ninja makes it parallel. setup.py calls `build_wheel`, so `pip install --no-build-isolation .` comes here too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # setup.py and the tests load this file by its path
    sys.path.append(str(HERE))

from edits import EDITS, Edit, apply_edits  # noqa: E402
from sdist import SDIST_NAME, SDIST_SHA256, VERSION, BuildError, download_sdist, read_sdist  # noqa: E402

COMPAT = HERE / "compat"
COMPAT_FILES = {
    "cpu": ("cblas.h", "cpu/sources_cpu.cpp", "cpu/torch/extension.h", "cpu/torch/script.h"),
    "cuda": ("cblas.h", "cuda_prelude.h"),
}
# Debug information triples the size of the objects and slows the compiler; nobody steps through this library.
HOST_FLAGS = ("-g0",)
# CUDA 13's own nvtx3 header and the one that CUB brings define the same names.
NVCC_FLAGS = ("-DCCCL_DISABLE_NVTX",)
GIB_PER_JOB = {"cpu": 2.0, "cuda": 4.0}  # peak memory of one compiler process, rounded up
MINUTES = {"cpu": "about a minute on 2 cores", "cuda": "about 16 minutes on 2 cores for each architecture"}


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of a wheel. `cuda` is torch's CUDA version ("13.0"), or None for a CPU-only build."""

    cuda: str | None = None
    architectures: str = ""
    reason: str = ""

    @property
    def kind(self) -> str:
        return "cuda" if self.cuda else "cpu"


# ------------------------------------------------------------------------------------- what to build, and its cache key


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"MinkowskiEngine is compiled against torch, and {sys.executable} cannot import it ({error})."
            " Install it first: pip install 'torch>=2.11'"
        ) from error
    return torch


def choose_target(wanted: str = "auto") -> Target:
    """Decides between a CPU-only and a CUDA build.

    Args:
        wanted: "cpu", "cuda", or "auto": CUDA if torch sees a device or FORCE_CUDA=1 is set.
    """
    torch = import_torch()
    if wanted == "cpu":
        return Target(reason="asked for")
    forced = wanted == "cuda" or os.environ.get("FORCE_CUDA") == "1"
    present = torch.cuda.is_available()
    if torch.version.cuda is None:
        if forced:
            raise BuildError(
                f"a CUDA build was requested, but torch {torch.__version__} has no CUDA."
                " Install a CUDA build of torch, or pass --cpu."
            )
        return Target(reason=f"torch {torch.__version__} has no CUDA")
    if not forced and not present:
        return Target(reason="torch sees no CUDA device")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not architectures and present:
        capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        architectures = ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    if not architectures:
        raise BuildError(
            "a CUDA build was requested without a CUDA device: set TORCH_CUDA_ARCH_LIST to the compute capabilities of the"
            " target GPUs, such as TORCH_CUDA_ARCH_LIST=9.0 for an H100 or H200."
        )
    architectures = ";".join(re.split(r"[;,\s]+", architectures.strip()))
    why = "asked for" if forced else "torch sees a CUDA device"
    return Target(cuda=torch.version.cuda, architectures=architectures, reason=f"architectures {architectures}, {why}")


def torch_exports_blas() -> bool:
    """True if libtorch_cpu has the BLAS functions that compat/cblas.h forwards to, as PyPI's builds for x86-64 do."""
    library = Path(import_torch().__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError:
        return False
    return all(hasattr(loaded, name) for name in ("sgemm_", "dgemm_", "saxpy_", "daxpy_"))


def edits_for(target: Target, edits: Sequence[Edit] = EDITS) -> list[Edit]:
    return [edit for edit in edits if edit.only in (None, target.kind)]


def recipe_hash(target: Target, edits: Sequence[Edit] = EDITS, compat: Path = COMPAT) -> str:
    """Hash of this project's changes to the published sources. Changes for one kind leave wheels of the other valid."""
    parts = [json.dumps([edit.file, edit.old, edit.new, edit.count]) for edit in edits_for(target, edits)]
    parts += [(compat / name).read_text() for name in COMPAT_FILES[target.kind]]
    parts += [*HOST_FLAGS, *(NVCC_FLAGS if target.cuda else ())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def ingredients(target: Target) -> dict[str, str | None]:
    """All that the wheel depends on, except the compiler: a cached wheel should serve a machine without one."""
    return {
        "minkowski_sdist": SDIST_SHA256,
        "torch": str(import_torch().__version__),
        "python": str(sysconfig.get_config_var("SOABI")),
        "platform": sysconfig.get_platform(),
        "libc": "-".join(platform.libc_ver()),
        "blas": "torch" if torch_exports_blas() else "openblas",
        "cuda": target.cuda,
        "architectures": target.architectures,
        "recipe": recipe_hash(target),
    }


def cache_key(parts: dict[str, str | None]) -> str:
    """A folder name of the main ingredients and a hash of all of them."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    kind = "cpu" if not parts["cuda"] else f"cuda{parts['cuda']}-{str(parts['architectures']).replace(';', '_')}"
    return re.sub(r"[^A-Za-z0-9._+-]", "_", f"{VERSION}-torch{parts['torch']}-{kind}-{digest}")


def default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "sparkme" / "minkowski"


# -------------------------------------------------------------------------------------------------- compilers and paths


def nvcc_version(nvcc: Path) -> str:
    """ "13.0" for a compiler of that release, "" if it does not run."""
    try:
        listing = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    release = re.search(r"release (\d+\.\d+)", listing)
    return release.group(1) if release else ""


def nvcc_home(nvcc: Path) -> Path:
    """The toolkit folder of `nvcc`, from its own output, since the one on PATH may be a wrapper."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    trace = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", trace, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else nvcc.resolve().parent.parent


def nvidia_folders(cuda: str) -> list[Path]:
    """Folders with headers and libraries in NVIDIA's pip packages: one for CUDA 13, one per library for CUDA 12."""
    site = Path(import_torch().__file__).parent.parent / "nvidia"
    joint = site / f"cu{cuda.split('.')[0]}"
    return [joint] if joint.is_dir() else sorted(path.parent for path in site.glob("*/include"))


def find_nvcc(cuda: str) -> tuple[Path | None, list[str]]:
    """The first nvcc of torch's major version (torch refuses others), and the rejected ones."""
    candidates = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += [Path(path) for path in [shutil.which("nvcc")] if path]
    candidates += [folder / "bin" / "nvcc" for folder in (*nvidia_folders(cuda), Path("/usr/local/cuda"))]
    rejected: list[str] = []
    for nvcc in filter(Path.is_file, candidates):
        version = nvcc_version(nvcc)
        if version.split(".")[0] == cuda.split(".")[0]:
            return nvcc, rejected
        rejected.append(f"{nvcc} is version {version or 'unknown'}")
    return None, rejected


def nvcc_packages(cuda: str) -> list[str]:
    """NVIDIA's pip packages of the compiler, its headers and CCCL, in torch's version."""
    major = int(cuda.split(".")[0])
    if major >= 13:
        names = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl"]
    else:
        names = [f"nvidia-cuda-nvcc-cu{major}", f"nvidia-cuda-cccl-cu{major}"]
    return [f"{name}=={cuda}.*" for name in names]


def require_cuda_home(cuda: str) -> Path:
    nvcc, rejected = find_nvcc(cuda)
    if nvcc is None:
        raise BuildError(
            f"a CUDA build needs nvcc {cuda.split('.')[0]}, since torch was built with CUDA {cuda}"
            + (f" ({', '.join(rejected)})" if rejected else "")
            + f": pass --install-nvcc, or pip install {' '.join(nvcc_packages(cuda))}, or set CUDA_HOME, or pass --cpu."
        )
    return nvcc_home(nvcc)


def check_tools(target: Target) -> None:
    """Checks the requirements before any long work."""
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"no C++ compiler ({compiler}): install one (apt-get install g++, dnf install gcc-c++,"
            " conda install cxx-compiler) or set CXX."
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise BuildError(
            f"Python's headers are missing ({header}): install them (apt-get install python3-dev, dnf install python3-devel)."
        )
    if importlib.util.find_spec("setuptools") is None:
        raise BuildError("setuptools is not installed in this Python: pip install 'setuptools>=77'")
    if target.cuda:
        require_cuda_home(target.cuda)


def parallel_jobs(kind: str) -> int:
    """Number of compiler processes: MAX_JOBS, or else as many as cores and memory allow."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(cores, int(memory_gib / GIB_PER_JOB[kind])))


def build_environment(target: Target, work: Path, blas: str) -> dict[str, str]:
    """Environment variables of setup.py, torch's build and the compilers. Ours come first, so that they win."""
    env = dict(os.environ, MAX_JOBS=str(parallel_jobs(target.kind)))

    def prepend(name: str, separator: str, *values: str | Path) -> None:
        env[name] = separator.join([*map(str, values), *([env[name]] if env.get(name) else [])])

    # ninja is looked for on PATH; in a virtual environment that was not activated it lies beside the interpreter.
    prepend("PATH", os.pathsep, sysconfig.get_path("scripts"))
    prepend("CPPFLAGS", " ", *HOST_FLAGS)
    headers, libraries = work / "compat", work / "lib"
    shutil.copytree(COMPAT, headers)
    libraries.mkdir()
    if blas == "torch":
        # setup.py always links a BLAS. An archive without members satisfies the linker; libtorch_cpu has the functions.
        (libraries / "libopenblas.a").write_bytes(b"!<arch>\n")
        prepend("CPPFLAGS", " ", f"-I{headers}")
        prepend("NVCC_PREPEND_FLAGS", " ", f"-I{headers}")
    prepend("LDFLAGS", " ", f"-L{libraries}")
    if not target.cuda:
        prepend("CPPFLAGS", " ", f"-I{headers / 'cpu'}")
    else:
        home, folders = require_cuda_home(target.cuda), nvidia_folders(target.cuda)
        env.update(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=target.architectures)
        prepend("NVCC_PREPEND_FLAGS", " ", *NVCC_FLAGS, f"-include {headers / 'cuda_prelude.h'}")
        # The headers of cublas, cusparse and cusolver that torch's pip packages bring, for toolkits without them; and
        # CCCL, which CUDA 13 moved away from where a host compiler finds it.
        includes = [base / "include" for base in dict.fromkeys((home, *folders))]
        includes += [path / "cccl" for path in includes if (path / "cccl").is_dir()]
        prepend("CPATH", os.pathsep, *includes)
        link_versioned_libraries(libraries, [*(base / "lib" for base in folders), home / "lib64"])
    return env


def link_versioned_libraries(destination: Path, folders: Sequence[Path]) -> None:
    """Links libNAME.so.N as libNAME.so for the linker, since NVIDIA's pip packages lack that link."""
    for folder in folders:
        for library in sorted(folder.glob("lib*.so.*")):
            link = destination / (library.name.partition(".so.")[0] + ".so")
            if not link.exists():
                link.symlink_to(library)


# ----------------------------------------------------------------------------------------------------------- the steps


class Progress:
    """Prints the name of every step and, at its end, its time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.done += 1
        start = time.monotonic()
        print(f"  {self.done}/{self.total} {name} ...", end="", flush=True)
        try:
            yield
        except BaseException:
            print(" failed", flush=True)
            raise
        print(f" {time.monotonic() - start:.0f} s", flush=True)


def write_beside(destination: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file and renames it, so that `destination` is always complete."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    neighbour = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        write(neighbour)
        os.replace(neighbour, destination)
    finally:
        neighbour.unlink(missing_ok=True)


def get_sdist(given: Path | None, cache: Path) -> bytes:
    """The published archive: `given` (or SPARKME_MINKOWSKI_SDIST), else from the cache, else from the index."""
    variable = os.environ.get("SPARKME_MINKOWSKI_SDIST")
    given = given or (Path(variable) if variable else None)
    if given is not None:
        return read_sdist(given)
    kept = cache / SDIST_NAME
    if kept.is_file():
        with contextlib.suppress(BuildError):
            return read_sdist(kept)
    content = download_sdist()
    write_beside(kept, lambda path: path.write_bytes(content))
    return content


def unpack_sdist(content: bytes, work: Path) -> Path:
    archive = work / SDIST_NAME
    archive.write_bytes(content)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return work / SDIST_NAME.removesuffix(".tar.gz")


def run_logged(command: Sequence[str], log: Path, what: str, **options: Any) -> None:
    """Runs a command with its output in `log`; if it fails, prints the first errors and the end."""
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, **options).returncode
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
        print("\n" + "\n".join([*errors[:10], "...", *lines[-25:]]), file=sys.stderr)
        raise BuildError(f"{what} failed with status {status}. The whole output is in {log}")


def compile_wheel(source: Path, target: Target, work: Path, log: Path, blas: str) -> Path:
    options = ["--blas=openblas", "--force_cuda" if target.cuda else "--cpu_only"]
    command = [sys.executable, "setup.py", *options, "bdist_wheel", "--dist-dir", str(work / "dist")]
    run_logged(command, log, "compiling MinkowskiEngine", cwd=source, env=build_environment(target, work, blas))
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def self_check(wheel: Path, target: Target, work: Path, log: Path) -> None:
    """Loads the package in a new process, without installation, and compares its convolutions with dense ones."""
    unpacked = work / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    command = [sys.executable, "-P", str(HERE / "self_check.py"), str(unpacked), "--expect", target.kind]
    run_logged(command, log, "the self-check of the built MinkowskiEngine", cwd=work)


# ------------------------------------------------------------------------------------------------------------ the whole


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that two builds of a wheel share a compilation. Without file locks, both compile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build_wheel(*, sdist: Path | None = None, cache: Path | None = None, wanted: str = "auto", force: bool = False) -> Path:
    """A checked wheel of MinkowskiEngine for this Python and torch, from the cache if possible.

    Args:
        sdist: The published archive; by default it comes from pip's index.
        cache: Folder of finished wheels.
        wanted: "auto", "cpu" or "cuda", see `choose_target`.
        force: Build even if the cache has the wheel.

    Raises:
        BuildError: in one line, with what to change.
    """
    cache = (cache or default_cache()).absolute()
    target = choose_target(wanted)
    parts = ingredients(target)
    folder = cache / cache_key(parts)
    title = f"MinkowskiEngine {VERSION} for torch {parts['torch']}, {target.kind} ({target.reason})"
    try:
        with locked(cache / f"{folder.name}.lock"):
            wheels = sorted(folder.glob("*.whl"))
            if wheels and not force:
                print(f"{title}: from the cache, {folder}", flush=True)
                return wheels[0]
            check_tools(target)
            log = cache / f"{folder.name}.log"
            log.write_text("")
            print(f"{title}; log: {log}", flush=True)
            # Not in the cache, which may be a slow network disk; and compilers dislike blanks in a path.
            with tempfile.TemporaryDirectory(prefix="sparkme-minkowski-") as work:
                return _build(sdist, cache, folder, target, parts, Path(work), log)
    except OSError as error:
        raise BuildError(
            f"cannot build MinkowskiEngine: {error}. The cache is {cache} (--cache DIR), the work folder"
            f" {tempfile.gettempdir()} (TMPDIR)."
        ) from error


def _build(
    sdist: Path | None,
    cache: Path,
    folder: Path,
    target: Target,
    parts: dict[str, str | None],
    work: Path,
    log: Path,
) -> Path:
    progress = Progress(4)
    with progress.step("published sources, sha256 checked"):
        source = unpack_sdist(get_sdist(sdist, cache), work)
    with progress.step("edits"):
        apply_edits(source, edits_for(target))
        if not target.cuda:
            shutil.copy(COMPAT / "cpu" / "sources_cpu.cpp", source / "src")
    with progress.step(f"compiling, {parallel_jobs(target.kind)} at a time ({MINUTES[target.kind]})"):
        wheel = compile_wheel(source, target, work, log, str(parts["blas"]))
    with progress.step("self-check against dense convolutions"):
        self_check(wheel, target, work, log)
    kept = folder / wheel.name
    write_beside(folder / "ingredients.json", lambda path: path.write_text(json.dumps(parts, indent=2) + "\n"))
    write_beside(kept, lambda path: shutil.copyfile(wheel, path))
    return kept


def pip_install(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError(f"failed, see above: {' '.join(command)}")


def install_nvcc_if_missing(target: Target) -> None:
    if target.cuda and find_nvcc(target.cuda)[0] is None:
        packages = nvcc_packages(target.cuda)
        print(f"nvcc {target.cuda} is missing, installing {' '.join(packages)}", flush=True)
        pip_install(*packages)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python cuda_ext/minkowski/build.py",
        description=f"Builds MinkowskiEngine {VERSION} for the torch of this Python, checks it and keeps the wheel."
        " For CUDA where torch sees a device or FORCE_CUDA=1 is set, else for the CPU only.",
        epilog="Variables: FORCE_CUDA=1 builds for CUDA without a GPU, TORCH_CUDA_ARCH_LIST says for which GPUs,"
        " CUDA_HOME where nvcc is, MAX_JOBS how many compilers run at a time, SPARKME_MINKOWSKI_SDIST stands for"
        " --sdist where no option can be passed (pip install).",
    )
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"{SDIST_NAME}, for machines without a network")
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"where wheels are kept (default: {default_cache()})")
    parser.add_argument("--install", action="store_true", help="install the wheel into the environment of this Python")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cuda", dest="wanted", action="store_const", const="cuda", help="build for CUDA, as FORCE_CUDA=1 does")
    kind.add_argument(
        "--cpu", dest="wanted", action="store_const", const="cpu", help="build for the CPU only, even beside a GPU"
    )
    parser.add_argument(
        "--install-nvcc", action="store_true", help="for a CUDA build without nvcc, install NVIDIA's pip packages of it"
    )
    parser.add_argument("--force", action="store_true", help="build even if the cache has the wheel")
    parser.set_defaults(wanted="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.install_nvcc:
            install_nvcc_if_missing(choose_target(arguments.wanted))
        wheel = build_wheel(sdist=arguments.sdist, cache=arguments.cache, wanted=arguments.wanted, force=arguments.force)
        if arguments.install:
            pip_install("--no-deps", "--no-index", "--force-reinstall", str(wheel))
            print(f"MinkowskiEngine {VERSION}: installed in {sys.prefix}")
        else:
            print(wheel)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
