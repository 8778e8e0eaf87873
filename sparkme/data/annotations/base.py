"""Images with boxes, classes and masks: the part that the readers of COCO's, YOLO's and Pascal VOC's files share.

COCO has 860,000 boxes. A Python object for each would take a gigabyte, and again in every process that loads images, since
counting references copies shared pages. So boxes lie in flat arrays that subsets share: 33 bytes per box, and 4 or 8 bytes per
coordinate of a polygon.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparkme.data.images import Decoded, load_image
from sparkme.data.planes import Pixels
from sparkme.data.sources import ImageSource
from sparkme.errors import UserError, first_line
from sparkme.seeds import derived_seed
from sparkme.text import ended, printable

MAX_FACTOR = 10  # a polygon may leave its image by so many of the image's longer sides
MAX_OUTLINE = 2**21  # pixels along a polygon; drawing one of this length takes half a GB
MOST_CLASSES = 2**15
_ORIENTATION = 0x0112

# A mask as polygons (x, y, x, y, ..., float64); or as run lengths of its columns, the first run of zeros (uint32); or no mask.
Outline = list[np.ndarray] | np.ndarray | None


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: (N, 4) float32: left, top, right, bottom in pixels of the image that `Annotated.load` returns. They lie inside
            the image, and their area is not zero.
        labels: (N,) int64, index of the class.
        crowd: (N,) bool, True for COCO's crowd regions and VOC's difficult objects. Training ignores them, and a prediction
            there does not count as wrong.
        areas: (N,) float64, in pixels: the area in the file, or that of the box if the file has none.
        segmentations: polygons, runs or None for each object; None if the data set has no masks.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor
    segmentations: tuple[Outline, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_mask(self) -> Tensor:
        """(N,) bool: True for objects with a mask."""
        if self.segmentations is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return torch.tensor([outline is not None for outline in self.segmentations], dtype=torch.bool)

    def masks(self, height: int, width: int) -> Tensor:
        """(N, H, W) uint8, 1 inside, as pycocotools' `annToMask` draws masks; 0 everywhere for an object without a mask.

        Args:
            height, width: the image's size in `Annotated.sizes`.

        Raises:
            ValueError: the masks have another size.
            UserError: the masks are polygons, and pycocotools is not installed.
        """
        masks = np.zeros((len(self), height, width), np.uint8)
        for mask, outline in zip(masks, self.segmentations or (), strict=False):
            if isinstance(outline, list):
                mask[:] = draw_polygons(outline, height, width)
            elif outline is not None:
                mask[:] = draw_runs(outline, height, width)
        return torch.from_numpy(masks)


def encode_outline(outline: Outline, height: int, width: int) -> dict[str, Any]:
    """A mask as pycocotools' RLE, {"size": [height, width], "counts": bytes}; an empty one for None."""
    from pycocotools import mask

    if isinstance(outline, list):
        return dict(mask.merge(mask.frPyObjects(list(outline), height, width)))
    runs = [height * width] if outline is None else outline.tolist()
    return dict(mask.frPyObjects({"size": [height, width], "counts": runs}, height, width))


def draw_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """(H, W) uint8, drawn by pycocotools, since Pillow and OpenCV treat pixels at an edge differently."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("masks from polygons need pycocotools: pip install 'sparkme[detection]'") from None
    drawn: np.ndarray = mask.decode(mask.merge(mask.frPyObjects(list(polygons), height, width)))
    return drawn


def draw_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 from COCO's run lengths."""
    if int(runs.sum(dtype=np.int64)) != height * width:
        raise ValueError(f"a mask of {int(runs.sum(dtype=np.int64))} pixels is not of {width} x {height}")
    return np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs).reshape(width, height).T


