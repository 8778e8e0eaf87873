"""Finds the files of annotated images, and splits the images.

coco/annotations/instances_train2017.json     COCO: images in coco/train2017/; or FILE.json and the folder of its images
set/data.yaml                                 YOLO: images/ and labels/
VOC2012/Annotations/NAME.xml                  Pascal VOC: JPEGImages/ and ImageSets/Main/train.txt
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import NamedTuple

from sparkme.data.annotations.base import Annotated, Objects
from sparkme.data.annotations.coco import read_coco
from sparkme.data.annotations.masks_folder import IGNORED, Segmented, SegmentedSplit, find_segmented
from sparkme.data.annotations.voc import ANNOTATIONS, IMAGES, SETS, read_set, read_voc
from sparkme.data.annotations.yolo import read_data_yaml, read_yolo
from sparkme.data.labelled import Labelled, hold_out
from sparkme.errors import UserError

YAML = (".yaml", ".yml")
EXPECTED = (
    "it takes COCO's annotations/instances_train*.json, YOLO's data.yaml, or Pascal VOC's Annotations and JPEGImages; "
    "or pass --train FILE.json --val FILE.json --root FOLDER"
)
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


class AnnotatedSplit(NamedTuple):
    """Training and validation images, and a note on their split."""

    train: Annotated
    val: Annotated
    note: str

    @property
    def remarks(self) -> list[str]:
        """Lines to print at the start."""
        return [*dict.fromkeys([*self.train.notes, *self.val.notes, *self.train.images.remarks, *self.val.images.remarks])]


def find_annotated(
    data: Path | str | None = None,
    train: Path | str | None = None,
    val: Path | str | None = None,
    root: Path | str | None = None,
    *,
    val_share: float = 0.2,
    seed: int = 0,
    flag: str = "--data",
) -> AnnotatedSplit:
    """Reads annotations in the format of COCO, YOLO or Pascal VOC.

    Args:
        data: a folder in one of the formats, a data.yaml, or a JSON file.
        train, val: two JSON files in COCO's format, instead of `data`. Without `val`, a part of `train` is drawn.
        root: folder of the images of JSON files, or of the splits of a data.yaml; searched near the files if None.
        val_share: share of validation images if the data has no split. They are drawn from each class; copies stay together.
        seed: of that draw.
        flag: command line flag of `data`, for messages.

    Raises:
        UserError: there are no annotations, or an entry is wrong; names the entry and what to change.
    """
    if not 0 < val_share < 1:
        raise UserError(f"--val-share {val_share} is outside (0, 1)")
    folder = None if root is None else Path(root)
    if folder is not None and not os.path.isdir(folder):
        raise UserError(f"--root {folder} is not a folder")
    if (data is None) == (train is None):
        raise UserError(f"pass either {flag}, or --train FILE.json with --val FILE.json: {EXPECTED}")
    if data is not None and val is not None:
        raise UserError(f"--val {val} goes with --train FILE.json, not with {flag}")
    if train is not None:
        for name, path in (("--train", train), ("--val", val)):
            if path is not None and Path(path).suffix.lower() != ".json":
                raise UserError(f"{name} {path} must be a .json file as COCO's; for a data.yaml or a folder pass {flag}")
        return _checked(_of_coco(Path(train), None if val is None else Path(val), folder, val_share, seed))
    assert data is not None
    return _checked(_find(Path(data), folder, val_share, seed, flag))


def _find(data: Path, root: Path | None, val_share: float, seed: int, flag: str) -> AnnotatedSplit:
    if os.path.isfile(data):  # False of a name that is too long, and of pipes
        if data.suffix.lower() in YAML:
            return _of_yolo(data, root, val_share, seed)
        if data.suffix.lower() == ".json":
            return _of_coco(data, None, root, val_share, seed)
    if not os.path.isdir(data):
        raise UserError(f"{flag} {data} is neither a folder, nor an existing .json or .yaml file; {EXPECTED}")
    yaml = _data_yaml(data, flag)
    if yaml is not None and yaml.stem == "data":
        return _of_yolo(yaml, root, val_share, seed)
    if (voc := _voc_folder(data, flag)) is not None:
        if root is not None:
            raise UserError(f"--root {root} is not for Pascal VOC's folders, which have their images in {IMAGES}")
        return _of_voc(voc, val_share, seed)
    train, val = (_json_of(data, split, flag) for split in ("train", "val"))
    if train is None and val is None:
        several = sorted(path for below in ("annotations", ".") for path in _matching(data / below, "*.json"))
        if yaml is not None and not several:
            return _of_yolo(yaml, root, val_share, seed)
        if len(several) != 1:
            raise UserError(f"{flag} {data} has no annotations; {EXPECTED}")
        train = several[0]
    if train is None:
        raise UserError(f"{flag} {data} has {val}, but no training set; pass --train FILE.json")
    return _of_coco(train, val, root, val_share, seed)


def _matching(folder: Path, pattern: str) -> list[Path]:
    return sorted(Path(name) for name in glob.glob(os.path.join(glob.escape(str(folder)), pattern)) if os.path.isfile(name))


def _data_yaml(data: Path, flag: str) -> Path | None:
    """The data.yaml of a folder; or its only .yaml file, which may have another purpose."""
    found = [path for ending in YAML for path in _matching(data, f"*{ending}")]
    named = [path for path in found if path.stem == "data"]
    if len(named) > 1:
        raise UserError(f"{flag} {data} has data.yaml and data.yml; leave one out")
    return next(iter(named or found[: len(found) == 1]), None)


def _voc_folder(data: Path, flag: str) -> Path | None:
    """The folder with Annotations and JPEGImages: `data`, or VOC2012 or VOCdevkit/VOC2012 in it."""
    tries = [
        data,
        *(Path(name) for below in ("VOC*", "VOCdevkit/VOC*") for name in glob.glob(f"{glob.escape(str(data))}/{below}")),
    ]
    found = [path for path in tries if os.path.isdir(path / ANNOTATIONS) and os.path.isdir(path / IMAGES)]
    if len(found) > 1:
        raise UserError(f"{flag} {data} has several years of Pascal VOC; name one: {flag} {found[0]}")
    return next(iter(found), None)


def _json_of(data: Path, split: str, flag: str) -> Path | None:
    """A split's JSON: annotations/instances_train2017.json, annotations/train.json, or train/_annotations.coco.json."""
    names = _SPLITS[split]
    tries = [
        *((data / "annotations", f"instances_{name}*.json") for name in names[:2]),
        *((data / below, f"{name}.json") for below in ("annotations", ".") for name in names),
        *((data / name, "_annotations.coco.json") for name in names),
    ]
    for folder, pattern in tries:
        if found := _matching(folder, pattern):
            if len(found) > 1:
                names_found = ", ".join(path.name for path in found[:4])
                raise UserError(
                    f"{flag} {data} has several files for {split} ({names_found}); pass --train FILE.json --val FILE.json"
                )
            return found[0]
    return None


