"""Semantic segmentation: folders of images, and of masks with the class of each pixel.

images/NAME.jpg, masks/NAME.png                          also train/images, train/masks, or images/train, masks/train
leftImg8bit/train/x_leftImg8bit.png, gtFine/train/...    Cityscapes, with its 19 classes for evaluation
JPEGImages, SegmentationClass, ImageSets/Segmentation    Pascal VOC

A mask has numbers (grey values, or indices of a palette) or colours. A file of classes or the data set tells which class each
stands for; otherwise each number or colour is a class.

Facts, from pytorch/vision: loss and measure ignore 255 (references/segmentation/train.py); indices of a palette are classes
(torchvision/datasets/voc.py); Cityscapes has 34 numbers, of which 19 are classes for training
(torchvision/datasets/cityscapes.py).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes
from tqdm import tqdm

from sparkme.data.annotations.base import Counted, draw_of_classes, raw_size, read_text, upright_size
from sparkme.data.annotations.voc import IMAGES, SETS, read_set
from sparkme.data.images import Decoded, load_image
from sparkme.data.labelled import Labelled, hold_out
from sparkme.data.planes import Pixels
from sparkme.data.sources.files import Files, Names, look_through
from sparkme.errors import UserError, first_line
from sparkme.text import printable, shown

IGNORED = 255  # label of pixels without a class
MOST_CLASSES, MOST_CLASSES_BYTES = 255, 2**20
IGNORE_NAME = "ignore"
CLASS_FILES = ("classes.txt", "classes.csv", "class_dict.csv", "labels.txt")
VOC_MASKS = "SegmentationClass"
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "leftImg8bit", IMAGES)
_MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "label", "gt", "gtFine", VOC_MASKS)
_TRAIN_IDS, _IDS = "_labelTrainIds", "_labelIds"
_MASK_ENDINGS = (
    "",
    "_mask",
    "_label",
    "_labels",
    "_gt",
    "_seg",
    "_L",
    _TRAIN_IDS,
    "_gtFine" + _TRAIN_IDS,
    _IDS,
    "_gtFine" + _IDS,
)
_IMAGE_ENDING = "_leftImg8bit"
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Codes(NamedTuple):
    """The class of each number or colour in masks.

    Attributes:
        classes: names of the classes.
        values: (K,) int64, sorted: numbers, or colours as 0xrrggbb.
        labels: (K,) uint8, index of the class of each value, or `IGNORED`.
    """

    classes: list[str]
    values: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, classes: Sequence[str], label_of: dict[int, int]) -> Codes:
        values = sorted(label_of)
        return cls([*classes], np.array(values, np.int64), np.array([label_of[v] for v in values], np.uint8))

    def find(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The labels of values, and a bool for each: whether the value is known."""
        place = np.searchsorted(self.values, values).clip(0, len(self.values) - 1)
        return self.labels[place], self.values[place] == values