class Ragged(NamedTuple):
    """Arrays of different lengths in one; array i is `values[starts[i] : starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray

    def of(self, number: int) -> np.ndarray:
        part: np.ndarray = self.values[self.starts[number] : self.starts[number + 1]]
        return part


class Outlines(NamedTuple):
    """The masks of all objects.

    Attributes:
        polygons: coordinates of each polygon as float64. If all have at most two decimals, as COCO's, they are int32 in
            hundredths, which is exact and takes half the memory.
        parts: (objects + 1,); object i has the polygons `parts[i]` to `parts[i + 1] - 1`.
        runs: run lengths of each object, uint32; empty for one without runs.
    """

    polygons: Ragged
    parts: np.ndarray
    runs: Ragged

    def of(self, row: int) -> Outline:
        if len(runs := self.runs.of(row)):
            return runs
        polygons = [self.polygons.of(part) for part in range(self.parts[row], self.parts[row + 1])]
        if self.polygons.values.dtype == np.int32:
            polygons = [polygon / 100 for polygon in polygons]
        return polygons or None

    @property
    def has_mask(self) -> np.ndarray:
        found: np.ndarray = (np.diff(self.parts) > 0) | (np.diff(self.runs.starts) > 0)
        return found


class ObjectTable(NamedTuple):
    """All objects of a data set in the order of its file, with the fields of `Objects` as NumPy arrays; labels are int32."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    outlines: Outlines | None

    @property
    def nbytes(self) -> int:
        arrays = [*self[:4]]
        if self.outlines:
            arrays += [*self.outlines.polygons, self.outlines.parts, *self.outlines.runs]
        return int(sum(values.nbytes for values in arrays))


