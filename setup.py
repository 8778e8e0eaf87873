"""Adds to pyproject.toml what cannot be static: the requirement of MinkowskiEngine.

No index has a MinkowskiEngine that builds as it is. So where the environment has none, the builder in
cuda_ext/minkowski makes a wheel (once per machine, then it comes from a cache), and the requirement points at it.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparkme_minkowski_build", ROOT / "cuda_ext" / "minkowski" / "build.py")
    assert spec is not None and spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = builder
    spec.loader.exec_module(builder)
    return builder


def has_working_minkowski(version: str) -> bool:
    """True if this environment has `version` and it loads; one that was built against another torch does not."""
    try:
        if importlib.metadata.version("MinkowskiEngine") != version:
            return False
    except importlib.metadata.PackageNotFoundError:
        return False
    return subprocess.run([sys.executable, "-c", "import MinkowskiEngine"], capture_output=True, check=False).returncode == 0


def minkowski_requirement() -> str:
    builder = load_builder()
    plain = f"MinkowskiEngine=={builder.VERSION}"
    # An archive of the sources, and the question what a build needs, must not start a compilation.
    if not {"dist_info", "bdist_wheel", "editable_wheel", "install", "develop"}.intersection(sys.argv):
        return plain
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "sparkme: the environment that builds has no torch, and MinkowskiEngine is compiled against it. Install"
            " torch first, then: pip install --no-build-isolation ."
        )
    if has_working_minkowski(builder.VERSION):
        return plain
    try:
        return f"MinkowskiEngine @ {builder.build_wheel().as_uri()}"
    except builder.BuildError as error:
        raise SystemExit(f"sparkme: {error}") from None


settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["sparkme"]
setup(install_requires=[*settings["dependencies"], minkowski_requirement()])
