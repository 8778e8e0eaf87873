"""SparK with a contrastive term, for small sets: crops of the same image shall have similar features.

A batch has two crops of each image, each with its own mask. Besides SparK's loss there is SimCLR's (Chen et al., ICML 2020,
equation 1), of the mean of the visible pixels of the last map behind a small head. Masked and contrastive learning were joined
before (CMAE, Huang et al., 2023). Here the encoder computes on the visible pixels of both crops alone: with a mask ratio of 0.6
that is four fifths of one whole image.

Colours stay as they are, where SimCLR changes them at random: for drawn images they tell much.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.methods.loss import hidden_patch_loss
from sparkme.methods.spark import SparK
from sparkme.sparse.batch_norm import add_up
from sparkme.sparse.encoder import SparseEncoder

WEIGHT = 0.2  # of the contrastive term; 0.5 and 1 were tried, see benchmarks/results/contrastive.json
TEMPERATURE = 0.2  # others were not tried
EMBEDDING = 128  # channels of the head's output, as SimCLR's


class ContrastiveSparK(SparK):
    """SparK, and a head for the contrastive term.

    Images 2 i and 2 i + 1 of a batch are crops of one image; the others of the batch, of all processes, are the negatives.
    """

    poor_loss = None  # it depends on the batch size
    loss_name = "loss on hidden patches, and contrastive term"

    def __init__(self, encoder: SparseEncoder, **settings: Any) -> None:
        super().__init__(encoder, **settings)
        width = encoder.channels[-1]
        self.head = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, EMBEDDING)
        )

    def forward(
        self,
        images: Tensor,
        active: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """SparK's loss plus the weighted contrastive term; the arguments are `SparK`'s.

        Raises:
            ValueError: an odd number of images.
        """
        if len(images) % 2:
            raise ValueError(f"{len(images)} images are no pairs of crops; use an even number")
        grid = self.grid(images, active, generator, keep)
        maps = self.encode(images, grid)
        last = maps[-1]
        pooled = last.rows.view(len(images), -1, last.channels).mean(1)  # rows of an image follow each other
        contrast = contrastive_loss(gathered(self.head(pooled)), TEMPERATURE)
        return hidden_patch_loss(self.decode(maps), images, grid) + WEIGHT * contrast


def contrastive_loss(embedded: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of embeddings (2 N, C), in which 2 i and 2 i + 1 belong together.

    It is the cross entropy of finding each one's partner among the 2 N - 1 others by cosine / temperature; float32 at least.
    """
    directions = F.normalize(embedded.to(torch.promote_types(embedded.dtype, torch.float32)), dim=1)
    similarity = directions @ directions.t() / temperature
    numbers = torch.arange(len(embedded), device=embedded.device)
    itself = numbers[:, None] == numbers
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), numbers ^ 1)


def gathered(embedded: Tensor) -> Tensor:
    """The embeddings (B, C) of all processes, (processes * B, C). Gradients are those of the sum of the processes' losses."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return embedded
    of_all = embedded.new_zeros(dist.get_world_size(), *embedded.shape)
    of_all = of_all.index_copy(0, torch.tensor([dist.get_rank()], device=embedded.device), embedded.unsqueeze(0))
    return add_up(of_all).flatten(0, 1)