@dataclass(frozen=True)
class Annotated:
    """Images and the objects on them.

    Attributes:
        images: source of the N images.
        classes: names of the classes, by label.
        category_ids: id of each class in the file, for results in COCO's format.
        image_ids: (N,) int64, id of each image in the file; from 1 if the file has none.
        sizes: (N, 2) int64, height and width of the images that `load` returns.
        table: the objects of all images.
        order: (objects,) int32, rows of the table, image by image.
        starts, counts: (N,) int64, first position of each image's rows in `order`, and their number.
        turned: whether all images are turned by their EXIF orientation, as in ultralytics. Otherwise an image is turned only if
            its recorded size is the turned one, since pycocotools and VOC's devkit ignore EXIF.
        notes: lines about entries that were left out or changed; a command prints each once.
    """

    images: ImageSource
    classes: list[str]
    category_ids: list[int]
    image_ids: Tensor
    sizes: Tensor
    table: ObjectTable
    order: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    turned: bool = False
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        """Whether an object outside of crowd regions has a mask; `notes` counts those without one."""
        return self.table.outlines is not None

    @property
    def has_every_mask(self) -> bool:
        """Whether all objects have masks, apart from crowds."""
        rows, outlines = self._all_rows(), self.table.outlines
        return outlines is not None and bool((outlines.has_mask[rows] | self.table.crowd[rows]).all())

    def objects(self, number: int) -> Objects:
        """The objects of an image, in the order of the file."""
        rows, table = self._rows(number), self.table
        outlines = None if table.outlines is None else tuple(table.outlines.of(row) for row in rows.tolist())
        return Objects(
            torch.from_numpy(table.boxes[rows]),
            torch.from_numpy(table.labels[rows].astype(np.int64)),
            torch.from_numpy(table.crowd[rows]),
            torch.from_numpy(table.areas[rows]),
            outlines,
        )

    def _rows(self, number: int) -> np.ndarray:
        start = int(self.starts[number])
        rows: np.ndarray = self.order[start : start + int(self.counts[number])]
        return rows

    def load(
        self,
        number: int,
        channels: int = 3,
        background: str = "white",
        pixels: Pixels = Pixels(),  # noqa: B008
    ) -> Decoded:
        """An image, turned to fit its boxes; see `load_image` for the arguments.

        Raises:
            OSError: it cannot be read, or its size is not the annotated one.
        """
        image = load_image(self.images.read(number), channels, background, pixels._replace(upright=self.upright(number)))
        height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
        self.check_size(number, (height, width))
        return image

    def check_size(self, number: int, size: tuple[int, int]) -> None:
        """Raises OSError if an image's height and width are not those that its boxes are for."""
        if [*size] != (wanted := self.sizes[number].tolist()):
            text = f"{size[1]} x {size[0]}, and its annotations are for {wanted[1]} x {wanted[0]}"
            raise OSError(f"{self.images.name(number)} is {text}; annotate it again, or leave it out")

    def upright(self, number: int) -> bool:
        """Whether an image has to be turned by its EXIF orientation to fit its boxes.

        Raises:
            OSError: it cannot be read.
        """
        if self.turned:
            return True
        height, width = self.sizes[number].tolist()
        if height == width:
            return False
        stored = self.images.read(number)
        if not isinstance(stored.content, Path):
            return False
        return raw_size(stored.content) == (width, height)

    def presence(self) -> Tensor:
        """(N, classes) bool: True if an image has an object of the class, apart from crowd regions."""
        found = np.zeros((len(self), len(self.classes)), dtype=bool)
        number = np.repeat(np.arange(len(self)), self.counts)
        rows = self._all_rows()
        learnt = ~self.table.crowd[rows]
        found[number[learnt], self.table.labels[rows[learnt]]] = True
        return torch.from_numpy(found)

    def class_counts(self) -> Tensor:
        """(classes,) int64: number of objects of each class, without crowd regions."""
        rows = self._all_rows()
        labels = self.table.labels[rows[~self.table.crowd[rows]]]
        return torch.from_numpy(np.bincount(labels, minlength=len(self.classes)))

    def content(self) -> tuple[Any, ...]:
        """Plain values that differ if the images' names, their classes or their boxes do."""
        names = [self.images.name(number).rpartition("/")[2] for number in range(len(self))]
        rows = self._all_rows()
        return names, self.classes, self.counts.tolist(), self.table.labels[rows].tobytes(), self.table.boxes[rows].tobytes()

    def _all_rows(self) -> np.ndarray:
        """The table's rows, image by image."""
        ends = np.cumsum(self.counts)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts - ends + self.counts, self.counts)
        rows: np.ndarray = self.order[places]
        return rows

    def subset(self, numbers: Tensor) -> Annotated:
        """The images of these numbers, in their order. The table is shared."""
        chosen = numbers.numpy()
        return Annotated(
            self.images.subset(numbers.tolist()),
            self.classes,
            self.category_ids,
            self.image_ids[numbers],
            self.sizes[numbers],
            self.table,
            self.order,
            self.starts[chosen],
            self.counts[chosen],
            self.turned,
            self.notes,
        )

    def draw(self, count: int, seed: int) -> Tensor:
        """Draws the numbers of at least `count` images of each class. The rarest class is drawn first, and an image counts for
        each of its classes. Classes without images are ignored.

        Raises:
            UserError: a class has fewer images.
        """
        if count < 1:
            raise UserError(f"--shots {count} must be at least 1")
        presence = self.presence()
        return draw_of_classes(presence, self.classes, count, seed)

    def shots(self, count: int, seed: int) -> Annotated:
        """The images that `draw` chooses."""
        return self.subset(self.draw(count, seed))

    def to_coco(self, *, masks: bool = False) -> dict[str, Any]:
        """The annotations in the form of pycocotools' `COCO().dataset`. Their ids begin at 1, because 0 means "not matched" in
        COCOeval.

        Args:
            masks: whether to include the segmentation of each object with a mask.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, (image_id, (height, width)) in enumerate(zip(self.image_ids.tolist(), self.sizes.tolist(), strict=True)):
            images.append({"id": image_id, "height": height, "width": width, "file_name": self.images.name(number)})
            objects = self.objects(number)
            for i, (x0, y0, x1, y1) in enumerate(objects.boxes.double().tolist()):
                entry: dict[str, Any] = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": self.category_ids[int(objects.labels[i])],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(objects.areas[i]),
                    "iscrowd": int(objects.crowd[i]),
                }
                if masks and objects.segmentations is not None and (outline := objects.segmentations[i]) is not None:
                    entry["segmentation"] = (
                        [polygon.tolist() for polygon in outline]
                        if isinstance(outline, list)
                        else {"size": [height, width], "counts": outline.tolist()}
                    )
                annotations.append(entry)
        categories = [{"id": id_, "name": name} for id_, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}


def draw_of_classes(presence: Tensor, classes: Sequence[str], count: int, seed: int) -> Tensor:
    """Draws images such that each class that occurs has at least `count`.

    Args:
        presence: (N, classes) bool.
        classes: names of the classes.
        count: images of each class.
        seed: of the choice.

    Returns:
        (K,) int64, sorted numbers of the chosen images.

    Raises:
        UserError: a class has fewer images.
    """
    chosen = torch.zeros(len(presence), dtype=torch.bool)
    for label in presence.sum(0).argsort(stable=True).tolist():
        members = presence[:, label].nonzero().flatten()
        if 0 < len(members) < count:
            raise UserError(f"--shots {count}: class {classes[label]!r} is in {len(members)} training images; lower it")
        left = members[~chosen[members]]
        generator = torch.Generator().manual_seed(derived_seed(seed, "shots", label))
        wanted = max(0, count - (len(members) - len(left)))
        chosen[left[torch.randperm(len(left), generator=generator)[:wanted]]] = True
    return chosen.nonzero().flatten()


class Counted:
    """Counts entries that are left out or changed, by kind, and keeps the first of each kind as an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, example: Callable[[], str] | str, count: int = 1) -> None:
        """Adds to the count of a kind. The example is made only if it is the first."""
        if not count:
            return
        if kind not in self.counts:
            self.examples[kind] = example if isinstance(example, str) else example()
        self.counts[kind] += count

    @property
    def lines(self) -> list[str]:
        """A line of text for each kind."""
        return [f"{kind}: {count:,}, such as {self.examples[kind]}" for kind, count in self.counts.items()]


