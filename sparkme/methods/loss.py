"""The reconstruction loss on hidden patches, each normalised by its own mean and deviation."""

import torch
from torch import Tensor

from sparkme.ops.patches import patchify, take_patches
from sparkme.sparse.grid import Grid

EPS = 1e-6  # added to the variance of a patch (spark.py:115)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch of (B, L, ., .); both (B, L, 1, 1)."""
    variance, mean = torch.var_mean(patches, dim=(2, 3), keepdim=True)
    return mean, (variance + EPS).sqrt()


def neighbour_statistics(images: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Estimates mean and deviation of hidden patches from visible ones, without use of hidden pixels.

    Each is a weighted average over the image's visible patches, with weights 1 / squared distance between centres (Shepard, *A
    two-dimensional interpolation function for irregularly-spaced data*, 1968), since patches close by are more likely alike.

    Args:
        images: (B, C, H, W).
        grid: the batch's grid.

    Returns:
        Both (B, L, 1, 1); only the values of hidden patches count.
    """
    mean, deviation = patch_statistics(take_patches(patchify(images, grid.patch), grid.visible))
    numbers = torch.arange(grid.f_h * grid.f_w, device=images.device)
    places = torch.stack((numbers // grid.f_w, numbers % grid.f_w), dim=1)
    offsets = places.unsqueeze(1) - places[grid.visible].unsqueeze(1)  # (B, L, keep, 2)
    weight = 1 / offsets.square().sum(3).clamp_min(1).to(images.dtype)
    weight = weight / weight.sum(2, keepdim=True)
    # No matrix product: autocast would round it to bf16.
    averages = [(weight * value.flatten(1).unsqueeze(1)).sum(2).view(grid.batch, -1, 1, 1) for value in (mean, deviation)]
    return averages[0], averages[1]


def hidden_patches(dense: Tensor, grid: Grid) -> Tensor:
    """Copies only the hidden patches of (B, C, H, W), as (B, L, C, p * p)."""
    blocks = dense.unflatten(3, (grid.f_w, grid.patch)).unflatten(2, (grid.f_h, grid.patch))
    sample = torch.arange(grid.batch, device=dense.device).view(-1, 1)
    return blocks[sample, :, grid.hidden // grid.f_w, :, grid.hidden % grid.f_w].flatten(3)


def hidden_patch_loss(prediction: Tensor, images: Tensor, grid: Grid, *, normalise: bool = True) -> Tensor:
    """Mean squared error on hidden patches between the prediction and the normalised image (spark.py:113-120).

    Only hidden patches are gathered and compared, in float32 or better.

    Args:
        prediction: (B, C, H, W), in units of each patch's deviation with `normalise`, else of the images.
        images: (B, C, H, W).
        grid: the batch's grid.
        normalise: whether to normalise the image's patches.

    Returns:
        Scalar.

    Raises:
        ValueError: no patch is hidden.
    """
    if grid.keep == grid.f_h * grid.f_w:
        raise ValueError("no patch is hidden, so there is nothing to reconstruct; raise the mask ratio")
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    target = hidden_patches(images, grid).to(dtype)
    predicted = hidden_patches(prediction, grid).to(dtype)
    if not normalise:
        return torch.nn.functional.mse_loss(predicted, target)
    mean, deviation = patch_statistics(target)
    return torch.nn.functional.mse_loss(predicted, (target - mean) / deviation)
