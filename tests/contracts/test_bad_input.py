"""What the command line is given by mistake: one line that says what to change, exit code 2, nothing built before."""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QUICKEST, fails
from PIL import Image

import sparkme.export
from sparkme.data.dataset import EpochSampler
from sparkme.data.images import load_image, load_rgb
from sparkme.data.sources.files import find_images
from sparkme.errors import UserError
from sparkme.methods.decoder import Decoder
from sparkme.pretrain import main
from sparkme.weights.checkpoint import load_checkpoint
from sparkme.weights.files import read_tensors

FLOATS = (
    "--warmup-epochs",
    "--checkpoint-minutes",
    "--weight-decay",
    "--weight-decay-end",
    "--clip-grad",
    "--base-lr",
    "--beta2",
    "--mask-ratio",
    "--crop-scale",
    "--drop-path",
)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("flag", FLOATS)
def test_numbers_that_are_none_are_refused(flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *QUICKEST, "--output", tmp_path / "run", f"{flag}={value}")
    assert f"{flag} {value} is not a finite number" in line
    assert not (tmp_path / "run").exists()


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *QUICKEST, "--output", tmp_path, "--decoder-width", 1000000)
    assert "decoder width 1000000" in line
    with pytest.raises(ValueError, match=r"about 39,\d+ billion weights; use at most 8192"):
        Decoder(32, 32 * 31250)
    assert "--workers 1000 is more than" in fails(capsys, *QUICKEST, "--output", tmp_path, "--workers", 1000)
    assert "--background mauve-ish is not a colour" in fails(
        capsys, *QUICKEST, "--output", tmp_path, "--background", "mauve-ish"
    )


def test_an_epoch_of_ten_thousand_million_draws_is_never_in_memory() -> None:
    sampler = EpochSampler(7, 10**10, 5, 0, range(10**9, 10**9 + 3))
    first, *_ = iter(sampler)
    assert len(first) == 5 and all(epoch == 0 and 5 * 10**9 - 7 <= draw < 5 * 10**9 + 7 for epoch, draw in first)
    again = list(EpochSampler(7, 10**10, 5, 0, range(10**9 + 1, 10**9 + 2)))
    assert again[0] == list(sampler)[1]


def test_every_copy_of_the_images_has_each_once_and_processes_share_a_batch() -> None:
    draws = [draw for batch in EpochSampler(7, 21, 3, 0, range(14)) for draw in batch]
    for epoch in (0, 1):
        of_epoch = [draw for e, draw in draws if e == epoch]
        for copy in range(3):
            assert sorted(of_epoch[7 * copy : 7 * copy + 7]) == list(range(7 * copy, 7 * copy + 7))
    assert [d for _, d in draws[:7]] != [d - 7 for _, d in draws[7:14]] != [d for _, d in draws[21:28]]
    whole = list(EpochSampler(7, 21, 4, 0, range(10)))
    shares = [list(EpochSampler(7, 21, 4, 0, range(10), rank, 2)) for rank in (0, 1)]
    assert all(w[0::2] == a and w[1::2] == b for w, a, b in zip(whole, *shares, strict=True))


class Harmless:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.getenv, ("HOME",)


@pytest.mark.parametrize("read", [load_checkpoint, read_tensors])
def test_a_file_with_more_than_tensors_is_refused_in_one_line(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "weights.pt"
    torch.save({"model": Harmless()}, path)
    with pytest.raises(UserError, match="it contains more than tensors and plain values") as caught:
        read(path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    path.write_bytes(pickle.dumps(Harmless()))
    with pytest.raises(UserError):
        read(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_laid_on_the_background(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    path = tmp_path / "image.png"
    image.convert(mode).save(path)
    white, blue = load_rgb(path), load_rgb(path, "#0000ff")
    assert white.getpixel((3, 3)) == (255, 255, 255) and blue.getpixel((3, 3)) == (0, 0, 255)
    if mode != "P":
        assert white.getpixel((0, 0)) == blue.getpixel((0, 0)) == (10, 10, 10)
        assert white.getpixel((1, 0)) == (127, 127, 127)


def test_names_with_control_characters_stay_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.png"
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"a\\nb\\x1b\[31m.png: ") as caught:
        load_rgb(path)
    assert "\n" not in str(caught.value)


def test_pillows_warnings_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    image = Image.new("P", (4, 4))
    image.putpalette([i % 256 for i in range(768)])
    image.save(path, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rgb(path)


def dds() -> bytes:
    return b"DDS " + struct.pack("<31I", 124, 0x1007, 64, 64, 0, 0, 0, *[0] * 11, 32, 0x1800, *[0] * 11)


BROKEN = {
    "no decoder.png": dds(),
    "huge box.jp2": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x01jp2h" + (2**60).to_bytes(8, "big"),
    "archive.npy": b"PK\x03\x04",
    "brackets.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n",
    "empty.png": b"",
    "text.jpg": b"hello",
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_a_decoder_raises_names_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    for channels in (1, 3, 5):
        with pytest.raises(OSError, match=re.escape(name)) as caught:
            load_image(tmp_path / name, channels)
        assert "\n" not in str(caught.value)


def test_a_truncated_stack_of_pages_is_unreadable_wherever_it_ends(tmp_path: Path) -> None:
    pages = [Image.new("L", (8, 8), 10 * i) for i in range(6)]
    pages[0].save(tmp_path / "whole.tif", save_all=True, append_images=pages[1:])
    content = (tmp_path / "whole.tif").read_bytes()
    path = tmp_path / "cut.tif"
    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        for channels in (1, 6):
            with contextlib.suppress(OSError):
                load_image(path, channels)


def test_three_grey_pages_are_three_channels(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 4), value) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "three.tif", save_all=True, append_images=pages[1:])
    read = load_image(tmp_path / "three.tif", 3)
    assert isinstance(read, torch.Tensor) and torch.allclose(read[:, 0, 0] * 255, torch.tensor([10.0, 20, 30]))


def test_numbers_of_32_bits_have_no_known_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[70000, 5]], dtype=np.int32)).save(tmp_path / "deep.tif")
    for channels in (1, 3):
        with pytest.raises(OSError, match="not all from 0 to 65535, so their range is not known; pass --value-range"):
            load_image(tmp_path / "deep.tif", channels)


