"""benchmarks.pixel_probe: figures of maps that know everything, nothing, or where objects are, counted another way too."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.pixel_probe import Pixels, area_under_curve, probe_pixels

CLASSES = 3


class Maps(nn.Module):
    """In place of a pyramid: one map at stride 4 that shows what it is told to, and one at stride 8 of noise."""

    mean, std = (0.5,), (0.5,)

    def __init__(self, knows: str) -> None:
        super().__init__()
        self.knows, self.network = knows, nn.BatchNorm2d(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        labels = ((images * 0.5 + 0.5) * CLASSES).round()[:, :, ::4, ::4].long()
        shown = {"all": labels, "objects": labels > 0, "nothing": torch.zeros_like(labels)}[self.knows]
        one_hot = nn.functional.one_hot(shown[:, 0].long(), CLASSES + 1).permute(0, 3, 1, 2).float()
        noise = torch.Generator().manual_seed(int(images.sum()))
        return [one_hot, torch.randn(len(images), 2, labels.shape[2] // 2, labels.shape[3] // 2, generator=noise)]


def pixels(seed: int) -> Pixels:
    labels = torch.randint(0, CLASSES + 1, (6, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images = (labels.float() / CLASSES).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    labels[:, 0, 0] = 255
    return Pixels(images, labels)


@pytest.mark.parametrize(("knows", "auc", "accuracy"), [("all", 1.0, 1.0), ("objects", 1.0, 1 / 3), ("nothing", 0.5, 1 / 3)])
def test_it_measures_what_the_maps_tell(knows: str, auc: float, accuracy: float) -> None:
    pyramid: Any = Maps(knows)
    found = probe_pixels(pyramid, pixels(0), pixels(1), pixels(2), CLASSES)
    assert found == {"object_auc": pytest.approx(auc, abs=0.08), "class_accuracy": pytest.approx(accuracy, abs=0.08)}
    assert not pyramid.network.training and pyramid.network.running_mean is not None


def test_the_area_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=60), rng.random(60) < 0.3
    pairs = scores[positive][:, None] > scores[~positive][None]
    assert area_under_curve(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(pairs.mean())