@dataclass(frozen=True)
class Segmented:
    """Images with a class for each pixel.

    Attributes:
        images, masks: N files each.
        codes: classes of the values in masks.
        sizes: (N, 2) int64, height and width of an image and its mask.
        turned: (N,) bool, True for images that are turned by their EXIF orientation to fit their masks.
        pixels: (N, classes) int64, number of pixels of each class in an image.
        notes: lines about files that were left out or changed; a command prints each once.
    """

    images: Files
    masks: Files
    codes: Codes
    sizes: Tensor
    turned: Tensor
    pixels: Tensor
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> list[str]:
        return self.codes.classes

    @property
    def pixel_counts(self) -> Tensor:
        """(classes,) int64, number of pixels of each class in all images, such as for weights of rare classes."""
        return self.pixels.sum(0)

    def presence(self) -> Tensor:
        """(N, classes) bool: True if an image has pixels of the class."""
        return self.pixels > 0

    def labels(self, number: int) -> Tensor:
        """(H, W) uint8: index of each pixel's class, or `IGNORED` (255).

        Raises:
            OSError: the mask cannot be read.
        """
        values = mask_values(self.masks.path(number))
        if values.dtype == np.uint8:
            table, known = self.codes.find(np.arange(256))
            return torch.from_numpy(np.where(known, table, IGNORED)[values].astype(np.uint8))
        labels, known = self.codes.find(values)
        return torch.from_numpy(np.where(known, labels, IGNORED).astype(np.uint8))

    def load(
        self,
        number: int,
        channels: int = 3,
        background: str = "white",
        pixels: Pixels = Pixels(),  # noqa: B008
    ) -> Decoded:
        """An image, turned to fit its mask; see `load_image` for the arguments.

        Raises:
            OSError: it cannot be read.
        """
        return load_image(self.images.read(number), channels, background, pixels._replace(upright=self.upright(number)))

    def upright(self, number: int) -> bool:
        """Whether an image is turned as its EXIF says, to fit its mask."""
        return bool(self.turned[number])

    def check_size(self, number: int, size: tuple[int, int]) -> None:
        """Raises OSError if an image's height and width are not its mask's."""
        if [*size] != (wanted := self.sizes[number].tolist()):
            text = f"{size[1]} x {size[0]}, and its mask is {wanted[1]} x {wanted[0]}"
            raise OSError(f"{self.images.name(number)} is {text}; make them equal, or leave it out")

    def content(self) -> tuple[Any, ...]:
        """Plain values that differ if the images' names, their classes or their numbers of pixels do."""
        names = [self.images.name(number).rpartition("/")[2] for number in range(len(self))]
        return names, self.classes, self.pixels.numpy().tobytes()

    def subset(self, numbers: Tensor) -> Segmented:
        """The images of these numbers, in their order."""
        images, masks = (files.subset(numbers.tolist()) for files in (self.images, self.masks))
        parts = self.sizes[numbers], self.turned[numbers], self.pixels[numbers]
        return Segmented(images, masks, self.codes, *parts, self.notes)

    def draw(self, count: int, seed: int) -> Tensor:
        """Draws the numbers of at least `count` images of each class, see `Annotated.draw`.

        Raises:
            UserError: a class has fewer images.
        """
        if count < 1:
            raise UserError(f"--shots {count} must be at least 1")
        return draw_of_classes(self.presence(), self.classes, count, seed)

    def shots(self, count: int, seed: int) -> Segmented:
        """The images that `draw` chooses."""
        return self.subset(self.draw(count, seed))


class SegmentedSplit(NamedTuple):
    """Training and validation images, and a note on their split."""

    train: Segmented
    val: Segmented
    note: str

    @property
    def remarks(self) -> list[str]:
        """Lines to print at the start."""
        return [*dict.fromkeys([*self.train.notes, *self.val.notes])]


class _Part(NamedTuple):
    """Pairs of images and masks, before the values of masks are assigned to classes.

    Attributes:
        ending: suffix of the masks' names, behind the images' names.
        found: for each mask, its values and their numbers of pixels.
        colours: whether the values are colours.
    """

    images: Files
    masks: Files
    ending: str
    sizes: list[tuple[int, int]]
    turned: list[bool]
    found: list[tuple[np.ndarray, np.ndarray]]
    colours: bool
    counted: Counted


def find_segmented(
    data: Path | str,
    *,
    classes: Path | str | None = None,
    ignore_index: int | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    flag: str = "--data",
) -> SegmentedSplit:
    """Finds images and their masks, and reads each mask once to count its values.

    Args:
        data: a folder in a layout of the module's docstring.
        classes: a file with a line `name`, `name,NUMBER`, `name,#rrggbb` or `name,R,G,B` for each class. Without a number, it
            is that of the line, from 0. Pixels of the name `ignore` have no class. If None, the folder may have a classes.txt
            or class_dict.csv.
        ignore_index: number of pixels without a class in masks; 255 if None.
        val_share: share of validation images if they have no folder. They are drawn from each class; copies stay together.
        seed: of that draw.
        flag: command line flag of `data`, for messages.

    Raises:
        UserError: there are no images with masks, sizes differ, or a mask has a value without a class; names the file.
    """
    if not 0 < val_share < 1:
        raise UserError(f"--val-share {val_share} is outside (0, 1)")
    if ignore_index is not None and not 0 <= ignore_index < 2**24:
        raise UserError(f"--ignore-index {ignore_index} must be at least 0, and below 2^24")
    folder = Path(data)
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is not a folder; pass a folder of images and masks")
    file = None if classes is None else Path(classes)
    if file is None:
        file = next((folder / name for name in CLASS_FILES if os.path.isfile(folder / name)), None)
    parts = [_read_part(*pair) for pair in _parts_of(folder, flag)]
    if len({part.colours for part in parts}) > 1:
        raise UserError(f"{flag} {folder} has masks of colours and masks of numbers; save all in one way")
    codes, notes = _codes(parts, file, ignore_index)
    found = [_segmented(part, codes, notes, file) for part in parts]
    if len(found) > 1:
        note = f"{len(found[0])} training and {len(found[1])} validation images, from their folders"
        return SegmentedSplit(found[0], found[1], note)
    (whole,) = found
    if not whole.pixel_counts.any():
        raise UserError(f"{flag} {folder}: no pixel of {len(whole)} masks has a class")
    chosen, note = hold_out(Labelled(whole.images, whole.presence(), whole.classes), val_share, seed)
    train, val = (whole.subset(part.nonzero().flatten()) for part in (~chosen, chosen))
    return SegmentedSplit(train, val, note)


