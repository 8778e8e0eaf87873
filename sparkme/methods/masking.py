"""Random masks: the patches of an image that the encoder sees."""

import torch
from torch import Tensor


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """The number of visible patches, `round(num_patches * (1 - mask_ratio))`, as in SparK (spark.py:29).

    Raises:
        ValueError: the ratio is outside [0, 1], or leaves no patch visible.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask ratio {mask_ratio} is outside [0, 1]")
    keep = round(num_patches * (1 - mask_ratio))
    if keep == 0:
        raise ValueError(f"mask ratio {mask_ratio} leaves none of {num_patches} patches visible; lower it")
    return keep


def random_active(
    batch: int,
    size: tuple[int, int],
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws the same number of visible patches for each image, uniformly and without replacement. Does not wait for the device.

    Args:
        batch: number of images B.
        size: number of patches, (f_h, f_w).
        mask_ratio: share of hidden patches, in [0, 1]; at least one patch must stay visible.
        generator: random generator, on its own device; the default one of `device` if None.
        device: device of the result.

    Returns:
        (B, 1, f_h, f_w) bool, True = visible.

    Raises:
        ValueError: the ratio leaves no patch visible.
    """
    f_h, f_w = size
    keep = num_visible(f_h * f_w, mask_ratio)
    noise = torch.rand(batch, f_h * f_w, generator=generator, device=generator.device if generator else device)
    visible = noise.argsort(dim=1)[:, :keep]
    active = torch.zeros(batch, f_h * f_w, dtype=torch.bool, device=noise.device).scatter_(1, visible, True)
    return active.view(batch, 1, f_h, f_w).to(device if device is not None else noise.device)
