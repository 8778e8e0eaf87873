"""Early warnings about problems of a run, each once, with what to change."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from sparkme.data.dataset import LoadedBatch
from sparkme.training.distributed import Process

LINES, STEPS = 3, 20  # a problem must last for so many log lines and steps
FIRST_STEPS = 50  # ignored after a start and after the warm-up
FIRST_IMAGES, LEAST_IMAGES = 256, 32  # most and fewest images that are checked
MOST_OUTSIDE = 0.01  # harmless share of pixel values outside the value range


class Watched(Protocol):
    """The part of `sparkme.training.loop.Training` that is needed here."""

    settings: Any
    process: Process
    poor_loss: float | None
    steps_per_epoch: int


class Health:
    """Checks the first images and the numbers of every log line."""

    def __init__(self, training: Watched) -> None:
        self.training = training
        self.said: set[str] = set()
        self.lasting: dict[str, tuple[int, int]] = {}  # number of log lines in a row, and the step of the first
        self.rates: list[float] = []
        self.first_step: int | None = None
        self.seen = self.enlarged = self.plain = self.ranged = 0
        self.outside = 0.0
        self.first: Tensor | None = None  # image
        self.differ = False

    def of_batch(self, batch: LoadedBatch) -> Iterator[str]:
        """Warnings about a batch, mostly about the first ones."""
        images = batch.images
        yield from self._of_range(batch)
        if images is None or self.seen >= FIRST_IMAGES:
            return
        values = images.float() / (255 if images.dtype == torch.uint8 else 1)
        self.first = values[0] if self.first is None else self.first
        alike = values.shape[1:] == self.first.shape  # batches of a detector are of different sizes
        self.differ = self.differ or not alike or float((values - self.first).abs().max()) > 1 / 255
        self.seen += len(images)
        self.enlarged += batch.enlarged
        self.plain += int((values.flatten(1).std(1) < 1 / 255).sum())
        if self.seen >= min(FIRST_IMAGES, max(LEAST_IMAGES, self.training.settings.batch_size)):
            if not self.differ:
                yield from self._once("alike", f"the first {self.seen} images are all the same: check --data")
            if 2 * self.enlarged > self.seen:
                size = self.training.settings.input_size
                yield from self._once(
                    "enlarged",
                    f"{100 * self.enlarged // self.seen} % of the crops are enlarged, since the images are smaller than "
                    f"--input-size {' '.join(map(str, size))}; a smaller size is faster and loses nothing",
                )
            if 2 * self.plain > self.seen and self.differ:
                yield from self._once(
                    "plain",
                    f"{100 * self.plain // self.seen} % of the crops have a single colour: check --data and --background",
                )

    def _of_range(self, batch: LoadedBatch) -> Iterator[str]:
        """Checks the whole run, since images unlike the sampled ones may come late."""
        self.outside += batch.outside
        self.ranged += len(batch.images) if batch.images is not None else 0
        if self.ranged >= LEAST_IMAGES and self.outside > MOST_OUTSIDE * self.ranged:
            yield from self._once(
                "outside",
                f"{100 * self.outside / self.ranged:.1f} % of the pixel values lie outside the value range and are clipped; "
                "set another with --value-range LOW HIGH",
            )

    def of_numbers(self, step: int, numbers: dict[str, float]) -> Iterator[str]:
        """Warnings about the numbers of a log line and of those before it."""
        training, settings = self.training, self.training.settings
        poor = training.poor_loss
        self.first_step = step if self.first_step is None else self.first_step
        if step < self.first_step + FIRST_STEPS:
            return
        warm = step > settings.warmup_epochs * training.steps_per_epoch + FIRST_STEPS
        if self._lasts("loss", step, poor is not None and warm and numbers["loss"] > 1.01 * poor):
            yield from self._once(
                "loss",
                f"the loss is {numbers['loss']:.3f} after the warm-up, above {poor:g}, the loss of predicting each patch's "
                "mean: lower --base-lr, or look at the reconstructions",
            )
        wait = numbers["loader_wait"]
        if self._lasts("wait", step, wait > 0.2):
            yield from self._once(
                "wait", f"steps wait for images {100 * wait:.0f} % of the time: {more_workers(settings.workers, wait)}"
            )
        rate = numbers["images_per_s"]
        usual = median(self.rates) if len(self.rates) >= 10 else 0.0
        if self._lasts("rate", step, rate < 0.6 * usual):
            yield from self._once(
                "rate",
                f"{rate:.0f} images/s instead of the usual {usual:.0f}: does something else use this machine or its disk?",
            )
        self.rates = [*self.rates[-99:], rate]
        if training.process.device.type == "cuda":
            busy = utilisation(training.process.device)
            if self._lasts("gpu", step, busy is not None and busy < 50 and wait < 0.2):
                yield from self._once(
                    "gpu",
                    f"the GPU is busy {busy} % of the time, though images are ready: raise --batch-size, or use --cuda-graph "
                    "or --compile",
                )

    def _lasts(self, name: str, step: int, is_so: bool) -> bool:
        """Whether a problem has lasted for some time."""
        lines, since = self.lasting.get(name, (0, step))
        self.lasting[name] = (lines + 1, since) if is_so else (0, step)
        return is_so and lines + 1 >= LINES and step - since >= STEPS

    def _once(self, name: str, text: str) -> Iterator[str]:
        if name not in self.said:
            self.said.add(name)
            yield text


def more_workers(workers: int, wait: float) -> str:
    """Advice on the number of workers."""
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    wanted = max(workers + 1, math.ceil(max(1, workers) / (1 - min(wait, 0.9))))
    if workers >= cores:
        return f"--workers is {workers}, and there are no more cores; smaller image files or a faster disk would help"
    more = f" ({wanted} would keep up)" if wanted > cores else ""
    return f"try --workers {min(wanted, cores)} instead of {workers}{more}"


def utilisation(device: torch.device) -> int | None:
    """Percent of the last second in which a GPU computed; None if unknown, for example without nvidia-ml-py."""
    try:
        return int(torch.cuda.utilization(device))
    except Exception:  # driver errors, or a missing library
        return None
