"""COCO's JSON of instances: images, categories, and annotations with boxes, polygons and runs.

Facts and their sources:
- Training ignores crowd regions (`iscrowd`). Boxes are cut at the edge of the image, and boxes without an area are left out:
  pytorch/vision, references/detection/coco_utils.py. Images without objects are kept.
- A label is the position of its category among the sorted ids, which may have gaps. A polygon has at least three points, and an
  even number of coordinates: facebookresearch/detectron2, detectron2/data/datasets/coco.py.
- Images are read as they are stored, regardless of EXIF: pytorch/vision, torchvision/datasets/coco.py. An image is turned if
  its recorded size is the turned one.
- Runs follow the columns, and are packed by `rleToString` of cocodataset/cocoapi, common/maskApi.c.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparkme.data.annotations.base import (
    MOST_CLASSES,
    Annotated,
    Counted,
    Rows,
    assemble,
    distinct,
    listed,
    memory_named,
    most_pixels,
    raw_size,
    read_text,
)
from sparkme.data.sources.files import Files, Names, inside
from sparkme.errors import UserError, first_line
from sparkme.text import shown

MOST_BYTES = 2**34
_LISTS = ("images", "annotations", "categories")
_NUMBERS = {int, float}
_SPACE = re.compile(r"[ \t\n\r]*")
_SAMPLE = 16
_MOST_ID = 2**63


@dataclass
class _File:
    """The content of a JSON file, with the ids of the file."""

    path: Path
    counted: Counted
    image_ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))  # height, width; 0 if missing
    categories: dict[int, str] = field(default_factory=dict)
    rows: Rows = field(default_factory=Rows)  # with ids as images and labels
    run_row: array[int] = field(default_factory=lambda: array("q"))
    run_size: array[int] = field(default_factory=lambda: array("q"))
    ids: array[int] = field(default_factory=lambda: array("q"))  # of the annotations; -1 if missing

    def where(self, row: int) -> str:
        """The place of an annotation, for messages."""
        named = f" (id {self.ids[row]})" if self.ids[row] >= 0 else ""
        return f"{self.path}: annotations[{row}]{named}"


def read_coco(path: Path, root: Path | None = None, *, like: Annotated | None = None) -> Annotated:
    """Reads a JSON file of instances.

    Args:
        path: the file.
        root: folder of its images; searched near the file if None.
        like: data, such as the training set, whose categories this file has to use.

    Raises:
        UserError: the file cannot be read, or an entry is wrong; names the entry and what to change.
    """
    with memory_named(path):
        counted = Counted()
        file = _read(path, counted)
        folder = _image_folder(path, root, file.names)
        kept = _existing(file, folder)
        image_ids = np.array([file.image_ids[i] for i in kept], np.int64)
        if not kept:
            raise UserError(f"{path}: none of its {len(file.names)} images is in {folder}; pass --root FOLDER")
        images = Files(folder, Names.pack(file.names[i] for i in kept), str(path))
        sizes = np.frombuffer(file.sizes, np.int64).reshape(-1, 2)[kept]
        sizes = _with_sizes(sizes, images)
        category_ids, classes = _classes(file, like)
        _resolve(file, image_ids, category_ids, sizes)
        return assemble(images, (category_ids, classes), image_ids, sizes, file.rows, file.where, counted)


class ListedImage(NamedTuple):
    """An image of a file: its number, and its height and width, (0, 0) where the file does not say."""

    id: int
    size: tuple[int, int]


def read_images(path: Path) -> dict[str, ListedImage]:
    """The images of a file by their names, such as of `image_info_test2017.json`; its annotations are not looked at.

    Raises:
        UserError: it cannot be read, has no images, or has two with one name or number.
    """
    with memory_named(path):
        counted = Counted()
        file = _File(path, counted)
        for key, index, entry in _entries(path, counted):
            if key == "images":
                what = f"{path}: images[{index}]"
                if not isinstance(entry, dict):
                    raise UserError(f"{what} is {_kind(entry)}, and must be an object such as {{...}}")
                _image(file, what, entry)
        if not file.image_ids:
            raise UserError(f"{path} has no images; it needs the list images, as COCO's instances")
        sizes = np.frombuffer(file.sizes, np.int64).reshape(-1, 2).tolist()
        found = {name: ListedImage(id_, (h, w)) for name, id_, (h, w) in zip(file.names, file.image_ids, sizes, strict=True)}
        if len(found) < len(sizes) or len(set(file.image_ids)) < len(sizes):
            raise UserError(f"{path} has two images with one file_name or id; number them anew")
        return found


def _read(path: Path, counted: Counted) -> _File:
    file = _File(path, counted)
    handlers = {"images": _image, "annotations": _annotation, "categories": _category}
    for key, index, entry in _entries(path, counted):
        what = f"{path}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise UserError(f"{what} is {_kind(entry)}, and must be an object such as {{...}}")
        handlers[key](file, what, entry)
    if not file.image_ids:
        raise UserError(f"{path} has no images; it needs the lists images, annotations and categories, as COCO's instances")
    if len(file.categories) > MOST_CLASSES:
        raise UserError(f"{path} has {len(file.categories)} categories, and may have {MOST_CLASSES}")
    if not file.categories:
        raise UserError(f"{path} has no categories; each needs an id and a name")
    if len(set(file.image_ids)) < len(file.image_ids):
        first: dict[int, int] = {}
        for i, id_ in enumerate(file.image_ids):
            if first.setdefault(id_, i) != i:
                raise UserError(f"{path}: images[{i}] has the id {id_}, as images[{first[id_]}]; give each image its own id")
    return file


def _entries(path: Path, counted: Counted) -> Iterator[tuple[str, int, Any]]:
    """The entries of the three lists, one by one. All at once would take ten times the memory of the file.

    Raises:
        UserError: the file is not JSON, or its content has another form.
    """
    text = read_text(path, MOST_BYTES, counted)
    decoder, where, seen = json.JSONDecoder(strict=False), "", set[str]()

    def skip(place: int, expected: str = "") -> int:
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
        if expected and text[place : place + 1] not in [*expected]:
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, expected))}", text, place)
        return place

    try:
        place = skip(0)
        if text[place : place + 1] == "[":
            raise UserError(
                f"{path} is a list, as a file of results; it must be an object with images, annotations, categories"
            )
        place = skip(skip(place, "{") + 1)
        while text[place : place + 1] != "}":
            skip(place, '"')
            key, place = decoder.raw_decode(text, place)
            place = skip(skip(place, ":") + 1)
            where = f" in {shown(key, 40)}"
            if key not in _LISTS:
                _, place = decoder.raw_decode(text, place)
            else:
                if key in seen:
                    raise UserError(f"{path} has {key} twice; join them to one list")
                seen.add(key)
                if text[place : place + 1] != "[":
                    value, _ = decoder.raw_decode(text, place)
                    raise UserError(f"{path}: {key} is {_kind(value)}, and must be a list")
                place, index = skip(place + 1), 0
                while text[place : place + 1] != "]":
                    where = f" in {key}[{index}]"
                    entry, place = decoder.raw_decode(text, place)
                    yield key, index, entry
                    place, index = skip(place, ",]"), index + 1
                    if text[place] == ",":
                        place = skip(place + 1)
                place += 1
            place = skip(place, ",}")
            if text[place] == ",":
                place = skip(skip(place + 1), '"')
        if (place := skip(place + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except RecursionError:
        raise UserError(f"{path} cannot be read as JSON: its brackets are nested too deeply{where}") from None
    except json.JSONDecodeError as error:
        cut = "; it may be cut off" if error.pos >= len(text.rstrip()) else ""
        raise UserError(f"{path} cannot be read as JSON{where}: {first_line(error)}{cut}") from None
    except UserError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path} cannot be read as JSON{where}: {first_line(error)}") from None


def _kind(value: Any) -> str:
    """Describes a value in a message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {shown(value, 40)!r}"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return f"the number {shown(value, 40)}"


