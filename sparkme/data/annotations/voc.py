"""Pascal VOC's XML: Annotations/NAME.xml and JPEGImages/NAME.jpg, and the lists of ImageSets/Main.

Facts and their sources:
- A box has its first and last pixels, counted from 1. So its edges are xmin - 1, ymin - 1, xmax, ymax:
  facebookresearch/detectron2, detectron2/data/datasets/pascal_voc.py.
- A `difficult` object counts neither as missed nor as wrongly found: the devkit's VOCevaldet.m, and
  facebookresearch/detectron2, detectron2/evaluation/pascal_voc_evaluation.py. Here it is `crowd`: training ignores it, and
  detections in it are not counted.
- The image of NAME.xml is NAME.jpg, and a list has a name in each line: pytorch/vision, torchvision/datasets/voc.py.
- Images are read as they are stored. An image is turned if its recorded size is the turned one.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sparkme.data.annotations.base import (
    MOST_CLASSES,
    Annotated,
    Counted,
    Rows,
    assemble,
    listed,
    memory_named,
    most_pixels,
    raw_size,
    read_bytes,
    read_text,
)
from sparkme.data.sources.files import Files, Names, inside
from sparkme.errors import UserError, first_line
from sparkme.text import shown

MOST_XML_BYTES, MOST_LIST_BYTES = 2**24, 2**28
_SIDES = ("xmin", "ymin", "xmax", "ymax")
ANNOTATIONS, IMAGES, SETS = "Annotations", "JPEGImages", "ImageSets"


class _Reader:
    """The content of the files read so far. Classes are numbered as they occur."""

    def __init__(self, folder: Path, known: list[str] | None) -> None:
        self.folder, self.counted, self.rows = folder, Counted(), Rows()
        self.numbers = {name: i for i, name in enumerate(known or [])}
        self.is_open = known is None
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.places: list[tuple[int, int]] = []  # file and object number of each row
        self.files: list[str] = []

    def where(self, row: int) -> str:
        """The place of an object, for messages."""
        number, index = self.places[row]
        return f"{self.files[number]}: object {index}"


def read_voc(folder: Path, names: list[str] | None = None, *, like: Annotated | None = None) -> Annotated:
    """Reads a folder in the layout of VOC's devkit.

    Args:
        folder: has Annotations and JPEGImages.
        names: names of the annotations without .xml, see `read_set`; all if None.
        like: data, such as the training set, whose classes are used; objects of other classes are left out.

    Raises:
        UserError: a file is missing or wrong; names the file and what to change.
    """
    with memory_named(folder):
        reader = _Reader(folder, None if like is None else like.classes)
        annotations = folder / ANNOTATIONS
        if names is None:
            names = sorted(name[:-4] for name in listed(str(annotations)) if name.endswith(".xml") and not name.startswith("."))
        images = listed(str(folder / IMAGES))
        by_stem = {os.path.splitext(image)[0]: image for image in sorted(images, reverse=True)}
        for name in tqdm(names, "reading annotations", delay=2, disable=not sys.stderr.isatty()):
            if not os.path.isfile(annotations / f"{name}.xml"):
                short = shown(name, 80)
                raise UserError(f"{annotations} has no {short}.xml, which a list in {SETS} names; add it, or remove the name")
            _read_xml(reader, annotations / f"{name}.xml", name, images, by_stem)
        if not reader.names:
            why = "".join(f"; {line}" for line in reader.counted.lines)
            raise UserError(f"{folder} has no annotated images: {ANNOTATIONS}/NAME.xml and {IMAGES}/NAME.jpg{why}")
        sizes = np.array(reader.sizes, np.int64)
        classes = [*reader.numbers] if like is not None else _sorted_classes(reader)
        found = Files(folder / IMAGES, Names.pack(reader.names), str(folder))
        numbered = [*range(1, len(classes) + 1)], classes
        ids = np.arange(1, len(sizes) + 1)
        return assemble(found, numbered, ids, sizes, reader.rows, reader.where, reader.counted)


def read_set(folder: Path, split: str, kind: str = "Main") -> list[str] | None:
    """The names in ImageSets/Main/train.txt, or None if there is no such file.

    Raises:
        UserError: the file is not a list of names, or has a name twice.
    """
    path = folder / SETS / kind / f"{split}.txt"
    if not os.path.exists(path):
        return None
    names = []
    for number, line in enumerate(read_text(path, MOST_LIST_BYTES, Counted()).splitlines(), 1):
        if not (words := line.split()):
            continue
        if "\0" in words[0] or not inside("/root", os.path.join("/root", words[0])):
            raise UserError(
                f"{path}: line {number} is {shown(words[0], 80)!r}, and must be a name in {ANNOTATIONS} without .xml"
            )
        names.append(words[0].removesuffix(".xml"))
    if not names:
        raise UserError(f"{path} names no images")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} names {shown(twice[0], 80)!r} twice; leave one out")
    return names


def _read_xml(reader: _Reader, path: Path, name: str, images: set[str], by_stem: dict[str, str]) -> None:
    """Adds an image and its objects."""
    root = _parse(path, reader.counted)
    if root.tag != "annotation":
        raise UserError(f"{path} is <{shown(root.tag, 40)}>, and must be <annotation>, as Pascal VOC's")
    said = os.path.basename((root.findtext("filename") or "").strip().replace("\\", "/"))
    image = by_stem.get(name) or (said if said in images else None)  # many tools write a wrong filename
    if image is None:
        reader.counted.add(f"left out: annotations whose image is not in {reader.folder / IMAGES}", f"{path.name}")
        return
    number = len(reader.names)
    size = _size(path, root, reader.folder / IMAGES / image)
    for index, entry in enumerate(root.findall("object")):
        what = f"{path}: object {index}"
        label = _label(reader, what, entry)
        box = entry.find("bndbox")
        if box is None:
            raise UserError(f"{what} has no bndbox; add one with xmin, ymin, xmax, ymax, or remove the object")
        left, top, right, bottom = (_number(box.findtext(side), f"{what}: {side}") for side in _SIDES)
        difficult = _number(entry.findtext("difficult", "0"), f"{what}: difficult")
        if difficult not in (0, 1):
            raise UserError(f"{what}: difficult is {difficult:g}, and must be 0 or 1")
        reader.rows.add(number, label, (left - 1, top - 1, right, bottom), crowd=bool(difficult))
        reader.places.append((number, index))
    reader.names.append(image)
    reader.sizes.append(size)
    reader.files.append(str(path))


def _parse(path: Path, counted: Counted) -> ET.Element:
    """The content of a file.

    Raises:
        UserError: the file is not XML.
    """
    content = read_bytes(path, MOST_XML_BYTES)
    if b"<!ENTITY" in content:
        raise UserError(f"{path} declares entities, which annotations do not need; remove them")
    try:
        return ET.fromstring(content)
    except (ET.ParseError, LookupError, ValueError) as error:
        reason = first_line(error)
    try:  # the declared encoding may be missing or wrong
        return ET.fromstring(read_text(path, MOST_XML_BYTES, counted))
    except (ET.ParseError, LookupError, ValueError):
        raise UserError(f"{path} cannot be read as XML: {reason}") from None


def _size(path: Path, root: ET.Element, image: Path) -> tuple[int, int]:
    """The recorded height and width; those of the image file if they are missing, or 0, as some tools write."""
    said = [root.findtext(f"size/{side}") for side in ("height", "width")]
    height, width = (_number(text, f"{path}: size") if (text or "").strip() else 0.0 for text in said)
    if height == width == 0:
        try:
            height, width = raw_size(image)
        except OSError as error:
            raise UserError(f"{path} has no size, and its image cannot be read: {error}") from error
    if not (height >= 1 and width >= 1 and float(height).is_integer() and float(width).is_integer()):
        raise UserError(f"{path}: size is {width:g} x {height:g}, and must be whole pixels, at least 1")
    if height * width > most_pixels():
        raise UserError(
            f"{path}: size is {width:g} x {height:g} pixels, more than an image may have; correct it or raise --max-pixels"
        )
    return int(height), int(width)


def _number(text: str | None, what: str) -> float:
    try:
        return float((text or "").strip())
    except ValueError:
        got = "is missing" if text is None else f"is {shown(text.strip(), 40)!r}"
        raise UserError(f"{what} {got}, and must be a number") from None


def _label(reader: _Reader, what: str, entry: ET.Element) -> int:
    """The number of an object's class. An unknown class gets a new number, or -1 if the classes are given."""
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{what} has no name; add its class")
    if name not in reader.numbers:
        if not reader.is_open:
            reader.counted.add(
                "left out: objects of classes that the training data does not have", f"{what}: {shown(name, 40)!r}"
            )
            return -1
        if len(reader.numbers) == MOST_CLASSES:
            raise UserError(f"{what}: there are more than {MOST_CLASSES} classes, the most that are allowed")
        reader.numbers[name] = len(reader.numbers)
    return reader.numbers[name]


def _sorted_classes(reader: _Reader) -> list[str]:
    """Sorts the classes by name, and renumbers the labels. Returns the names."""
    classes = sorted(reader.numbers)
    if classes:
        place = {name: i for i, name in enumerate(classes)}
        moved = np.array([place[name] for name in reader.numbers], np.int64)
        label = np.frombuffer(reader.rows.label, np.int64)
        label[:] = moved[label]
    return classes
