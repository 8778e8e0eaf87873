"""SparK without one of its parts: the ablations of the paper (Tian et al., ICLR 2023), to see what each part is worth.

Each class differs from `SparK` in one thing alone. Weights, settings, checkpoints and exported encoders are of the same kinds.

- `ZeroedSparK`: the encoder computes on hidden pixels, which are zero, as it does on all others. The paper argues that the mask
  then vanishes with depth, and that zeros shift the distribution of what the network sees.
- `SingleScaleSparK`: the decoder gets the deepest map alone, though a convolutional network is a hierarchy of maps.
- `LossOnAllSparK`: visible patches are compared as well, which the network can copy.

The decoder has no skip connections but the finer maps, so that "no skip connections" is `SingleScaleSparK`, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from sparkme.methods.loss import patch_statistics
from sparkme.methods.spark import SparK
from sparkme.ops.patches import patchify
from sparkme.sparse.grid import Grid
from sparkme.sparse.map import SparseMap


class ZeroedSparK(SparK):
    """Hidden pixels at zero instead of sparse convolutions.

    The encoder computes on every pixel, and its norms take their statistics over every pixel. Behind it all is as in `SparK`:
    what it gives at hidden pixels is left out, and mask tokens are there.
    """

    def encode(self, images: Tensor, grid: Grid) -> list[SparseMap]:
        everywhere = Grid(torch.ones_like(grid.active), grid.patch, grid.f_h * grid.f_w)
        maps = super().encode(images.where(grid.mask(1, torch.bool), 0), everywhere)
        return [_visible(x, grid) for x in maps]


def _visible(x: SparseMap, grid: Grid) -> SparseMap:
    """The part of a map of all pixels that is visible on a grid."""
    return x.replace(x.engine.layout.of_rows(grid.to_rows(x.dense(), x.stride), grid, x.stride))


class SingleScaleSparK(SparK):
    """The deepest map alone instead of the hierarchy: no finer map, and nothing that densifies one, is there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels = self.levels[:1]  # deepest first
        self.densify_norms, self.densify_projs = self.densify_norms[:1], self.densify_projs[:1]
        self.mask_tokens = self.mask_tokens[:1]

    def densify(self, maps: list[SparseMap]) -> dict[int, Tensor]:
        return super().densify(maps[-1:])


class LossOnAllSparK(SparK):
    """The loss is the mean over all patches instead of the hidden ones."""

    def forward(
        self,
        images: Tensor,
        active: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Mean squared error on all patches, each normalised by its own mean and deviation; the arguments are `SparK`'s."""
        prediction = self.predict(images, self.grid(images, active, generator, keep))
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        target = patchify(images, self.patch).to(dtype)
        mean, deviation = patch_statistics(target)
        return mse_loss(patchify(prediction, self.patch).to(dtype), (target - mean) / deviation)
