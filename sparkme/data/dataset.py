"""Crops of images, the order they come in, and batches of them.

Order and crops are pure functions of (seed, epoch, image). They depend neither on the number of workers nor on earlier steps,
so a resumed run sees the same crops as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from sparkme.data.handover import Loader
from sparkme.data.images import REDUCTIONS, Decoded, OpenImage, load_image, open_image
from sparkme.data.planes import Pixels
from sparkme.data.sources import Files, ImageSource
from sparkme.data.statistics import Statistics
from sparkme.errors import UserError
from sparkme.seeds import derived_seed
from sparkme.settings.shared import PixelSettings


def pixels_of(settings: PixelSettings) -> Pixels:
    """How a run converts pixel values."""
    return Pixels(settings.value_range, settings.upright)


def normalise(images: Tensor, statistics: Statistics = Statistics(), dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: B008
    """Normalises (B, C, H, W) bytes, or floats in [0, 1]. Runs on the device, so that bytes are copied there."""
    mean, std = _on_device(statistics, images.device, dtype)
    values = images.to(dtype)
    return ((values / 255 if images.dtype == torch.uint8 else values) - mean) / std


def denormalise(images: Tensor, statistics: Statistics = Statistics()) -> Tensor:  # noqa: B008
    """The inverse of `normalise`, clipped to [0, 1]."""
    mean, std = _on_device(statistics, images.device, images.dtype)
    return (images * std + mean).clamp(0, 1)


@lru_cache
def _on_device(statistics: Statistics, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C, 1, 1), cached, so that a step copies nothing to the device."""
    mean, std = (torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1) for values in statistics)
    return mean, std


def as_source(images: ImageSource | Sequence[Path]) -> ImageSource:
    return images if isinstance(images, ImageSource) else Files.of(images)


