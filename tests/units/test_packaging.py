"""The same requirements stand in pyproject.toml, environment.yml and constraints.txt; these tests hold them equal."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements_of_pyproject() -> dict[str, str]:
    """Name -> range of everything that `pip install -e .[demo,dev]` and the build of MinkowskiEngine ask for."""
    lines = [*PYPROJECT["tool"]["sparkme"]["dependencies"], *PYPROJECT["tool"]["sparkme"]["build"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        lines += extra
    parsed = map(Requirement, lines)
    return {requirement.name: str(requirement.specifier) for requirement in parsed if requirement.name != "sparkme"}


def requirements_of_environment() -> tuple[dict[str, str], list[str]]:
    """Name -> range in the pip part of environment.yml, and the lines of its conda part."""
    conda, pip = (ROOT / "environment.yml").read_text().split("- pip:\n")
    entries = [line.strip().removeprefix("- ") for line in pip.splitlines() if line.strip().startswith("- ")]
    options = [entry for entry in entries if entry.startswith("-")]
    assert options == ["-c constraints.txt"]
    parsed = [Requirement(entry) for entry in entries if entry not in options]
    return {requirement.name: str(requirement.specifier) for requirement in parsed}, re.findall(r"  - (\S+)", conda)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_environment_has_the_ranges_of_pyproject() -> None:
    pip, conda = requirements_of_environment()
    assert pip == requirements_of_pyproject()
    assert f"python{PYPROJECT['project']['requires-python']}" in conda


def test_every_direct_requirement_is_pinned_within_its_range() -> None:
    ranges = requirements_of_pyproject()
    assert set(pins()) == set(ranges)
    outside = {
        name: version for name, version in pins().items() if not Requirement(name + ranges[name]).specifier.contains(version)
    }
    assert not outside


def test_setuptools_range_is_the_one_of_the_build_system() -> None:
    assert PYPROJECT["build-system"]["requires"] == [f"setuptools{requirements_of_pyproject()['setuptools']}"]


def test_package_states_the_version_of_the_metadata() -> None:
    source = (ROOT / "sparkme" / "__init__.py").read_text()
    assert f'__version__ = "{PYPROJECT["project"]["version"]}"' in source


def test_every_file_beside_the_code_is_packaged() -> None:
    package = ROOT / "sparkme"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["sparkme"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    assert packaged == {path for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc", ".so")}


@pytest.mark.parametrize("name", ["demo", "test", "setup"])
def test_makefile_has_the_targets_that_the_readme_names(name: str) -> None:
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
