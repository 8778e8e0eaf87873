"""The loop that every training command shares: resume, step, log, save, stop.

A command derives a class from `Training` with its step, measurements and pictures; `Loop` runs it. Step k of a run is the same
whether or not the run was interrupted before it.
"""

from __future__ import annotations

import math
import os
import resource
import shlex
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkme.data.dataset import LoadedBatch
from sparkme.errors import CannotWrite, UserError, first_line, python_command, user_errors
from sparkme.machine import is_main_thread, problem_of
from sparkme.screen import settle, show
from sparkme.seeds import seed_step
from sparkme.settings.declare import to_config
from sparkme.settings.shared import MOST_NOT_FINITE, RECENT_STEPS, TrainingSettings
from sparkme.state_dict import state_dict_of
from sparkme.training.checkpoint import SpoiledWeights, free_gib
from sparkme.training.distributed import Process, is_of_others, stop_process
from sparkme.training.folder import RunFolder
from sparkme.training.health import Health
from sparkme.training.log import Notes, RunLog, Throughput
from sparkme.training.optimizer import update_schedule
from sparkme.watchdog import SAVING_S, STARTING_S, Watchdog

CHECKPOINT = "the checkpoint"  # its name among the files that are written
FIRST_IMAGES_S = 900.0  # limit for the first images, from a cold or remote disk
PATIENCE_S = 5.0  # a stopping run waits this long for images
RETRY_S = 60.0  # until a failed checkpoint is tried again
LAST_TRIES, LAST_TRIES_S = 60, 10.0  # after the last step: number of tries, and seconds between them


