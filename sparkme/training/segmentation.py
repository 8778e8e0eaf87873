"""Fine-tuning for semantic segmentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from sparkme.data.annotations import IGNORED, Segmented, SegmentedSplit, find_segmented
from sparkme.data.annotations.loading import PixelDataset, WholeDataset, WholeImages, create_training_loader
from sparkme.data.dataset import Batch, normalise
from sparkme.data.labelled import digest_of
from sparkme.errors import UserError
from sparkme.networks.segmenters import create_segmenter, predict_labels
from sparkme.reporting.predictions import legend_of, mean_iou, pictures_of_segmentation
from sparkme.settings.segmentation import SegmentationSettings
from sparkme.training.dense_tasks import DenseTask
from sparkme.training.metrics import SegmentationMeasure
from sparkme.training.target import Measure


class Segmentation(DenseTask):
    """Fine-tuning for segmentation."""

    settings: SegmentationSettings
    train_set: Segmented
    val_set: Segmented
    pictures = ("confusion.png", "predictions-*.png")
    figure = "mean IoU"
    columns = ("image", "true classes", "predicted classes", "wrong pixels")

    def find_data(self, asked: SegmentationSettings) -> SegmentedSplit:
        split = find_segmented(
            asked.data, classes=asked.classes, ignore_index=asked.ignore_index, val_share=asked.val_share, seed=asked.seed
        )
        self.train_set = split.train.shots(asked.shots, asked.seed) if asked.shots is not None else split.train
        self.val_set, self.classes = split.val, split.train.classes
        return split

    def found_in_data(self, asked: SegmentationSettings) -> dict[str, Any]:
        return {
            "typical_side": int(self.train_set.sizes.amin(1).median()),
            "split_digest": digest_of([part.content() for part in (self.train_set, self.val_set)]),
        }

    def with_head(self, body: nn.Module) -> nn.Module:
        settings = self.settings
        torch.manual_seed(settings.seed)  # the same head for pretrained and random weights
        return create_segmenter(self.pyramid, settings.head, len(self.classes), channels=settings.head_channels)

    def check_network(self) -> None:
        super().check_network()
        settings = self.settings
        if settings.head == "deeplabv3" and settings.batch_size // settings.accumulate < 2:  # it normalises means over images
            raise UserError("--head deeplabv3 needs two images in each pass; raise --batch-size or lower --accumulate")

    def smallest_sizes(self) -> tuple[tuple[int, int], int]:
        return self.settings.size, self.settings.short_side

    def whole_dataset(self, part: Segmented) -> WholeDataset:
        return WholeDataset(part, self.decoding, self.settings.short_side)

    def prepare_steps(self) -> None:
        settings, device = self.settings, self.process.device
        weights = class_weights(self.train_set.pixel_counts) if settings.class_weights == "balanced" else None
        self.criterion = PixelLoss(weights, dice="dice" in settings.loss).to(device)
        jitter = settings.colour_jitter
        self.dataset = PixelDataset(
            self.train_set,
            self.decoding,
            size=settings.size,
            short_side=settings.short_side,
            scale_range=settings.scale_range,
            colour=v2.ColorJitter(jitter, jitter, jitter) if jitter else None,
            flip=settings.flip,
            seed=settings.seed,
        )

    def batches(self, steps: range) -> Iterable[Batch]:
        sampler = self.sampler(len(self.dataset), steps)
        pin = self.process.device.type == "cuda"
        return create_training_loader(self.dataset, sampler, workers=self.settings.workers, pin_memory=pin)

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.images is not None and batch.labels is not None
        return batch.images, batch.labels

    def loss(self, *tensors: Any, generator: torch.Generator) -> Tensor:
        images, labels = tensors  # (B, C, H, W) bytes, or floats in [0, 1]; (B, H, W) uint8
        loss: Tensor = self.criterion(self.model(normalise(images, self.statistics)), labels.long())
        return loss

    def new_measure(self) -> Measure:
        return SegmentationMeasure(self.classes, IGNORED)

    def measure_batch(self, network: nn.Module, batch: WholeImages, measure: Measure) -> None:
        assert batch.images is not None and isinstance(measure, SegmentationMeasure)
        for image, number in zip(batch.images, batch.numbers):
            truth = self.val_set.labels(number)
            with self.precision():
                found = predict_labels(network, self.as_input(image), max(self.settings.size), truth.shape).cpu()
            measure.add([found], [truth])
            measure.figures[number] = mean_iou(found, truth)

    def figures(self, measure: Any) -> dict[int, float | None]:
        figures: dict[int, float | None] = measure.figures
        return figures

    def picture(self, network: nn.Module, measure: Measure, number: int) -> list[Image.Image]:
        truth = self.val_set.labels(number)
        image = self.whole_dataset(self.val_set)[number].image
        assert image is not None
        with self.precision():
            found = predict_labels(network, self.as_input(image), max(self.settings.size), truth.shape).cpu()
        return pictures_of_segmentation(self.whole_picture(number), found, truth, self.classes)

    def legend(self, numbers: Sequence[int]) -> list[tuple[str, tuple[int, int, int]]]:
        return legend_of(self.classes, [self.val_set.labels(number) for number in numbers])

    def in_words(self) -> dict[str, str]:
        settings, shares = self.settings, self.train_set.pixel_counts / self.train_set.pixel_counts.sum().clamp_min(1)
        low, high = int(shares.argmin()), int(shares.argmax())
        texts = [f"{100 * float(shares[i]):.2g} % ({self.classes[i]})" for i in (low, high)]
        return {
            "data": f"{len(self.classes)} classes of {texts[0]} to {texts[1]} of the pixels, in {len(self.train_set):,} images",
            "network": f"{settings.head}, {len(self.classes)} classes, crops of {'x'.join(map(str, settings.size))} pixels",
        }

    def notes(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "head": settings.head,
            "head_channels": settings.head_channels,
            "short_side": settings.short_side,
            "input_size": settings.input_size,
        }


def class_weights(pixels: Tensor) -> Tensor:
    """Weights (classes,) for the cross entropy, by the inverse root of each class's pixels; their mean over pixels is 1."""
    shares = pixels.double() / pixels.sum().clamp_min(1)
    weights = torch.where(shares > 0, shares.clamp_min(1e-12).rsqrt(), 0.0)
    return (weights / (weights * shares).sum().clamp_min(1e-12)).float()


