"""Compares exported weights in the dense network with the sparse encoder, and re-estimates batch-norm statistics."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparkme.data.dataset import normalise, pixels_of, preview_images
from sparkme.data.limits import limit_pixels
from sparkme.data.sources.files import find_images
from sparkme.data.statistics import statistics_of
from sparkme.errors import UserError
from sparkme.settings.pretrain import PretrainSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.hierarchy import dense_features, find_hierarchy

# In float64, rounding is about 1e-13 for a hundred layers. A wrong layout differs by about 1.
TOLERANCE = 1e-8


@torch.no_grad()
def verify(dense: nn.Module, encoder: SparseEncoder, size: tuple[int, int]) -> list[float]:
    """Compares a dense model with a sparse encoder, in float64 and eval mode, on images with every patch visible.

    Args:
        dense: the model with the exported weights: the encoder's original, or its counterpart in another library.
        encoder: the exported encoder; moved to float64 on the CPU.
        size: height and width of the images.

    Returns:
        For each stage, shallow to deep, the largest difference divided by the largest value; NaN for non-finite values.
    """
    for network in (dense, encoder):
        network.double().cpu()
        network.eval()  # a separate statement: a user's `train` may not return self
    encoder.set_engine("minkowski")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_channels, *size, generator=generator, dtype=torch.float64)
    patch = encoder.patch
    active = torch.ones(2, 1, size[0] // patch, size[1] // patch, dtype=torch.bool)
    with torch.enable_grad():
        taps = find_hierarchy(copy.deepcopy(dense), len(encoder.strides), in_channels=encoder.in_channels).taps
    if [tap.stride for tap in taps] != [*encoder.strides] or encoder.untrained:  # given by hand, or attention follows
        taps = encoder.hierarchy.taps
    expected = dense_features(dense, taps, images)
    return [_difference(x.dense(), y) for x, y in zip(encoder(images, active), expected, strict=True)]


def _difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def recalibrate(dense: nn.Module, data: Path, settings: PretrainSettings, count: int) -> None:
    """Re-estimates batch norm's running statistics on whole images, since those of pretraining are of visible patches.

    Prints how far they moved. Raises UserError without images.
    """
    limit_pixels(settings.max_pixels)
    paths = find_images(data, flag="--recalibrate-bn")
    norms = {n: m for n, m in dense.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats}
    if not norms:
        print("the network has no batch norm: nothing to recalibrate")
        return
    statistics = statistics_of(settings)
    step = max(1, len(paths) // count)
    chosen, size = paths[::step][:count], settings.size
    before = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}  # type: ignore[union-attr]
    dense.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    seen = 0
    with torch.no_grad():
        for start in tqdm(range(0, len(chosen), 32), desc="recalibrating batch norm", disable=not sys.stderr.isatty()):
            group = chosen[start : start + 32]
            images = preview_images(group, size, len(group), settings.channels, settings.background, pixels_of(settings))
            if len(images) > 1:
                dense(normalise(images, statistics))
                seen += len(images)
    dense.eval()
    if not seen:
        raise UserError(f"--recalibrate-bn {data}: too few of its images can be read")
    shifts, ratios = [], []
    for name, norm in norms.items():
        mean, variance = before[name]
        new_mean, new_variance = norm.running_mean, norm.running_var
        assert new_mean is not None and new_variance is not None
        if norm.num_batches_tracked:
            shifts.append(((new_mean - mean).abs() / (new_variance + norm.eps).sqrt()).mean())
            ratios.append(((variance + norm.eps) / (new_variance + norm.eps)).log().abs().mean())
        else:  # a layer that whole images do not reach
            norm.running_mean, norm.running_var = mean, variance
    print(
        f"batch norm recalibrated on {seen} whole images: means moved by {torch.stack(shifts).mean():.3f} standard deviations, "
        f"variances by a factor of {torch.stack(ratios).mean().exp():.3f}"
    )