def test_pipes_and_folders_with_an_images_name_are_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    assert [path.name for path in find_images(tmp_path)] == ["image.png"]
    with pytest.raises(UserError, match=r"--recalibrate-bn .* is not a folder"):
        find_images(tmp_path / "none", flag="--recalibrate-bn")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--weight-decay", "1e308"], "--weight-decay has a number that is too large"),
        (["--samples-per-epoch", "1" + "0" * 400], "--samples-per-epoch has a number that is too large"),
        (["--input-size", "32000"], "--input-size 32000 must be at most"),
        (["--channels", "10000000"], "--channels 10000000 must be at most"),
        (["--mean", "124", "117", "104", "--std", "58", "57", "57"], "divide by 255"),
        (["--recipe", "fcmae", "--decoder-width", "-1"], "decoder width -1 is outside 1 to"),
        (["--recipe", "fcmae", "--decoder-width", "100000"], "decoder width 100000 is outside 1 to"),
        (["--input-size", "32"], "is a single patch"),
        (["--model", ".:x"], "is no package.module:factory"),
        (["--model", "../nets:x"], "is no package.module:factory"),
        (["--model", "sys:exit", "--drop-path", "0"], "failed: SystemExit"),
        (["--model", "builtins:max", "--drop-path", "0"], "is not a function that returns a network"),
        (["--model", "no_such_module:x"], "start in the folder of no_such_module.py"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in fails(capsys, *QUICKEST, "--output", tmp_path / "run", *words)


@pytest.mark.parametrize("words", [["--data", ""], ["--output", ""], ["--init", ""], ["--epochs", "1e9"], ["--no-such-flag"]])
def test_a_command_line_that_cannot_be_read_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import torch\ndef f(): return torch.nn.Conv2d(3, 3, 3).double()", "make them float32 on the CPU"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("def f(): raise KeyError('x')", "failed: KeyError"),
    ],
)
def test_a_users_own_module_fails_in_one_line(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"own_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*QUICKEST, "--model", f"{name}:f", "--drop-path", "0", "--output", tmp_path / "run"]
    assert reason in fails(capsys, *words)


def test_no_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def allocate(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate\nmore")

    monkeypatch.setattr("sparkme.training.pretraining.build_network", allocate)
    assert "take a smaller batch" in fails(capsys, *QUICKEST, "--output", tmp_path / "run")


def damaged(run: Path, change: object, path: Path) -> Path:
    state = torch.load(run, weights_only=True)
    change(state)  # type: ignore[operator]
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("model"),
        lambda s: s.pop("step"),
        lambda s: s.update(step=-5),
        lambda s: s.update(config=None),
        lambda s: s.update(config={}),
        lambda s: s.update(model={}),
        lambda s: s.update(model=[1]),
        lambda s: s["model"].pop(next(iter(s["model"]))),
        lambda s: s["config"].update(recipe="x"),
        lambda s: s["config"].update(decoder_width="x"),
        lambda s: s["config"].pop("mask_ratio"),
        lambda s: s["config"].update(input_size=64),
        lambda s: s["model"].update(extra=torch.ones(1)),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    change: object, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(small_run / "checkpoints" / "last.pt", change, tmp_path / "damaged.pt")
    assert sparkme.export.main([str(path), "--output", str(tmp_path / "out.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and error.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main([*QUICKEST, "--epochs", "1", "--panel-epochs", "0", "--output", str(folder)]) == 0
    return folder


def test_damaged_metrics_do_not_stop_a_run(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder, symlinks=True)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n{"a": 1}\nnull\n\xff\xfe\n')
    assert main([*QUICKEST, "--epochs", "2", "--panel-epochs", "0", "--output", str(folder)]) == 0
    assert all("loss" in json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_a_resumed_run_keeps_where_it_started_from(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder, symlinks=True)
    words = [*QUICKEST, "--epochs", "2", "--panel-epochs", "0", "--output", str(folder), "--init", str(tmp_path / "none.pth")]
    assert main(words) == 0
    assert "none.pth is not used" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["init"] is None
