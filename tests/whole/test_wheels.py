"""`make wheels` on one machine, `make setup WHEELS=DIR` on another: what fits is installed without a compiler, what does not
is told in one line."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("gcc", "g++", "cc", "c++", "c89", "c99", "cpp", "clang", "nvcc", "ninja", "ld", "as", "x86_64-linux-gnu-")


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    sys.path.insert(0, str(ROOT / "cuda_ext"))
    try:
        import wheels as module
    finally:
        sys.path.remove(str(ROOT / "cuda_ext"))
    return module


@pytest.fixture
def fitting(wheels: ModuleType, tmp_path: Path) -> Path:
    """A folder whose list fits this machine; the wheels themselves are not real."""
    files = {}
    for name in ("minkowskiengine-0.5.4-cp311.whl", "sparkme-0.1.0-cp311.whl"):
        (tmp_path / name).write_text(name)
        files[name] = wheels.sha256(tmp_path / name)
    made_for = wheels.build.ingredients(wheels.build.Target()) | {"operators": wheels.sources_hash()}
    (tmp_path / "wheels.json").write_text(json.dumps({"made_for": made_for, "files": files}))
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    listed = json.loads((folder / "wheels.json").read_text())
    listed["made_for"].update(values)
    (folder / "wheels.json").write_text(json.dumps(listed))


def refusal(wheels: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert wheels.main(["check", str(folder)]) == 2
    words = capsys.readouterr().err
    assert words.startswith("error: the wheels do not fit: ") and words.count("\n") == 1 and "make wheels" in words
    return words


def test_wheels_of_this_machine_and_checkout_fit(wheels: ModuleType, fitting: Path) -> None:
    assert wheels.main(["check", str(fitting)]) == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"python": "cpython-312-x86_64-linux-gnu"}, "they are for Python cpython-312-x86_64-linux-gnu, this is cpython-"),
        ({"platform": "linux-aarch64"}, "they are for linux-aarch64, this is linux-"),
        ({"libc": "glibc-9.99"}, "they need glibc-9.99, this is "),
        ({"torch": "2.11.0+cpu"}, "they are for torch 2.11.0+cpu, this is 2."),
        ({"operators": "00"}, "they have other sources than this checkout's cuda_ext/csrc"),
    ],
)
def test_what_does_not_fit_is_named(
    wheels: ModuleType, fitting: Path, capsys: pytest.CaptureFixture[str], values: dict[str, str], words: str
) -> None:
    change(fitting, **values)
    assert words in refusal(wheels, fitting, capsys)


def test_older_libc_fits(wheels: ModuleType, fitting: Path) -> None:
    change(fitting, libc="glibc-2.9")
    assert wheels.main(["check", str(fitting)]) == 0


def test_missing_damaged_and_unlisted_wheels_are_named(
    wheels: ModuleType, fitting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fitting / "sparkme-0.1.0-cp311.whl").write_text("half")
    (fitting / "minkowskiengine-0.5.4-cp311.whl").unlink()
    words = refusal(wheels, fitting, capsys)
    assert "sparkme-0.1.0-cp311.whl is damaged" in words and "minkowskiengine-0.5.4-cp311.whl is missing" in words
    (fitting / "wheels.json").write_text("{}")
    assert "wheels.json, which make wheels writes, is missing or unreadable" in refusal(wheels, fitting, capsys)


def test_before_torch_is_installed_its_pinned_version_counts(
    wheels: ModuleType, fitting: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_torch() -> None:
        raise wheels.build.BuildError("no torch")

    monkeypatch.setattr(wheels.build, "import_torch", no_torch)
    change(fitting, torch=wheels.pinned_torch() + "+cu130")
    assert wheels.main(["check", str(fitting)]) == 0
    change(fitting, torch="2.11.0")
    assert f"for torch 2.11.0, constraints.txt has {wheels.pinned_torch()}" in refusal(wheels, fitting, capsys)


def test_gpu_needs_wheels_for_it(
    wheels: ModuleType, fitting: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8 + index, 0))
    assert "for the CPU only, and torch sees a GPU" in refusal(wheels, fitting, capsys)
    change(fitting, cuda="13.0", architectures="9.0")
    assert "for GPUs of compute capability 9.0, not 8.0" in refusal(wheels, fitting, capsys)
    change(fitting, architectures="8.0;9.0")
    assert wheels.main(["check", str(fitting)]) == 0


def hide_compilers(folder: Path) -> Path:
    """A folder for PATH with all programs that are on it but the compilers."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if not program.name.startswith(COMPILERS) and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    for name in ("gcc", "g++", "cc", "c++", "nvcc"):
        assert shutil.which(name, path=str(folder)) is None
    return folder


