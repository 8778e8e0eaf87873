"""Imports within the package: no circle, and no arrow from a room to one above it. Types and functions count, too."""

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From top to bottom; a room may import from its own row and from those below. The commands come first: `sparkme.pretrain` and
# its like, and `sparkme` itself, which gives the public names. What any room may import, and what imports none, comes last.
COMMANDS = {"", "doctor", "export", "finetune", "predict", "pretrain", "probe", "report", "visualize"}
SUPPORT = {"errors", "files", "machine", "screen", "seeds", "state_dict", "text", "watchdog"}
ROWS = (
    COMMANDS,
    {"reporting", "methods", "training", "results"},
    {"data", "weights"},
    {"settings"},
    {"networks"},
    {"sparse"},
    {"ops"},
    SUPPORT,
)
BUILT = "sparkme._C"  # the extension, which is no Python module


@cache
def modules() -> dict[str, Path]:
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in sorted((ROOT / "sparkme").rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imported(source: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """Modules of the package that a source imports, anywhere in it, and the lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known or name == BUILT else str(node.module) for name in names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in known)


@cache
def arrows() -> dict[str, dict[str, int]]:
    """By module: the modules that it imports, and where."""
    known = {*modules()}
    return {name: dict(imported(path.read_text(), known - {name})) for name, path in modules().items()}


def row_of(module: str) -> int:
    room = module.removeprefix("sparkme").removeprefix(".").split(".")[0]
    return {room: i for i, row in enumerate(ROWS) for room in row}[room]


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        graphlib.TopologicalSorter(arrows()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


def test_no_room_imports_from_one_above_it() -> None:
    up = [
        f"{modules()[name].relative_to(ROOT)}:{line} imports {other}"
        for name, others in arrows().items()
        for other, line in others.items()
        if row_of(other) < row_of(name)
    ]
    assert not up


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import sparkme.a.b
from sparkme.a import b, name
from sparkme import _C, a
if TYPE_CHECKING:
    from sparkme.c import Type
def late():
    import sparkme
"""
    found = set(imported(source, {"sparkme", "sparkme.a", "sparkme.a.b", "sparkme.c"}))
    assert found == {
        ("sparkme.a.b", 2),
        ("sparkme.a.b", 3),
        ("sparkme.a", 3),
        ("sparkme.a", 4),
        ("sparkme.c", 6),
        ("sparkme", 8),
    }
