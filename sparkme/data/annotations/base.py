"""Images with boxes, classes and masks: what the readers of COCO's, YOLO's and Pascal VOC's files have in common.

A data set of COCO's size has 860,000 boxes. A Python object for each would take a gigabyte, and again in every process that
loads images, since counting references copies shared pages. So boxes lie in flat arrays: 33 bytes each, and 4 or 8 more for
each coordinate of a polygon. Subsets share them.
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

MAX_FACTOR = 10  # how many sides of its image a polygon may lie outside
MAX_OUTLINE = 2**21  # pixels along a polygon: what drawing one takes grows with it, to half a GB at this length
MOST_CLASSES = 2**15
_ORIENTATION = 0x0112

# Polygons (flat x, y, x, y, float64), or runs of a mask that begin with 0, column by column (uint32), or no mask.
Outline = list[np.ndarray] | np.ndarray | None


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: (N, 4) float32: left, top, right, bottom in pixels of the image as `Annotated.load` hands it out. They lie
            inside of it, and have an area.
        labels: (N,) int64, from 0.
        crowd: (N,) bool: regions that are never learnt from, and where predictions are not counted as wrong: COCO's crowds and
            VOC's difficult objects.
        areas: (N,) float64, in pixels, as the file says it, or the box's.
        segmentations: a polygon list, runs or None for each object; None where the data set has no masks.
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
        """(N,) bool: which objects have one."""
        if self.segmentations is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return torch.tensor([outline is not None for outline in self.segmentations], dtype=torch.bool)

    def masks(self, height: int, width: int) -> Tensor:
        """(N, H, W) uint8, 1 inside: what pycocotools' `annToMask` gives; 0 everywhere for an object without a mask.

        Args:
            height, width: of the image, as `Annotated.sizes` has them.

        Raises:
            ValueError: the masks are of another size.
            UserError: there are polygons, and pycocotools is not installed.
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
    """(H, W) uint8: pycocotools' own raster, whose rule for pixels at an edge is none of Pillow's or OpenCV's."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("masks from polygons need pycocotools: pip install 'sparkme[detection]'") from None
    drawn: np.ndarray = mask.decode(mask.merge(mask.frPyObjects(list(polygons), height, width)))
    return drawn


def draw_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of COCO's run lengths."""
    if int(runs.sum(dtype=np.int64)) != height * width:
        raise ValueError(f"a mask of {int(runs.sum(dtype=np.int64))} pixels is not of {width} x {height}")
    return np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs).reshape(width, height).T