def _whole(entry: dict[str, Any], key: str, what: str, *, least: int = 0) -> int:
    """A whole number of an entry; 5.0 is one, too.

    Raises:
        UserError: the entry has no such number.
    """
    value = entry.get(key)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        got = f"is {_kind(value)}" if key in entry else "is missing"
        raise UserError(f"{what}: {key} {got}, and must be a whole number")
    if not least <= value < _MOST_ID:
        raise UserError(f"{what}: {key} is {shown(value, 40)}, and must be from {least} to 2^63 - 1")
    return value


def _text(entry: dict[str, Any], key: str, what: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        got = f"is {_kind(value)}" if key in entry else "is missing"
        raise UserError(f"{what}: {key} {got}, and must be a text")
    return value


def _category(file: _File, what: str, entry: dict[str, Any]) -> None:
    id_ = _whole(entry, "id", what)
    if id_ in file.categories:
        raise UserError(f"{what} has the id {id_} of another category; give it its own id")
    file.categories[id_] = _text(entry, "name", what)


def _image(file: _File, what: str, entry: dict[str, Any]) -> None:
    id_, name = _whole(entry, "id", what), _text(entry, "file_name", what)
    if "\\" in name:  # as Windows writes it
        file.counted.add("names of images with \\ instead of /", shown(name, 80))
        name = name.replace("\\", "/")
    if "\0" in name or not inside("/root", os.path.join("/root", name)):
        raise UserError(
            f"{what}: file_name is {shown(name, 80)!r}, which is outside the folder of images; write a path inside it"
        )
    height, width = 0, 0
    if entry.get("height") is not None or entry.get("width") is not None:
        height, width = _whole(entry, "height", what, least=1), _whole(entry, "width", what, least=1)
        if height * width > most_pixels():
            raise UserError(
                f"{what} has {width} x {height} pixels, more than an image may have; correct it or raise --max-pixels"
            )
    file.image_ids.append(id_)
    file.names.append(os.path.normpath(name))
    file.sizes.extend((height, width))


def _annotation(file: _File, what: str, entry: dict[str, Any]) -> None:
    rows, id_ = file.rows, entry.get("id")
    id_ = id_ if type(id_) is int and 0 <= id_ < _MOST_ID else -1
    what = f"{what} (id {id_})" if id_ >= 0 else what
    image, category = _whole(entry, "image_id", what), _whole(entry, "category_id", what)
    try:
        x, y, w, h = _numbers(entry.get("bbox"), f"{what}: bbox", 4)
    except OverflowError:
        raise UserError(f"{what}: bbox has a number that is too large; correct it") from None
    crowd, area = entry.get("iscrowd", 0), entry.get("area")
    if crowd not in (0, 1) or isinstance(crowd, float):
        raise UserError(f"{what}: iscrowd is {_kind(crowd)}, and must be 0 or 1")
    if area is not None and type(area) not in _NUMBERS:
        raise UserError(f"{what}: area is {_kind(area)}, and must be a number")
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        _runs(file, what, segmentation)
    elif isinstance(segmentation, list):
        _polygons(file, what, segmentation)
    elif segmentation is not None:
        raise UserError(f"{what}: segmentation is {_kind(segmentation)}, and must be a list of polygons, or an object of runs")
    file.ids.append(id_)
    rows.add(image, category, (x, y, x + w, y + h), _float(area), bool(crowd))


def _float(area: float | None) -> float:
    try:
        return float("nan") if area is None else float(area)
    except OverflowError:
        return float("inf")


def _numbers(value: Any, what: str, count: int | None = None) -> list[float]:
    """The numbers of a list, as floats if their `count` is given.

    Raises:
        UserError: the value is not a list of numbers, or has another length.
        OverflowError: an integer is too large for a float.
    """
    if type(value) is not list or (count is not None and len(value) != count):
        got = "missing" if value is None else _kind(value)
        raise UserError(
            f"{what} is {got}, and must be {'four numbers: left, top, width, height' if count else 'a list of numbers'}"
        )
    if not {*map(type, value)} <= _NUMBERS:
        odd = next(i for i, number in enumerate(value) if type(number) not in _NUMBERS)
        raise UserError(f"{what}[{odd}] is {_kind(value[odd])}, and must be a number")
    return [*map(float, value)] if count else value


def _polygons(file: _File, what: str, polygons: list[Any]) -> None:
    if polygons and type(polygons[0]) in _NUMBERS:
        raise UserError(f"{what}: segmentation is a list of numbers; write a list of polygons, [[x, y, x, y, ...]]")
    for i, polygon in enumerate(polygons):
        numbers = _numbers(polygon, f"{what}: segmentation[{i}]")
        if len(numbers) < 6 or len(numbers) % 2:
            file.counted.add("left out: polygons of fewer than three points, or half a point", f"{what}: segmentation[{i}]")
            continue
        try:
            file.rows.add_polygon(numbers)
        except OverflowError:
            raise UserError(f"{what}: segmentation[{i}] has a number that is too large; correct it") from None


def _runs(file: _File, what: str, segmentation: dict[str, Any]) -> None:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if type(size) is not list or len(size) != 2 or any(type(side) is not int or not 0 < side < 2**31 for side in size):
        raise UserError(f"{what}: segmentation.size is {_kind(size)}, and must be [height, width]")
    runs = None
    if isinstance(counts, str):
        runs = unpacked(counts)
    elif isinstance(counts, list) and {*map(type, counts)} == {int} and max(counts) < 2**32:
        runs = np.array(counts, np.int64)
    if runs is None or not len(runs) or int(runs.min()) < 0 or int(runs.sum()) != size[0] * size[1]:
        raise UserError(f"{what}: segmentation.counts are not runs of {size[0] * size[1]} pixels; encode the mask again")
    file.run_row.append(len(file.rows))
    file.run_size.extend(size)
    file.rows.run.frombytes(runs.astype(np.uint32).tobytes())


def unpacked(text: str) -> np.ndarray | None:
    """The runs of a packed text, (K,) int64; None if the text is not one.

    A character has 6 bits: 5 bits of a number, the lowest first, and a bit that says whether the number continues. From the
    fourth on, a number is the difference to the run two places before.
    """
    try:
        signs = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(signs) or int(signs.min()) < 0 or int(signs.max()) > 63 or signs[-1] & 32:
        return None
    ends = np.flatnonzero(signs & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > 7:
        return None
    shift = 5 * (np.arange(len(signs)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((signs & 31) << shift, starts)
    numbers -= np.where(signs[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers if int(numbers.max()) < 2**32 else None


def _image_folder(path: Path, root: Path | None, names: Sequence[str]) -> Path:
    """The folder of the images: of the usual places, the first that has the most of a sample of the names.

    Raises:
        UserError: no place has any of them.
    """
    split = re.sub(r"^(instances|annotations)_|_?annotations|\.coco", "", path.stem)
    bases = [path.parent.parent, path.parent] if root is None else [root]
    places = [base / below for base in bases for below in ("", split, "images", f"images/{split}")]
    sample = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    counts = [sum(os.path.isfile(place / name) for name in sample) for place in places]
    if not any(counts):
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        raise UserError(f"{path} names the image {shown(names[0], 80)!r}, which is in none of {looked}; pass --root FOLDER")
    return places[counts.index(max(counts))]


def _existing(file: _File, folder: Path) -> list[int]:
    """The numbers of the images whose files exist. The others are counted, and left out with their annotations."""
    known: dict[str, set[str]] = {}
    kept: list[int] = []
    for number, name in enumerate(file.names):
        below, last = os.path.split(name)
        if below not in known:
            known[below] = listed(os.path.join(folder, below))
        if last in known[below]:
            kept.append(number)
        else:
            file.counted.add(f"left out: images of {file.path.name} that are not in {folder}", shown(name, 80))
    return kept


def _with_sizes(sizes: np.ndarray, images: Files) -> np.ndarray:
    """Fills in sizes that entries do not have: those of the files, as they are stored."""
    for number in np.flatnonzero(sizes[:, 0] == 0).tolist():
        try:
            sizes[number] = raw_size(images.path(number))
        except OSError as error:
            raise UserError(f"{images.description} has no size of an image that cannot be read: {error}") from error
    return sizes


def _classes(file: _File, like: Annotated | None) -> tuple[list[int], list[str]]:
    """The ids and names of the categories, or those of `like`."""
    ids = sorted(file.categories)
    names = distinct([file.categories[id_] for id_ in ids], ids, file.counted)
    if like is None:
        return ids, names
    known = dict(zip(like.category_ids, like.classes, strict=True))
    used = {*np.unique(np.frombuffer(file.rows.label, np.int64)).tolist()}
    for id_, name in zip(ids, names, strict=True):
        if known.get(id_) != name and (id_ in known or id_ in used):
            other = f"is {known[id_]!r}" if id_ in known else "is missing"
            raise UserError(f"{file.path} has the category {id_} {name!r}, which {other} in the training data; use the same")
    return like.category_ids, like.classes


def _resolve(file: _File, image_ids: np.ndarray, category_ids: list[int], sizes: np.ndarray) -> None:
    """Replaces ids by numbers of images and labels, or -1 if they are unknown, and checks the sizes of masks."""
    rows = file.rows
    image = np.frombuffer(rows.image, np.int64)
    listed_ids = np.array(sorted(file.image_ids), np.int64)
    strange = listed_ids[np.searchsorted(listed_ids, image).clip(0, len(listed_ids) - 1)] != image
    _count(file, "left out: annotations of images that the file does not list", strange)
    image[:] = _places(image_ids, image)
    label = np.frombuffer(rows.label, np.int64)
    found = _places(np.array(category_ids, np.int64), label)
    _count(file, "left out: annotations of categories that the file does not list", found < 0)
    label[:] = found
    size = np.frombuffer(file.run_size, np.int64).reshape(-1, 2)
    row = np.frombuffer(file.run_row, np.int64)
    odd = (image[row] >= 0) & (size != sizes[image[row]]).any(1)
    if odd.any():
        place = int(odd.argmax())
        have, want = size[place].tolist(), sizes[image[row[place]]].tolist()
        raise UserError(
            f"{file.where(int(row[place]))}: segmentation.size is {have}, and its image is {want}; encode the mask again"
        )


def _count(file: _File, kind: str, which: np.ndarray) -> None:
    if count := int(which.sum()):
        file.counted.add(kind, lambda: file.where(int(which.argmax())), count)


def _places(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The position of each id among the known ones, or -1."""
    if not len(known):
        return np.full(len(ids), -1)
    order = np.argsort(known, kind="stable")
    place = order[np.searchsorted(known[order], ids).clip(0, len(known) - 1)]
    return np.where(known[place] == ids, place, -1)
