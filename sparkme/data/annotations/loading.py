"""Annotated images as detectors and segmenters take them: resized, and in training cropped and mirrored with what is on them.

As in `sparkme.data.dataset`, a training image is a pure function of (seed, epoch, image).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from sparkme.data.annotations.base import Annotated, Objects, draw_polygons, draw_runs
from sparkme.data.annotations.masks_folder import IGNORED, Segmented
from sparkme.data.dataset import Batch, Box, EpochSampler, cut
from sparkme.data.handover import Loader
from sparkme.data.images import OpenImage, open_image
from sparkme.data.planes import Pixels
from sparkme.data.sources import ImageSource
from sparkme.seeds import derived_seed

TRIES = 16  # images that are tried in place of unreadable ones
# A random crop before resizing, as shares of the usual side: where that is 800, short side 400, 500 or 600 and a crop of 384 to
# 600 (Carion et al., ECCV 2020, and the official SparK code for ConvNeXts).
CROP_SCALES, CROP_SIDES = (0.5, 0.625, 0.75), (0.48, 0.75)


class View(NamedTuple):
    """How an image is seen: a box of it, resized to `size` (height, width), and whether it is mirrored."""

    box: Box
    size: tuple[int, int]
    mirrored: bool = False


class Decoding(NamedTuple):
    """How images are decoded, see `sparkme.data.images.load_image`."""

    channels: int
    background: str
    pixels: Pixels

    def view(self, part: Annotated | Segmented, number: int, view: View) -> tuple[Tensor, float]:
        """(C, height, width) uint8, or float32 in [0, 1], and the share of clipped values.

        Raises:
            OSError: the image cannot be read, or has another size than its annotations.
        """
        pixels = self.pixels._replace(upright=part.upright(number))
        with open_image(part.images.read(number), self.channels, self.background, pixels) as image:
            part.check_size(number, image.size)
            tensor = _cut(image, view)
        return tensor, image.outside


def _cut(image: OpenImage, view: View) -> Tensor:
    crop = cut(image, view.box, view.size, reduced=True)
    tensor = crop if isinstance(crop, Tensor) else v2.functional.pil_to_tensor(crop)
    tensor = tensor if tensor.dtype == torch.uint8 else tensor.clamp(0, 1)
    return tensor.flip(-1) if view.mirrored else tensor


def resized(size: tuple[int, int], short_side: int, long_side: int | None = None) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes `short_side`, unless the longer one became too long."""
    factor = short_side / min(size)
    if long_side is not None:
        factor = min(factor, long_side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class Target(NamedTuple):
    """The objects of a training image, without crowds.

    Attributes:
        boxes: (N, 4) float32: left, top, right, bottom in pixels.
        labels: (N,) int64, from 0.
        masks: (N, H, W) uint8; None if masks are not learnt.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


class ObjectBatch(NamedTuple):
    """Training images with their objects.

    Attributes:
        images: (B, C, H, W) uint8, or floats in [0, 1], zero below and to the right of an image; None if one is missing.
        unreadable: errors of the images that could not be read.
        sizes: height and width of each image.
        targets: of each image.
        enlarged, outside: see `sparkme.data.dataset.Batch`.
    """

    images: Tensor | None
    unreadable: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    targets: tuple[Target, ...] = ()
    enlarged: int = 0
    outside: float = 0.0


class Drawn(NamedTuple):
    """A training image with its target (`Target`, or labels (H, W) uint8); no image if none of several could be read."""

    image: Tensor | None
    target: Any
    unreadable: tuple[str, ...]
    outside: float = 0.0


P = TypeVar("P", Annotated, Segmented)


class _Training(Dataset[Drawn], Generic[P]):
    """Training images by (epoch, draw). An unreadable image is replaced by another, and reported."""

    def __init__(self, part: P, decoding: Decoding, *, flip: bool, seed: int) -> None:
        self.part: P = part
        self.decoding, self.flip, self.seed = decoding, flip, seed

    def __len__(self) -> int:
        return len(self.part)

    @abstractmethod
    def draw_view(self, number: int) -> View:
        """A random view, from torch's generator."""

    @abstractmethod
    def finished(self, image: Tensor, number: int, view: View) -> tuple[Tensor, Any]:
        """The image and its target."""

    def __getitem__(self, index: tuple[int, int]) -> Drawn:
        epoch, draw = index
        unreadable: list[str] = []
        for attempt in range(TRIES):
            number = draw if attempt == 0 else derived_seed(self.seed, "replacement", epoch, draw, attempt)
            number %= len(self.part)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derived_seed(self.seed, "crop", epoch, draw))
                try:
                    view = self.draw_view(number)
                    image, outside = self.decoding.view(self.part, number, view)
                    return Drawn(*self.finished(image, number, view), tuple(unreadable), outside)
                except OSError as error:
                    unreadable.append(str(error))
        return Drawn(None, None, tuple(dict.fromkeys(unreadable)))

    def _mirrors(self) -> bool:
        return self.flip and _uniform(0, 1) < 0.5


