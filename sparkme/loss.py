"""What the network learns: to paint hidden patches, each normalised by its own mean and deviation."""

import torch
from torch import Tensor

from sparkme.grid import Grid

EPS = 1e-6  # added to the variance of a patch (spark.py:115)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch of (B, L, ., .); both (B, L, 1, 1)."""
    variance, mean = torch.var_mean(patches, dim=(2, 3), keepdim=True)
    return mean, (variance + EPS).sqrt()


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
