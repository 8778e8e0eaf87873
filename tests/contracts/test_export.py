"""`python -m sparkme.export`: what it writes loads into torchvision, and what does not agree is not written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from commands import QUICKEST, SMALL
from safetensors import safe_open
from safetensors.torch import load_file

import sparkme.export
import sparkme.pretrain
from sparkme.sparse import forms, sparsify
from sparkme.weights.format import STATE_DICTS
from sparkme.weights.formats import FORMATS


@pytest.fixture(scope="module", params=["resnet18", "timm:convnext_atto"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("run")
    flags = [*SMALL, "--model", request.param, "--epochs", "1", "--panel-epochs", "0", "--output", str(folder)]
    assert sparkme.pretrain.main(flags) == 0
    return request.param, folder / "checkpoints" / "last.pt"


@pytest.mark.parametrize(
    ("checkpoint", "suffix"),
    [("resnet18", ".safetensors"), ("resnet18", ".pth"), ("convnext_tiny", ".safetensors")],
    indirect=["checkpoint"],
)
def test_exported_weights_load_into_torchvision(
    checkpoint: tuple[str, Path], suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = checkpoint
    output = tmp_path / f"weights{suffix}"
    assert sparkme.export.main([str(path), "--to", "torchvision", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    state = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)
    model = torchvision.models.get_model(name, weights=None)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing and all(k.startswith(("fc.", "classifier.")) for k in missing)
    assert "verified" in printed and f"the classifier: {', '.join(missing)}" in printed
    assert printed.count("dense and sparse features differ by") == 4
    if suffix == ".safetensors":
        with safe_open(output, "pt") as file:
            metadata = file.metadata()
    else:
        metadata = json.loads((output.parent / "weights.pth.json").read_text())
    assert name in metadata["model"] and "SparK" in metadata["method"] and "last.pt, step 2" in metadata["source"]
    assert json.loads(metadata["recipe"])["mask_ratio"] == 0.6

    # The trained network itself, with every patch visible, against torchvision's.
    from sparkme.settings.declare import from_config
    from sparkme.settings.pretrain import PretrainSettings
    from sparkme.training.build import build_network
    from sparkme.weights.checkpoint import load_checkpoint

    saved = load_checkpoint(path)
    network = build_network(from_config(PretrainSettings, saved["config"])).eval()
    network.load_state_dict(saved["model"])
    images = torch.randn(2, 3, 64, 64)
    sparse = network.encoder(images, torch.ones(2, 1, 2, 2, dtype=torch.bool))[-1].dense()
    model.eval()
    dense = (
        model.layer4(model.layer3(model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images))))))))
        if name == "resnet18"
        else model.features(images)
    )
    assert torch.allclose(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", FORMATS)
def test_every_format_is_written_and_read_back(
    checkpoint: tuple[str, Path], target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name, path), form = checkpoint, FORMATS[target]
    output = tmp_path / f"weights{form.suffixes[0]}"
    code = sparkme.export.main([str(path), "--to", target, "--output", str(output), "--no-verify"])
    printed = capsys.readouterr()
    if ("convnext" if "convnext" in name else "resnet") not in form.tables:
        assert code == 2 and f"has no names in {target}" in printed.err and not output.exists()
        return
    if target == "torchvision" and name.startswith("timm:"):  # which torchvision does not have; its own is tested above
        assert code == 2 and not output.exists()
        return
    assert code == 0 and printed.out.endswith(f"load it:\n\n{form.loading(output, name, 3)}\n")
    if output.suffix not in STATE_DICTS:
        return
    expected, got = (sparkme.load_encoder(file).dense_state_dict() for file in (path, output))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], value) for k, value in expected.items() if not k.endswith("num_batches_tracked"))


def test_a_transposed_kernel_is_found_and_not_written(
    checkpoint: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparsify, "try_out", lambda encoder, dense: None)  # which would find it before
    for kind in (forms.SparseConv2d, forms.SparseDepthwiseConv2d):
        right = kind.dense_state
        monkeypatch.setattr(
            kind,
            "dense_state",
            lambda self, right=right: {k: v.transpose(2, 3).contiguous() if v.ndim == 4 else v for k, v in right(self).items()},
        )
    output = tmp_path / "wrong.safetensors"
    assert sparkme.export.main([str(checkpoint[1]), "--output", str(output)]) == 1
    assert "nothing was written" in capsys.readouterr().err and not output.exists()


def test_weights_that_are_not_finite_are_not_written(
    checkpoint: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(checkpoint[1], weights_only=True)
    name = next(k for k in state["model"] if "layer2" in k or "stages.1" in k)
    state["model"][name].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    output = tmp_path / "nan.safetensors"
    assert sparkme.export.main([str(tmp_path / "nan.pt"), "--output", str(output)]) == 2
    assert "weights that are not finite" in capsys.readouterr().err and not output.exists()


def test_a_moved_run_is_exported_into_its_own_folder(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    name, path = checkpoint
    moved = tmp_path / "moved" / "checkpoints" / "last.pt"
    moved.parent.mkdir(parents=True)
    shutil.copy(path, moved)
    assert sparkme.export.main([str(moved), "--no-verify"]) == 0
    assert (tmp_path / "moved" / f"{name.replace(':', '-')}.safetensors").exists()


def test_mistakes_get_one_line(checkpoint: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: object) -> str:
        assert sparkme.export.main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    path = checkpoint[1]
    assert "no checkpoint at" in fails(tmp_path / "none.pt")
    assert "--output w.pth: the suffix must be .pt" in fails(path, "--to", "ultralytics", "--output", "w.pth")
    assert "the suffix must be .safetensors or .pth" in fails(path, "--output", tmp_path / "weights.bin")
    (tmp_path / "taken.pth").write_bytes(b"mine")
    assert "exists; choose another --output, or pass --overwrite" in fails(path, "--output", tmp_path / "taken.pth")
    assert (tmp_path / "taken.pth").read_bytes() == b"mine"
    (tmp_path / "free.pth.json").write_text("mine")
    assert "free.pth.json exists" in fails(path, "--output", tmp_path / "free.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "is not a checkpoint of sparkme.pretrain" in fails(tmp_path / "other.pt")


def test_a_backbone_that_names_no_detector_is_told_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICKEST, "--drop-path", "0", "--epochs", "1", "--panel-epochs", "0", "--output", str(tmp_path)]
    assert sparkme.pretrain.main(words) == 0
    last = tmp_path / "checkpoints" / "last.pt"
    assert sparkme.export.main([str(last), "--to", "ultralytics"]) == 2
    error = capsys.readouterr().err
    assert "small_resnet:resnet does not say which detector" in error and "backbone.yaml = detector.yaml" in error
    assert [*tmp_path.glob("*.pt")] == []