class Ragged(NamedTuple):
    """Arrays of many lengths, one after the other; that of number i is `values[starts[i] : starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray

    def of(self, number: int) -> np.ndarray:
        part: np.ndarray = self.values[self.starts[number] : self.starts[number + 1]]
        return part


class Outlines(NamedTuple):
    """The masks of all objects.

    Attributes:
        polygons: coordinates of each polygon, float64; or int32 in hundredths, where every coordinate is that with two decimals
            at most, as COCO's are: exact, and half as large.
        parts: which polygons each object has: the first one, and the one behind the last.
        runs: of the objects that have them, uint32.
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
    """All objects of a file in the order it has them: as `Objects`, but NumPy's arrays; labels are int32."""

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
        images: where they are.
        classes: names, by label.
        category_ids: what the file calls each label, for results in COCO's format.
        image_ids: (N,) int64, what the file calls each image; from 1 where it has no numbers.
        sizes: (N, 2) int64, height and width of the images as `load` hands them out.
        table: the objects of all images.
        order: (objects,) int32, their rows in the table, image by image.
        starts, counts: (N,) int64, where the rows of each image begin in `order`, and how many it has.
        turned: whether all images are turned as their EXIF says, as ultralytics does. Else an image is turned only where the
            recorded size says so: pycocotools and VOC's devkit leave images as they are stored.
        notes: what was left out or is read otherwise than it is written, a line each, to say once.
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
        """Whether objects that are learnt from have masks; those without one are among `notes`."""
        return self.table.outlines is not None

    @property
    def has_every_mask(self) -> bool:
        """Whether all objects have masks, apart from crowds."""
        rows, outlines = self._all_rows(), self.table.outlines
        return outlines is not None and bool((outlines.has_mask[rows] | self.table.crowd[rows]).all())

    def objects(self, number: int) -> Objects:
        """Of an image, in the order of the file."""
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
        """An image, held as its boxes are, see `load_image`.

        Raises:
            OSError: it cannot be read, or is of another size than its boxes are for.
        """
        image = load_image(self.images.read(number), channels, background, pixels._replace(upright=self.upright(number)))
        height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
        self.check_size(number, (height, width))
        return image

    def check_size(self, number: int, size: tuple[int, int]) -> None:
        """Raises OSError if an image's height and width are not those that its boxes are for."""
        if [*size] != (wanted := self.sizes[number].tolist()):
            text = f"{size[1]} x {size[0]}, and its annotations are for {wanted[1]} x {wanted[0]}"
            raise OSError(f"{self.images.name(number)} is {text}; annotate it anew, or leave it out")

    def upright(self, number: int) -> bool:
        """Whether an image is turned as its EXIF says, to fit its boxes.

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
        """(N, classes) bool: which classes an image has, without its crowds."""
        found = np.zeros((len(self), len(self.classes)), dtype=bool)
        number = np.repeat(np.arange(len(self)), self.counts)
        rows = self._all_rows()
        learnt = ~self.table.crowd[rows]
        found[number[learnt], self.table.labels[rows[learnt]]] = True
        return torch.from_numpy(found)

    def class_counts(self) -> Tensor:
        """(classes,) int64: how many objects each class has, without crowds."""
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
        """Some of the images, in this order; the table is shared."""
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
        """The numbers of `count` images of each class, drawn at random: the rarest class first, and an image counts for every
        class that it shows. Classes that no image shows are passed over.

        Raises:
            UserError: a class has fewer.
        """
        if count < 1:
            raise UserError(f"--shots {count} must be at least 1")
        presence = self.presence()
        return draw_of_classes(presence, self.classes, count, seed)

    def shots(self, count: int, seed: int) -> Annotated:
        """As `draw`, the images themselves."""
        return self.subset(self.draw(count, seed))

    def to_coco(self, *, masks: bool = False) -> dict[str, Any]:
        """The truth as pycocotools' `COCO().dataset` has it, for its evaluation. Annotations are numbered from 1: for COCOeval
        number 0 is no match.

        Args:
            masks: with the segmentation of each object that has one.
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
    """(K,) int64, sorted: images of which every class that is there has `count` or more.

    Args:
        presence: (N, classes) bool.

    Raises:
        UserError: a class has fewer.
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
    """What is left out or changed, by kind, with the first of each as an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, example: Callable[[], str] | str, count: int = 1) -> None:
        """Counts; the example is made only where it is the first."""
        if not count:
            return
        if kind not in self.counts:
            self.examples[kind] = example if isinstance(example, str) else example()
        self.counts[kind] += count

    @property
    def lines(self) -> list[str]:
        """For people."""
        return [f"{kind}: {count:,}, such as {self.examples[kind]}" for kind, count in self.counts.items()]