class Training(ABC):
    """A training that `Loop` can run.

    Attributes:
        settings: the run's.
        process: this process.
        folder: the run folder.
        network: trained and saved, on the process's device.
        model: what a step calls: the network, or its DistributedDataParallel wrapper.
        optimizer: its groups may have an `lr_scale` and a `decay`, see `update_schedule`.
        clip_norm: largest gradient norm, unless the optimizer clips.
        loss_name: label of the curve.
        poor_loss: loss of a network that has learnt nothing, if known.
        steps_per_epoch, total_steps: of the whole run.
        step: number of finished steps.
        not_finite: number of skipped steps, and the most recent ones.
        gradient_norm: the latest one computed, before clipping; a scalar on the device.
    """

    settings: TrainingSettings
    process: Process
    folder: RunFolder
    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float | None = None
    loss_name = "loss"
    poor_loss: float | None = None
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    not_finite: tuple[int, list[int]] = (0, [])
    gradient_norm: Tensor | None = None

    @abstractmethod
    def batches(self, steps: range) -> Iterable[LoadedBatch]:
        """This process's batches of these steps, in order."""

    @abstractmethod
    def loss(self, *tensors: Any, generator: torch.Generator) -> Tensor:
        """The mean loss (scalar) of a part of a batch, on the device. Random numbers come from torch, which the loop seeds, and
        from the generator."""

    @abstractmethod
    def rates(self, step: int) -> dict[str, float]:
        """The `learning_rate` and the `weight_decay` of a step."""

    def tensors(self, batch: Any) -> tuple[Tensor, ...]:
        """The batch's tensors for the device, each (B, ...)."""
        return (batch.images,)

    def parts(self, batch: Any) -> list[tuple[Any, ...]]:
        """The batch on the device, in a part for each accumulation step; each part holds the arguments of `loss`."""
        tensors = [value.to(self.process.device, non_blocking=True) for value in self.tensors(batch)]
        return list(zip(*(value.chunk(self.settings.accumulate) for value in tensors), strict=True))

    def start_training(self) -> None:
        """Sets the modules' modes for training."""
        self.model.train()

    def after_step(self) -> None:  # noqa: B027
        """Runs after an update of the weights."""

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint, except `step`."""
        count, steps = self.not_finite
        return {
            "model": state_dict_of(self.network),
            "optimizer": self.optimizer.state_dict(),
            "config": to_config(self.settings),
            "not_finite": {"count": count, "steps": steps},
        }

    @abstractmethod
    def load(self, saved: dict[str, Any]) -> None:
        """Loads the result of `state`. Raises ValueError, KeyError or RuntimeError if it does not fit."""

    def resume(self) -> None:
        """Resumes from the folder's checkpoint, if any."""
        self.step = self.folder.restore(self.load)
        if self.step and self.folder.saved is not None:
            before = self.folder.saved.get("not_finite", {"count": 0, "steps": []})
            self.not_finite = before["count"], before["steps"]

    def is_due(self, epoch: int) -> bool:
        """Whether to call `report` after this epoch, counted from 1; 0 is before the first."""
        return False

    def report(self, epoch: int, log: RunLog | None) -> None:  # noqa: B027
        """Measures and draws after an epoch, in every process; only the first has a log."""

    def last_words(self, checkpoint: Path) -> str:
        """Lines about pictures and the next command."""
        return ""

    def precision(self) -> AbstractContextManager[Any]:
        bf16 = self.settings.precision == "bf16"
        return torch.autocast(self.process.device.type, torch.bfloat16) if bf16 else nullcontext()

    def train_step(self, batch: LoadedBatch) -> Tensor | None:
        """One update of the weights.

        Returns:
            The mean loss (scalar) on the device, without waiting for it. Unless `--on-nan` is `stop`, it waits, and returns
            None for a skipped step, whose loss or gradient is not finite.
        """
        settings, process = self.settings, self.process
        update_schedule(self.optimizer, **self.rates(self.step))
        generator = seed_step(settings.seed, process.rank, self.step, process.device)
        is_guarded = settings.on_nan != "stop"
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()] if is_guarded else []
        parts = self.parts(batch)
        total = torch.zeros((), device=process.device)
        for i, part in enumerate(parts):
            with self._gradients_stay_here(last=i == len(parts) - 1):
                with self.precision():
                    loss = self.loss(*part, generator=generator) / len(parts)
                loss.backward()
            total += loss.detach()
        if self.clip_norm or is_guarded or self.step == 0 or (self.step + 1) % settings.log_steps == 0:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            self.gradient_norm = nn.utils.get_total_norm(gradients)
        if self.clip_norm:
            assert self.gradient_norm is not None
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip_norm, self.gradient_norm)
        self.step += 1
        if is_guarded and any(process.agree(not _is_finite(total, self.gradient_norm))):
            with torch.no_grad():  # undoes updates of running statistics
                for buffer, before in buffers:
                    buffer.copy_(before)
            self.optimizer.zero_grad(set_to_none=True)
            count, steps = self.not_finite
            self.not_finite = count + 1, [s for s in (*steps, self.step) if s > self.step - RECENT_STEPS]
            return None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()
        return total

    def _gradients_stay_here(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients in the last accumulation step only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()


def _is_finite(*scalars: Tensor | None) -> bool:
    return all(bool(scalar.isfinite()) for scalar in scalars if scalar is not None)


class WaitEndedError(BaseException):
    """Ends the wait for images of a stopping run. A BaseException, so that loaders do not handle it."""


class StopRequest:
    """Records SIGTERM and Ctrl-C, so that the run saves before it exits; a second Ctrl-C ends it at once.

    Python delivers signals to the main thread only; a run in another thread does without.
    """

    def __init__(self, *, announce: bool) -> None:
        self.announce = announce
        self.signal = 0
        self.since = 0.0
        self._waits_since: float | None = None
        self._ended = threading.Event()

    @contextmanager
    def listen(self) -> Iterator[None]:
        if not is_main_thread():
            if self.announce:
                show("note: this is not the main thread, so Ctrl-C and SIGTERM do not save", sys.stderr)
            yield
            return
        # SIGHUP, too, which a closing terminal sends, unless nohup ignores it.
        closing = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT, *closing)}
        try:
            yield
        finally:
            self._ended.set()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def may_end(self) -> Iterator[None]:
        """Raises `WaitEndedError` inside if the run is stopping and the body takes longer than `PATIENCE_S`."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Schedulers signal every process, and torchrun passes signals on: only a second Ctrl-C ends the run at once.
        if number == signal.SIGINT and self.signal and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if self._is_overdue():
            raise WaitEndedError
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            threading.Thread(target=self._end_waits, args=(threading.get_ident(),), daemon=True).start()
            if self.announce:
                with suppress(OSError):
                    os.write(
                        2, b"\nstopping after this step, then saving; Ctrl-C again to stop at once and lose what is not saved\n"
                    )

    def _is_overdue(self) -> bool:
        since = self._waits_since
        return bool(self.signal) and since is not None and time.monotonic() - max(since, self.since) > PATIENCE_S

    def _end_waits(self, main: int) -> None:
        """Wakes the main thread if it waits too long."""
        while not self._ended.wait(0.5):
            if self._is_overdue():
                signal.pthread_kill(main, signal.SIGTERM)


class Loop:
    """Runs a training to its end, or until it is asked to stop."""

    def __init__(self, training: Training) -> None:
        self.training, self.folder = training, training.folder
        self.process, self.settings = training.process, training.settings
        self.checkpoints = self.folder.checkpoints
        self.checkpoints.keep_every = self.settings.keep_every * training.steps_per_epoch
        self.stop = StopRequest(announce=self.process.is_main)
        self.watchdog = Watchdog(self.settings.hang_seconds, self._how_to_continue, self.process.peers)
        self.notes = Notes(self.folder.path)
        self.health = Health(training)
        self.unreadable: set[str] = set()
        self.log: RunLog | None = None
        self.losses: list[Tensor] = []  # since the last log line, on the device
        self.in_step = False  # during a step the weights are not consistent
        self.refused: dict[str, str] = {}  # files that could not be written, with the reason
        self.last_save = 0.0
        self.stopped_s = 0.0  # longest wait of a step for a save to start, since the last log line

    def run(self) -> int:
        """Steps, logs, reports and saves. Returns the exit code."""
        with self.stop.listen(), self.watchdog.watch():
            try:
                return self._run()
            except (UserError, KeyboardInterrupt):
                raise
            except Exception as error:
                self._explain(error)
                raise
            finally:
                self.watchdog.expect("saving", SAVING_S)
                try:
                    self.checkpoints.wait()
                except Exception as error:  # must not replace the error that ended the run
                    self._warn("warning", first_line(error))
                if self.log:
                    with suppress(OSError):
                        self.log.close()
                for stream in (sys.stdout, sys.stderr):
                    settle(stream)

    def _run(self) -> int:
        training, settings, process = self.training, self.settings, self.process
        if training.step >= training.total_steps:
            trained = f"{self.folder.path} is trained for {settings.epochs} epochs"
            return self._say(f"nothing left to do: {trained}; --no-resume starts again")
        speed = Throughput(settings.batch_size, training.total_steps)
        first_step, self.last_save = training.step, time.monotonic()
        batches = iter(training.batches(range(training.step, training.total_steps)))
        # torch's SIGCHLD handler would raise in the middle of a step if a loader dies. Waiting for its batch raises anyway.
        if is_main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        training.start_training()
        if process.is_main:
            self._open_log()
        if training.step == 0 and training.is_due(0):
            self._report(0)
        speed.restart(training.step)
        usual_s = 0.0  # the longest step except the first, which may compile
        alone_s = 0.0  # time that the first process may need for work of its own
        while training.step < training.total_steps:
            since = time.perf_counter()
            first, second = training.step == first_step, training.step == first_step + 1
            limit_s = STARTING_S if first or second else 5 * usual_s
            self.watchdog.expect(f"waiting for the images of step {training.step + 1}", FIRST_IMAGES_S if first else limit_s)
            try:
                batch = self._next(batches)
            except WaitEndedError:
                if process.world == 1:  # _log waits for other processes
                    self._log(speed)
                return self._leave(spoiled=False)
            speed.waited_s += time.perf_counter() - since
            self._look_at(batch)
            self.watchdog.expect("waiting for the other processes", max(limit_s, alone_s))
            stop, spoiled, overdue = process.agree(bool(self.stop.signal), self._is_spoiled(batch), self._is_overdue())
            if stop or spoiled:
                self._log(speed)
                return self._leave(spoiled=spoiled)
            self.watchdog.expect(f"computing step {training.step + 1}", limit_s)
            self._step(batch, first=first)
            epoch, in_epoch = divmod(training.step, training.steps_per_epoch)
            done = training.step == training.total_steps
            report = in_epoch == 0 and training.is_due(epoch)
            kept = bool(settings.keep_every) and in_epoch == 0 and epoch % settings.keep_every == 0
            save = done or overdue or kept or (in_epoch == 0 and not settings.checkpoint_minutes)
            if report or save or training.step == 1 or training.step % settings.log_steps == 0:
                self._log(speed)
            if not first and not alone_s:
                usual_s = max(usual_s, time.perf_counter() - since)
            alone_s = STARTING_S if report else SAVING_S if save else 0.0
            if report:
                self._report(epoch)
            if report or save:
                self._keep(save=save, done=done)
            if report:
                speed.restart(training.step)
        if self.log:
            self._say_done(self.log)
        self.watchdog.expect("waiting for the first process to save", STARTING_S)
        process.agree(True)  # so that all exit together
        return 0

    def _say(self, text: str) -> int:
        if self.process.is_main:
            print(text)
        return 0

    def _step(self, batch: LoadedBatch, *, first: bool) -> None:
        self.in_step = True
        loss = self.training.train_step(batch)
        self.in_step = False
        if loss is None:
            self._leave_out()
        else:
            self.losses.append(loss)
        if self.log:
            self.log.step()
            self._check_saved(wait=False)
            if first:
                self.checkpoints.make_room(self.training.state())

    def _open_log(self) -> None:
        training, settings = self.training, self.settings
        self.log = RunLog(
            self.folder.path,
            first_step=training.step,
            total_steps=training.total_steps,
            steps_per_epoch=training.steps_per_epoch,
            bar=sys.stderr.isatty(),
            loss_name=training.loss_name,
            tracker=start_wandb(settings, self.folder.path) if settings.wandb else None,
        )
        self.notes.add("started", training.step, command_line(self.process, settings.command))

    def _keep(self, *, save: bool, done: bool) -> None:
        """Saves a checkpoint if due, and draws the curves."""
        if save:
            self.last_save = time.monotonic()
        self.watchdog.expect("saving", SAVING_S)
        if self.log and save:
            self._save_last() if done else self._save()
        if self.log:
            self._write("loss.png", self.log.plot)

    def _say_done(self, log: RunLog) -> None:
        skipped = f"; unreadable images: {len(self.unreadable)}" if self.unreadable else ""
        count, _ = self.training.not_finite
        skipped += f"; skipped steps that were not finite: {count}" if count else ""
        last = self.checkpoints.last
        self.notes.add("done", self.training.step, f"done{skipped}")
        log.finish(f"done: {last}{skipped}\n{self.training.last_words(last)}")

    def _next(self, batches: Iterator[LoadedBatch]) -> LoadedBatch:
        """The next batch. Saves if the loader ends."""
        try:
            with self.stop.may_end():
                return next(batches)
        except (MemoryError, OSError, EOFError) as error:
            problem = problem_of(error) or f"loading images ended: {first_line(error)} (see --workers)"
            raise UserError(f"{problem}; {self._save_at_the_end()}") from error

    def _look_at(self, batch: LoadedBatch) -> None:
        """Reports unreadable images and health warnings."""
        for problem in batch.unreadable:
            if problem not in self.unreadable:
                self.unreadable.add(problem)
                self._warn("unreadable", f"skipped unreadable image {problem}")
        for warning in self.health.of_batch(batch) if self.log else ():
            self._warn("warning", warning)

    def _warn(self, kind: str, text: str) -> None:
        self.notes.add(kind, self.training.step, text)
        show(text, sys.stderr)

    def _is_overdue(self) -> bool:
        """Whether a save is due in the first process and can start."""
        if not self.process.is_main or self.checkpoints.busy:
            return False
        every_s, since_s = 60 * self.settings.checkpoint_minutes, time.monotonic() - self.last_save
        if CHECKPOINT in self.refused:
            return since_s >= min(every_s or RETRY_S, RETRY_S)
        return bool(0 < every_s <= since_s)

    def _is_spoiled(self, batch: LoadedBatch) -> bool:
        return batch.images is None or len(self.unreadable) > self.settings.max_unreadable

    def _log(self, speed: Throughput) -> None:
        """Reads the losses since the last log line (waits for the device), checks them and logs their mean."""
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
            if training.gradient_norm is not None:
                numbers["gradient_norm"] = float(training.gradient_norm)
            numbers["memory_gib"] = peak_memory_gib(self.process.device)
            if count := training.not_finite[0]:
                numbers["not_finite"] = count
            if self.stopped_s:
                numbers["save_ms"], self.stopped_s = 1e3 * self.stopped_s, 0.0
            log, epoch = self.log, step / training.steps_per_epoch
            self._write("metrics.jsonl", lambda: log.metrics(step, epoch, numbers))
            for warning in self.health.of_numbers(step, numbers):
                self._warn("warning", warning)

    def _report(self, epoch: int) -> None:
        self.watchdog.expect("measuring and drawing", STARTING_S)
        self._write("pictures", lambda: self.training.report(epoch, self.log))
        self.training.start_training()

    def _leave_out(self) -> None:
        """Reports a skipped step and, with `--on-nan rollback`, loads the last checkpoint's weights."""
        training = self.training
        _, recent = training.not_finite
        text = f"the loss of step {training.step} or its gradient is not finite, the step is skipped"
        if len(recent) > MOST_NOT_FINITE:
            self._refuse(f"{text}; {len(recent)} of the last {RECENT_STEPS} steps were not finite")
        if self.settings.on_nan == "rollback":
            self.watchdog.expect("reading the last checkpoint", SAVING_S)
            self._check_saved(wait=True)
            path, saved = self.folder.read_newest()
            if path is None or saved is None:
                self._refuse(f"{text}; there is no checkpoint to roll back to")
            training.load(saved)
            text += f"; the weights are those of step {saved['step']} again"
        if self.log:
            self._warn("not_finite", text)

    def _refuse(self, problem: str) -> NoReturn:
        with suppress(CannotWrite, SpoiledWeights):
            self.checkpoints.wait()
        newest = self.checkpoints.newest()
        good = f"the last good checkpoint is {newest.resolve()}" if newest else "there is no checkpoint yet"
        clip = "lower --base-lr or --clip-grad" if self.settings.clip_grad else "lower --base-lr, set --clip-grad"
        others = "" if self.settings.on_nan != "stop" else ", or --on-nan skip"
        raise UserError(f"{problem}; {good}; {clip}, or use --precision float32{others}")

    def _save(self) -> None:
        """Starts to write a checkpoint."""
        self._check_saved(wait=True)
        since = time.perf_counter()
        self.checkpoints.start_saving(self.training.state(), self.training.step)
        self.stopped_s = max(self.stopped_s, time.perf_counter() - since)

    def _check_saved(self, *, wait: bool) -> None:
        """Handles the result of a started save, once it has ended or, with `wait`, after waiting for it."""
        if self.checkpoints.pending and (wait or not self.checkpoints.busy):
            self._write(CHECKPOINT, self.checkpoints.wait)

    def _save_last(self) -> None:
        """Writes the last checkpoint. On a full disk it tries for some time, since the latest steps depend on it."""
        state, step = self.training.state(), self.training.step
        assert self.log
        for tries_left in reversed(range(LAST_TRIES)):
            self._write(CHECKPOINT, lambda: self.checkpoints.save(state, step))
            self._write("metrics.jsonl", self.log.lines.flush)
            if not self.log.lines.kept and CHECKPOINT not in self.refused:
                return
            if self.stop.signal or not tries_left:
                break
            self.watchdog.expect("waiting for room on the disk", STARTING_S)
            time.sleep(LAST_TRIES_S)
        if problem := self.refused.get(CHECKPOINT):
            raise UserError(f"{problem}; later steps are lost; make room, then start again")

    def _write(self, what: str, write: Callable[[], object]) -> None:
        """Writes. A failure ends the run or is reported once, as `--on-full-disk` says."""
        try:
            write()
        except SpoiledWeights as error:
            self._refuse(str(error))
        except (OSError, CannotWrite) as error:
            text = str(error)
            if not isinstance(error, CannotWrite):
                text = f"cannot write {what}: {text} ({free_gib(self.folder.path):.1f} GiB free)"
            if self.settings.on_full_disk == "stop":
                saved = "" if what == CHECKPOINT else f"{self._save_at_the_end()}; "
                raise UserError(f"{text}; {saved}make room or change --output, then start again") from error
            if not self.refused or (what == CHECKPOINT and what not in self.refused):
                self._warn("warning", f"{text}; continuing without it, and trying again later")
            self.refused[what] = text
        else:
            # A checkpoint takes the most space, so everything can be written again.
            before, self.refused = (
                self.refused,
                {} if what == CHECKPOINT else {other: why for other, why in self.refused.items() if other != what},
            )
            if before and not self.refused:
                self._warn("warning", f"{what} could be written again")

    def _save_at_the_end(self) -> str:
        """Saves in the first process, unless inside a step. Returns a line about the result."""
        step = self.training.step
        if self.log is None or self.in_step or not step:
            return self._how_to_continue()
        with suppress(OSError):
            self.log.lines.flush()
        try:
            if self.process.device.type == "cuda":  # may hang if another process is gone; before the limit for saving starts
                torch.cuda.synchronize()
            self.watchdog.expect("saving", SAVING_S)
            path = self.checkpoints.save(self.training.state(), step)
        except Exception as error:  # also of a failed device; the first error must be reported as well
            return first_line(error)
        return f"saved {path} after step {step}; the same command continues from there"

    def _how_to_continue(self) -> str:
        newest = self.checkpoints.newest()
        if newest is None:
            return "there is no checkpoint yet; the same command starts again"
        return f"the same command continues from {newest.resolve().name}"

    def _explain(self, error: Exception) -> None:
        """Turns known problems of the machine or of other processes into one line."""
        saved = self._save_at_the_end()
        if problem := problem_of(error):
            raise UserError(f"{problem}; {saved}") from error
        if self.process.world > 1 and is_of_others(error):
            raise UserError(
                f"another process of this run ended or does not answer, see its output ({first_line(error)[:120]}); {saved}"
            ) from error
        show(f"an unexpected error after step {self.training.step}; {saved}", sys.stderr)

    def _leave(self, *, spoiled: bool) -> int:
        log, step = self.log, self.training.step
        saved = self._save_at_the_end()
        self.watchdog.expect("saving", SAVING_S)
        if log and step:
            with suppress(OSError, CannotWrite):
                log.plot()
        if spoiled:
            listed = "\n  ".join(sorted(self.unreadable)) or "in another process, see its output"
            raise UserError(
                f"{len(self.unreadable)} images cannot be read, more than --max-unreadable {self.settings.max_unreadable} or "
                f"too many in a row; repair or remove them ({saved}):\n  {listed}"
            )
        number = self.stop.signal or signal.SIGTERM  # this process's signal, or another's
        if log:
            name = signal.Signals(number).name
            self.notes.add("stopped", step, f"{name}: {saved}")
            log.finish(f"{name}: {saved}")
        return 128 + number


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory: torch's on a GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def command_line(process: Process, command: str) -> str:
    """The command line of this process, for people to copy."""
    launcher = f"{python_command()} -m"
    if process.world > 1:
        launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', process.world)} -m"
    return f"{launcher} sparkme.{command} {shlex.join(sys.argv[1:])}".strip()


def start_wandb(settings: TrainingSettings, folder: Path) -> Any:
    """A run of Weights & Biases, which a resumed run continues. Raises UserError."""
    import wandb  # noqa: PLC0415  (optional)

    path = folder / "wandb-run-id"
    try:
        name = path.read_text().strip() if path.is_file() else ""
        run = wandb.init(
            project="sparkme", name=folder.name, dir=str(folder), config=to_config(settings), id=name or None, resume="allow"
        )
        path.write_text(run.id + "\n")
    except Exception as error:  # of the service, of the network, of the settings
        raise UserError(f"--wandb: {first_line(error)}; leave it out, or set WANDB_MODE=offline") from error
    return run


class Outcome(NamedTuple):
    """The exit code and the run folder."""

    code: int
    folder: Path


def run_training(create: Callable[[], Training], hang_seconds: float) -> Outcome:
    """Creates and runs a training, then leaves the process group."""
    try:
        with user_errors(), Watchdog(hang_seconds).watch():
            training = create()
        code = Loop(training).run()
    except BaseException:
        stop_process(in_order=False)
        raise
    stop_process()
    return Outcome(code, training.folder.path)
