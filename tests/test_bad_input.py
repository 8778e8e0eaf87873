"""What the command line is given by mistake: one line that says what to change, exit code 2, nothing built before."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pretrain import SMALL, fails

from sparkme.data.dataset import EpochSampler
from sparkme.data.images import load_rgb
from sparkme.decoder import Decoder
from sparkme.errors import UserError
from sparkme.interop.files import read_state_dict
from sparkme.training.checkpoint import load_checkpoint

FLOATS = ("--warmup-epochs", "--checkpoint-minutes", "--weight-decay", "--weight-decay-end", "--clip-grad", "--base-lr",
          "--beta2", "--mask-ratio", "--crop-scale", "--drop-path")  # fmt: skip


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("flag", FLOATS)
def test_numbers_that_are_none_are_refused(flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *SMALL, "--output", tmp_path / "run", f"{flag}={value}")
    assert f"{flag} {value} is not a finite number" in line
    assert not (tmp_path / "run").exists()


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *SMALL, "--output", tmp_path, "--decoder-width", 1000000)
    assert "decoder width 1000000" in line
    with pytest.raises(ValueError, match=r"about 39,\d+ billion weights; use at most 8192"):
        Decoder(32, 32 * 31250)
    assert "--workers 1000 is more than" in fails(capsys, *SMALL, "--output", tmp_path, "--workers", 1000)
    assert "--background mauve-ish is no colour" in fails(capsys, *SMALL, "--output", tmp_path, "--background", "mauve-ish")


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


@pytest.mark.parametrize("read", [load_checkpoint, read_state_dict])
def test_a_file_with_more_than_tensors_is_refused_in_one_line(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "weights.pt"
    torch.save({"model": Harmless()}, path)
    with pytest.raises(UserError, match="it holds more than tensors and plain values") as caught:
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