@dataclass
class Rows:
    """Objects while a file is read.

    Attributes:
        image, label: numbers, or -1 for what is unknown.
        box: left, top, right, bottom.
        area: NaN for the box's own.
        crowd: 0 or 1.
        polygon, polygon_start: coordinates of all polygons, and where each begins.
        part: how many polygons there were before each object.
        run, run_start: runs of all objects, and where those of each begin.
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
        """An object; its polygons and runs are added before it."""
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
    """Cuts boxes at the edges of their images, as torchvision's references/detection/coco_utils.py does, and leaves out those
    without an area, and of unknown images or classes.

    Args:
        images: N of them, one or more.
        classes: their numbers and names.
        image_ids: (N,) int64.
        sizes: (N, 2) int64, height and width.
        rows: what was read.
        where: names a row for people.
        turned: see `Annotated`.
        counted: what is left out.

    Raises:
        UserError: a polygon is far too large.
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
    _count_rows("left out: boxes without an area inside of their image", good & ~has_area, where, counted)
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
    """The masks; None if no object outside of crowds has one."""
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
    """Coordinates times 100 if that and back is exact for all of them. In pieces: COCO has 40 million."""
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
    """Refuses polygons of good objects that lie far outside of their image, or would take gigabytes to draw."""
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
            raise UserError(f"{where(int(rows[place]))}: its {what}; mend or remove it")
        lengths = np.abs(np.diff(values.reshape(-1, 2), axis=0)).max(1, initial=0)  # to the next polygon, too
        long = np.add.reduceat(np.append(lengths, 0), (starts[:-1] - starts[0]) // 2)
        if (long := checked & (long > MAX_OUTLINE)).any():
            place = int(long.argmax())
            raise UserError(f"{where(int(rows[place]))}: its segmentation is millions of pixels long; simplify or remove it")


def raw_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file as it is stored; 0, 0 if Pillow does not read such files.

    Raises:
        OSError: it cannot be read.
    """
    return _size_and_orientation(path)[0]


def upright_size(path: Path) -> tuple[int, int]:
    """As `raw_size`, turned as its EXIF says."""
    (height, width), orientation = _size_and_orientation(path)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _size_and_orientation(path: Path) -> tuple[tuple[int, int], int]:
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            orientation = int(opened.getexif().get(_ORIENTATION, 1))
            width, height = opened.size
            if opened.format == "TIFF" and orientation in (5, 6, 7, 8):  # whose size Pillow has turned already
                width, height = height, width
            return (height, width), orientation
    except Exception as error:  # decoders fail in all ways there are
        raise OSError(f"{printable(path)}: {first_line(error)}") from error


def most_pixels() -> float:
    """How many an image may have, see `sparkme.data.limits`."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")


def read_text(path: Path, most_bytes: int, counted: Counted) -> str:
    """The text of a file that should be UTF-8: with a byte order mark or as UTF-16 and UTF-32, too. What is none of these is
    read as Windows-1252, and counted.

    Raises:
        UserError: it is no file, too large, or cannot be read.
    """
    content = read_bytes(path, most_bytes)
    encoding = _encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise UserError(f"{path} is no text in {encoding.upper()}, which it begins as; save it as UTF-8") from None
    counted.add("files that are no UTF-8, and are read as Windows-1252", str(path))
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
        UserError: it is no file, too large, or cannot be read.
    """
    named = ended(printable(path), 400)
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{named} is no file")
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most_bytes:
                raise UserError(f"{named} has {size:,} bytes, which is too large for such a file ({most_bytes:,})")
            return file.read(size)  # with a larger number all of it would be allocated
    except OSError as error:
        raise UserError(f"{named} cannot be read: {first_line(error)}") from error


@contextmanager
def memory_named(path: Path) -> Iterator[None]:
    """Turns a lack of memory while a file is read into a `UserError`."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{path} takes more memory to read than there is; split it into smaller files") from error


def distinct(names: Sequence[str], ids: Sequence[int], counted: Counted) -> list[str]:
    """Class names, with the number of the class where two have the same name."""
    twice = {name for name, count in Counter(names).items() if count > 1}
    for name in sorted(twice):
        counted.add("class names that several classes have, and that get the number of the class", repr(printable(name)))
    return [f"{name} ({id_})" if name in twice else name for name, id_ in zip(names, ids, strict=True)]


def listed(folder: str) -> set[str]:
    """The names of what is in a folder; none if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # a zero byte in a name
        return set()
