"""A step's forward and backward pass in a CUDA graph: queued at once, where the host would take longer than the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparkme.methods.base import MaskedAutoencoder


class GraphedLoss(nn.Module):
    """The loss of a training network for masks that hide the same number of patches in every image, from a CUDA graph.

    The passes are captured once, for one size of batch, and replayed: the same kernels on the same memory, so every pass is
    over before the next begins, and gradients are not added up over several. Random numbers (drop path) are torch's own and new
    in every pass. In eval mode the network runs as it is. While it is made, no other thread may call CUDA.

    Args:
        network: on a GPU, in training mode, on an engine that does not wait for the device (not `minkowski`).
        images: (B, C, H, W) of the size that will be trained on; their values are of no account.
        precision: of autocast, bfloat16; None for none.
    """

    def __init__(self, network: MaskedAutoencoder, images: Tensor, precision: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        active = network.random_active(len(images), device=images.device)
        with unchanged(network), torch.autocast("cuda", precision, enabled=precision is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(self, (images, active), allow_unused_input=True)

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """The mean loss, scalar; `active` is (B, 1, f_h, f_w) bool, of which `network.keep` are visible in every image."""
        loss: Tensor = self.network(images, active, keep=self.network.keep)
        return loss


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Puts buffers, such as running statistics, and the GPU's random numbers back to what they were."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    random = torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.cuda.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
