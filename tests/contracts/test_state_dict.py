"""Weights are read and written as torch defines it, whatever a class makes of `state_dict`, `load_state_dict` and `train`."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUICKEST
from pictures import make_labelled
from safetensors.torch import load_file
from torch import nn

import sparkme.export
from sparkme import finetune, pretrain, probe
from sparkme.state_dict import state_dict_of, torchs_state_dict

OWN = """
import torch
from torchvision.models.resnet import BasicBlock, ResNet


class ReturnsNothing(ResNet):
    def load_state_dict(self, state_dict, **kwargs):
        state_dict.pop("fc.bias", None)
        state_dict.pop("fc.weight", None)
        kwargs.setdefault("strict", False)
        super().load_state_dict(state_dict, **kwargs)


class TakesNothing(ResNet):
    def load_state_dict(self, state_dict):
        raise RuntimeError("nobody may call this")

    def state_dict(self):
        return {"net." + name: value.clone() for name, value in super().state_dict().items() if "layer3" not in name}

    def train(self, mode=True):
        super().train(mode)


class Quiet(torch.nn.Sequential):
    def state_dict(self, **options):
        return {}


def returns_nothing(in_channels=3):
    return ReturnsNothing(BasicBlock, [1, 1, 1, 1])


def takes_nothing(in_channels=3):
    net = TakesNothing(BasicBlock, [1, 1, 1, 1])
    net.layer2 = Quiet(*net.layer2)
    return net
"""


@pytest.mark.parametrize("factory", ["returns_nothing", "takes_nothing"])
def test_a_class_with_methods_of_its_own_goes_all_the_way(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"stubborn_{factory}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = f"stubborn_{factory}:{factory}"
    words = [*QUICKEST, "--model", model, "--drop-path", "0", "--epochs", "1", "--panel-epochs", "0", "--output", "pre"]
    assert pretrain.main(words) == 0
    last = Path("pre/checkpoints/last.pt")
    assert sparkme.export.main([str(last), "--output", "weights.safetensors"]) == 0
    assert "wrote weights.safetensors" in capsys.readouterr().out
    exported = load_file("weights.safetensors")
    assert {name.partition(".")[0] for name in exported} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    if factory == "returns_nothing":
        return

    data = make_labelled(tmp_path / "data", {"red": 4, "blue": 4})
    words = ["--data", str(data), "--workers", "0", "--input-size", "64", "--batch-size", "2", "--device", "cpu"]
    words += ["--ema-decay", "0.5", "--base-lr", "0.1", "--epochs", "1", "--output", "fine"]
    assert finetune.main(["weights.safetensors", *words]) == 0
    checkpoint = torch.load("fine/checkpoints/last.pt", weights_only=True)
    assert checkpoint["model"].keys() == checkpoint["average"].keys() == exported.keys() | {"fc.weight", "fc.bias"}
    for part in ("model", "average"):  # the average, too, has moved with the weights
        assert not torch.equal(checkpoint[part]["layer3.0.conv1.weight"], exported["layer3.0.conv1.weight"])
    assert finetune.main(["weights.safetensors", *["2" if word == "1" else word for word in words]]) == 0
    assert json.loads(Path("fine/results.json").read_text())["epoch"] == 2
    assert load_file("fine/best.safetensors").keys() == checkpoint["model"].keys()
    assert probe.main(["fine/best.safetensors", "--data", str(data), "--workers", "0", "--stage", "last", "--no-linear"]) == 0
    assert (
        pretrain.main(
            [
                *QUICKEST,
                "--model",
                model,
                "--drop-path",
                "0",
                "--epochs",
                "1",
                "--init",
                "fine/checkpoints/last.pt",
                "--panel-epochs",
                "0",
                "--output",
                "again",
            ]
        )
        == 0
    )


class Layer(nn.Linear):
    """Says less than it has, in other arguments; keeps an extra state."""

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"weight": self.weight.clone()}

    def get_extra_state(self) -> str:
        return "more"

    def set_extra_state(self, state: str) -> None:
        assert state == "more"


def test_the_state_dict_is_torchs_and_the_classes_own_is_back_after_it() -> None:
    net = nn.Sequential(OrderedDict(a=nn.BatchNorm1d(2), b=Layer(2, 2)))
    net.b.state_dict = lambda: {"mine": 1}  # type: ignore[method-assign,assignment]
    state = state_dict_of(net)
    counts = ["a.weight", "a.bias", "a.running_mean", "a.running_var", "a.num_batches_tracked"]
    assert [*state] == [*counts, "b.weight", "b.bias", "b._extra_state"] and state[
        "b.weight"
    ].data_ptr() == net.b.weight.data_ptr()
    assert state._metadata.keys() == {"", "a", "b"}  # type: ignore[attr-defined]
    assert net.b.state_dict() == {"mine": 1}
    del net.b.state_dict
    assert state_dict_of(net).keys() == state.keys() and net.b.state_dict().keys() == {"weight"}
    with torchs_state_dict(net.b):
        assert net.state_dict().keys() == state.keys()
    assert nn.Module.load_state_dict(net, state).missing_keys == []