def _parts_of(data: Path, flag: str) -> list[tuple[Files, Files]]:
    """The images and masks of train and val, or of the whole data set."""
    voc = data / IMAGES, data / VOC_MASKS
    if all(map(os.path.isdir, voc)) and (train := read_set(data, "train", "Segmentation")) is not None:
        val = read_set(data, "val", "Segmentation")
        return [_named(*voc, names) for names in (train, val) if names is not None]
    found: dict[str, tuple[Path, Path]] = {}
    for split, names in [*_SPLITS.items(), ("", ("",))]:
        for name in names:
            layouts = (
                (data / name / images, data / name / masks, data / images / name, data / masks / name)
                for images in _IMAGE_FOLDERS
                for masks in _MASK_FOLDERS
            )
            for first, second, third, fourth in layouts:
                for images, masks in ((first, second), (third, fourth)):
                    if split not in found and os.path.isdir(images) and os.path.isdir(masks):
                        found[split] = images, masks
    if "train" in found:
        wanted = [found[split] for split in ("train", "val") if split in found]
    elif "" in found and "val" not in found:
        wanted = [found[""]]
    else:
        raise UserError(
            f"{flag} {data} has no folders of images and masks: it takes images and masks, train/images and train/masks, "
            f"leftImg8bit and gtFine, or {IMAGES} and {VOC_MASKS}"
        )
    return [(look_through(images), look_through(masks)) for images, masks in wanted]


def _named(images: Path, masks: Path, names: list[str]) -> tuple[Files, Files]:
    """The images and masks that a list names."""
    found = []
    for folder in (images, masks):
        files, counted = look_through(folder), Counted()
        by_stem = {os.path.splitext(name)[0]: name for name in files.names}
        for name in names:
            if name not in by_stem:
                counted.add(f"left out: names in {SETS} that are not in {folder}", shown(name, 80))
        kept = [by_stem[name] for name in names if name in by_stem]
        found.append(Files(folder, Names.pack(kept), str(folder), notes=counted.lines))
    return found[0], found[1]


def _read_part(images: Files, masks: Files) -> _Part:
    """Reads all masks, and the sizes of the images.

    Raises:
        UserError: an image and its mask are of different sizes, or there are none.
    """
    pairs, ending, counted = _pairs(images, masks)
    sizes: list[tuple[int, int]] = []
    turned: list[bool] = []
    found: list[tuple[np.ndarray, np.ndarray]] = []
    kept: list[tuple[str, str]] = []
    kinds: dict[bool, str] = {}
    for image, mask in tqdm(pairs, "reading masks", delay=2, disable=not sys.stderr.isatty()):
        path, mask_path = images.root / image, masks.root / mask
        try:
            values = mask_values(mask_path)
            raw, upright = raw_size(path), upright_size(path)
        except OSError as error:
            counted.add("left out: images or masks that cannot be read", str(error))
            continue
        size = values.shape[0], values.shape[1]
        if size not in (raw, upright):
            which = f"{printable(path)} is {raw[1]} x {raw[0]}, and its mask {printable(mask_path)} {size[1]} x {size[0]}"
            raise UserError(f"{which}; give them one size, or remove them")
        kinds.setdefault(values.dtype == np.int32, printable(mask_path))
        if len(kinds) > 1:
            raise UserError(f"{kinds[True]} has colours, and {kinds[False]} has numbers; save all masks in one way")
        kept.append((image, mask))
        sizes.append(size)
        turned.append(size != raw)
        found.append(_counts(values))
    if not kept:
        why = "".join(f"; {line}" for line in counted.lines)
        raise UserError(f"{images.root} and {masks.root} have no image with a mask of the same name{why}")
    pairs_of = [
        Files(files.root, Names.pack(names), str(files.root), problems=files.problems, notes=files.notes)
        for files, names in zip((images, masks), zip(*kept, strict=True), strict=True)
    ]
    return _Part(pairs_of[0], pairs_of[1], ending, sizes, turned, found, True in kinds, counted)


