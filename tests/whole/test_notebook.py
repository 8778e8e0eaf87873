"""The commands as functions in a notebook's kernel: the example runs, an interrupt saves, and mistakes are named."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import nbclient
import nbformat
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SMALL = 'model="resnet18", input_size=64, decoder_width=32, batch_size=4, samples_per_epoch=8, workers=0, log_steps=1'


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH", "")]))


def test_the_example_runs_from_photographs_to_a_classifier(environment: None, tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "step 48/48 (100 %)" in shown and "'top1'" in shown and shown.count("image/png") == 2
    assert (tmp_path / "resnet18.safetensors").stat().st_size > 40e6


@pytest.fixture
def kernel(environment: None, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    manager, client = jupyter_client.manager.start_new_kernel(cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def said(client: Any, code: str) -> str:
    """What a cell prints, or its error."""
    found: list[str] = []
    client.execute_interactive(code, timeout=300, output_hook=lambda message: found.append(str(message["content"])))
    return "\n".join(found)


def test_an_interrupt_saves_and_the_same_call_goes_on(kernel: tuple[Any, Any], tmp_path: Path) -> None:
    manager, client = kernel
    call = f'from sparkme.pretrain import pretrain\nrun = pretrain({SMALL}, epochs=500, output="run")\n'
    call += 'print("finished", run.finished)'
    interrupted: list[float] = []

    def look(message: dict[str, Any]) -> None:
        if "step 2/" in str(message["content"]) and not interrupted:
            interrupted.append(time.monotonic())
            manager.interrupt_kernel()
        shown.append(str(message["content"]))

    shown: list[str] = []
    client.execute_interactive(call, timeout=300, output_hook=look)
    text = "\n".join(shown)
    assert interrupted and "SIGINT: saved" in text and "finished False" in text and "Traceback" not in text, text
    again = said(client, call.replace("epochs=500", "epochs=3").replace("log_steps=1", "log_steps=1, max_unreadable=5"))
    assert "resumed after step" in again, again


def test_mistakes_name_what_to_change(kernel: tuple[Any, Any]) -> None:
    _, client = kernel
    wrong = said(client, "from sparkme.pretrain import pretrain\npretrain(epoch=3)")
    assert "TypeError" in wrong and re.search(r"did you mean \W*epochs", wrong), wrong
    wrong = said(client, f'pretrain({SMALL}, epochs=0, output="run")')
    assert "UserError" in wrong and "epochs 0 must be at least 1" in wrong and "SystemExit" not in wrong, wrong