class ObjectDataset(_Training[Annotated]):
    """Images with boxes and masks for a detector.

    Args:
        part: the training images.
        decoding: how they are decoded.
        short_side: shorter sides after resizing, of which each image gets a random one.
        long_side: most pixels of the longer side.
        usual_side: what the sides of random crops follow from.
        random_crop: share of the images that are cropped.
        masks: whether masks are learnt.
        flip: whether half of the images are mirrored.
        seed: the run's.
    """

    def __init__(
        self,
        part: Annotated,
        decoding: Decoding,
        *,
        short_side: Sequence[int],
        long_side: int,
        usual_side: int,
        random_crop: float,
        masks: bool,
        flip: bool,
        seed: int,
    ) -> None:
        super().__init__(part, decoding, flip=flip, seed=seed)
        self.short_side, self.long_side, self.usual_side = short_side, long_side, usual_side
        self.random_crop, self.masks = random_crop, masks

    def draw_view(self, number: int) -> View:
        height, width = self.part.sizes[number].tolist()
        box = Box(0, 0, height, width)
        if _uniform(0, 1) < self.random_crop:
            factor = CROP_SCALES[_below(len(CROP_SCALES))] * self.usual_side / min(height, width)
            sides = [round(_uniform(*CROP_SIDES) * self.usual_side / factor) for _ in range(2)]
            box = _random_box((height, width), (sides[0], sides[1]))
        short = self.short_side[_below(len(self.short_side))]
        return View(box, resized((box.height, box.width), short, self.long_side), self._mirrors())

    def finished(self, image: Tensor, number: int, view: View) -> tuple[Tensor, Target]:
        return image, target_of(self.part.objects(number), self.part.sizes[number].tolist(), view, masks=self.masks)


def target_of(objects: Objects, size: Sequence[int], view: View, *, masks: bool) -> Target:
    """The objects in a view of an image. Left out are crowds, and boxes of which less than a pixel is visible.

    Args:
        objects: all of the image.
        size: its height and width.
        view: the part of it.
        masks: whether to draw masks.
    """
    box, (height, width) = view.box, view.size
    scale = torch.tensor([width / box.width, height / box.height]).repeat(2)
    boxes = (objects.boxes - torch.tensor([box.left, box.top]).repeat(2)) * scale
    boxes = torch.minimum(boxes.clamp_min(0), torch.tensor([width, height]).repeat(2))
    kept = ((boxes[:, 2:] - boxes[:, :2]).amin(1) >= 1) & ~objects.crowd
    boxes, labels = boxes[kept], objects.labels[kept]
    drawn = None
    if masks:
        outlines = [outline for outline, keep in zip(objects.segmentations or (), kept.tolist()) if keep]
        drawn = torch.zeros(len(outlines), height, width, dtype=torch.uint8)
        for mask, outline in zip(drawn, outlines):
            mask.copy_(torch.from_numpy(_draw_view(outline, size, view)))
    if view.mirrored:
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        drawn = None if drawn is None else drawn.flip(-1)
    return Target(boxes, labels, drawn)