@dataclass
class Rows:
    """Collects objects while a file is read.

    Attributes:
        image, label: number of the image and of the class; -1 if the data set has no such image or class.
        box: left, top, right, bottom.
        area: in pixels; NaN if the file has none.
        crowd: 0 or 1.
        polygon, polygon_start: coordinates of all polygons, and the position at which each begins.
        part: number of polygons up to and including each object.
        run, run_start: run lengths of all objects, and the position at which those of each object begin.
    """

    image: array[int] = field(default_factory=lambda: array("q"))
    label: array[int] = field(default_factory=lambda: array("q"))
    box: array[float] = field(default_factory=lambda: array("d"))
    area: array[float] = field(default_factory=lambda: array("d"))
    crowd: array[int] = field(default_factory=lambda: array("b"))
    polygon: array[float] = field(default_factory=lambda: array("d"))
    polygon_start: array[int] = field(default_factory=lambda: array("q", [0]))
    part: array[int] = field(default_factory=lambda: array("q", [0]))
    run: array[int] = field(default_factory=lambda: array("I"))
    run_start: array[int] = field(default_factory=lambda: array("q", [0]))

    def __len__(self) -> int:
        return len(self.image)

    def add(self, image: int, label: int, box: Sequence[float], area: float = float("nan"), crowd: bool = False) -> None:
        """Adds an object, after its polygons and runs."""
        self.image.append(image)
        self.label.append(label)
        self.box.extend(box)
        self.area.append(area)
        self.crowd.append(crowd)
        self.part.append(len(self.polygon_start) - 1)
        self.run_start.append(len(self.run))

    def add_polygon(self, coordinates: Iterable[float]) -> None:
        self.polygon.extend(coordinates)
        self.polygon_start.append(len(self.polygon))


