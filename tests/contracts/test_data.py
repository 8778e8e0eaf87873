"""Images of any number of channels: what is read, against arrays written by hand; what does not fit, with its reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QUICKEST, fails
from PIL import Image
from torch import Tensor

from sparkme.data.dataset import CropDataset, collate, denormalise, estimate_statistics, normalise, preview_images
from sparkme.data.images import load_image
from sparkme.data.statistics import Statistics
from sparkme.pretrain import main
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training.build import build_network
from sparkme.weights.checkpoint import load_checkpoint

RANDOM = np.random.default_rng(0)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def save_pages(path: Path, pages: list[np.ndarray]) -> Path:
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("first", [True, False])
def test_arrays_of_every_kind_are_read(dtype: type, first: bool, tmp_path: Path) -> None:
    values = RANDOM.random((5, 7, 9))
    array = (values * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else values.astype(dtype)
    stored = array.transpose(2, 0, 1) if first else array
    read = load_image(save(tmp_path / "a.npy", stored), 9)
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    assert isinstance(read, Tensor) and read.shape == (9, 5, 7) and read.dtype == torch.float32
    assert np.abs(read.numpy() - (array / scale).transpose(2, 0, 1)).max() < 1e-6


def test_sixteen_bits_stay_sixteen_bits_in_grey(tmp_path: Path) -> None:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "grey.tiff")
    read = load_image(tmp_path / "grey.tiff", 1)
    assert isinstance(read, Tensor) and len(read.unique()) == 4096
    assert np.abs(read[0].numpy() * 65535 - ramp).max() < 0.01


def test_colours_become_grey_and_pages_become_channels(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    assert torch.allclose(load_image(tmp_path / "red.png", 1), torch.full((1, 4, 4), 76 / 255))  # ITU-R 601: 0.299 of 255
    pages = [RANDOM.integers(0, 256, (6, 8), dtype=np.uint8) for _ in range(4)]
    read = load_image(save_pages(tmp_path / "pages.tiff", pages), 4)
    assert np.abs(read.numpy() * 255 - np.stack(pages)).max() < 1e-3
    colour = load_image(save_pages(tmp_path / "book.tiff", [np.full((4, 4, 3), v, np.uint8) for v in (10, 20)]))
    assert isinstance(colour, Image.Image) and colour.getpixel((0, 0)) == (10, 10, 10)  # the first page


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("a.npy", np.zeros((4, 4, 2)), "does not have 5 channels"),
        ("a.npy", np.full((4, 4, 5), np.nan), "NaN or infinite"),
        ("a.npy", np.full((4, 4, 5), 1.5), "not all from 0 to 1"),
        ("a.npy", np.full((4, 4, 5), 70000), "range is not known"),
        ("a.npy", np.zeros((4, 4, 5), np.complex64), "not a pixel type"),
        ("a.npy", np.zeros((2, 2, 2, 2)), "4 axes"),
        ("a.npy", np.array([{}], dtype=object), "not an array of numbers"),
        ("a.png", np.zeros((4, 4, 3), np.uint8), "3 channels and 1 pages, but --channels is 5"),
    ],
)
def test_what_does_not_fit_is_unreadable_with_its_reason(name: str, array: np.ndarray, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    np.save(path, array) if name.endswith(".npy") else Image.fromarray(array).save(path)
    with pytest.raises(OSError, match=reason) as caught:
        load_image(path, 5)
    assert "\n" not in str(caught.value)


def test_bytes_and_floats_may_share_a_batch(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "a.png")
    save(tmp_path / "b.npy", np.full((8, 8, 3), 0.2))
    dataset = CropDataset(sorted(tmp_path.iterdir()), (4, 4), min_scale=0.5, seed=0)
    images = collate([dataset[0, 0], dataset[0, 1]]).images
    assert images is not None and images.dtype == torch.float32
    assert torch.allclose(images[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2])) and torch.allclose(images[1], torch.tensor(0.2))
    assert collate([dataset[0, 0], dataset[1, 0]]).images.dtype == torch.uint8  # type: ignore[union-attr]
    statistics = Statistics((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert torch.allclose(denormalise(normalise(images, statistics), statistics), images, atol=1e-6)


def test_statistics_are_estimated_once_over_all_pixels(tmp_path: Path) -> None:
    arrays = RANDOM.random((6, 5, 4, 2))
    paths = [save(tmp_path / f"{i}.npy", array) for i, array in enumerate(arrays)]
    found = estimate_statistics(paths, 2, "white", seed=0)
    assert np.abs(np.array(found.mean) - arrays.mean((0, 1, 2))).max() < 1e-5
    assert np.abs(np.array(found.std) - arrays.std((0, 1, 2))).max() < 1e-5
    assert estimate_statistics(paths, 2, "white", seed=0) == found


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_run_on_images_of_other_channels_resumes_with_its_statistics(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for i in range(4):
        save(tmp_path / "data" / f"{i}.npy", RANDOM.random((40, 72, channels)).astype(np.float32) * 0.5)
    words = [
        *QUICKEST,
        "--model",
        "timm:test_resnet",
        "--drop-path",
        "0",
        "--data",
        str(tmp_path / "data"),
        "--channels",
        str(channels),
        "--output",
        str(tmp_path / "run"),
        "--input-size",
        "32",
        "64",
        "--checkpoint-minutes",
        "0",
    ]
    assert main([*words, "--epochs", "1"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(config["mean"]) == channels and abs(config["mean"][0] - 0.25) < 0.02
    assert main([*words, "--epochs", "2"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mean"] == config["mean"]
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    network = build_network(from_config(PretrainSettings, saved["config"]))
    network.load_state_dict(saved["model"])
    assert network.encoder.in_channels == channels
    assert Image.open(tmp_path / "run" / "reconstructions" / "epoch_0002.png").mode == "RGB"
    assert preview_images([tmp_path / "data" / "0.npy"], (32, 64), 1, channels).shape == (1, channels, 32, 64)
    capsys.readouterr()
    assert f"--channels {channels}, now it is 3" in fails(capsys, *words, "--channels", 3, "--epochs", 3)
    assert "--mean takes" in fails(capsys, *words, "--mean", *[0.5] * (channels + 1), "--std", *[0.5] * channels)
    assert "above 0" in fails(capsys, *words, "--no-resume", "--mean", *[0.5] * channels, "--std", *[0.0] * channels)
