"""README and docs/: their code runs as printed, their commands and links exist, their tables are those of the files."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import QUICKEST

import sparkme
from benchmarks import loading, plot
from sparkme import export
from sparkme.pretrain import main
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training.build import build_network
from sparkme.weights.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_with(words: str, page: str) -> str:
    """The one block of Python in a page that has these words."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S) if words in block)
    return block


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200 and len(text.split()) <= 1600


def test_the_readmes_snippet_runs() -> None:
    names: dict = {}
    exec(code_with("import sparkme", "README.md"), names)
    assert names["loss"].isfinite() and len(names["maps"]) == 4


def test_the_snippet_about_checkpoints_runs(trained: Path) -> None:
    code = code_with("load_encoder", "docs/weights.md").replace("runs/mine/checkpoints/last.pt", str(trained))
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (8, 512, 7, 7)


@pytest.mark.parametrize("module", ["pretrain", "export", "visualize", "probe", "finetune", "predict", "report"])
def test_flags_in_commands_exist(module: str) -> None:
    from importlib import import_module

    known = {flag for a in import_module(f"sparkme.{module}").create_parser()._actions for flag in a.option_strings}
    found = [command for page in PAGES for command in re.findall(rf"-m sparkme\.{module}.*", page.read_text())]
    assert found and all(set(re.findall(r"(--[a-z-]+)", command)) <= known for command in found), found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        names = (
            {
                re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
                for line in there.read_text().splitlines()
                if line.startswith("#")
            }
            if heading
            else set()
        )
        assert not heading or heading in names, f"{page.name}: {target}"


def test_every_public_name_is_documented() -> None:
    reference = re.findall(r"^::: sparkme\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert sorted(reference) == sorted(sparkme.__all__)
    assert all(getattr(sparkme, name).__doc__ for name in reference)


def test_the_tables_of_speed_are_those_of_the_files() -> None:
    records = {path.name: plot.read(path) for path in sorted(plot.RESULTS.glob("*.json"))}
    assert plot.summary(records) in (ROOT / "README.md").read_text()
    text = (ROOT / "docs" / "speed.md").read_text()
    for name, record in records.items():
        if plot.kind(record) == "throughput":
            assert all(block in text for block in plot.throughput_tables(name, record))


def test_the_scale_of_data_sets_is_computed_from_the_gpus_rates() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "loading.json").read_text())
    assert record["scale"] == loading.scale_rows(record["gpu_rates"])
    assert loading.scale_table(record["scale"]) in (ROOT / "docs" / "data.md").read_text()


def test_the_documents_own_network_can_be_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_with("def small_net", "docs/networks.md")
    (tmp_path / "mynet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*QUICKEST, "--model", "mynet:small_net", "--drop-path", "0", "--output", "run", "--checkpoint-minutes", "0"]
    assert main([*words, "--epochs", "1"]) == 0
    assert main([*words, "--epochs", "2"]) == 0
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    build_network(from_config(PretrainSettings, saved["config"])).load_state_dict(saved["model"])
    assert export.main(["run/checkpoints/last.pt", "--output", "weights.pth"]) == 0
    network = sys.modules["mynet"].small_net()
    assert not network.load_state_dict(torch.load("weights.pth", weights_only=True), strict=False).unexpected_keys
    assert main([*words, "--output", "other", "--drop-path", "0.2"]) == 2  # which it does not take
