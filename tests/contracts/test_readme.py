"""The README's own code runs as it is printed there."""

import re
import sys
from pathlib import Path

import pytest
import torch
from commands import SMALL

from sparkme import export
from sparkme.pretrain import main
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training.build import build_network
from sparkme.training.checkpoint import load_checkpoint

README = Path(__file__).parents[2] / "README.md"


def test_the_snippet_runs() -> None:
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "import sparkme" in block)
    names: dict = {}
    exec(snippet, names)
    assert names["loss"].isfinite() and len(names["maps"]) == 4


@pytest.mark.parametrize("module", ["pretrain", "export", "visualize", "probe", "finetune", "report"])
def test_flags_in_the_readme_exist(module: str) -> None:
    from importlib import import_module

    known = {flag for a in import_module(f"sparkme.{module}").create_parser()._actions for flag in a.option_strings}
    for command in re.findall(rf"-m sparkme\.{module}.*", README.read_text()):
        assert set(re.findall(r"(--[a-z-]+)", command)) <= known, command


def test_the_readmes_own_network_can_be_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "def small_net" in block)
    (tmp_path / "mynet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*SMALL, "--model", "mynet:small_net", "--drop-path", "0", "--output", "run", "--checkpoint-minutes", "0"]
    assert main([*words, "--epochs", "1"]) == 0
    assert main([*words, "--epochs", "2"]) == 0
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    build_network(from_config(PretrainSettings, saved["config"])).load_state_dict(saved["model"])
    assert export.main(["run/checkpoints/last.pt", "--output", "weights.pth"]) == 0
    network = sys.modules["mynet"].small_net()
    assert not network.load_state_dict(torch.load("weights.pth", weights_only=True), strict=False).unexpected_keys
    assert main([*words, "--output", "other", "--drop-path", "0.2"]) == 2  # which it does not take
