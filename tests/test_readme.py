"""The README's own code runs as it is printed there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_snippet_runs() -> None:
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "import sparkme" in block)
    names: dict = {}
    exec(snippet, names)
    assert names["loss"].isfinite() and len(names["maps"]) == 4


@pytest.mark.parametrize("module", ["pretrain", "export"])
def test_flags_in_the_readme_exist(module: str) -> None:
    from importlib import import_module

    known = {flag for a in import_module(f"sparkme.{module}").create_parser()._actions for flag in a.option_strings}
    for command in re.findall(rf"-m sparkme\.{module}.*", README.read_text()):
        assert set(re.findall(r"(--[a-z-]+)", command)) <= known, command
