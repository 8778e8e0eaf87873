"""Packages that are no dependencies, in virtual environments that are thrown away."""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest


def python_with(folder: Path, modules: Sequence[str], *installs: Sequence[str]) -> Path:
    """An interpreter that has the modules: this one, or one of an environment on top of it.

    Args:
        folder: for the environment.
        modules: what is imported.
        installs: arguments of `pip install`, one call each. Where one fails, the test is skipped.
    """
    if all(find_spec(module) for module in modules):
        return Path(sys.executable)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no virtual environment can be made here: {made.stdout.strip().splitlines()[-1:]}")
    interpreter, site = folder / "bin" / "python", next((folder / "lib").glob("python*")) / "site-packages"
    (site / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for words in installs:
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install {', '.join(words)}: {done.stderr.strip().splitlines()[-1:]}")
    return interpreter
