"""Depth, range, bands and orientation: found in the data once, told, kept with a run, and used again."""

import builtins
import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUICKEST, fails
from PIL import Image
from torch import Tensor

import sparkme.data.dataset
import sparkme.data.images
import sparkme.data.labelled
import sparkme.reporting.visualize
from sparkme import export, finetune, pretrain, probe, visualize
from sparkme.data.dataset import Batch, CropDataset, collate, pixels_of
from sparkme.data.images import Stored, load_image, open_image
from sparkme.data.planes import Pixels
from sparkme.data.sources import ImageSource
from sparkme.data.survey import find_pixels
from sparkme.errors import UserError
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.settings.shared import checked_range
from sparkme.training.distributed import Process, find_pixels_together
from sparkme.training.health import Health
from sparkme.weights.checkpoint import load_checkpoint
from sparkme.weights.pretrained import read_pretrained

tifffile = pytest.importorskip("tifffile")
RANDOM = np.random.default_rng(0)
# What EXIF's numbers mean, one transposition each: how an upright array is stored.
HELD = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def scene(low: float, high: float, height: int = 48, width: int = 64) -> np.ndarray:
    """(H, W) float64: smooth, with some noise, over all of a range but its ends."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = (np.sin(x / 9) + np.cos(y / 7)) / 4 + 0.5
    return low + (high - low) * (0.9 * smooth + 0.1 * RANDOM.random((height, width)))


def save(path: Path, array: np.ndarray, **words: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, **words)
    elif array.dtype == np.uint16 and array.ndim == 3:
        path.write_bytes(png16(array, **words))
    else:
        Image.fromarray(array).save(path)
    return path


def png16(array: np.ndarray, orientation: int = 1) -> bytes:
    """A PNG file with 16 bits of (H, W, C), which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = array.shape
    exif = Image.Exif()
    exif[274] = orientation
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array.astype(">u2"))
    parts = (b"IHDR", head), (b"eXIf", exif.tobytes()[6:]), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def found(paths: list[Path], channels: int = 1, **words: Any) -> tuple[Pixels, str]:
    return find_pixels(paths, channels, "white", **{"known": None, "given": None, "upright": None, **words})


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        *[(f"{bits}.png", scene(0, 2**bits - 1).astype(np.uint16), [0, 2**bits - 1]) for bits in (10, 12, 14, 16)],
        ("warm.png", scene(29000, 31000).astype(np.uint16), (29000, 31000)),
        ("ct.npy", scene(-1024, 3071).astype(np.int16), (-1024, 3071)),
        ("ct.tif", scene(-1024, 3071).astype(np.int16), (-1024, 3071)),
        ("signed.tif", scene(-50, 49).astype(np.int8), (-50, 49)),
        ("long.tif", scene(0, 3e9).astype(np.uint32), [0, 2**32 - 1]),
        ("long.npy", scene(0, 4000).astype(np.int64), [0, 4095]),
        ("float.tif", scene(-3.5, 8.25).astype(np.float32), (-3.5, 8.25)),
        ("double.tif", scene(0, 5), (0, 5)),
        ("half.tif", scene(0, 5).astype(np.float16), (0, 5)),
        ("unit.npy", scene(0, 1).astype(np.float32), [0, 1]),
        ("half of unit.npy", scene(0, 0.5), [0, 1]),
        ("dark.npy", scene(0, 0.004), (0, 0.004)),
        ("both signs.npy", scene(-1, 1), (-1, 1)),
        ("whole.npy", np.round(scene(0, 250)).astype(np.float32), [0, 255]),
        ("none.npy", np.zeros((5, 4), np.uint16), [0, 1]),
        ("one pixel.npy", np.full((1, 1), 9, np.int32), [0, 15]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_range_is_that_of_the_numbers_and_not_of_their_type(
    name: str, array: np.ndarray, expected: list[int] | tuple[float, float], tmp_path: Path
) -> None:
    path = save(tmp_path / name, array)
    pixels, text = found([path])
    assert pixels.ranges is not None
    ((low, high),) = pixels.ranges.values()
    span = expected[1] - expected[0]
    if isinstance(expected, list):
        assert [low, high] == expected
    else:  # all of the numbers, and little more
        assert array.min() >= low >= expected[0] - span / 20 and array.max() <= high <= expected[1] + span / 20
    assert "become 0 to 1, estimated (--value-range LOW HIGH)" in text and "outside" not in text
    for channels in (1, 3):
        read = load_image(path, channels, "white", pixels)
        wanted = (array.astype(np.float64) - low) / (high - low)
        assert isinstance(read, Tensor) and read.shape == (channels, *array.shape)
        assert all(np.abs(plane.numpy() - wanted).max() < 1e-6 for plane in read)
    assert found([path]) == (pixels, text)


def test_defective_pixels_do_not_make_the_range_and_are_counted(tmp_path: Path) -> None:
    array = scene(0, 4000).astype(np.uint16)
    array[5, 5], array[40, 3], array[0, 0] = 65535, 60000, 65535
    path = save(tmp_path / "hot.png", array)
    pixels, text = found([path])
    assert pixels.ranges == {"integers": [0, 4095]}
    assert "from 0 to 65535" in text or "to 65535; 0 to 4095" in text
    assert "0.098 % of them lie outside and are clipped" in text
    with open_image(Stored("hot", path), 1, pixels=pixels) as image:
        assert image.outside == pytest.approx(3 / array.size) and float(image.decode().max()) == 1
    cold = scene(2000, 3000).astype(np.uint16)
    cold[7, 7] = 0
    pixels, text = found([save(tmp_path / "cold.png", cold)])
    assert pixels.ranges is not None and pixels.ranges["integers"][0] >= 2000 and "are clipped" in text
    spots = np.full((64, 64), 100, np.uint16)
    spots[20:22, 30:32] = 4000  # of 2 x 2 pixels: something that is there
    assert found([save(tmp_path / "spots.png", spots)])[0].ranges == {"integers": [0, 4095]}


def test_bands_of_different_numbers_count_together(tmp_path: Path) -> None:
    bands = np.stack([scene(0, high) for high in (100, 9000, 700)], 2).astype(np.uint16)
    assert found([save(tmp_path / "bands.npy", bands)], 3)[0].ranges == {"integers": [0, 16383]}


def test_images_of_8_bits_are_read_as_they_were(tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 40, (12, 10, 3), dtype=np.uint8)  # dark ones, too
    Image.fromarray(colours).save(tmp_path / "a.png")
    pixels, text = found([tmp_path / "a.png"], 3)
    assert pixels == Pixels({}, True) and text == "RGB of 8 bits (1 of 1 sampled)"
    read = load_image(tmp_path / "a.png", 3, "white", pixels)
    assert isinstance(read, Image.Image) and np.array_equal(np.asarray(read), colours)
    dataset = CropDataset([tmp_path / "a.png"], (4, 4), min_scale=0.5, seed=0, pixels=pixels)
    assert dataset[0, 0].image.dtype == torch.uint8  # type: ignore[union-attr]
    pixels, text = found([tmp_path / "a.png"], 3, given=[0, 51])
    assert "bytes: 0 to 51 become 0 to 1, as given" in text
    read = load_image(tmp_path / "a.png", 3, "white", pixels)
    assert isinstance(read, Tensor) and np.abs(read.numpy() * 51 - colours.transpose(2, 0, 1)).max() < 1e-4
    Image.fromarray(colours).save(tmp_path / "a.jpg", quality=100)
    with open_image(Stored("a", tmp_path / "a.jpg"), 3, pixels=pixels) as image:
        assert isinstance(image.decode(), Tensor)


def test_deep_and_other_images_of_one_folder_have_their_own_ranges(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / "deep.png", scene(0, 4000).astype(np.uint16)),
        save(tmp_path / "float.npy", scene(0, 1)),
        save(tmp_path / "byte.png", scene(0, 255).astype(np.uint8)),
    ]
    pixels, text = found(paths)
    assert pixels.ranges == {"integers": [0, 4095], "floats": [0.0, 1.0]}
    assert "1 channel of uint16 in 1" in text and "L of 8 bits in 1" in text
    assert all(load_image(path, 1, "white", pixels).max() > 0.9 for path in paths)
    paths.append(save(tmp_path / "two.npy", np.zeros((4, 4, 2))))
    assert found(paths)[0] == pixels
    assert "(4 of 4 sampled)" in found(paths)[1] and "1 cannot be read, such as" in found(paths)[1]
    pixels, text = found([paths[0], paths[2]], given=[0, 8191])
    assert "bytes: 0 to 255 become 0 to 1, since --value-range is for the deeper images" in text
    assert load_image(paths[0], 1, "white", pixels).max() < 0.51 and load_image(paths[2], 1, "white", pixels).max() > 0.9


