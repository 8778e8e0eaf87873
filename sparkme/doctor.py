"""Prints what is installed, what each engine can do on this machine, and the command that installs what is missing.

    python -m sparkme.doctor

The exit status is 0 if pretraining can run, else 1. Imports happen inside functions, so that the command works while
requirements are missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sparkme.errors import run_command

BUILD = "python cuda_ext/minkowski/build.py --install"
INSTALL = "pip install --no-build-isolation ."
TOLERANCE = 1e-4
NCCL_BYTES = 2**30  # of shared memory are enough for NCCL


@dataclass(frozen=True)
class Finding:
    """One line of the report: `mend` says how to fix it, `fatal` that pretraining cannot run without it."""

    name: str
    text: str
    mend: str = ""
    fatal: bool = False


def first_printed_line(*command: str) -> str:
    """The first line that a program prints, or "" if it does not run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (result.stdout.strip().splitlines() or [""])[0] if result.returncode == 0 else ""


def check_python() -> Finding:
    return Finding("python", f"{platform.python_version()}, {sys.executable}")


def check_package(name: str, mend: str, *, fatal: bool = True) -> Finding:
    """The installed version of a package, which is not imported."""
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", mend, fatal)


def check_torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", f"cannot be imported: {error}", "pip install 'torch>=2.11' 'torchvision>=0.26'", fatal=True)
    return Finding("torch", f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"))


def check_minkowski() -> Finding:
    """Imports MinkowskiEngine, since one built against another torch is installed but does not load."""
    try:
        import MinkowskiEngine as ME
        import torch
    except (ImportError, OSError) as error:
        try:
            found = f"{metadata.version('MinkowskiEngine')}, but it cannot be imported: {error}"
        except metadata.PackageNotFoundError:
            found = "not installed"
        return Finding("MinkowskiEngine", found, f"in sparkme's source folder: {BUILD}", fatal=True)
    if ME.is_cuda_available():
        return Finding("MinkowskiEngine", f"{ME.__version__}, CPU and CUDA")
    mend = f"to run the engine minkowski on the GPU, in sparkme's source folder: {BUILD}"
    return Finding("MinkowskiEngine", f"{ME.__version__}, CPU only", mend if torch.cuda.is_available() else "")


def check_operators() -> Finding:
    """The extension sparkme._C, which the engine cuda_ext runs on."""
    try:
        from sparkme import ops
    except (ImportError, OSError) as error:
        return Finding("operators", f"cannot be imported: {error}")
    if problem := ops.unavailable(on_gpu=False):
        return Finding("operators", problem, f"for the engine cuda_ext, in sparkme's source folder: {INSTALL}")
    missing = ops.unavailable(on_gpu=True)
    import torch

    mend = f"to run the engine cuda_ext on the GPU, in sparkme's source folder: FORCE_CUDA=1 {INSTALL}"
    return Finding(
        "operators", "CPU only" if missing else "CPU and CUDA", mend if missing and torch.cuda.is_available() else ""
    )


def check_gpu() -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return Finding("GPU", "unknown without torch")
    if not torch.cuda.is_available():
        seen = first_printed_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        if seen:
            mend = "update the NVIDIA driver, or install a torch that was built for its CUDA version"
            return Finding("GPU", f"{seen}, but torch cannot use it", mend)
        return Finding("GPU", "none; everything runs on the CPU")
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPU", ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})" for p in properties))


def check_nvcc() -> Finding:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [str(path) for path in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes]
    found = next((path for path in [*candidates, shutil.which("nvcc")] if path and Path(path).is_file()), None)
    if found is None:
        return Finding("nvcc", "none; only needed to build for a GPU, and installed then")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = version.partition("release ")[2].partition(",")[0]
    return Finding("nvcc", f"{release or 'of unknown version'}, {found}")


def check_compiler() -> Finding:
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    version = first_printed_line(compiler, "--version")
    if version:
        return Finding("C++ compiler", version)
    return Finding("C++ compiler", f"{compiler} does not run; only needed to build MinkowskiEngine and the operators")


def check_cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except (ImportError, OSError):
        return Finding("CPU cores", str(cores))
    return Finding("CPU cores", f"{cores}, torch uses {torch.get_num_threads()} threads")