def copy_checkout(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("sparkme", "cuda_ext"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def written(wheels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    assert wheels.main(["write", str(folder)]) == 0
    return folder


@pytest.fixture
def setup(tmp_path: Path) -> Callable[[Path], subprocess.CompletedProcess[str]]:
    """`make setup WHEELS=...` in a copy of the checkout, without a compiler and an index, in an environment of its own. Only
    what this project does not compile is taken from the environment of the tests."""
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    pinned = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    if missing := [name for name in pinned if name not in installed]:
        pytest.skip(f"needs what make setup installs, here without {', '.join(missing)}")
    checkout = copy_checkout(tmp_path / "checkout")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(checkout / ".venv")], check=True)
    site = next((checkout / ".venv" / "lib").glob("python*")) / "site-packages"
    (site / "of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (checkout / ".venv" / ".venv-done").touch()
    path = hide_compilers(tmp_path / "programs")
    left_out = ("PYTHONPATH", "CC", "CXX", "CUDA_HOME", "FORCE_CUDA", "MAKEFLAGS", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"PATH": str(path), "PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def make(folder: Path) -> subprocess.CompletedProcess[str]:
        command = ["make", "setup", f"WHEELS={folder}", f"PYTHON={sys.executable}"]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)

    return make


def test_second_environment_is_set_up_without_a_compiler(
    setup: Callable[[Path], subprocess.CompletedProcess[str]], written: Path, tmp_path: Path
) -> None:
    made = setup(written)
    assert made.returncode == 0, made.stdout + made.stderr
    checkout = tmp_path / "checkout"
    program = """
import torch, torchvision, MinkowskiEngine, sparkme, sparkme._C
print(MinkowskiEngine.__file__, sparkme.__file__, sparkme._C.__file__, sep="\\n")
encoder = sparkme.sparsify(torchvision.models.resnet18()).eval()
active = sparkme.random_active(1, (2, 2), mask_ratio=0.5, generator=torch.Generator().manual_seed(0))
images = torch.randn(1, 3, 64, 64)
maps = {engine: encoder.set_engine(engine)(images, active)[-1].rows for engine in ("minkowski", "cuda_ext")}
torch.testing.assert_close(maps["minkowski"], maps["cuda_ext"], rtol=1e-3, atol=1e-4)
"""
    ran = subprocess.run(
        [checkout / ".venv" / "bin" / "python", "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert all(line.startswith(str(checkout)) for line in ran.stdout.splitlines()), ran.stdout
    assert setup(written).returncode == 0  # again: nothing is left to do


def test_set_up_from_wheels_that_do_not_fit_says_so_at_once(
    setup: Callable[[Path], subprocess.CompletedProcess[str]], fitting: Path, tmp_path: Path
) -> None:
    change(fitting, python="cpython-39-x86_64-linux-gnu")
    shutil.rmtree(tmp_path / "checkout" / ".venv")
    made = setup(fitting)
    assert made.returncode == 2
    assert "error: the wheels do not fit: they are for Python cpython-39-x86_64-linux-gnu" in made.stderr
    assert "torch" not in made.stdout  # not even torch was loaded
