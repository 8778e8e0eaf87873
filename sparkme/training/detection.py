"""Fine-tuning for object detection and instance segmentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sparkme.data.annotations import Annotated, AnnotatedSplit, find_annotated
from sparkme.data.annotations.base import encode_outline
from sparkme.data.annotations.loading import (
    ObjectBatch,
    ObjectDataset,
    Target,
    WholeDataset,
    WholeImages,
    create_training_loader,
)
from sparkme.data.labelled import digest_of
from sparkme.networks.detectors import Found, create_detector, detect, loss_of
from sparkme.reporting.predictions import image_score, pictures_of_detection
from sparkme.settings.detection import DetectionSettings
from sparkme.training.dense_tasks import DenseTask
from sparkme.training.metrics import DetectionMeasure, Detections, GroundTruth, check_pycocotools, encode_masks
from sparkme.training.optimizer import stepped_rate
from sparkme.training.target import Measure


class Detection(DenseTask):
    """Fine-tuning for detection."""

    settings: DetectionSettings
    train_set: Annotated
    val_set: Annotated
    pictures = ("predictions-*.png",)
    columns = ("true", "predicted")
    figure = "F1"

    def find_data(self, asked: DetectionSettings) -> AnnotatedSplit:
        check_pycocotools()
        split = find_annotated(asked.data, asked.train, asked.val, asked.root, val_share=asked.val_share, seed=asked.seed)
        self.train_set = split.train.shots(asked.shots, asked.seed) if asked.shots is not None else split.train
        self.val_set, self.classes = split.val, split.train.classes
        return split

    def found_in_data(self, asked: DetectionSettings) -> dict[str, Any]:
        return {
            "has_masks": self.train_set.has_every_mask and self.val_set.has_every_mask,
            "typical_side": int(self.train_set.sizes.amin(1).median()),
            "split_digest": split_digest(self.train_set, self.val_set),
        }

    def with_head(self, body: nn.Module) -> nn.Module:
        settings = self.settings
        torch.manual_seed(settings.seed)  # the same head for pretrained and random weights
        detector: Any = create_detector(
            self.pyramid,
            settings.head,
            len(self.classes),
            channels=settings.fpn_channels,
            norm=settings.head_norm,
            proposals=settings.proposals,
        )
        if hasattr(detector, "roi_heads"):
            detector.roi_heads.fg_bg_sampler.batch_size_per_image = settings.regions
        made: nn.Module = detector
        return made

    def smallest_sizes(self) -> tuple[tuple[int, int], int]:
        side = min(self.settings.short_side)
        return (side, side), self.settings.val_side

    def whole_dataset(self, part: Annotated) -> WholeDataset:
        return WholeDataset(part, self.decoding, self.settings.val_side, self.settings.long_side)

    def prepare_steps(self) -> None:
        settings = self.settings
        torch.backends.cudnn.benchmark = False  # each size of a batch would be a new search
        self.dataset = ObjectDataset(
            self.train_set,
            self.decoding,
            short_side=settings.short_side,
            long_side=settings.long_side,
            usual_side=settings.val_side,
            random_crop=settings.random_crop,
            masks=settings.has_mask_head,
            flip=settings.flip,
            seed=settings.seed,
        )

    def batches(self, steps: range) -> Iterable[ObjectBatch]:
        sampler = self.sampler(len(self.dataset), steps)
        pin = self.process.device.type == "cuda"
        return create_training_loader(self.dataset, sampler, workers=self.settings.workers, pin_memory=pin)

    def parts(self, batch: ObjectBatch) -> list[tuple[Any, ...]]:
        assert batch.images is not None
        device, count = self.process.device, self.settings.accumulate
        images = [image[:, :h, :w] for image, (h, w) in zip(batch.images.to(device, non_blocking=True), batch.sizes)]
        targets = [_as_torchvision(target, device) for target in batch.targets]
        size = -(-len(images) // count)
        return [(images[i : i + size], targets[i : i + size]) for i in range(0, len(images), size)]

    def loss(self, *tensors: Any, generator: torch.Generator) -> Tensor:
        images, targets = tensors
        return loss_of(self.model(images, targets))

    def rates(self, step: int) -> dict[str, float]:
        settings, each = self.settings, self.steps_per_epoch
        if not settings.decay_epochs:
            return super().rates(step)
        warmup, falls = round(settings.warmup_epochs * each), [round(epoch * each) for epoch in settings.decay_epochs]
        rate = stepped_rate(step, peak=settings.peak_rate, warmup_steps=warmup, falls=falls, factor=settings.decay_factor)
        return {"learning_rate": rate, "weight_decay": settings.weight_decay}

    def new_measure(self) -> Measure:
        return DetectionMeasure(self.classes, self.settings.has_mask_head)

    def measure_batch(self, network: nn.Module, batch: WholeImages, measure: Measure) -> None:
        assert batch.images is not None
        sizes = [(h, w) for h, w in self.val_set.sizes[batch.numbers].tolist()]
        with self.precision():
            found = detect(network, [image.to(self.process.device) for image in batch.images], sizes)
        masks = self.settings.has_mask_head
        measure.add([detections_of(one) for one in found], [truth_of(self.val_set, i, masks=masks) for i in batch.numbers])

    def figures(self, measure: Any) -> dict[int, float | None]:
        found = {}
        for number, image_id in enumerate(self.val_set.image_ids.tolist()):
            if image_id in measure.images:
                truth, detections = measure.images[image_id]
                found[number] = image_score(detections, truth)
        return found

    def picture(self, network: nn.Module, measure: Any, number: int) -> list[Image.Image]:
        truth, found = measure.images[int(self.val_set.image_ids[number])]
        return pictures_of_detection(self.whole_picture(number), found, truth, self.classes)

    def in_words(self) -> dict[str, str]:
        settings, counts = self.settings, self.train_set.class_counts()
        sides = " to ".join(str(side) for side in sorted({min(settings.short_side), max(settings.short_side)}))
        return {
            "data": f"{int(counts.sum()):,} objects of {len(self.classes)} classes in {len(self.train_set):,} images",
            "network": f"{settings.head}, {len(self.classes)} classes, shorter side {sides} pixels",
        }

    def notes(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "head": settings.head,
            "fpn_channels": settings.fpn_channels,
            "head_norm": settings.head_norm,
            "proposals": settings.proposals,
            "val_side": settings.val_side,
            "long_side": settings.long_side,
            "category_ids": self.train_set.category_ids,
        }


def _as_torchvision(target: Target, device: torch.device) -> dict[str, Tensor]:
    """A target as torchvision's detectors take it, whose classes are numbered from 1."""
    found = {"boxes": target.boxes, "labels": target.labels + 1}
    if target.masks is not None:
        found["masks"] = target.masks
    return {name: value.to(device, non_blocking=True) for name, value in found.items()}


def detections_of(found: Found) -> Detections:
    """What a detector found in an image, for the measure."""
    masks = None
    if found.probabilities is not None:
        masks = [encode_masks(mask[None])[0] for mask in found.masks()]
    return Detections(found.boxes.cpu().numpy(), found.scores.cpu().numpy(), found.labels.cpu().numpy(), masks)


def truth_of(part: Annotated, number: int, *, masks: bool) -> GroundTruth:
    """What an image shows, for the measure."""
    objects, (height, width) = part.objects(number), part.sizes[number].tolist()
    outlines = objects.segmentations or (None,) * len(objects)
    return GroundTruth(
        int(part.image_ids[number]),
        (height, width),
        objects.boxes.double().numpy(),
        objects.labels.numpy(),
        objects.areas.numpy(),
        objects.crowd.numpy(),
        [encode_outline(outline, height, width) for outline in outlines] if masks else None,
    )


def split_digest(train: Annotated, val: Annotated) -> str:
    """Twelve digits that change with the images, their objects and their split."""
    return digest_of([part.content() for part in (train, val)])
