"""How good a detector or a segmenter is: COCO's twelve figures by pycocotools, and intersection over union of pixels.

Each is a `Measure`, see `sparkme.training.target`. Ground truth comes as plain arrays, whatever files it was read from.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparkme.errors import UserError
from sparkme.training.target import Measure

Rle = dict[str, Any]  # a mask as pycocotools has it: {"size": [height, width], "counts": bytes or str}
Kind = Literal["box", "mask"]
# In the order in which pycocotools gives them: average precision, and average recall of at most 1, 10 and 100 boxes.
FIGURES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
FIGURES += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]


def _no_boxes() -> npt.NDArray[np.float64]:
    return np.zeros((0, 4))


@dataclass(frozen=True)
class GroundTruth:
    """The annotated objects of one image; N may be 0.

    Attributes:
        image_id: unique in the data set.
        size: (height, width) of the image, in pixels, to which boxes and masks refer.
        boxes: (N, 4) float64, x1, y1, x2, y2 in pixels; x2 - x1 is the width.
        labels: (N,) int64, index of the class, from 0.
        areas: (N,) float64, in pixels; they decide whether an object is small, medium or large in COCO's figures. COCO's files
            give the area of the mask, not of the box.
        crowd: (N,) bool, True for a region of many objects that are not annotated one by one; None if there is none.
        masks: N masks as RLE; None if there are only boxes.
    """

    image_id: int
    size: tuple[int, int]
    boxes: npt.NDArray[np.float64] = field(default_factory=_no_boxes)
    labels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    areas: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    crowd: npt.NDArray[np.bool_] | None = None
    masks: Sequence[Rle] | None = None


@dataclass(frozen=True)
class Detections:
    """The objects that a detector found in one image, in any order; N may be 0.

    Attributes:
        boxes: (N, 4) floats, x1, y1, x2, y2 in the pixels of `GroundTruth.size`.
        scores: (N,) floats.
        labels: (N,) integers, index of the class, from 0.
        masks: N masks as RLE, see `encode_masks`; None if the detector predicts only boxes.
    """

    boxes: npt.ArrayLike
    scores: npt.ArrayLike
    labels: npt.ArrayLike
    masks: Sequence[Rle] | None = None


def check_pycocotools() -> None:
    """Raises UserError if pycocotools, which computes the figures of detectors, is not installed."""
    if find_spec("pycocotools") is None:
        raise UserError("detectors are measured by pycocotools, which is not installed; pip install 'sparkme[detection]'")


def encode_masks(masks: Tensor) -> list[Rle]:
    """Masks (N, H, W), bool, on any device, as N RLEs."""
    from pycocotools import mask as coco_mask  # noqa: PLC0415  (optional)

    # pycocotools works on columns that follow each other in memory; so this copy is the only one.
    return list(coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))))


def decode_masks(masks: Sequence[Rle], size: tuple[int, int]) -> Tensor:
    """N RLEs of images of `size`, height and width, as masks (N, H, W), bool."""
    from pycocotools import mask as coco_mask  # noqa: PLC0415  (optional)

    if not masks:
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.from_numpy(coco_mask.decode([*masks])).permute(2, 0, 1).bool()


class DetectionMeasure(Measure):
    """COCO's twelve figures of boxes and, on request, of masks, computed by pycocotools.

    Args:
        classes: names of the classes.
        masks: whether masks are measured, too.

    Raises:
        UserError: pycocotools is not installed.
    """

    best = "box_ap"

    def __init__(self, classes: list[str], masks: bool = False) -> None:
        check_pycocotools()
        super().__init__(classes)
        self.kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
        self.best = f"{self.kinds[-1]}_ap"
        self.images: dict[int, tuple[GroundTruth, Detections]] = {}
        self._evaluated: dict[Kind, tuple[list[float | None], list[float | None]]] = {}

    def add(self, outputs: Iterable[Detections], targets: Iterable[GroundTruth]) -> None:
        """Adds a batch: the detections and the ground truth of each image. An image that was added before is ignored.

        Raises:
            ValueError: arrays differ in length, a label belongs to no class, a number is not finite, or masks are missing.
        """
        self._evaluated = {}
        for found, objects in zip(outputs, targets, strict=True):
            detections = Detections(
                np.asarray(found.boxes, dtype=np.float64).reshape(-1, 4),
                np.asarray(found.scores, dtype=np.float64),
                np.asarray(found.labels, dtype=np.int64),
                found.masks,
            )
            self._check_image(objects, objects, "objects", objects.areas)
            self._check_image(objects, detections, "detections", detections.scores)
            self.images.setdefault(objects.image_id, (objects, detections))

    def _check_image(self, image: GroundTruth, objects: GroundTruth | Detections, what: str, numbers: npt.ArrayLike) -> None:
        boxes, labels, values = np.asarray(objects.boxes), np.asarray(objects.labels), np.asarray(numbers)
        where = f"{what} of image {image.image_id}"
        if boxes.shape != (len(labels), 4) or values.shape != labels.shape:
            raise ValueError(f"{where}: {boxes.shape} boxes, {labels.shape} labels and {values.shape} scores or areas")
        if not (np.isfinite(boxes).all() and np.isfinite(values).all()):
            raise ValueError(f"{where}: a box, score or area is not finite")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(self.classes)):
            raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}; there are {len(self.classes)} classes")
        if "mask" in self.kinds:
            if objects.masks is None or len(objects.masks) != len(labels):
                raise ValueError(f"{where}: {len(labels)} boxes and {len(objects.masks or ())} masks")
            if any(tuple(mask["size"]) != tuple(image.size) for mask in objects.masks):
                raise ValueError(f"{where}: a mask is not of the image's size {tuple(image.size)}")

    def merge(self, other: Self) -> None:
        self._evaluated = {}
        self.images = {**other.images, **self.images}

    @property
    def num_images(self) -> int:
        return len(self.images)

    def check(self) -> None:
        super().check()
        if not any(_is_counted(objects).any() for objects, _ in self.images.values()):
            raise UserError("none of the readable validation images has an object, apart from crowd regions")

    def values(self) -> dict[str, float]:
        """`box_ap`, `box_ap50`, ... `box_ar_large`, and `mask_...`. A figure of a size that no object has is left out."""
        found = {f"{kind}_ap": 0.0 for kind in self.kinds}
        for kind in self.kinds:
            figures, _ = self._evaluate(kind)
            found |= {f"{kind}_{name}": value for name, value in zip(FIGURES, figures, strict=True) if value is not None}
        return found

    def describe(self, values: dict[str, float]) -> str:
        titles = {f"{kind}_ap{more}": f"{kind} AP{more}" for kind in ("box", "mask") for more in ("", "50")}
        return ", ".join(f"{title} {100 * values[name]:.1f} %" for name, title in titles.items() if name in values)

    def write(self, folder: Path) -> dict[str, Any]:
        """The figures of boxes and masks, and the AP of each class. A figure without objects is None."""
        result: dict[str, Any] = {}
        for kind in self.kinds:
            figures, of_each = self._evaluate(kind)
            result[kind] = dict(zip(FIGURES, figures, strict=True))
            result[f"{kind}_ap_of_each_class"] = dict(zip(self.classes, of_each, strict=True))
        result["of_each_class"] = result[f"{self.best}_of_each_class"]
        return result

    def _evaluate(self, kind: Kind) -> tuple[list[float | None], list[float | None]]:
        """COCO's twelve figures, and the AP of each class. A figure without objects is None."""
        if kind not in self._evaluated:
            self._evaluated[kind] = self._run_pycocotools(kind)
        return self._evaluated[kind]

    def _run_pycocotools(self, kind: Kind) -> tuple[list[float | None], list[float | None]]:
        from pycocotools.coco import COCO  # noqa: PLC0415  (optional)
        from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

        images = [*self.images.values()]  # pycocotools sorts them
        head = {
            "images": [{"id": i.image_id, "height": i.size[0], "width": i.size[1]} for i, _ in images],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)],
        }
        truth, results = COCO(), COCO()
        truth.dataset = {**head, "annotations": _numbered(images, lambda image: _annotations(image[0], kind))}
        results.dataset = {**head, "annotations": _numbered(images, lambda image: _results(*image, kind))}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            results.createIndex()
            evaluation = COCOeval(truth, results, "bbox" if kind == "box" else "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # (thresholds, recalls, classes, sizes, numbers of boxes), -1 without objects
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        each = [precision[:, :, i] for i in range(len(self.classes))]
        return [_known(value) for value in evaluation.stats], [_known(p[p > -1].mean() if (p > -1).any() else -1) for p in each]


def _known(value: float) -> float | None:
    return None if value == -1 else float(value)


def _is_counted(objects: GroundTruth) -> npt.NDArray[np.bool_]:
    return np.ones(len(objects.labels), dtype=bool) if objects.crowd is None else ~np.asarray(objects.crowd, dtype=bool)


def _numbered(
    images: list[tuple[GroundTruth, Detections]], entries: Callable[[tuple[GroundTruth, Detections]], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The entries of all images, with ids from 1, because 0 means "not matched" in pycocotools."""
    return [{**entry, "id": i + 1} for i, entry in enumerate(entry for image in images for entry in entries(image))]


def _annotations(objects: GroundTruth, kind: Kind) -> Iterable[dict[str, Any]]:
    """The entries of an image in a COCO annotation file."""
    counted = _is_counted(objects)
    for i, (label, area) in enumerate(zip(objects.labels, objects.areas, strict=True)):
        entry = {
            "image_id": objects.image_id,
            "category_id": int(label) + 1,
            "area": float(area),
            "iscrowd": int(not counted[i]),
        }
        yield {**entry, **_shape(objects, i, kind)}


def _results(objects: GroundTruth, found: Detections, kind: Kind) -> Iterable[dict[str, Any]]:
    """The entries that pycocotools makes from a results file. The area is that of the box, or of the mask for `mask`."""
    from pycocotools import mask as coco_mask  # noqa: PLC0415  (optional)

    for i, (label, score) in enumerate(zip(np.asarray(found.labels), np.asarray(found.scores), strict=True)):
        shape = _shape(found, i, kind)
        area = shape["bbox"][2] * shape["bbox"][3] if kind == "box" else float(coco_mask.area(shape["segmentation"]))
        entry = {"image_id": objects.image_id, "category_id": int(label) + 1, "score": float(score), "area": area, "iscrowd": 0}
        yield {**entry, **shape}


def _shape(objects: GroundTruth | Detections, i: int, kind: Kind) -> dict[str, Any]:
    """The box as x, y, width and height, or the mask."""
    if kind == "mask":
        assert objects.masks is not None
        return {"segmentation": objects.masks[i]}
    x1, y1, x2, y2 = np.asarray(objects.boxes)[i].tolist()
    return {"bbox": [x1, y1, x2 - x1, y2 - y1]}


class SegmentationMeasure(Measure):
    """Intersection over union and accuracy of pixels, from counts of all pairs of a true (row) and a predicted class (column).

    Args:
        classes: names of the classes.
        ignore_index: label of pixels that are not counted.

    Attributes:
        figures: a figure of each image by its number, from 0 to 1, for the images where the caller sets one.
    """

    best = "mean_iou"

    def __init__(self, classes: list[str], ignore_index: int = 255) -> None:
        super().__init__(classes)
        self.ignore_index = ignore_index
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
        self.seen = 0
        self.figures: dict[int, float | None] = {}

    def add(self, outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
        """Adds a batch: integer tensors (B, H, W), or lists of tensors (H, W) of any sizes, on any device.

        Args:
            outputs: the predicted class of each pixel.
            targets: the true class of each pixel.

        Raises:
            ValueError: the sizes differ, or a label belongs to no class.
        """
        count = len(self.classes)
        for predicted, true in zip(outputs, targets, strict=True):
            if predicted.shape != true.shape:
                raise ValueError(f"{tuple(predicted.shape)} pixels are predicted, and {tuple(true.shape)} are labelled")
            counted = true != self.ignore_index
            rows, columns = true[counted].long(), predicted[counted].long()
            for name, labels in (("labelled", rows), ("predicted", columns)):
                if len(labels) and not (labels.min() >= 0 and labels.max() < count):
                    raise ValueError(f"{name} pixels are from {labels.min()} to {labels.max()}; there are {count} classes")
            self.confusion += torch.bincount(rows * count + columns, minlength=count**2).view(count, count).cpu()
            self.seen += 1

    def merge(self, other: Self) -> None:
        self.confusion += other.confusion
        self.seen += other.seen
        self.figures |= other.figures

    @property
    def num_images(self) -> int:
        return self.seen

    def check(self) -> None:
        super().check()
        if not self.confusion.any():
            raise UserError(f"every pixel of the validation images is labelled {self.ignore_index}, which is ignored")

    def values(self) -> dict[str, float]:
        """`mean_iou` of classes with true or predicted pixels, `mean_accuracy` of those with true ones, `pixel_accuracy`."""
        right = int(self.confusion.diag().sum()) / max(1, int(self.confusion.sum()))
        return {"mean_iou": _mean(self.ious()), "pixel_accuracy": right, "mean_accuracy": _mean(self.accuracies())}

    def ious(self) -> list[float | None]:
        """Intersection over union of each class; None for a class without true and predicted pixels."""
        right = self.confusion.diag()
        return _ratios(right, self.confusion.sum(0) + self.confusion.sum(1) - right)

    def accuracies(self) -> list[float | None]:
        """The share of each class's pixels that is predicted correctly; None for a class without pixels."""
        return _ratios(self.confusion.diag(), self.confusion.sum(1))

    def describe(self, values: dict[str, float]) -> str:
        titles = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
        return ", ".join(f"{title} {100 * values[name]:.1f} %" for name, title in titles.items() if name in values)

    def write(self, folder: Path) -> dict[str, Any]:
        from sparkme.reporting.confusion import draw_confusion  # noqa: PLC0415  (matplotlib, in the first process alone)

        draw_confusion(self.confusion, self.classes, folder / "confusion.png", counted="pixels")
        return {
            "of_each_class": dict(zip(self.classes, self.ious(), strict=True)),
            "accuracy_of_each_class": dict(zip(self.classes, self.accuracies(), strict=True)),
            "confusion": self.confusion.tolist(),
        }


def _ratios(counts: Tensor, totals: Tensor) -> list[float | None]:
    return [count / total if total else None for count, total in zip(counts.tolist(), totals.tolist(), strict=True)]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / max(1, len(known))
