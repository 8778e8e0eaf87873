#!/usr/bin/env python3
"""Wheels of the compiled packages, MinkowskiEngine and sparkme with its operators, for other machines of the same kind.

    make wheels WHEELS=DIR       # on one machine: writes the wheels, and wheels.json with their requirements
    make setup WHEELS=DIR        # on the others, in a checkout: installs from DIR without a compiler

A checkout stays editable: its own Python files run, with only the compiled operators of sparkme's wheel, so both must have the
same C++ sources. Without a checkout, `pip install DIR/*.whl` after torch installs the whole package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "minkowski"))

import build  # noqa: E402

LIST = "wheels.json"
OPERATORS = "sparkme/_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def sources_hash() -> str:
    """Hash of the operators' sources."""
    digest = hashlib.sha256()
    for path in sorted((HERE / "csrc").rglob("*.*")):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(folder: Path) -> None:
    """Writes both wheels and their list, with the compiled operators in sparkme/."""
    if not (ROOT / OPERATORS).is_file():
        raise build.BuildError(f"{OPERATORS} is missing: run make setup first.")
    target = build.choose_target()
    if (b"cudaLaunchKernel" in (ROOT / OPERATORS).read_bytes()) != bool(target.cuda):
        raise build.BuildError(
            f"{OPERATORS} was not compiled for {target.kind} ({target.reason}): run make setup and make wheels with the same"
            " FORCE_CUDA, in a fresh checkout."
        )
    minkowski = build.build_wheel()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("minkowskiengine-*.whl"), *folder.glob("sparkme-*.whl")):
        old.unlink()
    shutil.copy(minkowski, folder)
    for stale in ROOT.glob("build/lib*"):  # setuptools would pack files of an earlier build
        shutil.rmtree(stale)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    if subprocess.run([*command, str(ROOT)], env={**os.environ, "SPARKME_OPERATORS": "compiled"}, check=False).returncode != 0:
        raise build.BuildError("building the wheel of sparkme failed, see above.")
    made_for = build.ingredients(target) | {"operators": sources_hash()}
    files = {path.name: sha256(path) for path in sorted(folder.glob("*.whl"))}
    (folder / LIST).write_text(json.dumps({"made_for": made_for, "files": files}, indent=2) + "\n")
    print(f"{folder}: {', '.join(files)}")


def numbers(version: object) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(version))]


def pinned_torch() -> str:
    """The version of torch that make setup installs."""
    return next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))[7:]


def misfits(folder: Path) -> Iterator[str]:
    """The reasons why the wheels in `folder` do not fit this machine and checkout. Without torch, its version is the one in
    constraints.txt, and checks that need torch are left out."""
    try:
        listed = json.loads((folder / LIST).read_text())
        made_for, files = listed["made_for"], listed["files"]
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{LIST}, which make wheels writes, is missing or unreadable in {folder}"
        return
    for name, digest in files.items():
        if not (folder / name).is_file():
            yield f"{name} is missing in {folder}"
        elif sha256(folder / name) != digest:
            yield f"{name} is damaged, or differs from the one in {LIST}"
    python = str(sysconfig.get_config_var("SOABI"))
    if made_for["python"] != python:
        yield f"they are for Python {made_for['python']}, this is {python}"
    if made_for["platform"] != sysconfig.get_platform():
        yield f"they are for {made_for['platform']}, this is {sysconfig.get_platform()}"
    libc = "-".join(platform.libc_ver())
    if numbers(made_for["libc"]) > numbers(libc):
        yield f"they need {made_for['libc']}, this is {libc}"
    if made_for["operators"] != sources_hash():
        yield "they have other sources than this checkout's cuda_ext/csrc"
    try:
        torch = build.import_torch()
    except build.BuildError:
        pinned = pinned_torch()
        if str(made_for["torch"]).partition("+")[0] != pinned:
            yield f"they are for torch {made_for['torch']}, constraints.txt has {pinned}"
        return
    if made_for["torch"] != str(torch.__version__):
        yield f"they are for torch {made_for['torch']}, this is {torch.__version__}"
    if torch.cuda.is_available():  # without a GPU any wheel is accepted, since containers are built on such machines
        here = {"{}.{}".format(*torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())}
        lacking = sorted(here - set(made_for["architectures"].split(";")))
        if not made_for["cuda"]:
            yield "they are for the CPU only, and torch sees a GPU here"
        elif lacking:
            yield f"they are for GPUs of compute capability {made_for['architectures']}, not {', '.join(lacking)}"


def check(folder: Path) -> None:
    found = list(misfits(folder))
    if found:
        raise build.BuildError(
            f"the wheels do not fit: {'; '.join(found)}. Run `make wheels` in this checkout on a machine like this one, or"
            " run make setup without WHEELS, which compiles."
        )


def install(folder: Path) -> None:
    check(folder)
    (minkowski,) = folder.glob("minkowskiengine-*.whl")
    (sparkme,) = folder.glob("sparkme-*.whl")
    build.pip_install("--no-deps", "--no-index", "--force-reinstall", str(minkowski))
    with zipfile.ZipFile(sparkme) as archive:
        build.write_beside(ROOT / OPERATORS, lambda path: path.write_bytes(archive.read(OPERATORS)))
    load = f"import torch, MinkowskiEngine; torch.ops.load_library({str(ROOT / OPERATORS)!r})"
    loaded = subprocess.run([sys.executable, "-P", "-c", load], capture_output=True, text=True, check=False)
    if loaded.returncode != 0:
        raise build.BuildError(f"the installed wheels do not load here: {loaded.stderr.strip().splitlines()[-1]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python cuda_ext/wheels.py", description="Write, check or install the wheels of the compiled packages."
    )
    parser.add_argument("action", choices=["write", "check", "install"], help="check works without torch")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    try:
        {"write": write, "check": check, "install": install}[arguments.action](arguments.folder)
    except build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
