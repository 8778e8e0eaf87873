"""Fine-tuning for classification: one class or several labels per image."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import v2

from sparkme.data.dataset import Batch, CropDataset, create_loader, normalise
from sparkme.data.labelled import Labelled, Split, WholeImages, class_counts, find_labelled, split_digest, whole_batches
from sparkme.data.sources import Columns
from sparkme.errors import UserError
from sparkme.settings.classification import ClassificationSettings
from sparkme.training.features import best_decay, fit_linear, scale_of
from sparkme.training.finetuning import Finetuning, averaging_batch_norms, norm_of
from sparkme.training.optimizer import layer_numbers
from sparkme.training.target import Measure, create_loss, create_measure


class Classification(Finetuning):
    """Fine-tuning for classification."""

    settings: ClassificationSettings
    train_set: Labelled
    val_set: Labelled
    pictures = ("confusion.png",)

    def find_data(self, asked: ClassificationSettings) -> Split:
        split = find_labelled(
            asked.data,
            asked.labels,
            label_separator=asked.label_separator,
            val_share=asked.val_share,
            seed=asked.seed,
            root=asked.root,
            cache=asked.shard_cache,
            cache_gib=asked.shard_cache_gib,
            columns=Columns(asked.image_column, asked.label_column),
        )
        self.train_set = split.train.shots(asked.shots, asked.seed) if asked.shots is not None else split.train
        self.val_set = split.val
        self.classes = split.train.classes
        return split

    def found_in_data(self, asked: ClassificationSettings) -> dict[str, Any]:
        return {
            "input_size": asked.input_size or self.pretrained.input_size,
            "several_labels": self.train_set.has_several,
            "split_digest": split_digest(self.train_set, self.val_set),
        }

    def create_body(self, drop_path: float) -> tuple[nn.Module, str]:
        network, self.missing, taken = self.pretrained.dense(len(self.classes), drop_path=drop_path)
        freeze_auxiliary_heads(network)
        self.head = self.pretrained.head_of(network)
        return network, taken

    def layers(self) -> dict[str, int]:
        return layer_numbers(self.network, self.head)

    def check_network(self) -> None:
        settings = self.settings
        if settings.images_per_pass < 2 and norm_of(self.network) == "bn":
            raise UserError(f"--batch-size {settings.batch_size} leaves batch norm a single image; raise it")

    def prepare_weights(self) -> None:
        if self.settings.head_init == "linear":
            self._fit_head()

    def prepare_steps(self) -> None:
        settings = self.settings
        self.mix, self.criterion, self.erase = create_losses(settings, self.process.device)
        self.dataset = CropDataset(
            self.train_set.images,
            settings.size,
            min_scale=settings.crop_scale,
            seed=settings.seed,
            channels=settings.channels,
            background=settings.background,
            flip=settings.flip,
            augment=create_augment(settings.auto_augment),
            labels=self.train_set.labels,
            reduced_jpeg=settings.reduced_jpeg,
            pixels=self.pixels,
        )

    def batches(self, steps: range) -> Iterable[Batch]:
        source = self.dataset.source
        sampler = self.sampler(len(self.dataset), steps, source.blocks, source.window)
        return create_loader(
            self.dataset, sampler, workers=self.settings.workers, pin_memory=self.process.device.type == "cuda"
        )

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.images is not None and batch.labels is not None
        return batch.images, batch.labels

    def loss(self, *tensors: Tensor, generator: torch.Generator) -> Tensor:
        images, labels = tensors  # (B, C, H, W) bytes, or floats in [0, 1]; (B,) int64, or (B, labels) bool
        x = normalise(images, self.statistics)
        if self.mix is not None:
            x, labels = self.mix(x, labels)
        if self.erase is not None:
            x = self.erase(x)
        loss: Tensor = self.criterion(scores_of(self.model(x)), labels)
        return loss

    def new_measure(self) -> Measure:
        return create_measure(self.classes, self.settings.several_labels)

    def whole_images(self) -> Iterable[Any]:
        return whole_batches(
            self._whole_images(self.val_set), batch_size=64, workers=self.settings.workers, share=self.val_share()
        )

    def measure_batch(self, network: nn.Module, batch: Any, measure: Measure) -> None:
        with self.precision():
            scores = scores_of(network(normalise(batch.images.to(self.process.device), self.statistics)))
        measure.add(scores.float().cpu(), self.val_set.labels[batch.numbers])

    def in_words(self) -> dict[str, str]:
        settings = self.settings
        kind = "labels" if settings.several_labels else "classes"
        size = "x".join(map(str, settings.size))
        return {"data": class_counts(self.train_set), "network": f"{len(self.classes)} {kind}, {size} pixels"}

    def notes(self) -> dict[str, Any]:
        return {"input_size": self.settings.input_size, "several_labels": self.settings.several_labels}

    def _fit_head(self) -> None:
        """Initialises the classifier with the best linear one on the frozen features of the training images.

        A random classifier first sends random gradients through the network, which distort its features (Kumar et al., ICLR
        2022, linear probing then fine-tuning). Batch norm's running statistics are estimated before, since those of pretraining
        are of visible patches, not of whole images.
        """
        with averaging_batch_norms(self.network):
            self._run_whole_images()
        layer: Any = self.network.get_submodule(self.head)
        is_pointwise = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
        if type(layer) is not nn.Linear and not is_pointwise:
            print(f"note: the classifier starts at random, since {type(layer).__name__} is not a linear layer", file=sys.stderr)
            return
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().cpu()))
        try:
            labels = self._run_whole_images()
        finally:
            handle.remove()
        x = torch.cat(inputs).flatten(1)
        mean, std = scale_of(x)
        x = (x - mean) / std
        linear = fit_linear(x, labels, best_decay(x, labels), classes=len(self.classes))
        weight = linear.weight / std
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias - weight @ mean)

    @torch.no_grad()
    def _run_whole_images(self) -> Tensor:
        """Runs the network in its current modes on whole training images. Returns the labels of the readable ones."""
        settings, labels = self.settings, []
        images = self._whole_images(self.train_set)
        # Shuffled, since a batch of one class would have its own batch-norm statistics.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        for batch in whole_batches(images, batch_size=64, workers=settings.workers, share=order):
            if batch.images is not None and len(batch.images) > 1:
                self.network(normalise(batch.images.to(self.process.device), self.statistics))
                labels.append(self.train_set.labels[batch.numbers])
        if not labels:
            raise UserError(f"--data {settings.data}: too few of its images can be read")
        return torch.cat(labels)

    def _whole_images(self, part: Labelled) -> WholeImages:
        settings = self.settings
        return WholeImages(
            part.images, settings.size, channels=settings.channels, background=settings.background, pixels=self.pixels
        )


def scores_of(out: Any) -> Tensor:
    """The scores (B, classes) of a network's output; in training some add those of auxiliary heads."""
    scores: Tensor = out if isinstance(out, Tensor) else out[0]
    return scores