def estimate_statistics(
    images: ImageSource | Sequence[Path],
    channels: int,
    background: str,
    *,
    seed: int,
    count: int = 256,
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Statistics:
    """Mean and standard deviation of each channel over `count` random images. Raises UserError if none can be read."""
    source = as_source(images)
    generator = torch.Generator().manual_seed(derived_seed(seed, "statistics"))
    sums, squares, num_pixels, problem = torch.zeros(channels), torch.zeros(channels), 0, ""
    for number in torch.randperm(len(source), generator=generator)[:count].tolist():
        try:
            values = as_floats(load_image(source.read(number), channels, background, pixels)).flatten(1).double()
        except OSError as error:
            problem = str(error)
            continue
        sums, squares = sums + values.sum(1), squares + values.square().sum(1)
        num_pixels += values.shape[1]
    if not num_pixels:
        raise UserError(f"no image could be read to estimate mean and standard deviation: {problem}")
    mean = sums / num_pixels
    std = (squares / num_pixels - mean.square()).clamp_min(1e-6).sqrt()
    return Statistics(tuple(round(v, 6) for v in mean.tolist()), tuple(round(max(v, 1e-3), 6) for v in std.tolist()))


def as_floats(image: Decoded) -> Tensor:
    """(C, H, W) in [0, 1]."""
    return image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(image).float() / 255


class Sample(NamedTuple):
    """A crop.

    Attributes:
        image: (C, H, W) uint8, or float32 in [0, 1]; None if no image could be read.
        unreadable: errors of the images that could not be read.
        label: the number of its class, or a bool per label; -1 without labels.
        is_enlarged: whether the image had fewer pixels there than the crop.
        outside: share of the image's pixel values outside the value range.
    """

    image: Tensor | None
    unreadable: tuple[str, ...]
    label: int | list[bool] = -1
    is_enlarged: bool = False
    outside: float = 0.0


class Batch(NamedTuple):
    """A batch of samples: images (B, C, H, W), or None if one is missing; labels (B,) int64 or (B, labels) bool; `enlarged`
    counts crops, `outside` adds up shares."""

    images: Tensor | None
    unreadable: tuple[str, ...]
    labels: Tensor | None = None
    enlarged: int = 0
    outside: float = 0.0


class LoadedBatch(Protocol):
    """What the training loop asks of a batch of any kind: images (B, C, H, W), or None if too few can be read."""

    @property
    def images(self) -> Tensor | None: ...

    @property
    def unreadable(self) -> tuple[str, ...]: ...

    @property
    def enlarged(self) -> int: ...

    @property
    def outside(self) -> float: ...


class CropDataset(Dataset[Sample]):
    """Random crops of images (utils/imagenet.py:66 of the official code), indexed by (epoch, draw).

    Args:
        images: a source, or files.
        size: height and width of a crop.
        min_scale: smallest area of a crop, as a share of the image's.
        seed: the run's.
        channels: channels of a crop.
        background: colour behind transparent images.
        flip: mirror half of the crops.
        augment: further augmentation of a Pillow image or tensor, with torch's generator.
        labels: (N,) int64 class numbers, or (N, labels) bool.
        reduced_jpeg: decode JPEG files at 1/2, 1/4 or 1/8 of their size if the crop still has enough pixels.
        pixels: conversion of pixel values.

    An unreadable image is replaced by another, and reported.
    """

    TRIES = 16

    def __init__(
        self,
        images: ImageSource | Sequence[Path],
        size: tuple[int, int],
        *,
        min_scale: float,
        seed: int,
        channels: int = 3,
        background: str = "white",
        flip: bool = True,
        augment: nn.Module | None = None,
        labels: Tensor | None = None,
        reduced_jpeg: bool = True,
        pixels: Pixels = Pixels(),  # noqa: B008
    ) -> None:
        self.source = as_source(images)
        self.size = size
        self.seed = seed
        self.channels = channels
        self.background = background
        self.pixels = pixels
        self.labels = labels
        self.reduced_jpeg = reduced_jpeg
        self.random_crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0))  # the box; `cut` takes it
        self.rest = v2.Compose(
            [
                *([v2.RandomHorizontalFlip()] if flip else []),
                *([augment] if augment is not None else []),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        epoch, draw = index
        unreadable: list[str] = []
        image_number = draw % len(self.source)
        for attempt in range(self.TRIES):  # all crops of an image in an epoch are replaced by crops of the same other one
            number = derived_seed(self.seed, "replacement", epoch, image_number, attempt) if attempt else image_number
            number %= len(self.source)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derived_seed(self.seed, "crop", epoch, draw))
                try:
                    with open_image(self.source.read(number), self.channels, self.background, self.pixels) as image:
                        box = self._draw_box(image.size)
                        crop = cut(image, box, self.size, reduced=self.reduced_jpeg)
                except OSError as error:
                    unreadable.append(str(error))
                    continue
                crop = self.rest(crop)
            label = -1 if self.labels is None else self.labels[number].tolist()
            is_enlarged = box.height < self.size[0] or box.width < self.size[1]
            crop = crop if crop.dtype == torch.uint8 else crop.clamp(0, 1)  # bicubic interpolation may overshoot
            return Sample(crop, tuple(unreadable), label, is_enlarged, image.outside)
        return Sample(None, tuple(dict.fromkeys(unreadable)))

    def _draw_box(self, size: tuple[int, int]) -> Box:
        """A random box in an image of this (height, width), from torch's generator."""
        return Box(**self.random_crop.make_params([torch.empty(1, *size, device="meta")]))


class Box(NamedTuple):
    """A box in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def cut(image: OpenImage, box: Box, size: tuple[int, int], *, reduced: bool) -> Decoded:
    """A box of an image, resized to (height, width) by antialiased bicubic interpolation.

    With `reduced`, a JPEG file is decoded at a fraction of its size, as long as the box has at least `size` pixels.
    """
    room = min(box.height / size[0], box.width / size[1])
    reduction = next((r for r in REDUCTIONS if r <= room), 1) if reduced and image.can_reduce else 1
    whole = image.decode(reduction)
    if isinstance(whole, Image.Image) and (whole.height, whole.width) != image.size:
        # If a side is no multiple, the last row or column stands for fewer pixels, or the first one in a mirrored file.
        y = whole.height - image.size[0] / reduction if image.mirrored[0] else 0
        x = whole.width - image.size[1] / reduction if image.mirrored[1] else 0
        right, bottom = box.left + box.width, box.top + box.height
        edges = (x + box.left / reduction, y + box.top / reduction, x + right / reduction, y + bottom / reduction)
        return whole.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=edges)
    cropped: Decoded = v2.functional.resized_crop(
        whole, *box, size=list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    return cropped


@dataclass(frozen=True)
class EpochSampler(Sampler[list[tuple[int, int]]]):
    """The draws of every step of one process: lists of (epoch, draw), where draw modulo `num_images` is the image.

    An epoch goes through shuffled copies of the data set until it has `samples_per_epoch`, and drops an incomplete last batch.
    Step k is the same whether or not the run was interrupted before it. With `repeats`, each image comes several times in a
    row, in different crops, and an epoch has fewer images (repeated augmentation, Hoffer et al., 2020).

    With `blocks` (see `ImageSource`) a copy is a random order of blocks. Each process takes its own part, so that it reads few
    blocks, and shuffles within a window, so that it reads blocks one after the other. No image is in two parts.
    """

    num_images: int
    samples_per_epoch: int
    batch_size: int
    seed: int
    steps: range
    rank: int = 0
    world: int = 1
    repeats: int = 1
    blocks: Tensor | None = None
    window: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.samples_per_epoch // self.batch_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        few = self.num_images < self.world  # a part would be empty
        return self._of_all() if self.blocks is None or few else self._of_blocks(self.blocks)

    def _of_all(self) -> Iterator[list[tuple[int, int]]]:
        """All processes share one order, and divide each batch; crops of an image stay together if the batch allows it."""
        together = self.repeats if self.batch_size % (self.repeats * self.world) == 0 else 1
        current, order = (-1, -1), torch.empty(0)
        for step in self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            batch = []
            groups = torch.arange(position * self.batch_size, (position + 1) * self.batch_size).view(-1, together)
            for place in groups[self.rank :: self.world].flatten().tolist():
                place, repeat = divmod(place, self.repeats)
                copy, place_in_copy = divmod(place, self.num_images)
                if current != (epoch, copy):
                    current, order = (epoch, copy), self._order(epoch, copy)
                batch.append((epoch, (copy * self.repeats + repeat) * self.num_images + int(order[place_in_copy])))
            yield batch

    def _order(self, epoch: int, copy: int) -> Tensor:
        """One shuffled copy of the data set. An epoch of many copies is never in memory as a whole."""
        words = (copy,) if copy else ()
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch, *words))
        return torch.randperm(self.num_images, generator=generator)

    def _of_blocks(self, blocks: Tensor) -> Iterator[list[tuple[int, int]]]:
        """Each process has its own part of the order."""
        share, images = self.batch_size // self.world, self.num_images // self.world
        current, order = (-1, -1, -1), torch.empty(0)
        for step in self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            batch = []
            for place in range(position * share, (position + 1) * share):
                place, repeat = divmod(place, self.repeats)
                copy, place_in_copy = divmod(place, images)
                window, place_in_window = divmod(place_in_copy, self.window)
                if current != (epoch, copy, window):
                    current, order = (epoch, copy, window), self._window(blocks, epoch, copy, window)
                batch.append((epoch, (copy * self.repeats + repeat) * self.num_images + int(order[place_in_window])))
            yield batch

    def _window(self, blocks: Tensor, epoch: int, copy: int, window: int) -> Tensor:
        """The shuffled images of a window of this process's part."""
        seed = derived_seed(self.seed, "blocks", epoch, copy)
        shuffled = torch.randperm(len(blocks) - 1, generator=torch.Generator().manual_seed(seed))
        ends = blocks.diff()[shuffled].cumsum(0)
        images = self.num_images // self.world
        places = torch.arange(window * self.window, min((window + 1) * self.window, images)) + self.rank * images
        block = torch.searchsorted(ends, places, right=True)
        numbers = blocks[1:][shuffled[block]] - (ends[block] - places)
        seed = derived_seed(self.seed, "window", epoch, copy, self.rank, window)
        return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]