def _draw_view(outline: Any, size: Sequence[int], view: View) -> np.ndarray:
    """A mask in a view, not mirrored: polygons are scaled and drawn, runs are drawn and scaled."""
    box, (height, width) = view.box, view.size
    if isinstance(outline, list):
        scale, start = (width / box.width, height / box.height), (box.left, box.top)
        moved = [((polygon.reshape(-1, 2) - start) * scale).ravel() for polygon in outline]
        return draw_polygons(moved, height, width)
    mask = draw_runs(outline, size[0], size[1])
    return mask[np.ix_(*_nearest(view))]


def _nearest(view: View) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of the image that is nearest to each row and column of a view."""
    box, (height, width) = view.box, view.size
    rows = box.top + (np.arange(height) + 0.5) * (box.height / height)
    columns = box.left + (np.arange(width) + 0.5) * (box.width / width)
    return rows.astype(np.int64), columns.astype(np.int64)


class PixelDataset(_Training[Segmented]):
    """Crops of images with the class of each pixel, for a segmenter. A smaller image is padded, and the padding ignored.

    Args:
        part: the training images.
        decoding: how they are decoded.
        size: height and width of the crops.
        short_side: shorter side of the images before they are scaled.
        scale_range: smallest and largest random factor.
        colour: random change of the colours of (C, H, W) uint8 or float images, or None.
        flip: whether half of the images are mirrored.
        seed: the run's.
    """

    def __init__(
        self,
        part: Segmented,
        decoding: Decoding,
        *,
        size: tuple[int, int],
        short_side: int,
        scale_range: Sequence[float],
        colour: nn.Module | None,
        flip: bool,
        seed: int,
    ) -> None:
        super().__init__(part, decoding, flip=flip, seed=seed)
        self.size, self.short_side, self.scale_range, self.colour = size, short_side, scale_range, colour

    def draw_view(self, number: int) -> View:
        height, width = self.part.sizes[number].tolist()
        factor = _uniform(*self.scale_range) * self.short_side / min(height, width)
        size = [min(side, max(1, round(factor * whole))) for side, whole in zip(self.size, (height, width))]
        box = _random_box((height, width), (round(size[0] / factor), round(size[1] / factor)))
        return View(box, (size[0], size[1]), self._mirrors())

    def finished(self, image: Tensor, number: int, view: View) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self.part.labels(number).numpy()[np.ix_(*_nearest(view))])
        labels = labels.flip(-1) if view.mirrored else labels
        image = self.colour(image) if self.colour is not None else image
        missing = (0, self.size[1] - view.size[1], 0, self.size[0] - view.size[0])
        return F.pad(image, missing), F.pad(labels, missing, value=IGNORED)


def _random_box(size: tuple[int, int], wanted: tuple[int, int]) -> Box:
    """A random box of at most these sides."""
    height, width = (min(whole, max(1, side)) for whole, side in zip(size, wanted))
    return Box(_below(size[0] - height + 1), _below(size[1] - width + 1), height, width)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def collate_objects(samples: list[Drawn]) -> ObjectBatch:
    images = [sample.image for sample in samples if sample.image is not None]
    unreadable = tuple(problem for sample in samples for problem in sample.unreadable)
    outside = sum(sample.outside for sample in samples)
    if len(images) < len(samples):
        return ObjectBatch(None, unreadable, outside=outside)
    images = _alike(images)
    sizes = tuple((int(image.shape[1]), int(image.shape[2])) for image in images)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    padded = torch.stack([F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes)])
    return ObjectBatch(padded, unreadable, sizes, tuple(sample.target for sample in samples), 0, outside)


def collate_pixels(samples: list[Drawn]) -> Batch:
    images = [sample.image for sample in samples if sample.image is not None]
    unreadable = tuple(problem for sample in samples for problem in sample.unreadable)
    outside = sum(sample.outside for sample in samples)
    if len(images) < len(samples):
        return Batch(None, unreadable, None, 0, outside)
    return Batch(torch.stack(_alike(images)), unreadable, torch.stack([sample.target for sample in samples]), 0, outside)


def _alike(images: list[Tensor]) -> list[Tensor]:
    """Images of one dtype."""
    if len({image.dtype for image in images}) == 1:
        return images
    return [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]


def create_training_loader(
    dataset: ObjectDataset | PixelDataset, sampler: EpochSampler, *, workers: int, pin_memory: bool
) -> Loader:
    """Batches in the sampler's order: `ObjectBatch` or `Batch`."""
    collate = collate_objects if isinstance(dataset, ObjectDataset) else collate_pixels
    return Loader(dataset, workers=workers, prefetch=4, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory)