def assemble(
    images: ImageSource,
    classes: tuple[list[int], list[str]],
    image_ids: np.ndarray,
    sizes: np.ndarray,
    rows: Rows,
    where: Callable[[int], str],
    counted: Counted,
    *,
    turned: bool = False,
) -> Annotated:
    """Makes the data set. Boxes are cut at the edges of their images, as in torchvision's references/detection/coco_utils.py;
    boxes without an area and those of unknown images or classes are left out.

    Args:
        images: source of N images, at least one.
        classes: ids and names of the classes.
        image_ids: (N,) int64.
        sizes: (N, 2) int64, height and width.
        rows: the objects of the files.
        where: describes the place of a row in its file, for messages.
        counted: counts objects that are left out or changed.
        turned: see `Annotated`.

    Raises:
        UserError: a polygon is much larger than its image.
    """
    image, label = (np.frombuffer(values, np.int64) for values in (rows.image, rows.label))
    boxes = np.frombuffer(rows.box, np.float64).reshape(-1, 4)
    good = (image >= 0) & (label >= 0)
    finite = np.isfinite(boxes).all(1)
    limits = sizes[np.where(image >= 0, image, 0)][:, [1, 0, 1, 0]]
    cut = np.clip(np.where(np.isfinite(boxes), boxes, 0), 0, limits)
    _count_rows("left out: boxes with numbers that are NaN or infinite", good & ~finite, where, counted)
    good &= finite
    cut = cut.astype(np.float32)
    has_area = (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])
    _count_rows("left out: boxes without an area inside their image", good & ~has_area, where, counted)
    good &= has_area
    _count_rows("boxes cut at the edge of their image", good & (np.abs(cut - boxes) > 0.01).any(1), where, counted)
    area = np.frombuffer(rows.area, np.float64)
    own = (cut[:, 2] - cut[:, 0]).astype(np.float64) * (cut[:, 3] - cut[:, 1])
    area = np.where(np.isfinite(area) & (area >= 0), area, own)
    crowd = np.frombuffer(rows.crowd, np.bool_)
    outlines = _outlines(rows, good, crowd, limits, where)
    if outlines is not None:
        _count_rows("objects without a mask", good & ~crowd & ~outlines.has_mask, where, counted)
    order = np.flatnonzero(good)
    order = order[np.argsort(image[order], kind="stable")].astype(np.int32)
    counts = np.bincount(image[order], minlength=len(sizes))
    table = ObjectTable(cut, label.astype(np.int32), crowd.copy(), area, outlines)
    found = torch.from_numpy(image_ids), torch.from_numpy(sizes)
    starts = np.cumsum(counts) - counts
    return Annotated(images, classes[1], classes[0], *found, table, order, starts, counts, turned, counted.lines)


def _count_rows(kind: str, which: np.ndarray, where: Callable[[int], str], counted: Counted) -> None:
    if count := int(which.sum()):
        counted.add(kind, lambda: where(int(which.argmax())), count)


def _outlines(
    rows: Rows, good: np.ndarray, crowd: np.ndarray, limits: np.ndarray, where: Callable[[int], str]
) -> Outlines | None:
    """The masks; None if no object outside of crowd regions has one."""
    values, starts = np.frombuffer(rows.polygon, np.float64), np.frombuffer(rows.polygon_start, np.int64)
    parts = np.frombuffer(rows.part, np.int64)
    polygons = Ragged(values, starts)
    found = Outlines(polygons, parts, Ragged(np.frombuffer(rows.run, np.uint32), np.frombuffer(rows.run_start, np.int64)))
    if not bool((found.has_mask & good & ~crowd).any()):
        return None
    row = np.repeat(np.arange(len(good)), np.diff(parts))  # of each polygon
    _check_polygons(polygons, row, good, limits, where)
    hundredths = _as_hundredths(values)
    runs = Ragged(found.runs.values.copy(), found.runs.starts.copy())
    return Outlines(Ragged(values.copy() if hundredths is None else hundredths, starts.copy()), parts.copy(), runs)


def _as_hundredths(values: np.ndarray, step: int = 2**20) -> np.ndarray | None:
    """The coordinates in hundredths as int32; None if that is not exact for all. Works in pieces, as COCO has 40 million."""
    found = np.empty(len(values), np.int32)
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        if not bool((np.abs(piece) < 2**24).all()):  # False for NaN, too
            return None
        found[start : start + step] = np.rint(piece * 100)
        if not np.array_equal(found[start : start + step] / 100, piece):
            return None
    return found


