"""The base of all methods: hides patches, predicts them, and compares the prediction with the image.

A method is a subclass with `create`, `num_visible` and `predict`, and a recipe in `sparkme.settings.pretrain` that names it.
A method with another target or loss overrides `forward`. One that predicts no pixels overrides `paint`, for the pictures.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparkme.methods.loss import hidden_patch_loss, neighbour_statistics, patch_statistics
from sparkme.methods.masking import random_active
from sparkme.ops.patches import patchify, unpatchify
from sparkme.settings.pretrain import PretrainSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.grid import Grid

# Sources of the mean and deviation of a painted patch.
PATCH_STATISTICS = ("true", "predicted")


class MaskedAutoencoder(nn.Module):
    """A network that is pretrained by reconstructing hidden patches.

    Args:
        encoder: from `sparkme.sparsify`.
        input_size: side of the images, or (height, width), in pixels.
        mask_ratio: share of hidden patches.
        patch: side of a patch in pixels; the encoder's total stride if None.
        normalise_patches: whether the target is each hidden patch less its mean, over its deviation.

    Raises:
        ValueError: sizes or ratio do not fit together.

    Attributes:
        poor_loss: the loss of a network that predicts the mean of each normalised patch; None if it is unknown.
        loss_name: for the loss curve.
    """

    decoder: nn.Module
    poor_loss: ClassVar[float | None] = 1.0
    loss_name: ClassVar[str] = "loss on hidden patches"

    def __init__(
        self,
        encoder: SparseEncoder,
        input_size: int | tuple[int, int],
        mask_ratio: float,
        patch: int | None,
        *,
        normalise_patches: bool = True,
    ) -> None:
        super().__init__()
        self.patch = patch or encoder.patch
        self.normalise_patches = normalise_patches
        if self.patch % encoder.patch:
            raise ValueError(f"patch {self.patch} is not a multiple of the encoder's total stride {encoder.patch}")
        self.set_task(input_size, mask_ratio)
        self.encoder = encoder

    @classmethod
    def create(cls, encoder: SparseEncoder, settings: PretrainSettings) -> MaskedAutoencoder:
        """The network of a run's settings. Raises ValueError if a value is invalid."""
        raise NotImplementedError

    def set_task(self, input_size: int | tuple[int, int], mask_ratio: float) -> None:
        """Sets input size and mask ratio; the weights fit any. Raises ValueError if they do not fit together."""
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            rows, columns = (max(1, round(side / self.patch)) for side in (height, width))
            if rows * columns == 1:
                rows = columns = 2
            sides = f"{rows * self.patch}x{columns * self.patch}" if rows != columns else f"{rows * self.patch}"
            raise ValueError(f"input size {height}x{width} is not a multiple of the patch of {self.patch}; use {sides}")
        num_patches = (height // self.patch, width // self.patch)
        total = num_patches[0] * num_patches[1]
        if total == 1:
            raise ValueError(
                f"input size {height}x{width} is a single patch, which cannot be hidden and visible; raise the input size"
            )
        keep = self.num_visible(total, mask_ratio)
        if keep == total:
            raise ValueError(f"mask ratio {mask_ratio} hides none of {total} patches; raise it or the input size")
        self.input_size, self.mask_ratio, self.num_patches, self.keep = (height, width), mask_ratio, num_patches, keep

    def num_visible(self, num_patches: int, mask_ratio: float) -> int:
        """Number of visible patches per image."""
        raise NotImplementedError

    def predict(self, images: Tensor, grid: Grid) -> Tensor:
        """The prediction (B, C, H, W) from the visible pixels; only its hidden patches count."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        active: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Reconstruction loss of a batch.

        Args:
            images: (B, C, H, W), normalised.
            active: (B, 1, f_h, f_w) bool, True = visible; random if None.
            generator: generator of a random mask, on the images' device.
            keep: visible patches per image of a given mask, if known; else the host waits for the device to count them.

        Returns:
            Scalar: mean squared error on hidden patches.
        """
        grid = self.grid(images, active, generator, keep)
        return hidden_patch_loss(self.predict(images, grid), images, grid, normalise=self.normalise_patches)

    def random_active(self, batch: int, generator: torch.Generator | None = None, device: Any = None) -> Tensor:
        """Draws `keep` visible patches for each image: (B, 1, f_h, f_w) bool."""
        hidden = 1 - self.keep / (self.num_patches[0] * self.num_patches[1])
        return random_active(batch, self.num_patches, hidden, generator=generator, device=device)

    def grid(
        self,
        images: Tensor,
        active: Tensor | None = None,
        generator: torch.Generator | None = None,
        keep: int | None = None,
    ) -> Grid:
        """The grid of a batch, for a given or a random mask; arguments as in `forward`."""
        if images.shape[1:] != (self.encoder.in_channels, *self.input_size):
            expected = ", ".join(map(str, (self.encoder.in_channels, *self.input_size)))
            raise ValueError(f"images must be (B, {expected}), got {tuple(images.shape)}")
        if active is None:
            return Grid(self.random_active(len(images), generator, images.device), self.patch, self.keep)
        if active.shape != (len(images), 1, *self.num_patches):
            raise ValueError(f"active must be {(len(images), 1, *self.num_patches)}, got {tuple(active.shape)}")
        return Grid(active, self.patch, keep)

    def compile_parts(self) -> MaskedAutoencoder:
        """Compiles the encoder's stages and the decoder with torch.compile; the first steps then take minutes."""
        self.encoder.compile_stages()
        self.decoder.compile()
        return self

    @torch.no_grad()
    def reconstruct(self, images: Tensor, active: Tensor | None = None, *, statistics: str = "true") -> tuple[Tensor, Tensor]:
        """Masked and reconstructed images, in the module's current mode, so call `eval()` first.

        Args:
            images: (B, C, H, W), normalised.
            active: (B, 1, f_h, f_w) bool, True = visible; random if None.
            statistics: see `paint`.

        Returns:
            (masked, reconstruction), both (B, C, H, W): the image with hidden pixels at zero, and `paint` of the prediction.
        """
        grid = self.grid(images, active)
        painted = self.paint(self.predict(images, grid), images, grid, statistics=statistics)
        return images * grid.mask(1, torch.bool), painted

    @torch.no_grad()
    def paint(self, prediction: Tensor, images: Tensor, grid: Grid, *, statistics: str = "true") -> Tensor:
        """Paints a prediction into the hidden patches of the images.

        With `normalise_patches` the network does not predict mean and deviation of a patch. `statistics` says where they come
        from.

        Args:
            prediction: (B, C, H, W), from `predict`.
            images: (B, C, H, W), normalised.
            grid: the batch's grid.
            statistics: `true`: each hidden patch's own mean and deviation, as in the paper's pictures; `predicted`:
                `neighbour_statistics`, without use of hidden pixels.

        Returns:
            (B, C, H, W) in the images' dtype: visible pixels of the images, and painted ones.

        Raises:
            ValueError: `statistics` is neither, or is `predicted` without `normalise_patches`.
        """
        if statistics not in PATCH_STATISTICS:
            raise ValueError(f"statistics {statistics!r} must be one of {', '.join(PATCH_STATISTICS)}")
        painted = prediction.to(images.dtype)
        if self.normalise_patches:
            patches = patchify(painted, self.patch)
            predicted = statistics == "predicted"
            mean, deviation = (
                neighbour_statistics(images, grid) if predicted else patch_statistics(patchify(images, self.patch))
            )
            painted = unpatchify(patches * deviation + mean, (grid.f_h, grid.f_w))
        elif statistics == "predicted":
            raise ValueError("statistics='predicted' does not apply: this network predicts mean and deviation, too")
        return torch.where(grid.mask(1, torch.bool), images, painted)