class PixelLoss(nn.Module):
    """Cross entropy of each pixel, and the Dice loss of each class (Milletari et al., 3DV 2016, eq. 2), without ignored pixels.

    Args:
        weights: of the classes in the cross entropy, (classes,), or None.
        dice: whether to add the Dice loss: 1 minus twice the overlap of probabilities and truth over their sums, over the whole
            batch, the mean over classes that are in it.
    """

    weights: Tensor | None

    def __init__(self, weights: Tensor | None, *, dice: bool) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.dice = dice

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Scores (B, classes, H, W) and labels (B, H, W) int64."""
        scores, known = scores.float(), labels != IGNORED
        loss = F.cross_entropy(scores, labels, self.weights, ignore_index=IGNORED, reduction="sum")
        weight = known if self.weights is None else self.weights[labels.masked_fill(~known, 0)] * known
        loss = loss / weight.sum().clamp_min(1e-12)
        if not self.dice:
            return loss
        classes = torch.arange(scores.shape[1], device=labels.device)
        truth = labels[:, None] == classes[:, None, None]  # false for ignored pixels
        found, sizes = scores.softmax(1), truth.sum((0, 2, 3))
        overlap, total = (found * truth).sum((0, 2, 3)), (found * known[:, None]).sum((0, 2, 3)) + sizes
        dice, present = 1 - (2 * overlap + 1) / (total + 1), sizes > 0
        return loss + (dice * present).sum() / present.sum().clamp_min(1)
