"""A kept trial saves the next one, and only where nothing that the trial depended on has changed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import SMALL
from torch import nn

import sparkme
from sparkme.export import main as export
from sparkme.networks.create import create_dense
from sparkme.pretrain import main as pretrain
from sparkme.sparse import sparsify as sparsify_module
from sparkme.sparse.proof import describe, seal

HELPERS = """
import torch

SLOPE = 0.0

def lift(x):
    return torch.relu(x) + SLOPE * x
"""
NETWORK = """
import functools
import torch
from torch import nn
import {helpers} as helpers

class Block(nn.Module):
    gain = 1.0

    def __init__(self, width, out):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, stride=2, padding=1)
        self.scale = 1.0
        self.act = functools.partial(torch.mul, other=1.0)

    def forward(self, x):
        from {later} import last
        return last(self.act(helpers.lift(self.conv(x)) * self.scale * self.gain))

def network():
    return nn.Sequential(Block(3, 8), Block(8, 8), Block(8, 16), Block(16, 16))
"""
LATER = """
def last(x):
    return x
"""
# What is changed behind the proof: the module, and a line of it before and after. With the new one the network is refused.
REFUSED = {
    "its own forward": ("network", "helpers.lift(self.conv(x))", "helpers.lift(self.conv(x)).detach()"),
    "a helper": ("helpers", "return torch.relu(x)", "return torch.relu(x).detach()  #"),
    "what forward imports": ("later", "return x", "return x.detach()"),
}
# The same, where the network is still good: it only has to be tried again.
CHANGED = {
    "a constant of a helper's module": ("helpers", "SLOPE = 0.0", "SLOPE = 0.1"),
    "an attribute": ("network", "self.scale = 1.0", "self.scale = 2.0"),
    "an attribute of the class": ("network", "gain = 1.0", "gain = 2.0"),
    "what a partial holds": ("network", "other=1.0", "other=3.0"),
    "its layers": ("network", "3, stride=2, padding=1", "3, stride=2, padding=1, bias=False"),
    "a default that is not used": ("later", "def last(x)", "def last(x, y=1)"),
}


class Code:
    """A network's three modules, written anew by each change, under names that no other test has."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.names = {kind: f"{kind}_{folder.name}" for kind in ("network", "helpers", "later")}
        self.text = {"network": NETWORK.format(**self.names), "helpers": HELPERS, "later": LATER}
        monkeypatch.syspath_prepend(folder)

    def load(self) -> nn.Module:
        for kind, name in self.names.items():
            (self.folder / f"{name}.py").write_text(self.text[kind])
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module: ModuleType = importlib.import_module(self.names["network"])
        torch.manual_seed(0)
        network: nn.Module = module.network()
        return network

    def change(self, kind: str, before: str, after: str) -> None:
        assert before in self.text[kind]
        self.text[kind] = self.text[kind].replace(before, after)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Code:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Code(tmp_path, monkeypatch)


def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("find_hierarchy", "try_out"):
        monkeypatch.setattr(sparsify_module, name, lambda *_, **__: pytest.fail("the network is tried again"))


