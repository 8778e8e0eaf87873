"""One call a command, for notebooks and scripts: settings as keywords, mistakes as exceptions, and what comes back."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import make_images, make_labelled

import sparkme.training.loop
from sparkme.errors import UserError
from sparkme.export import export
from sparkme.finetune import finetune
from sparkme.pretrain import pretrain
from sparkme.probe import probe
from sparkme.settings.commands import ProbeSettings
from sparkme.settings.declare import from_keywords
from sparkme.settings.pretrain import PretrainSettings

TINY = {"workers": 0, "device": "cpu", "log_steps": 1, "batch_size": 4, "input_size": 32, "epochs": 1}


def test_from_pictures_to_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labelled = make_labelled(tmp_path / "labelled", {"blue": 6, "green": 6, "red": 6})
    words = {**TINY, "model": "tiny_network:tiny", "decoder_width": 32, "output": "run", "panel_epochs": 0}
    run = pretrain(data=make_images(tmp_path / "images", 8), **words)
    assert run.finished and run.folder == Path("run") and run.checkpoint.is_file()
    assert run.settings.epochs == 1 and run.settings.recipe == "small" and run.settings.input_size == (32, 32)
    loss = run.curves["loss"]
    assert loss.steps == [1, 2] and loss.epochs == [0.5, 1.0] and all(0 < value < 3 for value in loss.values)
    assert run.encoder.strides == (2, 4, 8) and run.encoder is run.encoder

    longer = pretrain(data=[str(tmp_path / "images")], **words | {"epochs": 2})  # the same run goes on
    assert longer.curves["loss"].steps == [1, 2, 3, 4]

    rows = probe(run.checkpoint, data=labelled, stage="last", linear=False, workers=0, device="cpu")
    assert [row["stride"] for row in rows] == [8] and 0 <= rows[0]["knn"] <= 1
    weights = export(run.checkpoint, output=tmp_path / "weights.safetensors")
    assert weights.is_file()

    tuned = finetune(weights, data=labelled, output="tuned", **TINY)
    assert tuned.finished and tuned.results["best"]["epoch"] == 1 and "val_top1" in tuned.curves
    scores = tuned.network(torch.rand(2, 3, 32, 32))
    assert scores.shape == (2, 3) and not tuned.network.training


def test_a_bad_keyword_names_the_nearest_right_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="there is no setting 'epocs'; did you mean 'epochs'"):
        pretrain(epocs=3)
    with pytest.raises(TypeError, match="there is no setting 'num_images'"):  # which is found, not given
        pretrain(num_images=3)
    with pytest.raises(TypeError, match="epochs is 'many', which has the wrong type"):
        pretrain(epochs="many")
    with pytest.raises(TypeError, match="the setting 'data' is missing"):
        probe("weights.safetensors")
    with pytest.raises(UserError, match="engine 'fast' is unknown; choose one of auto, cuda_ext, minkowski, masked-dense"):
        pretrain(engine="fast")
    with pytest.raises(UserError, match="data is empty"):
        pretrain(data="")
    with pytest.raises(UserError, match="--epochs 0 must be at least 1"):
        pretrain(epochs=0, output=tmp_path / "run", workers=0, device="cpu")
    with pytest.raises(UserError, match="no checkpoint at"):
        export(tmp_path / "none.pt")
    assert not (tmp_path / "run").exists()


def test_values_become_what_the_flags_would_make_of_them(tmp_path: Path) -> None:
    asked = from_keywords(
        PretrainSettings, {"data": tmp_path, "init": "w.pt", "input_size": [64, 96], "mean": None, "base_lr": 1}
    )
    assert asked.data == str(tmp_path) and asked.init == Path("w.pt") and asked.input_size == (64, 96)
    assert asked.mean is None and asked.base_lr == 1 and asked.recipe == "auto"
    probed = from_keywords(ProbeSettings, {"weights": "w.pt", "data": tmp_path, "compare": "random"})
    assert probed.data == str(tmp_path) and probed.compare == ("random",) and probed.weights == Path("w.pt")


def test_a_stopped_run_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {**TINY, "model": "tiny_network:tiny", "decoder_width": 32, "output": tmp_path, "samples_per_epoch": 8}
    step = sparkme.training.loop.Training.train_step

    def interrupted(self, batch):  # type: ignore[no-untyped-def]
        loss = step(self, batch)
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(sparkme.training.loop.Training, "train_step", interrupted)
    assert not pretrain(**words).finished
    monkeypatch.undo()
    run = pretrain(**words)
    assert run.finished and run.curves["loss"].steps == [1, 2]


def test_the_functions_are_there_before_torch(tmp_path: Path) -> None:
    code = "import sys; from sparkme import export, finetune, pretrain, probe, results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