def _of_coco(train: Path, val: Path | None, root: Path | None, val_share: float, seed: int) -> AnnotatedSplit:
    found = read_coco(train, root)
    if val is None:
        return _drawn(found, val_share, seed)
    return _given(found, read_coco(val, root, like=found), train.name, val.name)


def _of_yolo(path: Path, root: Path | None, val_share: float, seed: int) -> AnnotatedSplit:
    data = read_data_yaml(path, root)
    if not data.train:
        raise UserError(f"{path} has no train; add a line such as `train: images/train`")
    found = read_yolo(data, data.train)
    if not data.val:
        return _drawn(found, val_share, seed)
    return _given(found, read_yolo(data, data.val), "train", "val")


def _of_voc(folder: Path, val_share: float, seed: int) -> AnnotatedSplit:
    train, val = read_set(folder, "train"), read_set(folder, "val")
    if train is None and val is not None:
        raise UserError(f"{folder / SETS / 'Main'} has val.txt, but no train.txt; add it")
    if train is None:
        train, val = read_set(folder, "trainval"), read_set(folder, "test")
    found = read_voc(folder, train)
    if val is None:
        return _drawn(found, val_share, seed)
    return _given(found, read_voc(folder, val, like=found), "train.txt", "val.txt")


def _given(train: Annotated, val: Annotated, train_name: str, val_name: str) -> AnnotatedSplit:
    return AnnotatedSplit(
        train, val, f"{len(train)} training images in {train_name}, {len(val)} validation images in {val_name}"
    )


def _drawn(found: Annotated, val_share: float, seed: int) -> AnnotatedSplit:
    """Draws validation images from each class."""
    if not found.class_counts().any():
        raise UserError(f"{found.images.description}: its {len(found)} images have no objects")
    chosen, note = hold_out(Labelled(found.images, found.presence(), found.classes), val_share, seed)
    train, val = (found.subset(part.nonzero().flatten()) for part in (~chosen, chosen))
    return AnnotatedSplit(train, val, note)


def _checked(split: AnnotatedSplit) -> AnnotatedSplit:
    """Raises UserError if a part has no objects."""
    for part, purpose in ((split.train, "training"), (split.val, "validation")):
        if not part.class_counts().any():
            why = "".join(f"; {line}" for line in part.notes[:4])
            raise UserError(f"{part.images.description}: none of the {len(part)} {purpose} images has an object{why}")
    return split


__all__ = [
    "IGNORED",
    "Annotated",
    "AnnotatedSplit",
    "Objects",
    "Segmented",
    "SegmentedSplit",
    "find_annotated",
    "find_segmented",
]