class WholeImage(NamedTuple):
    """An image (C, H, W), or None with the error; its number; its height and width before it was resized."""

    image: Tensor | None
    number: int
    unreadable: str = ""
    size: tuple[int, int] = (0, 0)


class WholeImages(NamedTuple):
    """Images of any sizes, or None if none can be read; their numbers, errors of the others, and heights and widths before they
    were resized."""

    images: list[Tensor] | None
    numbers: list[int]
    unreadable: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ()


class WholeDataset(Dataset[WholeImage]):
    """Whole images, resized.

    Args:
        part: the images.
        decoding: how they are decoded.
        short_side: shorter side after resizing.
        long_side: most pixels of the longer side, or None.
    """

    def __init__(self, part: Annotated | Segmented, decoding: Decoding, short_side: int, long_side: int | None = None) -> None:
        self.part, self.decoding, self.short_side, self.long_side = part, decoding, short_side, long_side

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, number: int) -> WholeImage:
        height, width = self.part.sizes[number].tolist()
        size = resized((height, width), self.short_side, self.long_side)
        try:
            image, _ = self.decoding.view(self.part, number, View(Box(0, 0, height, width), size))
        except OSError as error:
            return WholeImage(None, number, str(error))
        return WholeImage(image, number, "", (height, width))


class UnannotatedDataset(Dataset[WholeImage]):
    """Whole images of a source, resized as in `WholeDataset`.

    Args:
        images: the source.
        decoding: how they are decoded.
        short_side, long_side: see `WholeDataset`.
        sizes: height and width of each image; (0, 0) where they are not known. An image of known size is turned as its EXIF
            says only if it then has that size, as in `Annotated`.
    """

    def __init__(
        self,
        images: ImageSource,
        decoding: Decoding,
        short_side: int,
        long_side: int | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.images, self.decoding, self.short_side, self.long_side, self.sizes = images, decoding, short_side, long_side, sizes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> WholeImage:
        try:
            with self.opened(number) as image:
                height, width = image.size
                size = resized(image.size, self.short_side, self.long_side)
                return WholeImage(_cut(image, View(Box(0, 0, height, width), size)), number, "", image.size)
        except OSError as error:
            return WholeImage(None, number, str(error))

    @contextmanager
    def opened(self, number: int) -> Iterator[OpenImage]:
        """An image, held as its known size says.

        Raises:
            OSError: it cannot be read, or has another size.
        """
        stored, (channels, background, pixels) = self.images.read(number), self.decoding
        known = self.sizes[number] if self.sizes is not None else (0, 0)
        if not any(known):
            with open_image(stored, channels, background, pixels) as image:
                yield image
            return
        for upright in (False, True):
            with open_image(stored, channels, background, pixels._replace(upright=upright)) as image:
                if image.size == known:
                    yield image
                    return
                height, width = image.size
        raise OSError(f"{stored.name} is {width} x {height}, and its annotations are for {known[1]} x {known[0]}")


def create_whole_loader(
    dataset: WholeDataset | UnannotatedDataset, *, batch_size: int, workers: int, share: Sequence[int]
) -> Loader:
    """Batches of the images `share`, in that order, as `WholeImages`."""
    return Loader(dataset, workers=workers, batch_size=batch_size, sampler=share, collate_fn=_collate_whole)


def _collate_whole(samples: list[WholeImage]) -> WholeImages:
    images = [sample.image for sample in samples if sample.image is not None]
    readable = [sample for sample in samples if sample.image is not None]
    problems = tuple(sample.unreadable for sample in samples if sample.image is None)
    numbers, sizes = [sample.number for sample in readable], tuple(sample.size for sample in readable)
    return WholeImages(images or None, numbers, problems, sizes)
