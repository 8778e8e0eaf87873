"""What the network learns: to paint hidden patches, each normalised by its own mean and deviation."""

import torch
from torch import Tensor

from sparkme.grid import Grid, patchify, take_patches

EPS = 1e-6  # added to the variance of a patch (spark.py:115)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch of (B, L, A, C), over A and C; both (B, L, 1, 1)."""
    variance, mean = torch.var_mean(patches, dim=(2, 3), keepdim=True)
    return mean, (variance + EPS).sqrt()


def hidden_patch_loss(prediction: Tensor, images: Tensor, grid: Grid) -> Tensor:
    """Mean squared error on hidden patches between the prediction and the normalised image (spark.py:113-120).

    Only hidden patches are gathered and compared, in float32 or better.

    Args:
        prediction: (B, C, H, W), in units of each patch's deviation.
        images: (B, C, H, W).
        grid: the batch's grid; its mask says which patches are hidden.

    Returns:
        Scalar.

    Raises:
        ValueError: no patch is hidden.
    """
    if grid.keep == grid.f_h * grid.f_w:
        raise ValueError("no patch is hidden, so there is nothing to reconstruct; raise the mask ratio")
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    target = take_patches(patchify(images.to(dtype), grid.patch), grid.hidden)
    predicted = take_patches(patchify(prediction, grid.patch), grid.hidden).to(dtype)
    mean, deviation = patch_statistics(target)
    return torch.nn.functional.mse_loss(predicted, (target - mean) / deviation)