def _pairs(images: Files, masks: Files) -> tuple[list[tuple[str, str]], str, Counted]:
    """Pairs of images and masks of the same name, and the suffix of the masks' names that gives the most pairs."""
    counted = Counted()
    by_key: dict[str, str] = {}
    for name in images.names:
        key = os.path.splitext(name)[0].removesuffix(_IMAGE_ENDING)
        if (other := by_key.setdefault(key, name)) != name:
            raise UserError(f"{images.root} has {printable(other)} and {printable(name)}, which would share a mask; rename one")
    best: dict[str, str] = {}
    ending = ""
    for tried in _MASK_ENDINGS:
        stems = ((os.path.splitext(name)[0], name) for name in masks.names)
        fits = {stem.removesuffix(tried): name for stem, name in stems if stem.endswith(tried)}
        fits = {key: name for key, name in fits.items() if key in by_key}
        if len(fits) > len(best):
            best, ending = fits, tried
    for key, name in by_key.items():
        if key not in best:
            counted.add(f"left out: images without a mask in {masks.root}", shown(name, 120))
    return [(by_key[key], best[key]) for key in by_key if key in best], ending, counted


def mask_values(path: Path) -> np.ndarray:
    """(H, W): numbers, uint8 or uint16, which are indices if there is a palette; or colours as 0xrrggbb, int32.

    Raises:
        OSError: the file cannot be read, or is not a mask.
    """
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            if opened.format == "JPEG":
                raise OSError("a JPEG, whose pixels are not exact; save masks as PNG")
            if opened.mode in ("P", "L", "1"):
                return np.asarray(opened).astype(np.uint8)
            if opened.mode in ("PA", "LA"):
                return np.asarray(opened)[:, :, 0].astype(np.uint8)
            if opened.mode.startswith("I"):
                numbers = np.asarray(opened)
                if int(numbers.min()) < 0 or int(numbers.max()) >= 2**16:
                    raise OSError(f"has numbers from {numbers.min()} to {numbers.max()}, and must have those from 0 to 65535")
                return numbers.astype(np.uint8 if int(numbers.max()) < 256 else np.uint16)
            if opened.mode not in ("RGB", "RGBA"):
                raise OSError(f"has mode {opened.mode}, and must have numbers or colours; save masks as PNG")
            colours = np.asarray(opened.convert("RGB")).astype(np.int32)
            return (colours[:, :, 0] << 16) | (colours[:, :, 1] << 8) | colours[:, :, 2]
    except Exception as error:  # decoders raise errors of many types
        raise OSError(f"{printable(path)}: {first_line(error)}") from error


