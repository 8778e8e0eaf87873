"""Pictures of what the network makes of hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.utils import make_grid

from sparkme.data.dataset import Statistics, denormalise
from sparkme.masked import MaskedAutoencoder


def reconstruction_panel(
    model: MaskedAutoencoder, images: Tensor, active: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """Draws original, masked and reconstructed images side by side, one row per image.

    Args:
        model: put into eval mode for the pictures and back into its own afterwards.
        images: (B, C, H, W), normalised. One channel is drawn in grey, more than three as their mean.
        active: (B, 1, f_h, f_w) bool, True = visible.
        statistics: what the images were normalised by; ImageNet's if None.

    Returns:
        (3, height, width) float32 in [0, 1], on the CPU.
    """
    was_training = model.training
    model.eval()
    _, painted = model.reconstruct(images, active)
    model.train(was_training)
    visible = model.grid(images, active).mask(1, torch.float32).cpu()
    statistics = statistics or Statistics()
    original, reconstruction = (denormalise(x.float(), statistics).cpu() for x in (images, painted))
    if images.shape[1] != 3:
        original, reconstruction = (x.mean(1, keepdim=True).expand(-1, 3, -1, -1) for x in (original, reconstruction))
    masked = original * visible + 0.5 * (1 - visible)
    return make_grid(torch.stack((original, masked, reconstruction), dim=1).flatten(0, 1), nrow=3, padding=4, pad_value=1.0)