def test_the_same_network_is_not_tried_again(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    network = code.load()
    tried = sparkme.sparsify(network)
    assert tried.tried_because
    no_trial(monkeypatch)
    kept = json.loads(json.dumps(tried.proof))
    proved = sparkme.sparsify(code.load(), proof=kept)
    assert proved.tried_because == ""
    assert proved.proof == kept
    assert proved.hierarchy == tried.hierarchy
    images, active = torch.randn(2, 3, 32, 32), torch.rand(2, 1, 2, 2).argsort(-1) > 0
    for x, y in zip(proved(images, active), tried(images, active), strict=True):
        torch.testing.assert_close(x.rows, y.rows, rtol=0, atol=0)


@pytest.mark.parametrize("what", REFUSED)
def test_changed_code_is_refused_as_without_a_proof(code: Code, what: str) -> None:
    proof = sparkme.sparsify(code.load()).proof
    assert proof is not None
    code.change(*REFUSED[what])
    with pytest.raises(sparkme.UnsupportedLayerError):
        sparkme.sparsify(code.load())
    with pytest.raises(sparkme.UnsupportedLayerError):
        sparkme.sparsify(code.load(), proof=proof)


@pytest.mark.parametrize("what", CHANGED)
def test_whatever_changes_the_network_is_tried_again(code: Code, what: str) -> None:
    proof = sparkme.sparsify(code.load()).proof
    code.change(*CHANGED[what])
    again = sparkme.sparsify(code.load(), proof=proof)
    assert again.tried_because == "the network's code or structure changed since the trial"
    assert again.proof not in (None, proof)


def test_methods_and_hooks_that_are_put_in_later_count(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = sparkme.sparsify(code.load()).proof
    hooked = code.load()
    for block in hooked:
        block.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(sparkme.UnsupportedLayerError):
        sparkme.sparsify(hooked, proof=proof)
    network = code.load()
    monkeypatch.setattr(type(network[0]), "forward", lambda self, x: self.conv(x).detach())
    with pytest.raises(sparkme.UnsupportedLayerError):
        sparkme.sparsify(network, proof=proof)


def test_a_proof_of_other_versions_or_another_question_does_not_count(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    network = code.load()
    proof = sparkme.sparsify(network).proof
    assert sparkme.sparsify(network, proof=proof, num_scales=2).tried_because.startswith("the call of sparsify")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert "and is 9.9" in sparkme.sparsify(network, proof=proof).tried_because
    monkeypatch.undo()
    monkeypatch.setitem(sparkme.sparse.forms.SPARSE_FORMS, nn.Bilinear, lambda layer: layer)
    assert "changed since the trial" in sparkme.sparsify(network, proof=proof).tried_because


def test_an_edited_proof_does_not_count(code: Code) -> None:
    network = code.load()
    proof = json.loads(json.dumps(sparkme.sparsify(network).proof))
    right = sparkme.sparsify(network).hierarchy
    proof["hierarchy"]["taps"].pop()
    assert sparkme.sparsify(network, proof=proof).tried_because == "the kept proof has been changed"
    # by somebody who also makes the seal anew: the short look finds what is wrong
    wrong = json.loads(json.dumps(sparkme.sparsify(network).proof))
    wrong["hierarchy"]["taps"][-1]["module"] = "1"
    wrong["seal"] = seal({key: value for key, value in wrong.items() if key != "seal"})
    again = sparkme.sparsify(network, proof=wrong)
    assert again.tried_because.startswith("it no longer passes the check that it passed before")
    assert again.hierarchy == right
    for damaged in ({}, {"seal": 1}, {**wrong, "seal": None}, 3, [], "x"):
        assert "proof" in sparkme.sparsify(network, proof=damaged).tried_because  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line", ["open('/dev/null').close()", "__import__('os').environ.get('GAIN')", "self.count = iter([1])"], ids=str
)
def test_what_cannot_be_compared_is_tried_every_time(code: Code, line: str) -> None:
    place = "self.scale = 1.0" if line.startswith("self") else "from {later} import last".format(**code.names)
    code.change("network", place, f"{place}; {line}")
    network = code.load()
    with pytest.raises(Exception, match=r"calls|cannot be compared"):
        describe(network, {})


def test_the_description_is_the_same_in_every_process(code: Code) -> None:
    """Python orders sets of strings differently from process to process, and numbers objects as it pleases."""
    network = code.load()
    script = (
        "import sys; sys.dont_write_bytecode = True\n"
        "from sparkme.networks.create import create_dense; from sparkme.sparse.proof import describe\n"
        f"import {code.names['network']} as n\n"
        "print(*(describe(x, {})['network'] for x in (n.network(), create_dense('resnet18'), create_dense('convnext_tiny'))))"
    )
    path = os.pathsep.join([str(code.folder), str(Path(sparkme.__file__).parents[1])])
    another = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": another}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    here = [describe(x, {})["network"] for x in (network, create_dense("resnet18"), create_dense("convnext_tiny"))]
    assert done.stdout.split() == here


def test_files_keep_the_trial_and_load_encoder_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain([*SMALL, "--model", "timm:resnet10t", "--epochs", "1", "--output", str(run)]) == 0
    last, weights, hub = run / "checkpoints" / "last.pt", tmp_path / "w.safetensors", tmp_path / "hub"
    no_trial(monkeypatch)
    assert export([str(last), "--to", "timm", "--no-verify", "--output", str(weights)]) == 0
    assert export([str(last), "--to", "timm", "--no-verify", "--hub-folder", str(hub)]) == 0
    images = torch.randn(2, 3, 64, 64)
    whole = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    with torch.no_grad():
        expected = [x.dense() for x in sparkme.load_encoder(last)(images, whole)]
        for path in (str(weights), hub):
            encoder = sparkme.load_encoder(path)
            assert not encoder.training
            for x, y in zip(encoder(images, whole), expected, strict=True):
                torch.testing.assert_close(x.dense(), y, rtol=0, atol=0)
    with pytest.raises(ValueError, match="leave out --model"):
        sparkme.load_encoder(last, "resnet18")
    monkeypatch.undo()
    saved = torch.load(last, weights_only=True)
    del saved["proof"]  # as earlier versions wrote it
    torch.save(saved, last.resolve())
    sparsify_module._tried.clear()
    capsys.readouterr()
    sparkme.load_encoder(last)
    assert "the network was tried again: no proof of its trial was kept" in capsys.readouterr().err


def test_a_relative_import_in_a_function_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a module of the same name that is not meant; in a function within the function."""
    package = f"package_{tmp_path.name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "meant.py").write_text("def f(x):\n    return x\n")
    (tmp_path / package / "user.py").write_text(
        "def g(x):\n    def h():\n        from .meant import f\n        return f(x)\n    return h()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    digests = []
    for line in ("return x", "return x.detach()"):
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
        (tmp_path / package / "meant.py").write_text(f"def f(x):\n    {line}\n")
        importlib.invalidate_caches()
        network = nn.Conv2d(3, 4, 3)
        network.after = importlib.import_module(f"{package}.user").g
        digests.append(describe(network, {})["network"])
    assert digests[0] != digests[1]
