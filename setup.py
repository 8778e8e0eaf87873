"""Adds the dynamic parts to pyproject.toml: the extension `sparkme._C`, and the requirement of MinkowskiEngine.

The extension is compiled from cuda_ext/csrc, with CUDA if torch sees a GPU. FORCE_CUDA=1 with TORCH_CUDA_ARCH_LIST="8.0;9.0"
compiles the CUDA sources without a GPU; MAX_JOBS is the number of compilers. SPARKME_OPERATORS=compiled uses the extension in
sparkme/ and compiles nothing.

The published MinkowskiEngine does not build unchanged. If the environment has none, the builder in cuda_ext/minkowski makes a
wheel (once per machine, then it comes from a cache), and the requirement points at it.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INSTALLS = {"build", "bdist_wheel", "editable_wheel", "install", "develop"}


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparkme_minkowski_build", ROOT / "cuda_ext" / "minkowski" / "build.py")
    assert spec is not None and spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = builder
    spec.loader.exec_module(builder)
    return builder


def has_working_minkowski(version: str) -> bool:
    """True if this environment has `version` and it loads, which fails after a build against another torch."""
    try:
        if importlib.metadata.version("MinkowskiEngine") != version:
            return False
    except importlib.metadata.PackageNotFoundError:
        return False
    return subprocess.run([sys.executable, "-c", "import MinkowskiEngine"], capture_output=True, check=False).returncode == 0


def require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "sparkme: the build environment lacks torch, against which the extension is compiled. Install torch first, then:"
            " pip install --no-build-isolation ."
        )


def minkowski_requirement() -> str:
    builder = load_builder()
    plain = f"MinkowskiEngine=={builder.VERSION}"
    # An sdist, or a query of the build's requirements, must not start a compilation.
    if not {"dist_info", *INSTALLS}.intersection(sys.argv):
        return plain
    require_torch()
    if has_working_minkowski(builder.VERSION):
        return plain
    try:
        return f"MinkowskiEngine @ {builder.build_wheel().as_uri()}"
    except builder.BuildError as error:
        raise SystemExit(f"sparkme: {error}") from None


class TakeCompiled(build_ext):
    """Copies the extension in sparkme/ to the place where setuptools expects a new one."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        compiled = ROOT / "sparkme" / target.name
        if not compiled.is_file():
            raise SystemExit(
                f"sparkme: SPARKME_OPERATORS=compiled needs {compiled}, which is missing. Unset the variable to compile."
            )
        if target.resolve() != compiled:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(compiled, target)


def extension() -> dict[str, Any]:
    """The arguments of setuptools that build `sparkme._C`."""
    if not {"build_ext", *INSTALLS}.intersection(sys.argv):
        return {}
    if os.environ.get("SPARKME_OPERATORS") == "compiled":
        return {"ext_modules": [Extension("sparkme._C", sources=[])], "cmdclass": {"build_ext": TakeCompiled}}
    require_torch()
    builder = load_builder()
    try:
        target = builder.choose_target()
        home = builder.require_cuda_home(target.cuda) if target.cuda else None
    except builder.BuildError as error:
        raise SystemExit(f"sparkme: {error}") from None
    print(f"sparkme: building the operators for {target.kind} ({target.reason})", flush=True)
    os.environ["MAX_JOBS"] = str(builder.parallel_jobs(target.kind))
    if home:
        os.environ.update(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=target.architectures)  # read at the import below
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # operators.cpp includes all families except the inner loops, which have a file for each instruction set. operators.cu
    # includes all except the kernels of the depthwise convolution.
    sources = ["cuda_ext/csrc/operators.cpp", "cuda_ext/csrc/cpu/kernels*.cpp"]
    sources += ["cuda_ext/csrc/cuda/operators.cu", "cuda_ext/csrc/cuda/depthwise_*.cu"] if home else []
    options: dict[str, Any] = {
        "name": "sparkme._C",
        "sources": sorted(str(path.relative_to(ROOT)) for pattern in sources for path in ROOT.glob(pattern)),
        "extra_compile_args": {"cxx": ["-O3", "-g0", "-fopenmp"], "nvcc": ["-O3", "--expt-relaxed-constexpr"]},
    }
    options["extra_link_args"] = ["-fopenmp"]  # at::parallel_for runs its body in the calling thread without it
    if not home:
        options["extra_compile_args"] = options["extra_compile_args"]["cxx"]
        return {"ext_modules": [CppExtension(**options)], "cmdclass": {"build_ext": BuildExtension}}
    folders = builder.nvidia_folders(target.cuda)
    libraries = Path(tempfile.mkdtemp(prefix="sparkme-lib-"))
    builder.link_versioned_libraries(libraries, [*(folder / "lib" for folder in folders), home / "lib64"])
    options |= {"include_dirs": [str(folder / "include") for folder in folders], "library_dirs": [str(libraries)]}
    return {"ext_modules": [CUDAExtension(**options)], "cmdclass": {"build_ext": BuildExtension}}


settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["sparkme"]
setup(install_requires=[*settings["dependencies"], minkowski_requirement()], **extension())