def freeze_auxiliary_heads(network: nn.Module) -> None:
    """Freezes auxiliary heads (torchvision's GoogLeNet and Inception), which the loss does not use: several processes would
    wait for their gradients."""
    for name, child in network.named_children():
        if name.lower().startswith("aux"):
            child.requires_grad_(False)


def create_augment(name: str) -> nn.Module | None:
    kinds = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
    if name == "none":
        return None
    bicubic, bilinear = (
        kinds[name](interpolation=mode) for mode in (v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR)
    )
    return ImagesOrArrays(bicubic, bilinear)


class ImagesOrArrays(nn.Module):
    """Augments Pillow images and tensors with different modules, since torchvision rotates them with other interpolations."""

    def __init__(self, of_images: nn.Module, of_arrays: nn.Module) -> None:
        super().__init__()
        self.of_images, self.of_arrays = of_images, of_arrays

    def forward(self, x: Any) -> Any:
        return self.of_arrays(x) if isinstance(x, Tensor) else self.of_images(x)


def create_losses(settings: ClassificationSettings, device: torch.device) -> tuple[Any, nn.Module, Any]:
    """timm's mixup and CutMix or None, the loss, and timm's random erasing or None."""
    mix, criterion = create_loss(settings)
    erasing = settings.random_erasing
    return mix, criterion, RandomErasing(erasing, mode="pixel", device=str(device)) if erasing else None
