"""Runs a step's forward and backward pass from a CUDA graph, for GPUs that wait for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparkme.methods.base import MaskedAutoencoder


class GraphedLoss(nn.Module):
    """The loss of a network in training mode, from a CUDA graph.

    Forward and backward pass are captured once, for one batch size, and replayed with the same kernels on the same memory. So
    gradients cannot accumulate over several passes. Random numbers (drop path) are new in every pass. In eval mode the network
    runs normally. During capture no other thread may call CUDA.

    Args:
        network: on a GPU, in training mode, on an engine that does not wait for the device (not `minkowski`).
        images: (B, C, H, W) of the training size, with any values.
        precision: autocast dtype, bfloat16; None for no autocast.
    """

    def __init__(self, network: MaskedAutoencoder, images: Tensor, precision: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        active = network.random_active(len(images), device=images.device)
        with unchanged(network), torch.autocast("cuda", precision, enabled=precision is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(self, (images, active), allow_unused_input=True)

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """The mean loss (scalar); `active` is (B, 1, f_h, f_w) bool with `network.keep` visible patches per image."""
        loss: Tensor = self.network(images, active, keep=self.network.keep)
        return loss


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Restores buffers, such as running statistics, and the GPU's random state."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    random = torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.cuda.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