def _check_polygons(
    polygons: Ragged, row: np.ndarray, good: np.ndarray, limits: np.ndarray, where: Callable[[int], str], step: int = 2**16
) -> None:
    """Raises UserError if a polygon of a `good` object lies far outside its image or would take gigabytes to draw."""
    for first in range(0, len(row), step):
        last = min(first + step, len(row))
        starts = polygons.starts[first : last + 1]
        values = polygons.values[starts[0] : starts[-1]]
        rows = row[first:last]
        checked = good[rows]
        side = limits[rows].max(1)
        largest = np.maximum.reduceat(np.abs(values), starts[:-1] - starts[0])
        if (far := checked & ~(largest <= side * (MAX_FACTOR + 1))).any():
            place = int(far.argmax())
            what = f"segmentation reaches {largest[place]:.6g} pixels, and the image has {int(side[place])}"
            raise UserError(f"{where(int(rows[place]))}: its {what}; correct or remove it")
        lengths = np.abs(np.diff(values.reshape(-1, 2), axis=0)).max(1, initial=0)  # to the next polygon, too
        long = np.add.reduceat(np.append(lengths, 0), (starts[:-1] - starts[0]) // 2)
        if (long := checked & (long > MAX_OUTLINE)).any():
            place = int(long.argmax())
            raise UserError(f"{where(int(rows[place]))}: its segmentation is millions of pixels long; simplify or remove it")


def raw_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file as it is stored, regardless of its EXIF orientation.

    Raises:
        OSError: the file cannot be read.
    """
    return _size_and_orientation(path)[0]


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, turned by its EXIF orientation. Raises OSError if it cannot be read."""
    (height, width), orientation = _size_and_orientation(path)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _size_and_orientation(path: Path) -> tuple[tuple[int, int], int]:
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            orientation = int(opened.getexif().get(_ORIENTATION, 1))
            width, height = opened.size
            if opened.format == "TIFF" and orientation in (5, 6, 7, 8):  # Pillow has turned its size already
                width, height = height, width
            return (height, width), orientation
    except Exception as error:  # decoders raise errors of many types
        raise OSError(f"{printable(path)}: {first_line(error)}") from error


def most_pixels() -> float:
    """The largest number of pixels of an image, see `sparkme.data.limits`."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")


def read_text(path: Path, most_bytes: int, counted: Counted) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Other files are read as Windows-1252,
    and counted.

    Raises:
        UserError: the path is not a file, or the file is too large or cannot be read.
    """
    content = read_bytes(path, most_bytes)
    encoding = _encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise UserError(f"{path} begins as {encoding.upper()}, but is damaged; save it as UTF-8") from None
    counted.add("files that are not UTF-8, and were read as Windows-1252", str(path))
    return content.decode("cp1252", errors="replace")


def _encoding(content: bytes) -> str:
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for mark, encoding in marks.items():
        if content.startswith(mark):
            return encoding
    if content.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        start = content[:256]
        if len(start) > 3 and start[first::2].count(0) > len(start) // 4:
            return encoding
    return "utf-8"


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file.

    Raises:
        UserError: the path is not a file, or the file is too large or cannot be read.
    """
    named = ended(printable(path), 400)
    if not os.path.isfile(path):  # reading a pipe would block
        raise UserError(f"{named} is not a file")
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most_bytes:
                raise UserError(f"{named} has {size:,} bytes, and may have at most {most_bytes:,}")
            return file.read(size)  # a larger number would be allocated as a whole
    except OSError as error:
        raise UserError(f"{named} cannot be read: {first_line(error)}") from error


@contextmanager
def memory_named(path: Path) -> Iterator[None]:
    """Raises UserError, with the path of the file, if there is not enough memory to read it."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{path} takes more memory to read than there is; split it into smaller files") from error


def distinct(names: Sequence[str], ids: Sequence[int], counted: Counted) -> list[str]:
    """Class names. Names that several classes share get the class's number appended."""
    twice = {name for name, count in Counter(names).items() if count > 1}
    for name in sorted(twice):
        counted.add("class names that several classes have; their numbers were appended", repr(printable(name)))
    return [f"{name} ({id_})" if name in twice else name for name, id_ in zip(names, ids, strict=True)]


def listed(folder: str) -> set[str]:
    """The names of the entries of a folder; empty if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # a zero byte in a name
        return set()
