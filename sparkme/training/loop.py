"""The loop that every training command shares: resume, step, log, save, stop.

A command derives from `Training` and says what a step is, what is measured and what is drawn; `RunFolder` is where its run
lives, and `Loop` runs it. Step k of a run is the same whether or not the run was interrupted before it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkme.errors import UserError, first_line, user_errors
from sparkme.training.checkpoint import Checkpoints, free_gib, load_checkpoint
from sparkme.training.config import as_text, flag_of
from sparkme.training.distributed import Process, stop_process
from sparkme.training.log import RunLog, Throughput
from sparkme.training.optimizer import update_schedule
from sparkme.training.random import seed_step

if TYPE_CHECKING:
    from sparkme.data.dataset import Batch


class Training(ABC):
    """What is trained, and how.

    Attributes:
        config: every setting, as it is saved. The loop reads `seed`, `accumulate`, `precision`, `max_unreadable`,
            `log_steps` and `checkpoint_minutes`.
        process: this process.
        folder: where the run lives.
        network: whose weights are trained and saved, on the process's device.
        model: what a step runs: the network, or what wraps it for several processes.
        optimizer: of the network's parameters; its groups may have an `lr_scale` and a `decay`, see `update_schedule`.
        clip_norm: the largest norm of a gradient, where the optimizer does not see to it.
        loss_name: of the curve in the picture.
        steps_per_epoch, total_steps: of the whole run.
        step: how many were done.
    """

    config: dict[str, Any]
    process: Process
    folder: RunFolder
    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float | None = None
    loss_name = "loss"
    steps_per_epoch: int
    total_steps: int
    step: int = 0

    @abstractmethod
    def batches(self, steps: range) -> Iterable[Batch]:
        """The batches of these steps, in order, of this process."""

    @abstractmethod
    def loss(self, *tensors: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss, a scalar, of a part of a batch's tensors, on the device; randomness is torch's own, which the loop
        seeds, and the generator's."""

    @abstractmethod
    def rates(self, step: int) -> dict[str, float]:
        """The `learning_rate` and the `weight_decay` of a step."""

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        """What of a batch goes to the device, each (B, ...)."""
        assert batch.images is not None
        return (batch.images,)

    def after_step(self) -> None:  # noqa: B027
        """After an update of the weights."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `step`."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "config": self.config}

    def is_due(self, epoch: int) -> bool:
        """Whether there is something to measure or to draw at the end of this epoch, counted from 1; 0 is before the first."""
        return False

    def report(self, epoch: int, log: RunLog | None) -> None:  # noqa: B027
        """Measures and draws, at the end of an epoch that is due; every process comes here, and the first has a log."""

    def last_words(self, checkpoint: Path) -> str:
        """What to look at, and what to do next."""
        return ""

    def precision(self) -> AbstractContextManager[Any]:
        bf16 = self.config["precision"] == "bf16"
        return torch.autocast(self.process.device.type, torch.bfloat16) if bf16 else nullcontext()

    def train_step(self, batch: Batch) -> Tensor:
        """One update of the weights.

        Returns:
            The mean loss, scalar, on the device; nothing waits for it.
        """
        config, process = self.config, self.process
        update_schedule(self.optimizer, **self.rates(self.step))
        generator = seed_step(config["seed"], process.rank, self.step, process.device)
        tensors = [value.to(process.device, non_blocking=True) for value in self.tensors(batch)]
        parts = list(zip(*(value.chunk(config["accumulate"]) for value in tensors), strict=True))
        total = torch.zeros((), device=process.device)
        for i, part in enumerate(parts):
            with self._gradients_stay_here(last=i == len(parts) - 1):
                with self.precision():
                    loss = self.loss(*part, generator=generator) / len(parts)
                loss.backward()
            total += loss.detach()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.after_step()
        return total

    def _gradients_stay_here(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients at the last accumulation step only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()


class RunFolder:
    """The folder of a run, and the checkpoint to go on from.

    Args:
        path: the folder.
        resume: whether to go on from the newest checkpoint in it.
        keep_checkpoints: how many to keep.
        command: whose run it is; another's is refused.

    Raises:
        UserError: the newest checkpoint cannot be read, or is another command's.
    """

    def __init__(self, path: Path, *, resume: bool, keep_checkpoints: int, command: str) -> None:
        self.path, self.resume = path, resume
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints)
        self.newest = self.checkpoints.newest() if resume else None
        self.saved = load_checkpoint(self.newest) if self.newest else None
        if self.saved is not None and (other := self.saved["config"].get("command", "pretrain")) != command:
            raise UserError(f"{self.newest} is a checkpoint of sparkme.{other}; use another --output")

    @property
    def saved_config(self) -> dict[str, Any] | None:
        return self.saved["config"] if self.saved else None

    def restore(self, load: Callable[[dict[str, Any]], None]) -> int:
        """Has `load` take what the checkpoint keeps, if there is one. Returns how many steps were done."""
        if self.saved is None:
            return 0
        try:
            load(self.saved)
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.newest}: {first_line(error)}; use another --output, or --no-resume to start anew"
            ) from error
        step: int = self.saved["step"]
        return step

    def prepare(self, config: dict[str, Any], *, pictures: tuple[str, ...]) -> None:
        """Makes the folder, with config.json; takes away what an earlier run left, if this one starts anew."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                written = ("checkpoints/*.pt", "metrics.jsonl", "tensorboard/events.*", *pictures)
                for old in (path for pattern in written for path in self.path.glob(pattern)):
                    old.unlink()
            (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to --output {self.path}: {error}") from error

    def print_changes(self, config: dict[str, Any]) -> None:
        """Says which settings differ from the checkpoint's."""
        for name, before in self.saved["config"].items() if self.saved else ():
            if config.get(name) != before:
                print(f"{'changed':9s} {name.replace('_', ' ')} from {as_text(before)} to {as_text(config.get(name))}")
        if self.saved and self.saved["step"] and not self.checkpoints.last.exists():
            print(f"{'note':9s} {self.checkpoints.last} was missing; continuing from the newest checkpoint beside it")


# Settings that no flag sets, since they are found in the data.
FOUND = {"num_train_images": "images to learn from", "num_classes": "classes", "weights": "to start from",
         "split_digest": "as digest of the images, their classes and which of them are measured on"}  # fmt: skip


def check_same_run(
    saved: dict[str, Any], config: dict[str, Any], path: Path | None, fixed: tuple[str, ...], older: dict[str, Any]
) -> None:
    """Refuses to continue a run with other settings than it has to keep.

    Args:
        saved: the checkpoint's configuration.
        config: the command's.
        path: the checkpoint.
        fixed: what has to stay.
        older: what checkpoints mean that do not say.

    Raises:
        UserError: names the first flag that differs.
    """
    for name in fixed:
        before = saved.get(name, older.get(name))
        if before != config[name]:
            said = f"{before} {FOUND[name]}" if name in FOUND else f"{flag_of(name)} {as_text(before)}"
            raise UserError(
                f"{path} was trained with {said}, now it is {as_text(config[name])}; use the same, "
                "another --output, or --no-resume to start anew"
            )


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the run can save before it leaves; a second Ctrl-C ends it at once."""

    def __init__(self, *, announce: bool) -> None:
        self.announce = announce
        self.signal = 0
        self.since = 0.0

    @contextmanager
    def listen(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A scheduler may signal every process, and torchrun passes its own on: only an impatient user ends the run at once.
        if number == signal.SIGINT and self.signal and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if self.announce:
                os.write(
                    2, b"\nstopping after this step, then saving; Ctrl-C again to stop at once and lose what is not saved\n"
                )


class Loop:
    """Runs a training to its end, or until it is asked to stop.

    Args:
        training: what is trained.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.folder = training, training.folder
        self.process, self.config = training.process, training.config
        self.stop = StopRequest(announce=self.process.is_main)
        self.unreadable: set[str] = set()
        self.log: RunLog | None = None
        self.losses: list[Tensor] = []  # of the steps since the last log line, still on the device

    def run(self) -> int:
        """Steps, logs, reports and saves. Returns the exit code."""
        with self.stop.listen():
            return self._run()

    def _run(self) -> int:
        training, config, process = self.training, self.config, self.process
        if training.step >= training.total_steps:
            if process.is_main:
                print(
                    f"nothing left to do: {self.folder.path} is trained for {config['epochs']} epochs; --no-resume starts anew"
                )
            return 0
        speed = Throughput(config["batch_size"], training.total_steps)
        last_save = time.monotonic()
        batches = training.batches(range(training.step, training.total_steps))
        training.model.train()
        try:
            if process.is_main:
                self.log = RunLog(
                    self.folder.path, first_step=training.step, total_steps=training.total_steps, bar=sys.stderr.isatty(),
                    loss_name=training.loss_name,
                )  # fmt: skip
            if training.step == 0 and training.is_due(0):
                training.report(0, self.log)
                training.model.train()
            speed.restart(training.step)
            for batch in batches:
                self._name_unreadable(batch)
                overdue = 0 < 60 * config["checkpoint_minutes"] <= time.monotonic() - last_save
                stop, spoiled, overdue = process.agree(bool(self.stop.signal), self._is_spoiled(batch), overdue)
                if stop or spoiled:
                    self._log(speed)
                    return self._leave(spoiled=spoiled)

                self.losses.append(training.train_step(batch))
                if self.log:
                    self.log.step()
                epoch, in_epoch = divmod(training.step, training.steps_per_epoch)
                done = training.step == training.total_steps
                report = in_epoch == 0 and training.is_due(epoch)
                save = done or overdue or (in_epoch == 0 and not config["checkpoint_minutes"])
                if report or save or training.step == 1 or training.step % config["log_steps"] == 0:
                    self._log(speed)
                if report:
                    training.report(epoch, self.log)
                    training.model.train()
                if save:
                    last_save = time.monotonic()
                if self.log and save:
                    self._save()
                if self.log and (save or report):
                    self.log.plot()
                if save or report:
                    speed.restart(training.step)
            if self.log:
                skipped = f"; images that could not be read: {len(self.unreadable)}" if self.unreadable else ""
                last = self.folder.checkpoints.last
                self.log.finish(f"done: {last}{skipped}\n{training.last_words(last)}")
            return 0
        except OSError as error:  # of the log or of a picture
            saved = f"saved {self._save()}" if process.is_main else "the first process saves"
            free = free_gib(self.folder.path)
            raise UserError(f"{error} ({free:.1f} GiB free); {saved}; make room, then start again") from error
        finally:
            if self.log:
                with suppress(OSError):
                    self.log.close()

    def _name_unreadable(self, batch: Batch) -> None:
        for problem in batch.unreadable:
            if problem not in self.unreadable:
                self.unreadable.add(problem)
                if self.log:
                    self.log.warn(f"skipped unreadable image {problem}")
                else:
                    print(f"skipped unreadable image {problem}", file=sys.stderr, flush=True)

    def _is_spoiled(self, batch: Batch) -> bool:
        return batch.images is None or len(self.unreadable) > self.config["max_unreadable"]

    def _log(self, speed: Throughput) -> None:
        """Reads the losses of the last steps, which waits for the device, checks them, and writes their mean."""
        if not self.losses:
            return
        training, step = self.training, self.training.step
        values = self.process.mean(torch.stack(self.losses)).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                self._refuse(f"the loss of step {step - len(values) + i + 1} is {value}")
        self.losses.clear()
        if self.log:
            numbers = {"loss": sum(values) / len(values), **training.rates(step - 1), **speed.report(step)}
            self.log.metrics(step, step / training.steps_per_epoch, numbers)

    def _refuse(self, problem: str) -> NoReturn:
        newest = self.folder.checkpoints.newest()
        good = f"the last good checkpoint is {newest.resolve()}" if newest else "there is no checkpoint yet"
        clip = "lower --base-lr or --clip-grad" if self.config["clip_grad"] else "lower --base-lr, set --clip-grad"
        raise UserError(f"{problem}; {good}; {clip}, or use --precision float32")

    def _save(self) -> Path:
        """Writes a checkpoint, unless the weights are spoiled: the loss of a step says nothing of its update."""
        state = self.training.state()
        tensors = [value for value in state["model"].values() if isinstance(value, Tensor)]  # a module may keep other things
        finite = torch.stack([value.isfinite().all() for value in tensors if value.is_floating_point()])
        if not finite.all():
            self._refuse(f"the weights are not finite after step {self.training.step}")
        return self.folder.checkpoints.save(state, self.training.step)

    def _leave(self, *, spoiled: bool) -> int:
        log, step = self.log, self.training.step
        saved = f"saved {self._save()} after step {step}" if log and step else "nothing to save yet"
        if log:
            with suppress(OSError):
                log.plot()
        if spoiled:
            listed = "\n  ".join(sorted(self.unreadable)) or "those of another process, see its lines"
            raise UserError(
                f"{len(self.unreadable)} images cannot be read, more than --max-unreadable {self.config['max_unreadable']} or "
                f"too many in a row; mend or remove them ({saved}):\n  {listed}"
            )
        number = self.stop.signal or signal.SIGTERM  # of another process, if not of this one
        if log:
            log.finish(f"{signal.Signals(number).name}: {saved}; the same command continues from here")
        return 128 + number


def run_training(create: Callable[[], Training]) -> int:
    """Sets a training up and runs it, and ends this process's part among others. Returns the exit code."""
    try:
        with user_errors():
            training = create()
        return Loop(training).run()
    finally:
        stop_process()
