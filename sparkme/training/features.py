"""Frozen features of whole images, and their accuracy with nearest neighbours and a linear classifier.

On a whole image an encoder computes the same as the dense network, so the same code measures an encoder during training, a
checkpoint, and exported weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.data.dataset import normalise
from sparkme.data.labelled import WholeBatch
from sparkme.data.statistics import Statistics
from sparkme.sparse.encoder import SparseEncoder

# For the weighted vote: Wu et al., CVPR 2018, section 3.4, with the values of DINO (Caron et al., ICCV 2021, section 4.1).
NEIGHBOURS, TEMPERATURE = 20, 0.07
# For the linear classifier, on features with standard deviation 1; the best on a fifth of the training images is used.
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class PooledFeatures:
    """The spatial mean of every map, for some images.

    Attributes:
        maps: by stride (N, channels) float32, on the CPU.
        numbers: (N,) int64 numbers of the readable images.
        unreadable: errors of the others.
    """

    maps: dict[int, Tensor]
    numbers: Tensor
    unreadable: tuple[str, ...] = ()


@torch.no_grad()
def pooled_features(
    encoder: SparseEncoder, batches: Iterable[WholeBatch], statistics: Statistics, device: torch.device
) -> PooledFeatures:
    """Runs an encoder in eval mode on images with every patch visible, and then restores its modes.

    Args:
        encoder: on the device.
        batches: whole images, (B, C, H, W) bytes or floats in [0, 1].
        statistics: mean and standard deviation of the images.
        device: where to compute.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    found: dict[int, list[Tensor]] = {stride: [torch.empty(0, c)] for stride, c in zip(encoder.strides, encoder.channels)}
    numbers: list[Tensor] = [torch.empty(0, dtype=torch.long)]
    unreadable: list[str] = []
    encoder.eval()
    try:
        for batch in batches:
            unreadable += batch.unreadable
            if batch.images is None:
                continue
            images = normalise(batch.images.to(device, non_blocking=True), statistics)
            b, _, h, w = images.shape
            whole = torch.ones(b, 1, h // encoder.patch, w // encoder.patch, dtype=torch.bool, device=device)
            for x in encoder(images, whole, whole[0].numel()):
                found[x.stride].append(x.rows.view(b, -1, x.channels).float().mean(1).cpu())
            numbers.append(batch.numbers)
    finally:
        for module, mode in modes:
            module.training = mode
    return PooledFeatures({stride: torch.cat(parts) for stride, parts in found.items()}, torch.cat(numbers), tuple(unreadable))


def knn_accuracy(
    train: Tensor,
    labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """The share of images whose class wins the vote of their nearest neighbours, weighted by exp(cosine / temperature).

    Args:
        train, val: (N, C) and (M, C) features, of any lengths.
        labels, val_labels: (N,) and (M,) int64.
        neighbours: number of voters, at most all.
        temperature: of the weights.
    """
    classes = int(max(labels.max(), val_labels.max())) + 1
    # Features after a ReLU all lie in one orthant; without their mean, angles tell more.
    center = train.mean(0)
    train, val = F.normalize(train - center, dim=1), F.normalize(val - center, dim=1)
    right = 0
    for part, truth in zip(val.split(1024), val_labels.split(1024), strict=True):
        cosine, nearest = (part @ train.t()).topk(min(neighbours, len(train)), dim=1)
        weights = ((cosine - cosine.amax(1, keepdim=True)) / temperature).exp()
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[nearest], weights)
        right += int((votes.argmax(1) == truth).sum())
    return right / len(val)


def linear_accuracy(
    train: Tensor, labels: Tensor, val: Tensor, val_labels: Tensor, *, decays: tuple[float, ...] = DECAYS
) -> tuple[float, float]:
    """The accuracy of a linear classifier (multinomial logistic regression).

    Features are scaled to mean 0 and standard deviation 1. Every fifth image of each class is held out to choose the weight
    decay; then the classifier is fitted to all images.

    Returns:
        The accuracy, and the weight decay.
    """
    mean, std = scale_of(train)
    train, val = (train - mean) / std, (val - mean) / std
    best = best_decay(train, labels, decays)
    return _share(fit_linear(train, labels, best), val, val_labels), best


def scale_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of (N, C) features; a deviation of the size of rounding is raised."""
    mean, std = x.mean(0), x.std(0, correction=0)
    least = 1e-6 * max(float(mean.abs().max()), float(std.max()))
    return mean, std.clamp_min(max(least, 1e-30))


def best_decay(x: Tensor, labels: Tensor, decays: tuple[float, ...] = DECAYS) -> float:
    """The weight decay that is best on every fifth image of each class (of all, with several labels), fitted to the others."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    groups = labels if labels.ndim == 1 else torch.zeros(len(labels))
    for group in groups.unique().tolist():
        members = (groups == group).nonzero().flatten()
        held_out[members[4::5] if len(members) >= 5 else members[1:2]] = True
    if not held_out.any():  # one image per class
        return decays[len(decays) // 2]
    scores = []
    for decay in decays:
        classifier = fit_linear(x[~held_out], labels[~held_out], decay, classes=_num_classes(labels))
        score = _share if labels.ndim == 1 else _minus_loss
        scores.append((score(classifier, x[held_out], labels[held_out]), decay))
    return max(scores)[1]  # the strongest of equals


def fit_linear(x: Tensor, labels: Tensor, decay: float, *, classes: int | None = None) -> nn.Linear:
    """Minimises cross entropy (binary, for several labels) + decay / 2 |W|^2 by L-BFGS, from zero.

    Args:
        x: (N, C) features.
        labels: (N,) int64, or (N, labels) bool.
        decay: weight decay, not of the biases.
        classes: number of classes; those in the labels if None.
    """
    classifier = nn.Linear(x.shape[1], classes or _num_classes(labels))
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _loss(classifier, x, labels) + decay / 2 * classifier.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return classifier.requires_grad_(False)


def _num_classes(labels: Tensor) -> int:
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def _loss(classifier: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    scores = classifier(x)
    if labels.ndim == 1:
        return F.cross_entropy(scores, labels)
    # The sum over labels, so that weight decay acts on each label's classifier as if it were alone.
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype)) * labels.shape[1]


@torch.no_grad()
def _minus_loss(classifier: nn.Linear, x: Tensor, labels: Tensor) -> float:
    return -float(_loss(classifier, x, labels))


@torch.no_grad()
def _share(classifier: nn.Linear, x: Tensor, labels: Tensor) -> float:
    return float((classifier(x).argmax(1) == labels).double().mean())
