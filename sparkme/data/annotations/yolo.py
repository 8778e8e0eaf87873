"""YOLO's text files: a data.yaml, and a label file for each image with a line for each box or polygon.

Facts, all from ultralytics/ultralytics:
- data.yaml has `path`, `train`, `val` (or `validation`), and `names` (a list, or numbers and names) or `nc`:
  ultralytics/data/utils.py, `check_det_dataset`. A split is a folder, a list of folders, or a text file of images, whose names
  may begin with ./ for the folder of that file: ultralytics/data/base.py, `get_img_files`.
- The path of a label file is that of its image, with the last images/ replaced by labels/ and the suffix by .txt. Without that
  file, the image has no objects: ultralytics/data/utils.py, `img2label_paths` and `verify_image_label`.
- A line is `class x y width height`, centre and size as shares of the image's size; or `class x y x y x y ...`, a polygon,
  whose box is the smallest around it. Shares may exceed the image by 1 %. Of equal lines, one counts. Images are turned by
  their EXIF orientation: `verify_image_label` and `exif_size`. One difference: a box among polygons stays a box.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from sparkme.data.annotations.base import (
    MOST_CLASSES,
    Annotated,
    Counted,
    Rows,
    assemble,
    distinct,
    memory_named,
    most_pixels,
    read_text,
    upright_size,
)
from sparkme.data.sources.files import Files, Names, is_image, look_through
from sparkme.errors import UserError
from sparkme.text import shown

MOST_YAML_BYTES, MOST_LABEL_BYTES, MOST_LIST_BYTES = 2**19, 2**25, 2**31
TOLERANCE = 0.01  # a share may lie so far outside 0 to 1


@dataclass(frozen=True)
class DataYaml:
    """The content of a data.yaml.

    Attributes:
        path: of the file.
        root: folder of the splits.
        train, val: folders or text files of images; empty if the file does not name any.
        classes: names of the classes.
        notes: lines about names that were changed.
    """

    path: Path
    root: Path
    train: list[Path]
    val: list[Path]
    classes: list[str]
    notes: list[str]


def read_data_yaml(path: Path, root: Path | None = None) -> DataYaml:
    """Reads a data.yaml.

    Args:
        path: the file.
        root: folder of the splits, instead of the one that the file names.

    Raises:
        UserError: the file is not a data.yaml, or an entry is wrong.
    """
    text = read_text(path, MOST_YAML_BYTES, Counted())
    try:
        # All values are read as texts, since a class may be named `no`, which is false in YAML.
        said = yaml.load(text, Loader=yaml.BaseLoader)
    except RecursionError:
        raise UserError(f"{path} cannot be read as YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} has no lines such as `train: images/train` and `names: [cat, dog]`")
    if "kpt_shape" in said:
        raise UserError(f"{path} has key points, which are not supported; use labels of boxes or polygons")
    counted = Counted()
    classes = _names(path, said, counted)
    folder = root or _root(path, said)
    val = said.get("val") or said.get("validation")
    train = _places(path, folder, "train", said.get("train"))
    return DataYaml(path, folder, train, _places(path, folder, "val", val), classes, counted.lines)


def _names(path: Path, said: dict[Any, Any], counted: Counted) -> list[str]:
    names, count = said.get("names"), said.get("nc")
    number = int(count) if isinstance(count, str) and count.isascii() and count.isdecimal() and len(count) < 7 else None
    if (count is not None and number is None) or (number is not None and not 0 < number <= MOST_CLASSES):
        raise UserError(f"{path}: nc is {shown(count, 40)}, and must be the number of classes, at most {MOST_CLASSES}")
    if not names:
        if number is None:
            raise UserError(f"{path} has neither names nor nc; add a line such as `names: [cat, dog]`")
        return [f"class_{i}" for i in range(number)]
    if isinstance(names, dict):
        keys = sorted(
            (key for key in names if isinstance(key, str) and key.isascii() and key.isdecimal()), key=lambda k: (len(k), k)
        )
        if keys != [str(i) for i in range(len(names))]:
            raise UserError(f"{path}: the numbers of names must be 0 to {len(names) - 1}, each once")
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: names must be a list of texts, or numbers and texts, such as `names: [cat, dog]`")
    if len(names) > MOST_CLASSES:
        raise UserError(f"{path} has {len(names)} names, and may have {MOST_CLASSES}")
    if number is not None and number != len(names):
        raise UserError(f"{path}: nc is {number}, and names has {len(names)}; correct one")
    return distinct(names, range(len(names)), counted)


def _root(path: Path, said: dict[Any, Any]) -> Path:
    """The folder that a file names, relative to the file or to the working directory; that of the file if it does not exist."""
    named = said.get("path")
    if named in (None, ""):
        return path.parent
    if not isinstance(named, str) or "\0" in named:
        raise UserError(f"{path}: path is {shown(named, 80)}, and must be a folder")
    return next((place for place in (path.parent / named, Path(named)) if os.path.isdir(place)), path.parent)


def _places(path: Path, root: Path, key: str, said: Any) -> list[Path]:
    if said in (None, ""):
        return []
    found = []
    for name in said if isinstance(said, list) else [said]:
        if not isinstance(name, str) or "\0" in name:
            raise UserError(
                f"{path}: {key} is {shown(said, 80)}, and must be a folder, a list of folders, or a .txt file of images"
            )
        # Exported files begin with ../ where they mean the folder of the file.
        tries = [root / name, *([root / name[3:]] if name.startswith("../") else []), path.parent / name]
        place = next((place for place in tries if os.path.exists(place)), None)
        if place is None:
            raise UserError(f"{path}: {key} is {shown(name, 80)}, but {tries[0]} does not exist; correct {key} or path")
        found.append(place)
    return found


def read_yolo(data: DataYaml, places: list[Path]) -> Annotated:
    """Reads the images of a split, and their labels.

    Args:
        data: content of the data.yaml.
        places: folders or text files of images: `data.train` or `data.val`.

    Raises:
        UserError: there are no images, or a line of a label file is wrong; names the line.
    """
    counted, rows, lines = Counted(), Rows(), list[tuple[int, int]]()
    with memory_named(data.path):
        names, remarks = _images(data, places, counted)
        kept: list[str] = []
        sizes: list[tuple[int, int]] = []
        labels: list[str] = []
        for name in tqdm(names, "reading labels", delay=2, disable=not sys.stderr.isatty()):
            try:
                height, width = upright_size(Path(name))
            except OSError as error:
                counted.add("left out: images that cannot be read", str(error))
                continue
            if not 0 < height * width <= most_pixels():
                counted.add("left out: images with more pixels than --max-pixels", shown(name, 120))
                continue
            label = _label_file(name)
            labels.append(label)
            _read_labels(label, len(kept), (height, width), data, rows, lines, counted)
            kept.append(name)
            sizes.append((height, width))
        if not kept:
            raise UserError(
                f"{data.path}: none of {len(names)} images can be read: {counted.lines[0] if counted.lines else ''}"
            )
        size = np.array(sizes, np.int64)

        def where(row: int) -> str:
            number, line = lines[row]
            return f"{labels[number]}: line {line}"

        images = Files(Path(), Names.pack(kept), str(data.path), notes=[*data.notes, *remarks])
        ids, numbered = np.arange(1, len(kept) + 1), ([*range(len(data.classes))], data.classes)
        return assemble(images, numbered, ids, size, rows, where, counted, turned=True)


def _images(data: DataYaml, places: list[Path], counted: Counted) -> tuple[list[str], list[str]]:
    """The images of folders and lists, sorted and without repetition; and remarks on the folders."""
    found: dict[str, None] = {}
    remarks: list[str] = []
    for place in places:
        if os.path.isdir(place):
            files = look_through(place)
            found.update((str(files.path(i)), None) for i in range(len(files)))
            remarks += files.remarks
        else:
            for name in _listed_images(data, place, counted):
                found[name] = None
    if not found:
        raise UserError(f"{data.path}: no images in {', '.join(map(str, places))}")
    return sorted(found), remarks


def _listed_images(data: DataYaml, place: Path, counted: Counted) -> Iterator[str]:
    for line in read_text(place, MOST_LIST_BYTES, counted).splitlines():
        if not (name := line.strip()):
            continue
        if not is_image(name):
            counted.add(f"left out: lines of {place.name} that do not name an image", shown(name, 120))
            continue
        tries = [place.parent / name] if name.startswith("./") else [data.root / name, place.parent / name]
        if "\0" in name or (path := next((path for path in tries if os.path.isfile(path)), None)) is None:
            counted.add(f"left out: images of {place.name} that do not exist", shown(name, 120))
            continue
        yield os.path.normpath(path)


def _label_file(image: str) -> str:
    """The path of an image's label file: the last images/ of its absolute path becomes labels/."""
    before, found, after = os.path.abspath(image).rpartition(f"{os.sep}images{os.sep}")
    stem = os.path.splitext(after)[0] + ".txt"
    return f"{before}{os.sep}labels{os.sep}{stem}" if found else stem


