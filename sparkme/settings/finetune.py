"""The settings of `sparkme.finetune` that its tasks share, and how their defaults are chosen.

Each task has a module with a class of its own: `classification`, `detection` and `segmentation`.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from sparkme.errors import UserError
from sparkme.settings.declare import check, filled, found, in_images, in_network, in_optimisation, in_output, setting, varied
from sparkme.settings.shared import (
    Machine,
    PixelSettings,
    TrainingSettings,
    WeightSettings,
    check_batch,
    check_warmup,
    check_workers,
    default_workers,
    with_precision,
)

TASKS = ("classification", "detection", "segmentation")
GROUPS = ("data", "images", "network", "optimisation", "machine", "output")


@dataclass(frozen=True)
class FinetuneRecipe:
    """Defaults of settings.

    Attributes:
        name: `paper` or `small`.
        source: where the values come from and why this recipe was chosen, for people.
        defaults: value by name of the setting.
    """

    name: str
    source: str
    defaults: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(WeightSettings, TrainingSettings, PixelSettings):
    """The settings of a run of fine-tuning, whatever its task.

    Attributes:
        small_set: with fewer training images the recipe `small` is the default.
        small_epochs, small_steps: the fewest of a run with that recipe, unless --epochs is given.
        small: that recipe's defaults.
        gpu_batch, cpu_batch: most images of a batch per process, unless --batch-size is given.
    """

    small_set: ClassVar[int] = 10_000
    small_epochs: ClassVar[int] = 20
    small_steps: ClassVar[int] = 200
    small: ClassVar[Mapping[str, Any]]
    gpu_batch: ClassVar[int]
    cpu_batch: ClassVar[int]

    # fmt: off
    weights: Path | None = setting(
        "checkpoint, exported weights, hub folder, or weights of torchvision, timm and others; not needed with "
        "--from-scratch --model", positional=True, nargs="?", metavar="CHECKPOINT_OR_WEIGHTS", fixed=True)
    task: str = setting(
        "what the network learns; each task has settings of its own, see --task TASK --help", "classification",
        otherwise="classification", choices=TASKS, fixed=True, older="classification")
    recipe: str = setting(
        "the published fine-tuning settings for this network, or settings for small sets", "auto",
        otherwise="auto, which depends on the number of images", choices=("auto", "paper", "small"))
    from_scratch: bool = setting(
        "start from random weights, to compare pretraining with", False, fixed=True)

    shots: int | None = in_images(
        "train on N images of each class, drawn with --seed", otherwise="all", metavar="N", at_least=1, fixed=True)
    flip: bool = in_images("mirror half of the images left to right", True)

    model: str = varied(
        TrainingSettings, "model", help="network, if the weights file does not name it; see sparkme.pretrain --model")
    ema_decay: float = in_network(
        "decay of the running average of the weights, which is validated and saved; 0: no average", metavar="D", at_least=0,
        below=1)

    layer_decay: float = in_optimisation(
        "learning rate of a layer divided by the next layer's; with --from-scratch 1, unless given", metavar="D", above=0,
        at_most=1, fixed=True)

    output: Path = varied(TrainingSettings, "output", otherwise="runs/finetune-MODEL, -TASK, -scratch, -Nshots")
    eval_epochs: int = in_output(
        "validate every N epochs", otherwise="1; with --recipe small twenty times per run", metavar="N", at_least=1)

    command: str = found(default="finetune")
    channels: int = found("channels", fixed=True)
    num_train_images: int = found("training images", fixed=True)
    num_val_images: int = found()
    num_classes: int = found("classes", fixed=True)
    split_digest: str = found("as digest of the images, their classes and their split", fixed=True)
    ema_warmup: bool = found()
    # fmt: on

    def run_folder(self, model: str) -> Path:
        """The value of --output, or a name made of the model, the task, --from-scratch and --shots."""
        task = "" if self.task == TASKS[0] else f"-{self.task}"
        name = "finetune-" + re.sub(r"[^\w.]+", "-", model) + task + "-scratch" * self.from_scratch
        return self.output or Path("runs", name + (f"-{self.shots}shots" if self.shots else ""))

    @classmethod
    @abstractmethod
    def paper_recipe(cls, model: str, norm: str) -> FinetuneRecipe:
        """The published settings for a network, or for the most similar network that has some.

        Args:
            model: the network's name.
            norm: `bn` if it has batch norms, else `ln`.
        """

    def adapted(self, recipe: FinetuneRecipe) -> FinetuneRecipe:
        """The recipe as this data and network need it."""
        return recipe

    def prepared(self) -> Self:
        """These settings with their own values in the form that a run keeps."""
        return self

    def check_together(self) -> None:
        """Raises UserError for values that exclude each other."""
        check_warmup(self)

    def choose_recipe(self, norm: str) -> FinetuneRecipe:
        """The recipe for a network and a number of images; its `source` says why.

        Args:
            norm: the network's kind, `bn` or `ln`.
        """
        images = self.num_train_images
        is_small = self.recipe == "small" or (self.recipe == "auto" and images < self.small_set)
        of_small = FinetuneRecipe("small", "for small sets", self.small)
        recipe = of_small if is_small else self.paper_recipe(self.model, norm)
        if self.recipe == "auto":
            least = f"{'fewer than' if is_small else 'at least'} {self.small_set:,}"
            recipe = replace(recipe, source=f"{recipe.source}, chosen for {images:,} image{'s' * (images != 1)}, {least}")
        if self.from_scratch:
            recipe = replace(recipe, defaults={**recipe.defaults, "layer_decay": 1.0})
        return self.adapted(recipe)


F = TypeVar("F", bound=FinetuneSettings)


def resolve(asked: F, recipe: FinetuneRecipe, machine: Machine, saved: F | None = None) -> F:
    """The settings with every default filled in.

    Args:
        asked: from the command line, with what was found: the model, the images, and the pixel settings of the weights.
        recipe: see `choose_recipe`.
        machine: where it runs.
        saved: the settings of the run to continue.

    Raises:
        UserError: values that are out of range or do not fit together; names the flag.
    """
    check(asked)
    check_workers(asked.workers)
    settings = replace(asked.prepared(), recipe=recipe.name, output=asked.run_folder(asked.model), processes=machine.processes)
    settings = _with_batch(settings, recipe, machine, saved)
    if recipe.name == "small":
        steps = settings.num_train_images // settings.batch_size
        settings = filled(settings, {"epochs": max(asked.small_epochs, math.ceil(asked.small_steps / steps))})
        defaults = {"warmup_epochs": settings.epochs / 10, "eval_epochs": max(1, settings.epochs // 20)}
        settings = filled(settings, defaults)
    settings = filled(settings, recipe.defaults)
    settings = filled(
        settings,
        {"workers": default_workers(on_gpu=machine.on_gpu), "max_unreadable": max(10, settings.num_train_images // 100)},
    )
    if asked.warmup_epochs is None:
        settings = replace(settings, warmup_epochs=min(settings.warmup_epochs, settings.epochs / 10))
    settings = with_precision(settings, machine)
    settings.check_together()
    return settings


def _with_batch(settings: F, recipe: FinetuneRecipe, machine: Machine, saved: F | None) -> F:
    """Fills in the batch size: the recipe's, as far as the machine and the number of images allow."""
    share, images = machine.processes * settings.accumulate, settings.num_train_images
    if saved is not None:
        settings = filled(settings, {"batch_size": saved.batch_size})
    most = (settings.gpu_batch if machine.on_gpu else settings.cpu_batch) * machine.processes
    wanted = min(recipe.defaults["batch_size"], most, images)
    pairs = max(wanted // (2 * share), 1) * 2 * share if wanted >= 2 * share else share
    settings = filled(settings, {"batch_size": pairs})
    check_batch(settings)
    if settings.batch_size > images:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {images} training images; lower it")
    return settings