def check_shared_memory() -> Finding:
    """Shared memory holds locks between processes, and GPUs of one machine may exchange gradients through it."""
    from sparkme.machine import MORE_SHARED_MEMORY, shared_memory, shared_memory_bytes

    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        text = f"{shared_memory()}; cannot be used ({error.strerror}), so one process loads all images"
        return Finding("shared memory", text, MORE_SHARED_MEMORY)
    if shared_memory_bytes() >= NCCL_BYTES:
        return Finding("shared memory", f"{shared_memory()}; enough")
    text = f"{shared_memory()}; enough for image loading and one GPU; several GPUs exchange gradients through up to 1 GB of it"
    return Finding("shared memory", text, MORE_SHARED_MEMORY if num_gpus() > 1 else "")


def num_gpus() -> int:
    try:
        import torch
    except (ImportError, OSError):
        return 0
    return torch.cuda.device_count()


def engine_error(name: str, device: str) -> float:
    """The relative error of a small sparse network against its dense one, on fully visible images."""
    import torch

    import sparkme

    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for channels_in, channels_out in ((3, 8), (8, 8), (8, 8), (8, 8)):
        layers += [torch.nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), torch.nn.ReLU()]
    dense = torch.nn.Sequential(*layers)
    images = torch.randn(2, 3, 32, 32)
    active = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # TF32 is right to three digits only
        expected = dense(images)
        encoder = sparkme.sparsify(dense).to(device).set_engine(name)
        got = encoder(images.to(device), active.to(device))[-1].dense().cpu()
    return float((got - expected).norm() / expected.norm())


def check_engine(name: str, device: str) -> Finding:
    from sparkme.sparse.engines import why_not

    if problem := why_not(name, device):
        return Finding(name, f"{device}: cannot run, {problem}")
    try:
        error = engine_error(name, device)
    except Exception as problem:  # of any kind; the report goes on
        return Finding(name, f"{device}: cannot run, {type(problem).__name__}: {problem}", fatal=device == "cpu")
    if not error <= TOLERANCE:
        mend = f"in sparkme's source folder: {BUILD} --force"
        return Finding(name, f"{device}: WRONG, relative error {error:.0e} to the dense network", mend, fatal=True)
    return Finding(name, f"{device}: works, relative error {error:.0e} to the dense network")


def check_engines() -> Iterator[Finding]:
    """Runs every engine on every kind of device."""
    try:
        import torch

        from sparkme.sparse.engines import ENGINES
    except (ImportError, OSError) as error:
        yield Finding("engines", f"cannot be loaded: {error}", fatal=True)
        return
    for name in ENGINES:
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            yield check_engine(name, device)


def check_installed() -> Iterator[Finding]:
    yield check_python()
    yield check_torch()
    yield check_package("torchvision", "pip install 'torchvision>=0.26'")
    yield check_minkowski()
    yield check_operators()
    for name in ("timm", "safetensors", "pillow", "tqdm", "matplotlib", "tensorboard"):
        yield check_package(name, INSTALL)
    yield check_package("scikit-image", "for the demo's photographs: pip install scikit-image", fatal=False)
    yield check_package("pyarrow", "for --data of Parquet files: pip install pyarrow", fatal=False)
    yield check_package("pycocotools", "for masks and detection: pip install 'sparkme[detection]'", fatal=False)
    yield check_package("onnxruntime", "for ONNX files: pip install 'sparkme[onnx]'", fatal=False)
    yield check_package("tifffile", "for TIFF files of many bands: pip install 'sparkme[tiff]'", fatal=False)


def check_machine() -> Iterator[Finding]:
    yield from (check_gpu(), check_cores(), check_shared_memory(), check_compiler(), check_nvcc())


SECTIONS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Installed", check_installed),
    ("Machine", check_machine),
    ("Engines", check_engines),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sparkme.doctor",
        description="Print what is installed, what each engine can do here, and how to install what is missing. The exit "
        "status is 0 if pretraining can run, else 1.",
    )
    parser.parse_args(argv)
    return run_command(examine, watch=True)


def examine() -> int:
    """Prints all findings. Returns the exit code."""
    findings: list[Finding] = []
    for title, check in SECTIONS:
        print(title)
        for finding in check():
            print(f"  {finding.name:<16} {finding.text}", flush=True)
            findings.append(finding)
    to_mend = [finding for finding in findings if finding.mend]
    if to_mend:
        print("To fix")
        for finding in to_mend:
            print(f"  {finding.name:<16} {finding.mend}")
    fatal = [finding.name for finding in findings if finding.fatal]
    print(f"Pretraining cannot run here: {', '.join(dict.fromkeys(fatal))}." if fatal else "Pretraining can run here.")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