def _read_labels(
    label: str,
    number: int,
    size: tuple[int, int],
    data: DataYaml,
    rows: Rows,
    lines: list[tuple[int, int]],
    counted: Counted,
) -> None:
    """Adds the objects of an image."""
    if not os.path.exists(label):
        return
    seen = set[tuple[str, ...]]()
    height, width = size
    for line, text in enumerate(read_text(Path(label), MOST_LABEL_BYTES, counted).splitlines(), 1):
        if not (cells := text.split()):
            continue
        what = f"{label}: line {line}"
        if (key := tuple(cells)) in seen:
            counted.add("left out: repeated lines of labels", what)
            continue
        seen.add(key)
        category, values = _numbers(cells, what)
        if category >= len(data.classes):
            counted.add(f"left out: objects of classes that {data.path.name} does not name", f"{what}: class {category}")
            category = -1
        if len(values) == 4:
            x, y, w, h = (share * side for share, side in zip(values, (width, height, width, height), strict=True))
            box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        else:
            points = np.array(values).reshape(-1, 2) * (width, height)
            rows.add_polygon(points.ravel())
            box = (*points.min(0).tolist(), *points.max(0).tolist())
        rows.add(number, category, box)
        lines.append((number, line))


def _numbers(cells: list[str], what: str) -> tuple[int, list[float]]:
    """The class and the shares of a line.

    Raises:
        UserError: the line is neither a box nor a polygon.
    """
    if len(cells) != 5 and (len(cells) < 7 or len(cells) % 2 == 0):
        kind = "`class x y width height`, or `class x y x y x y ...` of three points or more"
        raise UserError(f"{what} has {len(cells)} values, and must be {kind}")
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        odd = next(cell for cell in cells if not _is_number(cell))
        raise UserError(f"{what} has {shown(odd, 40)!r}, which is not a number") from None
    if not numbers[0].is_integer() or not 0 <= numbers[0] < 2**31:
        raise UserError(f"{what} begins with {shown(cells[0], 40)}, which is not the number of a class")
    for cell, value in zip(cells[1:], numbers[1:], strict=True):
        if not -TOLERANCE <= value <= 1 + TOLERANCE and abs(value) != float("inf") and value == value:
            raise UserError(
                f"{what} has {shown(cell, 40)}, and must have shares of the image, from 0 to 1; divide by its width or height"
            )
    return int(numbers[0]), numbers[1:]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
