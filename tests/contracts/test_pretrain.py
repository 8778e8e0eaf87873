"""`python -m sparkme.pretrain` as its users run it: runs, interruptions, and mistakes. Several processes: tests/whole."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from commands import QUICKEST, fails, losses, weights
from pictures import make_images
from PIL import Image

from sparkme.data.dataset import Batch
from sparkme.pretrain import create_parser, main
from sparkme.training.pretraining import Pretraining


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs without interruption, that saves every epoch."""
    folder = tmp_path_factory.mktemp("straight")
    assert main([*QUICKEST, "--output", str(folder), "--checkpoint-minutes", "0", "--panel-epochs", "2"]) == 0
    return folder


def test_a_run_leaves_what_the_readme_promises(straight: Path) -> None:
    found = {str(p.relative_to(straight)) for p in straight.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "reconstructions/epoch_0002.png",
        "reconstructions/epoch_0003.png",
        "checkpoints/last.pt",
        "checkpoints/step_00000002.pt",
        "checkpoints/step_00000006.pt",
    } <= found
    assert any(name.startswith("tensorboard/events") for name in found)
    assert json.loads((straight / "config.json").read_text())["warmup_epochs"] == pytest.approx(0.3)
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and all(r["loss"] > 0 for r in records)
    with Image.open(straight / "reconstructions" / "epoch_0003.png") as panel:
        assert panel.width == 3 * 128 + 4 * 6 and panel.height > 6 * (128 + 6)  # enlarged, with words above and below


def test_resuming_equals_a_straight_run_bit_for_bit(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted after every epoch: the checkpoint of each is the start of the next, with processes that load images."""
    for step in (2, 4):
        folder = tmp_path / str(step)
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(straight / "checkpoints" / f"step_{step:08d}.pt", folder / "checkpoints" / "last.pt")
        shutil.copy(straight / "metrics.jsonl", folder)
        assert main([*QUICKEST, "--output", str(folder), "--workers", "2"]) == 0
        assert f"resumed after step {step}" in capsys.readouterr().out
        assert losses(folder) == losses(straight)
        expected = weights(straight)
        assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
        assert main([*QUICKEST, "--output", str(folder)]) == 0
        assert "nothing left to do" in capsys.readouterr().out


def test_no_resume_starts_anew(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder, symlinks=True)
    assert main([*QUICKEST, "--output", str(folder), "--no-resume", "--epochs", "1"]) == 0
    assert len(losses(folder)) == 2 and [p.name for p in (folder / "checkpoints").glob("step*")] == ["step_00000002.pt"]


def test_the_checkpoint_of_another_run_is_refused_and_kept(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder, symlinks=True)
    before = (folder / "config.json").read_text()
    message = fails(capsys, *QUICKEST, "--output", folder, "--model", "resnet34")
    assert "was trained with --model small_resnet:resnet, now it is resnet34" in message and "--no-resume" in message
    assert "--batch-size 4, now it is 2" in fails(capsys, *QUICKEST, "--output", folder, "--batch-size", 2)
    assert (folder / "config.json").read_text() == before and len(weights(folder)) > 100


def test_convnext_pretrains_from_given_weights(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images")
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "init.pth")
    arguments = [
        "--data",
        data,
        "--model",
        "timm:convnext_atto",
        "--input-size",
        64,
        "--decoder-width",
        32,
        "--epochs",
        1,
        "--workers",
        0,
        "--init",
        tmp_path / "init.pth",
        "--output",
        tmp_path / "run",
        "--accumulate",
        2,
        "--engine",
        "masked-dense",
        "--precision",
        "bf16",
        "--device",
        "cpu",
        "--optimizer",
        "adamw",
    ]
    assert main([*map(str, arguments)]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["batch_size"], config["beta2"]) == (6, 0.999)


def test_the_loss_falls(tmp_path: Path) -> None:
    flags = [
        *QUICKEST,
        "--epochs",
        "7",
        "--samples-per-epoch",
        "16",
        "--base-lr",
        "1.6",
        "--crop-scale",
        "0.6",
        "--log-steps",
        "4",
    ]
    assert main([*flags, "--output", str(tmp_path)]) == 0
    seen = losses(tmp_path)
    assert sum(seen[-5:]) / 5 < seen[0] - 0.03, seen


def test_unreadable_images_are_counted_and_too_many_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "images", 8)
    broken = sorted(data.rglob("*.png"))[:3]
    for path in broken:
        path.write_bytes(b"broken")
    flags = [*QUICKEST, "--data", data, "--epochs", "1"]
    assert main([*map(str, flags), "--output", str(tmp_path / "kept")]) == 0
    errors = capsys.readouterr().err
    assert all(f"skipped unreadable image {path}" in errors for path in broken)
    assert main([*map(str, flags), "--output", str(tmp_path / "stopped"), "--max-unreadable", "1"]) == 2
    errors = capsys.readouterr().err
    assert "images cannot be read, more than --max-unreadable 1 or too many in a row; repair or remove them" in errors
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    assert main([*map(str, flags), "--output", str(tmp_path / "all")]) == 2


@pytest.mark.parametrize("name", ["decoder.proj.bias", "encoder.network.conv1.kernel"])
def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(
    name: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    state = torch.load(straight / "checkpoints" / "step_00000004.pt", weights_only=True)
    state["model"][name].fill_(float("nan"))
    torch.save(state, tmp_path / "checkpoints" / "last.pt")
    assert main([*QUICKEST, "--output", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: the loss of step 5 is ") and "; the last good checkpoint is" in errors, errors


def test_spoiled_weights_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An update can overflow after a finite loss."""
    right = Pretraining.train_step

    def overflow(self: Pretraining, batch: Batch) -> torch.Tensor:
        loss = right(self, batch)
        if self.step == 4:
            next(self.network.parameters()).data.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Pretraining, "train_step", overflow)
    assert main([*QUICKEST, "--output", str(tmp_path), "--checkpoint-minutes", "0"]) == 2
    assert re.search(r"the weights are not finite after step 4 \(.*\); the last good checkpoint is", capsys.readouterr().err)
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["step"] == 2


