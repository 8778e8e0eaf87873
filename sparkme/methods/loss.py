"""What the network learns: to paint hidden patches, each normalised by its own mean and deviation."""

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
    """Guesses mean and deviation of hidden patches from the visible ones, with no look at hidden pixels.

    Each is the average of those of the image's visible patches, weighted by 1 / squared distance between the centres (Shepard,
    *A two-dimensional interpolation function for irregularly-spaced data*, 1968): near patches are the likelier ones to be
    alike, and one that lies alone still gets the average of all.

    Args:
        images: (B, C, H, W).
        grid: the batch's grid.

    Returns:
        Both (B, L, 1, 1), of which the hidden patches are meant.
    """
    mean, deviation = patch_statistics(take_patches(patchify(images, grid.patch), grid.visible))
    numbers = torch.arange(grid.f_h * grid.f_w, device=images.device)
    places = torch.stack((numbers // grid.f_w, numbers % grid.f_w), dim=1)
    offsets = places.unsqueeze(1) - places[grid.visible].unsqueeze(1)  # (B, L, keep, 2)
    weight = 1 / offsets.square().sum(3).clamp_min(1).to(images.dtype)
    weight = weight / weight.sum(2, keepdim=True)
    # Not a matrix product, which autocast would round to bf16.
    averages = [(weight * value.flatten(1).unsqueeze(1)).sum(2).view(grid.batch, -1, 1, 1) for value in (mean, deviation)]
    return averages[0], averages[1]


def hidden_patches(dense: Tensor, grid: Grid) -> Tensor:
    """Copies the hidden patches, and nothing else, of (B, C, H, W): to (B, L, C, p * p)."""
    blocks = dense.unflatten(3, (grid.f_w, grid.patch)).unflatten(2, (grid.f_h, grid.patch))
    sample = torch.arange(grid.batch, device=dense.device).view(-1, 1)
    return blocks[sample, :, grid.hidden // grid.f_w, :, grid.hidden % grid.f_w].flatten(3)


def hidden_patch_loss(prediction: Tensor, images: Tensor, grid: Grid, *, normalise: bool = True) -> Tensor:
    """Mean squared error on hidden patches between the prediction and the normalised image (spark.py:113-120).

    Only hidden patches are gathered and compared, in float32 or better.

    Args:
        prediction: (B, C, H, W), in units of each patch's deviation.
        images: (B, C, H, W).
        grid: the batch's grid; its mask says which patches are hidden.
        normalise: whether the image's patches are; else the prediction is in the image's own units.

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