def collate(samples: list[Sample]) -> Batch:
    images = [sample.image for sample in samples if sample.image is not None]
    unreadable = tuple(path for sample in samples for path in sample.unreadable)
    if len({image.dtype for image in images}) > 1:
        images = [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]
    enlarged = sum(sample.is_enlarged for sample in samples)
    outside = sum(sample.outside for sample in samples)
    if len(images) < len(samples):
        return Batch(None, unreadable, None, enlarged, outside)
    return Batch(torch.stack(images), unreadable, torch.tensor([sample.label for sample in samples]), enlarged, outside)


def create_loader(dataset: CropDataset, sampler: EpochSampler, *, workers: int, pin_memory: bool) -> Loader:
    """Batches in the sampler's order."""
    return Loader(dataset, workers=workers, prefetch=4, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory)


def centre_crop(image: Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """The largest central box with the aspect ratio of `size` (height, width), resized: (C, height, width) uint8 or float32."""
    height, width = v2.functional.get_size(image)
    part = (min(height, max(1, round(width * size[0] / size[1]))), min(width, max(1, round(height * size[1] / size[0]))))
    # Crop first: resizing a very long image would take much memory.
    resized = v2.functional.resize(v2.functional.center_crop(image, list(part)), list(size), antialias=True)
    return resized if isinstance(resized, Tensor) else v2.functional.pil_to_tensor(resized)


def preview_images(
    images: ImageSource | Sequence[Path],
    size: tuple[int, int],
    count: int,
    channels: int = 3,
    background: str = "white",
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Tensor:
    """Centre crops of `count` readable images spread over the source, (B, C, H, W)."""
    source = as_source(images)
    step = max(1, len(source) // count)
    crops: list[Sample] = []
    for number in chain(range(0, len(source), step), (i for i in range(len(source)) if i % step)):
        try:
            crops.append(Sample(centre_crop(load_image(source.read(number), channels, background, pixels), size), ()))
        except OSError:
            continue
        if len(crops) == count:
            break
    batch = collate(crops).images if crops else None
    return torch.empty(0, channels, *size, dtype=torch.uint8) if batch is None else batch