def test_numbers_of_a_kind_that_nobody_looked_at_are_refused_with_the_flag(tmp_path: Path) -> None:
    path = save(tmp_path / "deep.png", scene(0, 4000).astype(np.uint16))
    with pytest.raises(OSError, match=r"deep.png: it holds uint16, .* pass --value-range LOW HIGH"):
        load_image(path, 1, "white", Pixels({}))
    pixels, text = found([path], known=Pixels({"floats": [0.0, 2.0]}))  # of a run on others
    assert pixels.ranges == {"floats": [0.0, 2.0], "integers": [0, 4095]} and "estimated" in text
    pixels, text = found([path], known=Pixels({"integers": [0, 1000]}))
    assert pixels.ranges == {"integers": [0, 1000]} and "as before" in text and "lie outside and are clipped" in text
    pixels, text = found([path], known=Pixels())  # of a run that did not ask
    assert pixels.ranges is None and "0 to 65535 become 0 to 1, the range of their type, as before" in text


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour_keep_all_of_them(channels: int, tmp_path: Path) -> None:
    array = np.stack([scene(0, 4000) for _ in range(channels)], 2).astype(np.uint16)
    if channels == 4:
        array[..., 3] = 65535
    words = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    paths = [save(tmp_path / "a.png", array), save(tmp_path / "b.tif", array, photometric="rgb", **words)]
    paths += [save(tmp_path / "c.tif", array.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **words)]
    for path in paths:
        pixels, text = found([path], 3)
        assert pixels.ranges == {"integers": [0, 4095]} and ("alpha" in text) == (channels == 4)
        read = load_image(path, 3, "white", pixels)
        assert isinstance(read, Tensor) and np.abs(read.numpy() * 4095 - array[..., :3].transpose(2, 0, 1)).max() < 0.01
        grey = load_image(path, 1, "white", pixels)
        assert np.abs(grey[0].numpy() * 4095 - array[..., :3] @ [0.299, 0.587, 0.114]).max() < 0.01
    array[..., -1] = 0
    clear = load_image(save(tmp_path / "clear.png", array), 3, "red", pixels)
    assert channels == 3 or torch.equal(clear[:, 0, 0], torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("layout", ["interleaved", "separate", "deflated"])
def test_tiff_files_of_many_bands_are_read_in_every_layout(dtype: type, layout: str, tmp_path: Path) -> None:
    array = np.stack([scene(0, 200) for _ in range(13)], 2).astype(dtype)
    words: dict[str, Any] = {
        "photometric": "minisblack",
        "planarconfig": "contig",
        "compression": "zlib" if layout == "deflated" else None,
    }
    stored = array
    if layout == "separate":
        stored, words["planarconfig"] = array.transpose(2, 0, 1), "separate"
    path = save(tmp_path / "bands.tif", stored, **words)
    pixels, text = found([path], 13)
    assert f"13 channels of {np.dtype(dtype)}" in text
    read = load_image(Stored("bands", path.read_bytes()), 13, "white", pixels)
    ((low, high),) = (pixels.ranges or {"bytes": [0, 255]}).values()
    assert isinstance(read, Tensor) and np.abs(read.numpy() * (high - low) + low - array.transpose(2, 0, 1)).max() < 1e-3
    for channels in (1, 3, 4):
        with pytest.raises(UserError, match=rf"it has 13 channels and 1 pages, but --channels is {channels}; .*--channels 13"):
            found([path], channels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_infrared_beside_colours_is_read_or_left_out_aloud(dtype: type, tmp_path: Path) -> None:
    array = np.stack([scene(0, 200) for _ in range(4)], 2).astype(dtype)
    path = save(tmp_path / "infrared.tif", array, photometric="rgb", extrasamples=["unspecified"])
    pixels, text = found([path], 4)
    read = load_image(path, 4, "white", pixels)
    assert isinstance(read, Tensor) and np.abs(read.numpy() * 255 - array.transpose(2, 0, 1)).max() < 1e-3
    assert "bands" not in text
    for channels in (1, 3):
        pixels, text = found([path], channels)
        assert "1 with 4 bands, the first 3 are used (--channels 4 uses all)" in text
    read = load_image(path, 3, "white", pixels)
    values = np.asarray(read) if isinstance(read, Image.Image) else read.permute(1, 2, 0).numpy() * 255
    assert np.abs(values - array[..., :3]).max() < 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_pages_are_channels_or_the_first_is_taken_aloud(dtype: type, tmp_path: Path) -> None:
    pages = np.stack([scene(0, 200) for _ in range(5)]).astype(dtype)
    path = save(tmp_path / "stack.tif", pages, photometric="minisblack")
    pixels, text = found([path], 5)
    assert "1 with one page per channel" in text
    read = load_image(path, 5, "white", pixels)
    ((low, high),) = (pixels.ranges or {"bytes": [0, 255]}).values()
    assert np.abs(read.numpy() * (high - low) + low - pages).max() < 1e-3
    for channels in (1, 3):
        text = found([path], channels)[1]
        assert "1 with 5 pages, the first is used (--channels 5 uses grey pages as channels)" in text
    with pytest.raises(UserError, match="1 channels and 5 pages, but --channels is 4"):
        found([path], 4)
    first, second = Image.new("L", (4, 4)), Image.new("L", (4, 4), 9)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert "1 with 2 frames, the first is used" in found([tmp_path / "a.gif"], 3)[1]


KINDS = {
    "grey.png": (np.uint8, 0),
    "colour.png": (np.uint8, 3),
    "alpha.png": (np.uint8, 4),
    "deep.png": (np.uint16, 3),
    "deep alpha.png": (np.uint16, 4),
    "deep grey.png": (np.uint16, 0),
    "grey.tif": (np.uint8, 0),
    "colour.tif": (np.uint8, 3),
    "alpha.tif": (np.uint8, 4),
    "deep grey.tif": (np.uint16, 0),
    "deep.tif": (np.uint16, 3),
    "bands.tif": (np.uint16, 7),
    "float.tif": (np.float32, 0),
    "pages.tif": (np.uint16, -5),
    "colour.jpg": (np.uint8, 3),
}


@pytest.mark.parametrize("orientation", HELD)
@pytest.mark.parametrize("name", KINDS)
def test_images_are_upright_with_every_number_of_channels(name: str, orientation: int, tmp_path: Path) -> None:
    """A bright corner says how an image lies, whatever is made of its colours."""
    dtype, bands = KINDS[name]
    upright = np.full((16, 24), 20, dtype)
    upright[:8, :12] = 200
    held = np.ascontiguousarray(HELD[orientation](upright))
    stored = np.repeat(held[..., None], bands, 2) if bands > 0 else np.repeat(held[None], -bands, 0) if bands else held
    if name.startswith(("alpha", "deep alpha")):
        stored[..., 3] = np.iinfo(dtype).max
    path = tmp_path / name
    if path.suffix == ".tif":
        words = {"photometric": "rgb" if bands in (3, 4) else "minisblack", "planarconfig": "contig" if bands > 0 else None}
        tifffile.imwrite(path, stored, extratags=[(274, "H", 1, orientation, True)], **words)
    elif dtype == np.uint16 and bands:
        path.write_bytes(png16(stored, orientation))
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))
    for channels in {1, 3, abs(bands) or 1}:
        if bands == 7 and channels != 7:
            continue
        pixels, text = found([path], channels, given=[0, 255] if dtype != np.uint8 else None)
        assert ("1 rotated as their EXIF says" in text) == (orientation != 1)
        for is_upright, expected in ((True, upright), (False, held)):
            with open_image(Stored(name, path), channels, pixels=pixels._replace(upright=is_upright)) as image:
                read = image.decode()
                assert image.size == expected.shape
            values = np.asarray(read.convert("L")) if isinstance(read, Image.Image) else read[0].numpy() * 255
            assert np.abs(values - expected.astype(float)).max() < 12, (channels, is_upright)  # JPEG rounds
    assert orientation == 1 or "not rotated as" in found([path], abs(bands) or 1, upright=False)[1]


