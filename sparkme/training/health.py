"""Says early when something is wrong with a run, while it can still be mended: each thing once, with what to change."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from sparkme.data.dataset import Batch
from sparkme.training.distributed import Process

LINES, STEPS = 3, 20  # log lines in a row, and steps, that have to say the same
FIRST_STEPS = 50  # whose numbers say little: of a start, and of the warm-up's end
FIRST_IMAGES, LEAST_IMAGES = 256, 32  # that are looked at
MOST_OUTSIDE = 0.01  # share of the pixels outside of the range of values that hurts nobody


class Watched(Protocol):
    """What has to be known of a training, see `sparkme.training.loop.Training`."""

    settings: Any  # of a command that trains
    process: Process
    poor_loss: float | None
    steps_per_epoch: int


class Health:
    """Looks at the first images, and at the numbers of every log line.

    Args:
        training: what is trained.
    """

    def __init__(self, training: Watched) -> None:
        self.training = training
        self.said: set[str] = set()
        self.lasting: dict[str, tuple[int, int]] = {}  # how many lines have said it, and the step of the first
        self.rates: list[float] = []
        self.first_step: int | None = None
        self.seen = self.enlarged = self.plain = self.ranged = 0
        self.outside = 0.0
        self.first: Tensor | None = None  # image
        self.differ = False

    def of_batch(self, batch: Batch) -> Iterator[str]:
        """What is odd about a batch, mostly about the first ones."""
        images = batch.images
        yield from self._of_range(batch)
        if images is None or self.seen >= FIRST_IMAGES:
            return
        values = images.float() / (255 if images.dtype == torch.uint8 else 1)
        self.first = values[0] if self.first is None else self.first
        self.differ = self.differ or float((values - self.first).abs().max()) > 1 / 255
        self.seen += len(images)
        self.enlarged += batch.enlarged
        self.plain += int((values.flatten(1).std(1) < 1 / 255).sum())
        if self.seen >= min(FIRST_IMAGES, max(LEAST_IMAGES, self.training.settings.batch_size)):
            if not self.differ:
                yield from self._once("alike", f"the first {self.seen} pictures are all the same: is --data what it should be?")
            size = self.training.settings.input_size
            if 2 * self.enlarged > self.seen:
                yield from self._once(
                    "enlarged",
                    f"{100 * self.enlarged // self.seen} % of the crops are enlarged, since the images are smaller than "
                    f"--input-size {' '.join(map(str, size))}; a smaller one is faster and loses nothing",
                )
            if 2 * self.plain > self.seen and self.differ:
                yield from self._once(
                    "plain",
                    f"{100 * self.plain // self.seen} % of the crops are of one colour: see --data, --background",
                )

    def _of_range(self, batch: Batch) -> Iterator[str]:
        """In the whole run: an image that is unlike those that were looked at may come late."""
        self.outside += batch.outside
        self.ranged += len(batch.images) if batch.images is not None else 0
        if self.ranged >= LEAST_IMAGES and self.outside > MOST_OUTSIDE * self.ranged:
            yield from self._once(
                "outside",
                f"{100 * self.outside / self.ranged:.1f} % of the pixels lie outside of the range of values and are cut to it; "
                "--value-range LOW HIGH takes another",
            )

    def of_numbers(self, step: int, numbers: dict[str, float]) -> Iterator[str]:
        """What the numbers of a log line, and of those before it, say."""
        training, settings = self.training, self.training.settings
        poor = training.poor_loss
        self.first_step = step if self.first_step is None else self.first_step
        if step < self.first_step + FIRST_STEPS:
            return
        warm = step > settings.warmup_epochs * training.steps_per_epoch + FIRST_STEPS
        if self._lasts("loss", step, poor is not None and warm and numbers["loss"] > 1.01 * poor):
            yield from self._once(
                "loss",
                f"the loss is {numbers['loss']:.3f} after the warm-up, above {poor:g}, which painting every patch in its mean "
                "colour would reach: lower --base-lr, or look at the reconstructions",
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
                "rate", f"{rate:.0f} images/s, and {usual:.0f} were usual: does something else use this machine, or its disk?"
            )
        self.rates = [*self.rates[-99:], rate]
        if training.process.device.type == "cuda":
            busy = utilisation(training.process.device)
            if self._lasts("gpu", step, busy is not None and busy < 50 and wait < 0.2):
                yield from self._once(
                    "gpu",
                    f"the GPU computes {busy} % of the time, and images are there: raise --batch-size, or --cuda-graph or "
                    "--compile",
                )

    def _lasts(self, name: str, step: int, is_so: bool) -> bool:
        """Whether something is so for some time: of a single step, or a few, many things are."""
        lines, since = self.lasting.get(name, (0, step))
        self.lasting[name] = (lines + 1, since) if is_so else (0, step)
        return is_so and lines + 1 >= LINES and step - since >= STEPS

    def _once(self, name: str, text: str) -> Iterator[str]:
        if name not in self.said:
            self.said.add(name)
            yield text


def more_workers(workers: int, wait: float) -> str:
    """How many would keep up, where the machine has the cores."""
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    wanted = max(workers + 1, math.ceil(max(1, workers) / (1 - min(wait, 0.9))))
    if workers >= cores:
        return f"--workers is {workers}, and there are no more cores; smaller image files, or a faster disk, would help"
    more = f" (of {wanted} that would keep up)" if wanted > cores else ""
    return f"try --workers {min(wanted, cores)} instead of {workers}{more}"


def utilisation(device: torch.device) -> int | None:
    """Percent of the last second that a GPU computed; None where it cannot be asked, for want of nvidia-ml-py for example."""
    try:
        return int(torch.cuda.utilization(device))
    except Exception:  # of a driver, of a library that is not installed
        return None
