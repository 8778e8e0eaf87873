"""What detection and segmentation share: a pretrained pyramid, its batch norms and its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparkme.data.annotations.loading import Decoding, WholeDataset, create_whole_loader
from sparkme.data.dataset import normalise
from sparkme.networks.pyramid import Pyramid
from sparkme.training.finetuning import Finetuning, averaging_batch_norms
from sparkme.training.optimizer import pyramid_layers

MOST_ESTIMATED = 512  # training images that batch-norm statistics are estimated on


class DenseTask(Finetuning):
    """A task that predicts something for every place of an image.

    Attributes:
        pyramid: the pretrained network.
    """

    pyramid: Pyramid

    def create_body(self, drop_path: float) -> tuple[nn.Module, str]:
        self.pyramid = self.pretrained.pyramid(drop_path=drop_path)
        return self.pyramid, ""

    def layers(self) -> dict[str, int]:
        return pyramid_layers(self.network, self.pyramid)

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.settings.channels, self.settings.background, self.pixels)

    def prepare_weights(self) -> None:
        if self.settings.batch_norm == "frozen":
            with averaging_batch_norms(self.pyramid.network):
                self._run_whole_images()

    def start_training(self) -> None:
        super().start_training()
        if self.settings.batch_norm == "frozen":
            for module in self._body().modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _body(self) -> nn.Module:
        return self.pyramid.network

    @torch.no_grad()
    def _run_whole_images(self) -> None:
        """Runs the pretrained network on whole training images, for the statistics of its batch norms."""
        for batch in self.loader_of(self.train_set, range(min(len(self.train_set), MOST_ESTIMATED))):
            for image in batch.images or ():
                self.pyramid.maps(self._as_input(image))

    def _as_input(self, image: Tensor) -> Tensor:
        return normalise(image[None].to(self.process.device), self.statistics)

    def whole_dataset(self, part: Any) -> WholeDataset:
        """Whole images as the network takes them."""
        raise NotImplementedError

    def loader_of(self, part: Any, numbers: range) -> Any:
        """Whole images in batches."""
        settings = self.settings
        return create_whole_loader(
            self.whole_dataset(part), batch_size=settings.images_per_pass, workers=settings.workers, share=numbers
        )

    def whole_images(self) -> Iterator[Any]:
        yield from self.loader_of(self.val_set, self.val_share())
