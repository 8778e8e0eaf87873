"""What tests of several benchmarks share."""

from importlib import import_module

import pytest

from benchmarks import transfer


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run: in this process, since each would load torch anew."""
    seen: list[list[str]] = []

    def run(module: str, *words: object, quiet: bool = False, threads: int | None = None) -> None:
        seen.append([module, *map(str, words)])
        assert import_module(module).main(seen[-1][1:]) == 0

    monkeypatch.setattr(transfer, "run", run)
    return seen
