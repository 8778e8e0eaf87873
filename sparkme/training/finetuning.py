"""A run of `sparkme.finetune`, from its settings to its weights and measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms import v2

from sparkme.data.dataset import Batch, CropDataset, EpochSampler, create_loader, normalise, pixels_of
from sparkme.data.labelled import Labelled, Split, WholeImages, class_counts, find_labelled, split_digest, whole_batches
from sparkme.data.limits import limit_pixels
from sparkme.data.sources import Columns
from sparkme.errors import CannotWrite, UserError
from sparkme.files import replaced_when_whole
from sparkme.settings.finetune import FinetuneSettings, choose_recipe, resolve
from sparkme.settings.shared import checked_range
from sparkme.state_dict import state_dict_of, torchs_state_dict
from sparkme.training.device import prepare_device
from sparkme.training.distributed import Process, distribute, find_pixels_together, start_process
from sparkme.training.features import best_decay, fit_linear, scale_of
from sparkme.training.folder import RunFolder, check_same_run
from sparkme.training.log import RunLog
from sparkme.training.loop import Outcome, Training, run_training
from sparkme.training.optimizer import create_finetuning_optimizer, layer_numbers, learning_rate
from sparkme.training.target import Measure, create_loss, create_measure
from sparkme.weights.files import write_state_dict
from sparkme.weights.prefixes import Choice, shortened
from sparkme.weights.pretrained import Pretrained, read_pretrained


def finetune(asked: FinetuneSettings) -> Outcome:
    """Starts or continues a run."""
    process = start_process(asked.device)
    return run_training(lambda: Finetuning(asked, process), asked.hang_seconds)


class Finetuning(Training):
    """One fine-tuning run.

    Args:
        asked: the user's settings.
        process: this process.

    Raises:
        UserError, ValueError: the settings or the data do not work; says what to change.
    """

    settings: FinetuneSettings
    loss_name = "training loss"

    def __init__(self, asked: FinetuneSettings, process: Process) -> None:
        prepare_device(process.device, tf32=asked.tf32)
        limit_pixels(asked.max_pixels)
        self.process = process
        pretrained = find_weights(asked)
        self.folder = folder = RunFolder(asked.run_folder(pretrained.model), asked, process)
        saved = folder.saved_as(FinetuneSettings)
        split = self._find_data(asked, pretrained, saved)
        network, reason, taken = self._create_network(asked, pretrained, saved)
        settings = self.settings
        self.size = settings.size
        freeze_auxiliary_heads(network)
        self.network = network.to(process.device)
        self.head = pretrained.head_of(self.network)
        self._check_batch_norm()
        if settings.head_init == "linear" and folder.saved is None:
            self._fit_head()
        self.optimizer = create_finetuning_optimizer(
            settings.optimizer, self.network, layer_numbers(self.network, self.head), layer_decay=settings.layer_decay
        )
        self.clip_norm = settings.clip_grad or None
        self.average = create_average(self.network, settings.ema_decay, warmup=settings.ema_warmup)
        self.steps_per_epoch = len(self.train_set) // settings.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.best: dict[str, float] = {}
        self.unreadable: set[str] = set()  # validation images
        self.resume()
        self.network, self.model = distribute(self.network, process)
        self.mix, self.criterion, self.erase = create_losses(settings, process.device)
        self.dataset = CropDataset(
            self.train_set.images,
            self.size,
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
        if process.is_main:
            folder.prepare(settings, pictures=("confusion.png", "best.safetensors", "results.json"))
            self._introduce(pretrained, split, reason, taken)

    def _find_data(self, asked: FinetuneSettings, pretrained: Pretrained, saved: FinetuneSettings | None) -> Split:
        """Finds the images, their classes and the conversion of pixel values."""
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
        self.statistics = pretrained.statistics
        self.pixels, self.seen = find_pixels_together(
            self.process,
            self.train_set.images,
            pretrained.channels,
            pretrained.background,
            known=pixels_of(saved) if saved else pretrained.pixels,
            given=checked_range(asked.value_range),
            upright=asked.upright,
        )
        return split

    def _create_network(
        self, asked: FinetuneSettings, pretrained: Pretrained, saved: FinetuneSettings | None
    ) -> tuple[nn.Module, str, str]:
        """The network with its initial weights, the reason for the recipe, and a line about the weights."""
        torch.manual_seed(asked.seed)
        network, self.missing, taken = pretrained.dense(len(self.classes))
        informed = self._with_found(asked, pretrained)
        recipe = choose_recipe(informed, norm_of(network))
        self.settings, reason = resolve(informed, recipe, self.process.machine, saved), recipe.source
        if self.folder.saved_config is not None:
            check_same_run(self.folder.saved_config, self.settings, self.folder.newest)
        if self.settings.drop_path:
            torch.manual_seed(asked.seed)
            try:
                network, self.missing, taken = pretrained.dense(len(self.classes), drop_path=self.settings.drop_path)
            except ValueError:  # the network has none
                if asked.drop_path is not None:
                    raise
                self.settings = replace(self.settings, drop_path=0.0)
                reason += f"; no drop path, which {pretrained.model} does not support"
        return network, reason, taken

    def batches(self, steps: range) -> Iterable[Batch]:
        settings, process = self.settings, self.process
        sampler = EpochSampler(
            len(self.dataset),
            len(self.dataset),
            settings.batch_size,
            settings.seed,
            steps,
            process.rank,
            process.world,
            settings.repeats,
            self.dataset.source.blocks,
            self.dataset.source.window,
        )
        return create_loader(self.dataset, sampler, workers=settings.workers, pin_memory=process.device.type == "cuda")

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

    def rates(self, step: int) -> dict[str, float]:
        settings = self.settings
        warmup = round(settings.warmup_epochs * self.steps_per_epoch)
        rate = learning_rate(step, peak=settings.peak_rate, warmup_steps=warmup, total_steps=self.total_steps)
        return {"learning_rate": rate, "weight_decay": settings.weight_decay}

    def after_step(self) -> None:
        if self.average is not None:
            with torchs_state_dict(self.network, self.average.module):  # timm updates the average from the state dict
                self.average.update(self.network, self.step)

    def state(self) -> dict[str, Any]:
        average = {"average": state_dict_of(self.average.module)} if self.average is not None else {}
        return {**super().state(), **average, "best": self.best, "classes": self.classes}

    def load(self, saved: dict[str, Any]) -> None:
        nn.Module.load_state_dict(self.network, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            nn.Module.load_state_dict(self.average.module, saved.get("average", saved["model"]))
        if not self.best:  # with `--on-nan rollback`, best.safetensors stays
            self.best = saved["best"]

    def is_due(self, epoch: int) -> bool:
        return epoch > 0 and (epoch % self.settings.eval_epochs == 0 or epoch == self.settings.epochs)

    def report(self, epoch: int, log: RunLog | None) -> None:
        """Validates the weights and their running average, if any; saves the best, by the average if there is one."""
        found, measure = self._measure(self.network)
        values, text = {f"val_{name}": value for name, value in found.items()}, measure.describe(found)
        kept = self.network
        if self.average is not None:
            found, measure = self._measure(self.average.module)
            values |= {f"val_{name}_average": value for name, value in found.items()}
            kept = self.average.module
            text += f"; running average {100 * found[measure.best]:.1f} %"
        if not log:
            return
        log.measured(self.step, epoch, values, text)
        if not self.best or found[measure.best] > self.best[measure.best]:
            before, self.best = self.best, {measure.best: found[measure.best], "epoch": epoch}
            try:
                self._write_weights(kept)
            except CannotWrite:  # a full disk: the file still has the earlier weights
                self.best = before
                raise
        self._write_results(values, epoch, measure)

    @torch.no_grad()
    def _measure(self, network: nn.Module) -> tuple[dict[str, float], Measure]:
        """Validates a network; the processes share the images."""
        settings, process, measure = self.settings, self.process, self._new_measure()
        images = self._whole_images(self.val_set)
        share = range(process.rank, len(self.val_set), process.world)
        network.eval()
        process.share_buffers(network)
        for batch in whole_batches(images, batch_size=64, workers=settings.workers, share=share):
            for problem in batch.unreadable:
                if problem not in self.unreadable:
                    print(f"skipped unreadable validation image {problem}", file=sys.stderr, flush=True)
            self.unreadable.update(batch.unreadable)
            if batch.images is None:
                continue
            with self.precision():
                scores = scores_of(network(normalise(batch.images.to(process.device), self.statistics)))
            measure.add(scores.float().cpu(), self.val_set.labels[batch.numbers])
        measure, *others = process.gather(measure)
        for other in others:
            measure.merge(other)
        if process.is_main:
            measure.check()
        return measure.values(), measure

    def _new_measure(self) -> Measure:
        return create_measure(self.classes, self.settings.several_labels)

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
            part.images, self.size, channels=settings.channels, background=settings.background, pixels=self.pixels
        )

    def _write_weights(self, network: nn.Module) -> None:
        settings = self.settings
        state = {name: value for name, value in state_dict_of(network).items() if isinstance(value, Tensor)}
        notes = {
            "format": "pt",
            "network": settings.model,
            "num_classes": str(len(self.classes)),
            "classes": json.dumps(self.classes),
            "channels": str(settings.channels),
            "mean": json.dumps(settings.mean),
            "std": json.dumps(settings.std),
            "background": settings.background,
            "input_size": json.dumps(settings.input_size),
            "several_labels": json.dumps(settings.several_labels),
            "value_range": json.dumps(settings.value_range),
            "upright": json.dumps(settings.upright),
        } | {name: str(value) for name, value in self.best.items() if name != "epoch"}
        write_state_dict(self.folder.path / "best.safetensors", state, notes)

    def _write_results(self, values: dict[str, float], epoch: int, measure: Measure) -> None:
        results = {
            "epoch": epoch,
            "last": values,
            "best": self.best,
            "num_train": len(self.train_set),
            "num_val": measure.num_images,
            **measure.write(self.folder.path),
        }
        with replaced_when_whole(self.folder.path / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n")

    def last_words(self, checkpoint: Path) -> str:
        folder = self.folder.path
        if not self.best:
            return "no weights could be written; make room, then start again with more --epochs"
        best = f"best epoch: {self._new_measure().describe(self.best)} after epoch {self.best['epoch']}"
        pictures = [folder / "loss.png", *([] if self.settings.several_labels else [folder / "confusion.png"])]
        return f"{best}, {folder / 'best.safetensors'}\npictures: {', '.join(map(str, pictures))}"

    def _with_found(self, asked: FinetuneSettings, pretrained: Pretrained) -> FinetuneSettings:
        """Fills in what the images are, and what the weights expect of them."""
        return replace(
            asked,
            model=pretrained.model,
            num_train_images=len(self.train_set),
            num_val_images=len(self.val_set),
            num_classes=len(self.classes),
            several_labels=self.train_set.has_several,
            channels=pretrained.channels,
            mean=pretrained.statistics.mean,
            std=pretrained.statistics.std,
            background=pretrained.background,
            value_range=self.pixels.ranges,
            upright=self.pixels.upright,
            input_size=asked.input_size or pretrained.input_size or (224,),
            split_digest=split_digest(self.train_set, self.val_set),
        )

    def _check_batch_norm(self) -> None:
        settings = self.settings
        if settings.images_per_pass < 2 and norm_of(self.network) == "bn":
            raise UserError(f"--batch-size {settings.batch_size} leaves batch norm a single image; raise it")

    def _introduce(self, pretrained: Pretrained, split: Split, reason: str, taken: str) -> None:
        """Prints the settings, with the reasons for automatic choices."""
        settings, process = self.settings, self.process
        threads = f", threads: {torch.get_num_threads()}" if process.device.type == "cpu" else ""
        shots = f"; --shots {settings.shots} of each class" if settings.shots else ""
        kind = "labels" if settings.several_labels else "classes"
        new = f"; {len(self.missing)} new: {shortened(self.missing)}" if self.missing else ""
        lines = {
            "data": f"{split.note}{shots}; {class_counts(self.train_set)}",
            "images": self.seen,
            "weights": f"{pretrained.origin}{', ' if taken else ''}{taken}{new}",
            "network": f"{settings.model}, {len(self.classes)} {kind}, {'x'.join(map(str, self.size))} pixels",
            "recipe": reason,
            "training": f"{settings.epochs} epochs of {self.steps_per_epoch} steps, batch {settings.batch_size}, "
            f"{settings.optimizer}, peak learning rate {settings.peak_rate:.2g}, layer decay {settings.layer_decay:g}",
            "machine": f"{process.world} x {process.device.type}{threads}, {settings.precision}",
            "output": f"{self.folder.path}" + (f", resumed after step {self.step}" if self.folder.saved else ""),
        }
        for name, text in lines.items():
            print(f"{name:9s} {text}")
        for remark in split.remarks:
            print(f"{'note':9s} {remark}")
        self.folder.print_changes(settings)
        sys.stdout.flush()


def find_weights(asked: FinetuneSettings) -> Pretrained:
    """The initial weights of a run. Raises UserError if none are named."""
    if asked.from_scratch and (asked.weights_key or asked.adapt_stem):
        raise UserError("--weights-key and --adapt-stem are for reading weights, but --from-scratch reads none")
    if asked.weights is not None:
        found = read_pretrained(asked.weights, asked.model, Choice(asked.weights_key, asked.adapt_stem))
        return found.random() if asked.from_scratch else found
    if not asked.from_scratch:
        raise UserError("name a checkpoint or weights to start from, or pass --from-scratch --model NAME")
    if asked.model is None:
        raise UserError("--from-scratch needs --model NAME, or a checkpoint to take the network from")
    return Pretrained(asked.model, None, "random weights")


@contextmanager
def averaging_batch_norms(network: nn.Module) -> Iterator[None]:
    """Re-estimates running statistics as the mean over all forward passes inside; leaves the network in eval mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()


def norm_of(network: nn.Module) -> str:
    return "bn" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()) else "ln"


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


def create_average(network: nn.Module, decay: float, *, warmup: bool) -> Any:
    """timm's running average of the weights, or None; with `warmup` it forgets early steps faster."""
    return ModelEmaV3(network, decay=decay, use_warmup=warmup) if decay else None


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


def create_losses(settings: FinetuneSettings, device: torch.device) -> tuple[Any, nn.Module, Any]:
    """timm's mixup and CutMix or None, the loss, and timm's random erasing or None."""
    mix, criterion = create_loss(settings)
    erasing = settings.random_erasing
    return mix, criterion, RandomErasing(erasing, mode="pixel", device=str(device)) if erasing else None
