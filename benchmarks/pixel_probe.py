"""Measures what frozen maps tell about each pixel: whether it is an object's, and of which class.

Maps of all strides are resampled to a pixel for each 4 x 4 pixels of the image and put side by side. A ridge regression maps
them to the classes and the background. Batch norms have the statistics of the training images, since those of pretraining are
of visible patches. This takes seconds where training a detector takes minutes. It separates two reasons for a poor detector:
the features do not tell objects from background, or they do not tell classes apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sparkme.data.annotations import IGNORED, Annotated
from sparkme.data.sources.files import Files
from sparkme.networks.pyramid import Pyramid
from sparkme.training.finetuning import averaging_batch_norms

STRIDE = 4  # image pixels for each pixel that is classified
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # over the number of pixels, for features of unit variance
BATCH = 25


@dataclass(frozen=True)
class Pixels:
    """Images of one size and their labels.

    Attributes:
        images: (N, C, S, S) float32 from 0 to 1.
        labels: (N, S / 4, S / 4) uint8: 0 is the background, classes are from 1, 255 is ignored.
    """

    images: Tensor
    labels: Tensor


def read_pixels(part: Annotated, numbers: Iterable[int], size: int) -> Pixels:
    """Reads RGB images at size x size pixels, whatever their shape was."""
    assert isinstance(part.images, Files)
    images, labels = [], []
    for number in numbers:
        with Image.open(part.images.path(number)) as image:
            images.append(pil_to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
        whole = labels_of(part, number)[None, None].float()
        labels.append(F.interpolate(whole, size=(size // STRIDE,) * 2, mode="nearest-exact")[0, 0].byte())
    return Pixels(torch.stack(images).float() / 255, torch.stack(labels))


def labels_of(part: Annotated, number: int) -> Tensor:
    """The class of each pixel of an image, (H, W) uint8: 0 is the background, crowds are ignored, later objects cover earlier
    ones."""
    objects = part.objects(number)
    labels = torch.zeros(*part.sizes[number].tolist(), dtype=torch.uint8)
    for mask, label, crowd in zip(objects.masks(*labels.shape), objects.labels.tolist(), objects.crowd.tolist(), strict=True):
        labels[mask > 0] = IGNORED if crowd else label + 1
    return labels


@torch.no_grad()
def probe_pixels(pyramid: Pyramid, train: Pixels, choose: Pixels, test: Pixels, num_classes: int) -> dict[str, float]:
    """Fits on `train`, takes the penalty that is best on `choose`, and measures on `test`.

    Returns:
        `object_auc`: how often a pixel of an object has a lower score for background than a pixel of the background has; 0.5 is
        chance. `class_accuracy`: share of the objects' pixels whose class has the highest score among the classes.
    """
    with averaging_batch_norms(pyramid.network):
        for batch in train.images.split(BATCH):
            pyramid.maps(_normalised(pyramid, batch))
    parts = {name: _features(pyramid, part) for name, part in (("train", train), ("choose", choose), ("test", test))}
    features, labels = parts["train"]
    mean, std = features.mean(0), features.std(0) + 1e-6
    features = _with_bias((features - mean) / std)
    targets = F.one_hot(labels.long(), num_classes + 1).float()
    products, correlations = features.T @ features, features.T @ targets
    found = []
    for penalty in PENALTIES:
        ridge = products + penalty * len(features) * torch.eye(len(products))
        weights = torch.linalg.solve(ridge, correlations)
        of_parts = {}
        for name in ("choose", "test"):
            rows, truth = parts[name]
            of_parts[name] = _figures(_with_bias((rows - mean) / std) @ weights, truth)
        found.append(of_parts)
    return {
        figure: max(found, key=lambda of_parts: of_parts["choose"][figure])["test"][figure]
        for figure in ("object_auc", "class_accuracy")
    }


def _features(pyramid: Pyramid, part: Pixels) -> tuple[Tensor, Tensor]:
    """(P, channels of all maps) float32 and (P,) labels of the pixels that are not ignored."""
    rows = []
    for images, labels in zip(part.images.split(BATCH), part.labels.split(BATCH)):
        maps = pyramid.maps(_normalised(pyramid, images))
        whole = torch.cat([F.interpolate(each, size=labels.shape[1:], mode="bilinear") for each in maps], 1)
        rows.append(whole.permute(0, 2, 3, 1)[labels != IGNORED])
    return torch.cat(rows), part.labels[part.labels != IGNORED]


def _normalised(pyramid: Pyramid, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (pyramid.mean, pyramid.std))
    return (images - mean) / std


def _with_bias(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def _figures(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Of (P, classes + 1) scores and (P,) labels."""
    is_object = labels > 0
    of_classes = scores[is_object, 1:].argmax(1) + 1
    return {
        "object_auc": area_under_curve(-scores[:, 0], is_object),
        "class_accuracy": (of_classes == labels[is_object]).double().mean().item(),
    }


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """The ROC curve's: the share of pairs of a positive and a negative of which the positive has the higher score."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(len(scores), dtype=torch.float64)
    count = int(positive.sum())
    lowest = (count - 1) / 2  # the positives' mean rank if all of them were below the negatives
    return float((ranks[positive].mean() - lowest) / (len(scores) - count))