def test_what_pillow_brings_down_to_8_bits_is_said(tmp_path: Path) -> None:
    array = np.stack([scene(0, 4000) for _ in range(4)], 2).astype(np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6 64 48 4095\n" + array[..., :3].astype(">u2").tobytes())
    save(tmp_path / "cmyk.tif", array, photometric="separated")
    assert "1 reduced from 12 bits to 8, since Pillow reads no more of PPM colours" in found([tmp_path / "a.ppm"], 3)[1]
    assert "1 reduced from 16 bits to 8" in found([tmp_path / "cmyk.tif"], 3)[1]
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG2000")
    deep = bytearray(content.getvalue())
    deep[deep.index(b"ihdr") + 14] = 15  # 16 bits, less one
    (tmp_path / "b.jp2").write_bytes(deep)
    (tmp_path / "c.jp2").write_bytes(content.getvalue())
    assert "1 reduced from 16 bits to 8" in found([tmp_path / "b.jp2"], 3)[1]
    assert "reduced from" not in found([tmp_path / "c.jp2"], 3)[1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_what_becomes_of_colours_and_alpha_is_said(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 8), (9, 90, 200)).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    colour, grey = found([path], 3)[1], found([path], 1)[1]
    assert ("1 grey, copied to three channels" in colour) == (mode in ("1", "L", "LA"))
    assert ("1 colour, converted to grey" in grey) == (mode not in ("1", "L", "LA"))
    assert ("1 with alpha, laid on white (--background)" in colour) == (mode in ("LA", "RGBA"))


def test_without_tifffile_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(
        tmp_path / "bands.tif",
        RANDOM.integers(0, 99, (8, 8, 5), dtype=np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )
    real = builtins.__import__

    def without(name: str, *args: Any, **words: Any) -> Any:
        if name == "tifffile":
            raise ModuleNotFoundError(name)
        return real(name, *args, **words)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"bands.tif: Pillow cannot read .*; pip install 'sparkme\[tiff\]'") as caught:
        found([path], 5)
    assert "\n" not in str(caught.value)


class Counting(ImageSource):
    """In blocks; counts what is read."""

    def __init__(self, blocks: list[int] | None, count: int, image: Path) -> None:
        self.blocks = None if blocks is None else torch.tensor(blocks)
        self.count, self.image, self.read_numbers, self.description = count, image, list[int](), "many"

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return str(number)

    def read(self, number: int) -> Stored:
        self.read_numbers.append(number)
        return Stored(str(number), self.image)


@pytest.mark.parametrize("blocks", [None, list(range(0, 10001, 100)), [0, 10000]])
def test_few_images_all_over_the_source_are_looked_at(blocks: list[int] | None, tmp_path: Path) -> None:
    source = Counting(blocks, 10000, save(tmp_path / "a.npy", scene(-5, 5)))
    pixels, text = find_pixels(source, 1, "white", known=None, given=None, upright=None)
    assert len(source.read_numbers) == len(set(source.read_numbers)) == 64 and "(64 of 10,000 sampled)" in text
    assert min(source.read_numbers) < 200 and max(source.read_numbers) > 8000
    if blocks is not None:
        assert len({int(np.searchsorted(blocks, n, side="right")) for n in source.read_numbers}) <= 8
    assert pixels.ranges is not None and -5.6 < pixels.ranges["floats"][0] < -5  # with room for the others


def test_the_first_process_decides_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, box = save(tmp_path / "a.npy", scene(0, 4000).astype(np.int32)), list[Any]()
    words: dict[str, Any] = {"known": None, "given": None, "upright": None}

    def share(process: Process, value: Any) -> Any:
        box.append(value) if process.is_main else None
        return json.loads(json.dumps(box[0]))

    monkeypatch.setattr(Process, "share", share)
    device = torch.device("cpu")
    first = find_pixels_together(Process(0, 2, device), [path], 1, "white", **words)
    path.unlink()
    assert find_pixels_together(Process(1, 2, device), [path], 1, "white", **words) == first
    box.clear()
    for rank in (0, 1):
        with pytest.raises(UserError, match="none of the sampled images can be read"):
            find_pixels_together(Process(rank, 2, device), [path], 1, "white", **words)


def test_many_pixels_outside_of_the_range_are_told_once_whenever_they_come(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", scene(0, 4000).astype(np.int32))
    dataset = CropDataset([path], (8, 8), min_scale=0.5, seed=0, channels=1, pixels=Pixels({"integers": [0, 1000]}))
    batch = collate([dataset[0, draw] for draw in range(4)])
    assert batch.images is not None and 2 < batch.outside < 4 and float(batch.images.max()) <= 1

    looked = Health(SimpleNamespace(settings=PretrainSettings(batch_size=4, input_size=(8, 8))))  # type: ignore[arg-type]
    good = [Batch(torch.rand(4, 1, 8, 8), (), outside=0.001) for _ in range(100)]
    assert not [text for other in good for text in looked.of_batch(other)]
    (text,) = [text for _ in range(20) for text in looked.of_batch(batch)]
    assert "% of the pixel values lie outside the value range and are clipped; set another with --value-range LOW HIGH" in text


WORDS = [*QUICKEST, "--epochs", "1", "--checkpoint-minutes", "0", "--panel-epochs", "0"]


def make_deep(folder: Path, high: float = 1600) -> Path:
    """Two classes of 12 bits in 16, as PNG."""
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            save(folder / label / f"{i}.png", scene(0, high, 72, 80).astype(np.uint16))
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images of 12 bits, and the checkpoint of a run on them."""
    folder = tmp_path_factory.mktemp("deep")
    data = make_deep(folder / "data")
    assert pretrain.main([*WORDS, "--data", str(data), "--output", str(folder / "run")]) == 0
    return data, folder / "run" / "checkpoints" / "last.pt"


def test_a_run_keeps_the_range_and_goes_on_with_it(
    deep: tuple[Path, Path], used: list[Pixels], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint = deep
    kept = {"integers": [0, 2047]}
    assert load_checkpoint(checkpoint)["config"]["value_range"] == kept
    assert json.loads((checkpoint.parents[1] / "config.json").read_text())["value_range"] == kept
    brighter = make_deep(tmp_path / "brighter", 60000)
    run = [*WORDS, "--output", str(checkpoint.parents[1]), "--panel-epochs", "1", "--probe-data", str(data)]
    assert pretrain.main([*run, "--data", str(brighter), "--epochs", "2"]) == 0
    shown = capsys.readouterr()
    assert "; 0 to 2047 become 0 to 1, as before" in shown.out and "lie outside and are clipped" in shown.out
    assert load_checkpoint(checkpoint)["config"]["value_range"] == kept
    assert used and set(map(repr, used)) == {repr(Pixels(kept))}
    assert pretrain.main([*run, "--data", str(data), "--epochs", "3", "--value-range", "0", "4095"]) == 0
    assert "0 to 4095 become 0 to 1, as given" in capsys.readouterr().out
    assert load_checkpoint(checkpoint)["config"]["value_range"]["integers"] == [0, 4095]


@pytest.mark.parametrize("values", [[5.0, 5.0], [9.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")], [0.0, 1e300]])
def test_what_is_no_range_is_refused(values: list[float]) -> None:
    with pytest.raises(UserError, match=r"--value-range .*: takes two finite numbers, the lower one first"):
        checked_range(values)


def test_every_command_looks_at_the_flag(deep: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, checkpoint = map(str, deep)
    flags = ["--value-range", "9", "1"]
    assert "--value-range 9.0 1.0" in fails(capsys, *WORDS, "--data", data, "--output", tmp_path / "run", *flags)
    folder = ["--output", str(tmp_path / "tuned")]
    for command, rest in ((finetune.main, ["--data", data, *folder]), (probe.main, ["--data", data]), (visualize.main, [data])):
        assert command([checkpoint, *rest, *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: --value-range 9.0 1.0: takes two finite numbers")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Pixels]:
    """How images were read."""
    told: list[Pixels] = []

    def spied(stored: Any, channels: int, background: str, pixels: Pixels = Pixels()) -> Any:  # noqa: B008
        told.append(pixels)
        return load_image(stored, channels, background, pixels)

    def opened(stored: Any, channels: int, background: str, pixels: Pixels = Pixels()) -> Any:  # noqa: B008
        told.append(pixels)
        return open_image(stored, channels, background, pixels)

    for module in (sparkme.data.images, sparkme.data.dataset, sparkme.data.labelled, sparkme.reporting.visualize):
        monkeypatch.setattr(module, "load_image", spied)
    monkeypatch.setattr(sparkme.data.dataset, "open_image", opened)
    return told


def test_later_commands_read_images_as_the_run_did(
    deep: tuple[Path, Path], used: list[Pixels], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint = deep
    kept = pixels_of(from_config(PretrainSettings, load_checkpoint(checkpoint)["config"]))
    assert kept.ranges is not None

    def reads_as(pixels: Pixels, words: str) -> None:
        assert used and set(map(repr, used)) == {repr(pixels)} and words in capsys.readouterr().out
        used.clear()

    said = f"0 to {kept.ranges['integers'][1]} become 0 to 1, as before"
    common = ["--data", str(data), "--workers", "0", "--device", "cpu", "--input-size", "64"]
    assert probe.main([str(checkpoint), *common, "--no-linear"]) == 0
    reads_as(kept, said)
    assert visualize.main([str(checkpoint), str(data), "--output", str(tmp_path / "a.png"), "--max-images", "1"]) == 0
    reads_as(kept, said)
    words = [*common, "--output", str(tmp_path / "tuned"), "--epochs", "1", "--batch-size", "2"]
    assert finetune.main([str(checkpoint), *words, "--recipe", "small"]) == 0
    reads_as(kept, said)
    exported = tmp_path / "weights.safetensors"
    flags = ["--no-verify", "--recalibrate-bn", str(data)]
    assert export.main([str(checkpoint), "--output", str(exported), *flags]) == 0
    reads_as(kept, "recalibrated")
    for path in (checkpoint, exported, tmp_path / "tuned" / "best.safetensors", tmp_path / "tuned" / "checkpoints" / "last.pt"):
        assert read_pretrained(path).pixels == kept
    assert probe.main([str(exported), *common, "--no-linear", "--value-range", "0", "9999", "--no-upright"]) == 0
    reads_as(Pixels({"integers": [0, 9999], "floats": [0, 9999]}, False), "0 to 9999 become 0 to 1, as given")


def test_runs_that_did_not_ask_go_on_as_they_were(tmp_path: Path) -> None:
    assert pixels_of(from_config(PretrainSettings, {"channels": 3})) == Pixels(None, True)
    path = save(tmp_path / "a.png", scene(0, 65535).astype(np.uint16))
    read = load_image(path, 1, "white", pixels_of(from_config(PretrainSettings, {})))
    assert np.abs(read[0].numpy() * 65535 - np.asarray(Image.open(path))).max() < 0.01