def _counts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a mask, and the number of pixels of each."""
    if values.dtype == np.uint8:
        counts = np.bincount(values.ravel(), minlength=256)
        return np.flatnonzero(counts), counts[counts > 0]
    found, counts = np.unique(values, return_counts=True)
    return found.astype(np.int64), counts


def _codes(parts: Sequence[_Part], file: Path | None, ignore_index: int | None) -> tuple[Codes, list[str]]:
    """The classes of the values, and notes for the user."""
    colours, ignored = parts[0].colours, 255 if ignore_index is None else ignore_index
    if file is not None:
        classes, label_of, notes = read_classes(file, colours)
        if not colours and ignored not in label_of:
            label_of[ignored] = IGNORED
        return Codes.of(classes, label_of), notes
    if parts[0].ending.endswith(_IDS):
        trained = sorted((c.train_id, c.name) for c in Cityscapes.classes if 0 <= c.train_id < 255)
        label_of = {c.id: c.train_id if 0 <= c.train_id < 255 else IGNORED for c in Cityscapes.classes if c.id >= 0}
        return Codes.of([name for _, name in trained], label_of | {255: IGNORED}), []
    values = {*np.unique(np.concatenate([values for part in parts for values, _ in part.found])).tolist()}
    if parts[0].ending.endswith(_TRAIN_IDS):
        names = [name for _, name in sorted((c.train_id, c.name) for c in Cityscapes.classes if 0 <= c.train_id < 255)]
        return Codes.of(names, {i: i for i in range(len(names))} | {ignored: IGNORED}), []
    if parts[0].masks.root.name == VOC_MASKS and not colours and values <= {*range(len(VOC_CLASSES)), 255}:
        return Codes.of(VOC_CLASSES, {i: i for i in range(len(VOC_CLASSES))} | {ignored: IGNORED}), []
    if ignore_index is None and values == {0, 255}:
        return Codes.of(["0", "255"], {0: 0, 255: 1}), ["masks have the numbers 0 and 255 only, so 255 is a class"]
    known = sorted(values if colours else values - {ignored})
    if not 0 < len(known) <= MOST_CLASSES:
        kind = "colours" if colours else "numbers"
        raise UserError(
            f"{parts[0].masks.root}: masks have {len(known)} {kind}, and each would be a class, at most {MOST_CLASSES}; pass "
            "--classes FILE with a line for each, and save masks without smoothed edges"
        )
    named = [f"#{value:06x}" if colours else str(value) for value in known]
    label_of = {value: i for i, value in enumerate(known)}
    if not colours:
        label_of[ignored] = IGNORED
    notes = [f"no file of classes: each of {len(known)} {'colours' if colours else 'numbers'} in masks is a class"]
    return Codes.of(named, label_of), notes


def read_classes(file: Path, colours: bool) -> tuple[list[str], dict[int, int], list[str]]:
    """The class names of a file, the label of each number or colour, and notes for the user.

    Args:
        file: see `find_segmented`.
        colours: whether the masks have colours.

    Raises:
        UserError: a line is wrong; names the line.
    """
    counted = Counted()
    classes: list[str] = []
    label_of: dict[int, int] = {}
    count = 0
    for number, line in enumerate(read_text(file, MOST_CLASSES_BYTES, counted).splitlines(), 1):
        cells = [cell.strip() for cell in line.replace("\t", ",").replace(";", ",").split(",")]
        if not any(cells) or (not count and cells[0].lower() == "name" and len(cells) > 1 and not _is_value(cells[1])):
            continue
        what = f"{file}: line {number}"
        value = _value_of(cells, count, what)
        if colours and len(cells) == 1:
            raise UserError(f"{what} has no colour, and the masks have; write name,#rrggbb")
        if not colours and (len(cells) == 4 or cells[-1].startswith("#")):
            raise UserError(f"{what} has a colour, and the masks have numbers; write name,NUMBER")
        if value in label_of:
            raise UserError(f"{what} has the number or colour of another line; leave one out")
        if cells[0] in classes:
            raise UserError(f"{what} has the name {shown(cells[0], 40)!r} of another line; leave one out")
        label_of[value] = IGNORED if cells[0].lower() == IGNORE_NAME else len(classes)
        classes += [] if cells[0].lower() == IGNORE_NAME else [cells[0]]
        count += 1
    if not 0 < len(classes) <= MOST_CLASSES:
        raise UserError(f"{file} has {len(classes)} classes, and must have 1 to {MOST_CLASSES}, each in a line")
    return classes, label_of, counted.lines


def _is_value(cell: str) -> bool:
    return cell.startswith("#") or (cell.isascii() and cell.isdecimal())


def _value_of(cells: list[str], count: int, what: str) -> int:
    """The number or colour in a line; `count` if it has none."""
    name, *rest = cells
    if not name:
        raise UserError(f"{what} has no name")
    if not rest:
        return count
    digits = rest[0].removeprefix("#").lower()
    if len(rest) == 1 and rest[0].startswith("#") and len(digits) == 6 and {*digits} <= {*"0123456789abcdef"}:
        return int(digits, 16)
    if len(rest) in (1, 3) and all(cell.isascii() and cell.isdecimal() and len(cell) < 6 for cell in rest):
        numbers = [int(cell) for cell in rest]
        if len(rest) == 1 and numbers[0] < 2**16:
            return numbers[0]
        if len(rest) == 3 and max(numbers) < 256:
            return (numbers[0] << 16) | (numbers[1] << 8) | numbers[2]
    raise UserError(f"{what} is {shown(','.join(cells), 60)!r}, and must be name, name,NUMBER, name,#rrggbb or name,R,G,B")


def _segmented(part: _Part, codes: Codes, notes: Iterable[str], file: Path | None) -> Segmented:
    """Counts the pixels of each class.

    Raises:
        UserError: a mask has a value without a class.
    """
    pixels = np.zeros((len(part.images), len(codes.classes)), np.int64)
    for number, (values, counts) in enumerate(part.found):
        labels, known = codes.find(values)
        if not known.all():
            odd = int(values[~known][0])
            value = f"the colour #{odd:06x}" if part.colours else f"the number {odd}"
            remedy = f"add a line to {file}, such as {IGNORE_NAME},{odd}" if file else "pass --classes FILE with a line for it"
            if part.colours and file:
                remedy = f"add a line to {file}, such as {IGNORE_NAME},#{odd:06x}"
            where = f"{part.masks.name(number)} has {value} on {int(counts[~known][0])} pixels"
            raise UserError(f"{where}, which has no class; {remedy}")
        learnt = labels != IGNORED
        np.add.at(pixels[number], labels[learnt], counts[learnt])
    lines = [*notes, *part.images.remarks, *part.masks.remarks, *part.counted.lines]
    return Segmented(
        part.images,
        part.masks,
        codes,
        torch.tensor(part.sizes),
        torch.tensor(part.turned),
        torch.from_numpy(pixels),
        [line for line, _ in Counter(lines).items()],
    )
