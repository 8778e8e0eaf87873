"""What detection and segmentation share: a pretrained pyramid, its batch norms and its layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from sparkme.data.annotations.loading import Decoding, WholeDataset, create_whole_loader
from sparkme.data.dataset import normalise
from sparkme.errors import UserError
from sparkme.files import replaced_when_whole
from sparkme.networks.pyramid import Pyramid
from sparkme.reporting.predictions import choose, contact_sheet
from sparkme.training.finetuning import Finetuning, averaging_batch_norms, norm_of
from sparkme.training.optimizer import pyramid_layers
from sparkme.training.target import Measure

NUM_DRAWN = 6  # images of each sheet of predictions
MOST_ESTIMATED = 512  # training images that batch-norm statistics are estimated on


class DenseTask(Finetuning):
    """A task that predicts something for every place of an image.

    Attributes:
        pyramid: the pretrained network.
        columns: titles of the pictures of an image.
        figure: name of the figure of an image.
    """

    pyramid: Pyramid
    columns: ClassVar[tuple[str, ...]]
    figure: ClassVar[str]

    def create_body(self, drop_path: float) -> tuple[nn.Module, str]:
        self.pyramid = self.pretrained.pyramid(drop_path=drop_path)
        return self.pyramid, ""

    def layers(self) -> dict[str, int]:
        return pyramid_layers(self.network, self.pyramid)

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.settings.channels, self.settings.background, self.pixels)

    def check_network(self) -> None:
        settings, stride = self.settings, self.pyramid.strides[-1]
        together, (height, width), whole = settings.batch_size // settings.accumulate, *self.smallest_sizes()
        text = f"leaves batch norms a single value of each channel in the map at stride {stride}"
        if norm_of(self.network) == "bn" and together * -(-height // stride) * -(-width // stride) < 2:
            raise UserError(f"a single image of {width} x {height} pixels {text}; take larger ones, or two in each pass")
        if norm_of(self._body()) == "bn" and settings.batch_norm == "frozen" and whole <= stride:
            raise UserError(f"--batch-norm frozen estimates statistics on whole images; a side of {whole} pixels {text}")

    @abstractmethod
    def smallest_sizes(self) -> tuple[tuple[int, int], int]:
        """Height and width of the smallest image in training, and the shorter side of whole images."""

    def prepare_weights(self) -> None:
        if self.settings.batch_norm == "frozen" and norm_of(self._body()) == "bn":
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
                self.pyramid.maps(self.as_input(image))

    def as_input(self, image: Tensor) -> Tensor:
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

    def draw(self, network: nn.Module, measure: Measure) -> None:
        """Draws the best and the worst images and a fixed sample into predictions-*.png."""
        figures = self.figures(measure)
        for name, numbers in choose(figures, NUM_DRAWN).items():
            rows = [self.picture(network, measure, number) for number in numbers]
            if rows:
                captions = [self._caption(number, figures[number]) for number in numbers]
                sheet = contact_sheet(rows, self.columns, captions, self.legend(numbers))
                with replaced_when_whole(self.folder.path / f"predictions-{name}.png") as temporary:
                    sheet.save(temporary, format="png")

    def _caption(self, number: int, figure: float | None) -> str:
        name = self.val_set.images.name(number).rpartition("/")[2]
        return name if figure is None else f"{name}: {self.figure} {100 * figure:.0f} %"

    @abstractmethod
    def figures(self, measure: Any) -> dict[int, float | None]:
        """A figure of each measured image, from 0 to 1, by its number."""

    @abstractmethod
    def picture(self, network: nn.Module, measure: Measure, number: int) -> list[Image.Image]:
        """A row of a sheet, a picture for each of `columns`: a validation image, what is true and what is predicted."""

    def legend(self, numbers: Sequence[int]) -> list[tuple[str, tuple[int, int, int]]]:
        """Classes and colours below a sheet."""
        return []

    def whole_picture(self, number: int) -> Image.Image | Tensor:
        """A validation image in its own size: Pillow's, or (C, H, W) uint8."""
        image = self.val_set.load(number, *self.decoding)
        return (image * 255).round().byte() if isinstance(image, Tensor) else image

    def whole_images(self) -> Iterator[Any]:
        yield from self.loader_of(self.val_set, self.val_share())
