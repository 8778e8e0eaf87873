"""Images that tests make: plain ones, labelled ones and shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_images(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
        (folder / f"sub{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"sub{i % 2}" / f"{i}.png")
    return folder


COLOURS = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (255, 0, 0)}


def make_labelled(folder: Path, counts: dict[str, int], size: int = 48) -> Path:
    """A folder for each class: pictures of its colour, with a box that is elsewhere in each."""
    for name, count in counts.items():
        (folder / name / "deeper").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = Image.new("RGB", (size, size), COLOURS.get(name, (90, 90, 90)))
            picture.paste((255, 255, 255), (i % 5 * 8, i // 5 % 5 * 8, i % 5 * 8 + 9, i // 5 % 5 * 8 + 11))
            picture.putpixel((size - 1, size - 1), (i, sum(name.encode()) % 256, 0))  # no two are the same
            picture.save(folder / name / ("deeper" if i % 2 else "") / f"{i:03d}.png")
    return folder


def encoded(number: int, colour: tuple[int, int, int], kind: str = "PNG", size: tuple[int, int] = (48, 40)) -> bytes:
    noise = np.random.default_rng(number).integers(0, 30, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise + np.array(colour, dtype=np.uint8) // 2).save(file, kind)
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path: Path, numbers: range, label: str = ".cls") -> list[bytes]:
    """Images of alternating classes, with their labels beside them. Returns the images."""
    images = []
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for number in numbers:
            name = ("red", "blue")[number % 2]
            images.append(encoded(number, {"red": (220, 30, 30), "blue": (30, 30, 220)}[name]))
            add(archive, f"{number:05d}.png", images[-1])
            content = name if label == ".cls" else json.dumps({"label": name})
            add(archive, f"{number:05d}{label}", content.encode())
    return images