def test_a_lost_link_does_not_start_the_run_anew(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder, symlinks=True)
    (folder / "checkpoints" / "last.pt").unlink()
    assert main([*QUICKEST, "--output", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "resumed after step 6" in shown and "last.pt was missing" in shown


def test_pictures_of_a_run_inside_the_data_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_images(tmp_path / "images", 8)
    monkeypatch.chdir(data)
    flags = [flag for flag in QUICKEST if flag not in ("--samples-per-epoch", "8", "--batch-size", "4")]
    assert main([*flags, "--data", ".", "--epochs", "1"]) == 0
    assert len(list(Path("runs").rglob("*.png"))) == 2
    Image.new("RGB", (40, 40)).save("another.png")  # what follows from the number of images stays as the run began
    assert main([*flags, "--data", ".", "--epochs", "2"]) == 0
    config = json.loads(Path("runs/small_resnet-resnet-64/config.json").read_text())
    assert (config["num_images"], config["samples_per_epoch"], config["batch_size"]) == (9, 8, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input-size", "230"], "input size 230x230 is not a multiple of the patch of 32; use 224"),
        (["--input-size", "64", "64", "64"], "--input-size takes a side, or height and width; got 3 numbers"),
        (["--mask-ratio", "0.95"], "leaves none of 4 patches visible"),
        (["--mask-ratio", "0.05"], "hides none of 4 patches"),
        (["--model", "resnet19"], "unknown model 'resnet19'; did you mean resnet"),
        (["--data", "no/such/folder"], "--data no/such/folder is not a folder"),
        (["--batch-size", "16"], "--batch-size 16 is more than the 8 crops per epoch"),
        (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3 is not a multiple of 1 processes x --accumulate 2; use 4"),
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--workers", "-1"], "--workers -1 must be at least 0"),
        (["--decoder-width", "-32"], "decoder width -32 is not a multiple of 32"),
        (["--beta2", "2"], "--beta2 2.0 is outside [0, 1)"),
        (["--base-lr", "-1"], "--base-lr -1.0 must be above 0"),
        (["--clip-grad", "-1"], "--clip-grad -1.0 must be at least 0"),
        (["--seed", str(2**64)], "use one below 2^63"),
        (["--batch-size", "1", "--mask-ratio", "0.75"], "leaves batch norm one visible pixel at stride 32"),
        (["--warmup-epochs", "3"], "--warmup-epochs 3.0 must be less than --epochs 3"),
        (["--drop-path", "1"], "--drop-path 1.0 is outside [0, 1)"),
        (["--crop-scale", "0"], "--crop-scale 0.0 is outside (0, 1]"),
        (["--device", "tpu"], "--device tpu is not"),
        (["--init", "none.pth"], "no file none.pth"),
        (["--decoder-width", "40"], "decoder width 40 is not a multiple of 32"),
        (["--output", "/proc/none"], "cannot write to --output /proc/none"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *QUICKEST, "--output", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so asking for one is no mistake")
def test_a_missing_gpu_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no GPU" in fails(capsys, *QUICKEST, "--output", tmp_path / "run", "--device", "cuda")


def test_help_is_grouped() -> None:
    shown = create_parser().format_help()
    for group in ("data:", "network:", "optimisation:", "machine:", "output:"):
        assert f"\n{group}" in shown
