"""A run of `sparkme.finetune`, from its settings to its weights and measurements, whatever its task.

A task derives a class from `Finetuning`: what its data, a batch, the loss and the measure are.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparkme.data.dataset import EpochSampler, pixels_of
from sparkme.data.limits import limit_pixels
from sparkme.data.planes import Pixels
from sparkme.data.sources import ImageSource
from sparkme.errors import CannotWrite, UserError
from sparkme.files import replaced_when_whole
from sparkme.settings.finetune import FinetuneSettings, resolve
from sparkme.settings.shared import checked_range
from sparkme.state_dict import state_dict_of, torchs_state_dict
from sparkme.training.device import prepare_device
from sparkme.training.distributed import Process, distribute, find_pixels_together
from sparkme.training.folder import RunFolder, check_same_run
from sparkme.training.log import RunLog
from sparkme.training.loop import Training
from sparkme.training.optimizer import create_finetuning_optimizer, learning_rate
from sparkme.training.target import Measure
from sparkme.weights.files import write_state_dict
from sparkme.weights.prefixes import Choice, shortened
from sparkme.weights.pretrained import Pretrained, read_pretrained


class Part(Protocol):
    """The training or the validation images of a task."""

    images: ImageSource

    def __len__(self) -> int: ...


class Found(Protocol):
    """The data of a task."""

    @property
    def note(self) -> str: ...

    @property
    def remarks(self) -> Sequence[str]: ...


class WholeBatch(Protocol):
    """Whole images of a loader, or none if no image of the batch can be read."""

    images: Any
    unreadable: tuple[str, ...]


class Finetuning(Training):
    """One fine-tuning run.

    Args:
        asked: the user's settings.
        process: this process.

    Attributes:
        pictures: patterns of the pictures in the run folder.
        classes: their names.
        statistics: mean and standard deviation of the images.
        pixels: conversion of pixel values.
        missing: names of the weights that are not pretrained, without the task's own.

    Raises:
        UserError, ValueError: the settings or the data do not work; says what to change.
    """

    settings: Any  # the task's
    loss_name = "training loss"
    pictures: ClassVar[tuple[str, ...]] = ()
    classes: list[str]
    train_set: Any
    val_set: Any
    missing: Sequence[str] = ()

    def __init__(self, asked: Any, process: Process) -> None:
        prepare_device(process.device, tf32=asked.tf32)
        limit_pixels(asked.max_pixels)
        self.process = process
        self.pretrained = pretrained = find_weights(asked)
        self.folder = folder = RunFolder(asked.run_folder(pretrained.model), asked, process)
        saved = folder.saved_as(type(asked))
        self.statistics = pretrained.statistics
        data = self.find_data(asked)
        self.pixels, self.seen = self._find_pixels(asked, saved)
        network, reason, taken = self._create_network(asked, saved)
        settings = self.settings
        self.network = network.to(process.device)
        self.check_network()
        if folder.saved is None:
            self.prepare_weights()
        self.optimizer = create_finetuning_optimizer(
            settings.optimizer, self.network, self.layers(), layer_decay=settings.layer_decay
        )
        self.clip_norm = settings.clip_grad or None
        self.average = create_average(self.network, settings.ema_decay, warmup=settings.ema_warmup)
        self.steps_per_epoch = len(self.train_set) // settings.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.best: dict[str, float] = {}
        self.unreadable: set[str] = set()  # validation images
        self.resume()
        self.network, self.model = distribute(self.network, process)
        self.prepare_steps()
        if process.is_main:
            folder.prepare(settings, pictures=(*self.pictures, "best.safetensors", "results.json"))
            self._introduce(data, reason, taken)

    # What a task is.

    @abstractmethod
    def find_data(self, asked: Any) -> Found:
        """Finds the images and what is known about them: sets `train_set`, `val_set` and `classes`."""

    @abstractmethod
    def found_in_data(self, asked: Any) -> dict[str, Any]:
        """The settings that follow from the data."""

    @abstractmethod
    def create_body(self, drop_path: float) -> tuple[nn.Module, str]:
        """The pretrained network and a line about its weights; sets `missing`. Raises ValueError if it has no drop path."""

    def with_head(self, body: nn.Module) -> nn.Module:
        """The network to train, once the settings are known."""
        return body

    def check_network(self) -> None:
        """Raises UserError if the network cannot be trained with these settings."""

    def prepare_weights(self) -> None:
        """Prepares the weights of a new run, before its first step."""

    @abstractmethod
    def layers(self) -> dict[str, int]:
        """The layer of every parameter for layer-wise learning rates, from 0 at the input."""

    @abstractmethod
    def prepare_steps(self) -> None:
        """Makes what steps need, such as the data set and the loss; the network is on the device."""

    @abstractmethod
    def new_measure(self) -> Measure: ...

    @abstractmethod
    def whole_images(self) -> Iterable[Any]:
        """This process's validation images in batches; each has `images`, None if none can be read, and `unreadable`."""

    @abstractmethod
    def measure_batch(self, network: nn.Module, batch: Any, measure: Measure) -> None:
        """Adds the network's results of a batch, in eval mode and without gradients."""

    def draw(self, network: nn.Module, measure: Any) -> None:
        """Draws pictures of the predictions of the best weights so far into the run folder, in the first process."""

    @abstractmethod
    def in_words(self) -> dict[str, str]:
        """The lines about `data` (the classes) and `network` that a run starts with."""

    def notes(self) -> dict[str, Any]:
        """What the file of weights keeps, besides what every task has."""
        return {}

    # What the tasks share.

    def _find_pixels(self, asked: FinetuneSettings, saved: FinetuneSettings | None) -> tuple[Pixels, str]:
        pretrained = self.pretrained
        return find_pixels_together(
            self.process,
            self.train_set.images,
            pretrained.channels,
            pretrained.background,
            known=pixels_of(saved) if saved else pretrained.pixels,
            given=checked_range(asked.value_range),
            upright=asked.upright,
        )

    def _create_network(self, asked: FinetuneSettings, saved: FinetuneSettings | None) -> tuple[nn.Module, str, str]:
        """The network with its initial weights, the reason for the recipe, and a line about the weights."""
        torch.manual_seed(asked.seed)
        body, taken = self.create_body(0.0)
        informed = self._with_found(asked)
        recipe = informed.choose_recipe(norm_of(body))
        self.settings, reason = resolve(informed, recipe, self.process.machine, saved), recipe.source
        if self.folder.saved_config is not None:
            check_same_run(self.folder.saved_config, self.settings, self.folder.newest)
        if self.settings.drop_path:
            torch.manual_seed(asked.seed)
            try:
                body, taken = self.create_body(self.settings.drop_path)
            except ValueError:  # the network has none
                if asked.drop_path is not None:
                    raise
                self.settings = replace(self.settings, drop_path=0.0)
                reason += f"; no drop path, which {self.pretrained.model} does not support"
        return self.with_head(body), reason, taken

    def _with_found(self, asked: FinetuneSettings) -> FinetuneSettings:
        """Fills in what the images are, and what the weights expect of them."""
        pretrained = self.pretrained
        return replace(
            asked,
            model=pretrained.model,
            num_train_images=len(self.train_set),
            num_val_images=len(self.val_set),
            num_classes=len(self.classes),
            channels=pretrained.channels,
            mean=pretrained.statistics.mean,
            std=pretrained.statistics.std,
            background=pretrained.background,
            value_range=self.pixels.ranges,
            upright=self.pixels.upright,
            **self.found_in_data(asked),
        )

    def sampler(self, num_images: int, steps: range, blocks: Tensor | None = None, window: int = 1) -> EpochSampler:
        """This process's draws of these steps."""
        settings, process = self.settings, self.process
        repeats = getattr(settings, "repeats", 1)
        batch, seed = settings.batch_size, settings.seed
        return EpochSampler(num_images, num_images, batch, seed, steps, process.rank, process.world, repeats, blocks, window)

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
        measure, kept = self._measure(self.network), self.network
        averaged = self._measure(self.average.module) if self.average is not None else None
        if not log:
            return
        found = measure.values()
        values, text = {f"val_{name}": value for name, value in found.items()}, measure.describe(found)
        if self.average is not None and averaged is not None:
            measure, kept = averaged, self.average.module
            found = measure.values()
            values |= {f"val_{name}_average": value for name, value in found.items()}
            text += f"; running average {100 * found[measure.best]:.1f} %"
        log.measured(self.step, epoch, values, text)
        is_best = not self.best or found[measure.best] > self.best[measure.best]
        if is_best:
            before, self.best = self.best, {measure.best: found[measure.best], "epoch": epoch}
            try:
                self._write_weights(kept)
            except CannotWrite:  # a full disk: the file still has the earlier weights
                self.best = before
                raise
        self._write_results(values, epoch, measure)
        if is_best:
            self.draw(kept, measure)

    @torch.no_grad()
    def _measure(self, network: nn.Module) -> Measure:
        """Validates a network; the processes share the images, and the first has all results."""
        process, measure = self.process, self.new_measure()
        network.eval()
        process.share_buffers(network)
        for batch in self.whole_images():
            for problem in batch.unreadable:
                if problem not in self.unreadable:
                    print(f"skipped unreadable validation image {problem}", file=sys.stderr, flush=True)
            self.unreadable.update(batch.unreadable)
            if batch.images is not None:
                self.measure_batch(network, batch, measure)
        measure, *others = process.gather(measure)
        for other in others:
            measure.merge(other)
        if process.is_main:
            measure.check()
        return measure

    def val_share(self) -> range:
        """The numbers of this process's validation images."""
        return range(self.process.rank, len(self.val_set), self.process.world)

    def _write_weights(self, network: nn.Module) -> None:
        settings = self.settings
        state = {name: value for name, value in state_dict_of(network).items() if isinstance(value, Tensor)}
        notes = {
            "format": "pt",
            "task": settings.task,
            "network": settings.model,
            "num_classes": str(len(self.classes)),
            "classes": json.dumps(self.classes),
            "channels": str(settings.channels),
            "mean": json.dumps(settings.mean),
            "std": json.dumps(settings.std),
            "background": settings.background,
            "value_range": json.dumps(settings.value_range),
            "upright": json.dumps(settings.upright),
            "precision": settings.precision,
            **{name: json.dumps(value) for name, value in self.notes().items()},
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
        best = f"best epoch: {self.new_measure().describe(self.best)} after epoch {self.best['epoch']}"
        drawn = [folder / "loss.png", *sorted(path for pattern in self.pictures for path in folder.glob(pattern))]
        return f"{best}, {folder / 'best.safetensors'}\npictures: {', '.join(map(str, drawn))}"

    def _introduce(self, data: Found, reason: str, taken: str) -> None:
        """Prints the settings, with the reasons for automatic choices."""
        settings, process, words = self.settings, self.process, self.in_words()
        threads = f", threads: {torch.get_num_threads()}" if process.device.type == "cpu" else ""
        shots = f"; --shots {settings.shots} of each class" if settings.shots else ""
        new = f"; {len(self.missing)} new: {shortened([*self.missing])}" if self.missing else ""
        lines = {
            "data": f"{data.note}{shots}; {words['data']}",
            "images": self.seen,
            "weights": f"{self.pretrained.origin}{', ' if taken else ''}{taken}{new}",
            "network": f"{settings.model}, {words['network']}",
            "recipe": reason,
            "training": f"{settings.epochs} epochs of {self.steps_per_epoch} steps, batch {settings.batch_size}, "
            f"{settings.optimizer}, peak learning rate {settings.peak_rate:.2g}, layer decay {settings.layer_decay:g}",
            "machine": f"{process.world} x {process.device.type}{threads}, {settings.precision}",
            "output": f"{self.folder.path}" + (f", resumed after step {self.step}" if self.folder.saved else ""),
        }
        for name, text in lines.items():
            print(f"{name:9s} {text}")
        for remark in data.remarks:
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


def create_average(network: nn.Module, decay: float, *, warmup: bool) -> Any:
    """timm's running average of the weights, or None; with `warmup` it forgets early steps faster."""
    return ModelEmaV3(network, decay=decay, use_warmup=warmup) if decay else None
