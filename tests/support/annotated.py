"""Annotated images that tests make: bright squares on dark ground, as COCO has them and as masks of numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from commands import asked_to_finetune
from PIL import Image
from small_resnet import resnet

from sparkme.training.distributed import start_process
from sparkme.training.tasks import TASKS

CLASSES = ("red", "blue")
SIDES = (18, 26)  # of the squares, by their class
COLOURS = ((235, 40, 40), (40, 60, 240))
Square = tuple[int, int, int, int, int]  # left, top, right, bottom and class


def draw_squares(number: int, size: tuple[int, int], count: int = 2, classes: int = 2) -> list[Square]:
    """Squares that do not touch, a pure function of the number; `size` is (height, width)."""
    rng = np.random.default_rng(number)
    found: list[Square] = []
    for _ in range(50):
        label = int(rng.integers(classes)) if classes > 1 else 0
        side = SIDES[label]
        left, top = int(rng.integers(0, size[1] - side)), int(rng.integers(0, size[0] - side))
        box = (left, top, left + side, top + side)
        if all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in found) and len(found) < count:
            found.append((*box, label))
    return found


def picture_of(number: int, size: tuple[int, int], squares: Sequence[Square]) -> np.ndarray:
    """(H, W, 3) uint8."""
    values = np.random.default_rng(number).integers(0, 40, (*size, 3), dtype=np.uint8)
    for left, top, right, bottom, label in squares:
        values[top:bottom, left:right] = COLOURS[label]
    return values


def save_picture(path: Path, values: np.ndarray, channels: int = 3) -> None:
    """With 1 channel a grey picture, with 4 one whose last channel is the mean of the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = values.mean(2).astype(np.uint8)
    Image.fromarray({1: grey, 3: values, 4: np.dstack([values, grey])}[channels]).save(path)


def entry_of(square: Square, masks: str | None) -> dict[str, Any]:
    """An object as COCO has it; `masks` is `polygon`, `crowd` or None."""
    left, top, right, bottom, label = square
    entry: dict[str, Any] = {
        "category_id": 10 * (label + 1),
        "bbox": [left, top, right - left, bottom - top],
        "area": float((right - left) * (bottom - top)),
        "iscrowd": 0,
    }
    if masks is not None:
        entry["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    return entry


def make_coco(
    folder: Path,
    train: int = 8,
    val: int = 4,
    *,
    size: tuple[int, int] = (64, 64),
    masks: str | None = "polygon",
    channels: int = 3,
    classes: int = 2,
    per_image: int = 2,
) -> Path:
    """A folder as COCO has it."""
    for split, first, count in (("train", 0, train), ("val", 1000, val)):
        images, entries = [], []
        for number in range(first, first + count):
            squares = draw_squares(number, size, per_image, classes)
            name = f"{number:04d}.png"
            save_picture(folder / split / name, picture_of(number, size, squares), channels)
            images.append({"id": number + 1, "file_name": name, "height": size[0], "width": size[1]})
            for square in squares:
                entries.append({"id": len(entries) + 1, "image_id": number + 1, **entry_of(square, masks)})
        categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(CLASSES[:classes])]
        target = folder / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return folder


def change_coco(folder: Path, split: str, change: Any) -> None:
    """Rewrites a split's annotations: `change` gets them and alters them in place."""
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_masks(
    folder: Path,
    train: int = 8,
    val: int = 4,
    *,
    size: tuple[int, int] = (64, 64),
    channels: int = 3,
    ignored: bool = True,
) -> Path:
    """Folders train/images, train/masks, val/images and val/masks: ground 0, squares 1 and 2, a border of two pixels 255."""
    for split, first, count in (("train", 0, train), ("val", 1000, val)):
        for number in range(first, first + count):
            squares = draw_squares(number, size)
            name = f"{number:04d}.png"
            save_picture(folder / split / "images" / name, picture_of(number, size, squares), channels)
            mask = np.zeros(size, np.uint8)
            for left, top, right, bottom, label in squares:
                mask[top:bottom, left:right] = label + 1
            if ignored:
                mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = 255, 255, 255, 255
            save_mask(folder / split / "masks" / f"{number:04d}.png", mask)
    return folder


def save_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def save_weights(path: Path, channels: int = 3) -> Path:
    """Random weights of the small ResNet, as sparkme.export writes them."""
    torch.manual_seed(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    mean, std = [0.4, 0.45, 0.5, 0.55][:channels], [0.25, 0.2, 0.3, 0.35][:channels]
    notes = {"network": "small_resnet:resnet", "channels": str(channels), "mean": json.dumps(mean), "std": json.dumps(std)}
    safetensors.torch.save_file(resnet(in_channels=channels).state_dict(), path, notes)
    return path


def create(*words: object) -> Any:
    """The training that a command line of sparkme.finetune begins."""
    asked = asked_to_finetune(*words)
    return TASKS[asked.task](asked, start_process("cpu"))


def run_steps(training: Any, last: int) -> list[float]:
    """Trains until this step; returns the losses."""
    training.start_training()
    return [float(training.train_step(batch)) for batch in training.batches(range(training.step, last))]
