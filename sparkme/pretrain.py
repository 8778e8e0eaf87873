"""Pretrains a convolutional network on images without labels, with SparK on sparse convolutions.

    python -m sparkme.pretrain                                             # a small run on photographs, no data needed
    python -m sparkme.pretrain --data photos/ --model convnext_tiny        # one GPU, or the CPU
    torchrun --nproc-per-node 8 -m sparkme.pretrain --data imagenet/train  # eight GPUs

The same command again continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkme.errors import UserError, run_command, user_errors
from sparkme.training.config import FIXED, as_text, create_parser, resolve_config
from sparkme.training.distributed import Process, start_process, stop_process

if TYPE_CHECKING:
    from sparkme.sparse.encoder import SparseEncoder


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: pretrain(args))


def pretrain(args: argparse.Namespace) -> int:
    """Trains, or continues, the run that the arguments describe. Returns the exit code."""
    process = start_process(args.device)
    try:
        with user_errors():
            run = Run(args, process)
        with run.stop.listen():
            return run.train()
    finally:
        stop_process()


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the run can save before it leaves; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listen(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


class Run:
    """One pretraining run.

    Args:
        args: the command line.
        process: this process.

    Raises:
        UserError, ValueError: what was asked for cannot be done; says what to change.
    """

    def __init__(self, args: argparse.Namespace, process: Process) -> None:
        from sparkme.data.dataset import CropDataset
        from sparkme.data.images import demo_photographs, find_images
        from sparkme.training.build import build_network
        from sparkme.training.checkpoint import Checkpoints
        from sparkme.training.optimizer import create_optimizer

        self.process, self.stop = process, StopRequest()
        paths = find_images(args.data) if args.data else demo_photographs()
        self.config = config = resolve_config(args, len(paths), process)
        self.folder = Path(config["output"])
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config["keep_checkpoints"])
        saved = self._saved_run() if args.resume else None

        torch.manual_seed(config["seed"])
        self.network = build_network(config)
        if args.init and saved is None:
            load_initial_weights(self.network.encoder, args.init)
        self.network.to(process.device)
        self.network.encoder.set_engine(config["engine"])
        self.optimizer = create_optimizer(
            config["optimizer"], self.network, beta2=config["beta2"], clip_grad=config["clip_grad"] or None
        )
        self.steps_per_epoch = config["samples_per_epoch"] // config["batch_size"]
        self.total_steps = config["epochs"] * self.steps_per_epoch
        self.step = 0
        if saved is not None:
            self.network.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]

        if process.world > 1 and process.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.model: nn.Module = DistributedDataParallel(self.network) if process.world > 1 else self.network
        self.dataset = CropDataset(paths, self.network.input_size, min_scale=config["crop_scale"], seed=config["seed"])
        self.unreadable: set[str] = set()
        if process.is_main:
            self._make_folder(anew=not args.resume)
            self._introduce(saved)

    def train(self) -> int:
        """Steps, logs, draws and saves to the end, or until asked to stop. Returns the exit code."""
        from sparkme.data.dataset import EpochSampler, create_loader
        from sparkme.training.log import RunLog, Throughput

        config, process = self.config, self.process
        if self.step >= self.total_steps:
            if process.is_main:
                print(f"nothing left to do: {self.folder} is trained for {config['epochs']} epochs", flush=True)
            return 0
        remaining = range(self.step, self.total_steps)
        sampler = EpochSampler(
            len(self.dataset), config["samples_per_epoch"], config["batch_size"], config["seed"],
            remaining, process.rank, process.world,
        )  # fmt: skip
        on_gpu = process.device.type == "cuda"
        loader = create_loader(self.dataset, sampler, workers=config["workers"], pin_memory=on_gpu)
        log = None
        if process.is_main:
            log = RunLog(self.folder, first_step=self.step, total_steps=self.total_steps, bar=sys.stderr.isatty())
        speed = Throughput(config["batch_size"], self.total_steps)
        losses: list[Tensor] = []  # of the steps since the last log line, still on the device
        last_save = time.monotonic()
        self.model.train()
        speed.restart(self.step)
        try:
            for batch in loader:
                losses.append(self._train_step(self._take(batch)))
                self.step += 1
                if log:
                    log.step()
                epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
                epoch_ends, done = in_epoch == 0, self.step == self.total_steps
                stopping = self._asked_to_stop(at_epoch_end=epoch_ends)
                draw = epoch_ends and self._panel_is_due(epoch)
                save = stopping or done or (epoch_ends and self._save_is_due(last_save))
                if draw or save or self.step % config["log_steps"] == 0:
                    mean_loss = self._check_finite(losses)
                    losses.clear()
                    if log:
                        rates = self._rates(self.step - 1)
                        values = {"loss": mean_loss, **rates, **speed.report(self.step)}
                        log.metrics(self.step, self.step / self.steps_per_epoch, values)
                if save and process.is_main:
                    self._save()
                if draw and log:
                    self._draw_panel(log, epoch)
                if (save or draw) and log:
                    log.plot_loss()
                if save:
                    last_save = time.monotonic()
                if stopping:
                    return self._leave(log)
                if save or draw:
                    speed.restart(self.step)
            if log:
                last = self.checkpoints.last
                log.say(f"done: {last}; export it with\n  python -m sparkme.export {last} --to torchvision")
            return 0
        finally:
            if log:
                log.close()

    def _train_step(self, images: Tensor) -> Tensor:
        """One update of the weights on (B, 3, H, W) uint8 images.

        Returns:
            The mean loss, scalar, on the device; nothing waits for it.
        """
        from sparkme.data.dataset import normalise
        from sparkme.training.optimizer import update_schedule
        from sparkme.training.random import seed_step

        config, process = self.config, self.process
        update_schedule(self.optimizer, **self._rates(self.step))
        generator = seed_step(config["seed"], process.rank, self.step, process.device)
        parts = images.to(process.device, non_blocking=True).chunk(config["accumulate"])
        total = torch.zeros((), device=process.device)
        for i, part in enumerate(parts):
            with self._gradients_stay_here(until=len(parts) - 1, part=i):
                with self._precision():
                    loss = self.model(normalise(part), generator=generator) / len(parts)
                loss.backward()
            total += loss.detach()
        if config["optimizer"] == "adamw" and config["clip_grad"]:  # LAMB clips by itself
            nn.utils.clip_grad_norm_(self.network.parameters(), config["clip_grad"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _gradients_stay_here(self, *, until: int, part: int) -> AbstractContextManager[None]:
        """Processes exchange gradients at the last accumulation step only."""
        if isinstance(self.model, DistributedDataParallel) and part < until:
            return self.model.no_sync()
        return nullcontext()

    def _precision(self) -> AbstractContextManager[None]:
        bf16 = self.config["precision"] == "bf16"
        return torch.autocast(self.process.device.type, torch.bfloat16) if bf16 else nullcontext()

    def _rates(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay of a step."""
        from sparkme.training.optimizer import learning_rate, weight_decay

        config, total = self.config, self.total_steps
        peak = config["base_lr"] * config["batch_size"] / 256
        warmup = round(config["warmup_epochs"] * self.steps_per_epoch)
        decay, decay_end = config["weight_decay"], config["weight_decay_end"]
        return {
            "learning_rate": learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total),
            "weight_decay": weight_decay(step, start=decay, end=decay_end, total_steps=total),
        }

    def _take(self, batch: Any) -> Tensor:
        """The images of a batch; reports those that could not be read, and stops when they are too many."""
        for problem in batch.unreadable:
            if problem not in self.unreadable:
                self.unreadable.add(problem)
                print(f"skipped unreadable image {problem}", file=sys.stderr, flush=True)
        if batch.images is None or len(self.unreadable) > self.config["max_unreadable"]:
            if self.process.is_main and self.step:
                print(f"saved {self._save()}", flush=True)
            listed = "\n  ".join(sorted(self.unreadable))
            raise UserError(
                f"{len(self.unreadable)} images cannot be read; mend or remove them, or raise --max-unreadable "
                f"(now {self.config['max_unreadable']}):\n  {listed}"
            )
        images: Tensor = batch.images
        return images

    def _check_finite(self, losses: list[Tensor]) -> float:
        """Mean of the losses since the last log line. Reads them, which waits for the device."""
        values = self.process.mean(torch.stack(losses)).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                last = self.checkpoints.last
                good = f"the last good checkpoint is {last.resolve()}" if last.exists() else "there is no checkpoint yet"
                raise UserError(
                    f"the loss of step {self.step - len(values) + i + 1} is {value}; {good}; lower --base-lr or "
                    "--clip-grad, or use --precision float32"
                )
        return sum(values) / len(values)

    def _asked_to_stop(self, *, at_epoch_end: bool) -> bool:
        """Whether a signal came. Several processes ask each other, but not at every step."""
        if self.process.world > 1 and not at_epoch_end and self.step % self.config["log_steps"]:
            return False
        return self.process.any(bool(self.stop.signal))

    def _save_is_due(self, last_save: float) -> bool:
        return self.process.any(time.monotonic() - last_save >= 60 * self.config["checkpoint_minutes"])

    def _panel_is_due(self, epoch: int) -> bool:
        every = self.config["panel_epochs"]
        return bool(every) and (epoch % every == 0 or epoch == self.config["epochs"])

    def _draw_panel(self, log: Any, epoch: int) -> None:
        from torchvision.utils import save_image

        from sparkme.data.dataset import normalise, preview_images
        from sparkme.masking import random_active
        from sparkme.training.panel import reconstruction_panel

        images = preview_images(self.dataset.paths, self.network.input_size, 6).to(self.process.device)
        if not len(images):
            return
        generator = torch.Generator().manual_seed(self.config["seed"])
        active = random_active(len(images), self.network.num_patches, self.config["mask_ratio"], generator=generator)
        with self._precision():
            panel = reconstruction_panel(self.network, normalise(images), active.to(images.device))
        path = self.folder / "reconstructions" / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(panel, path)
        log.picture("reconstructions", panel, self.step)

    def _save(self) -> Path:
        state = {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "config": self.config}
        return self.checkpoints.save(state, self.step)

    def _leave(self, log: Any) -> int:
        number = self.stop.signal or signal.SIGTERM  # of another process, if not of this one
        if log:
            log.say(f"{signal.Signals(number).name}: saved {self.checkpoints.last} after step {self.step}; "
                    "the same command continues from here")  # fmt: skip
        return 128 + number

    def _saved_run(self) -> dict[str, Any] | None:
        """The state to continue from, if the run folder has one; refuses that of another run."""
        from sparkme.training.checkpoint import load_checkpoint

        if not self.checkpoints.last.exists():
            return None
        saved = load_checkpoint(self.checkpoints.last)
        for name in FIXED:
            before, now = saved["config"].get(name), self.config[name]
            if before != now:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{self.checkpoints.last} was trained with {flag} {as_text(before)}, now it is {as_text(now)}; use "
                    "the same, another --output, or --no-resume to start anew"
                )
        return saved

    def _make_folder(self, *, anew: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if anew:
                for old in [*(self.folder / "checkpoints").glob("*.pt"), self.folder / "metrics.jsonl"]:
                    old.unlink(missing_ok=True)
            (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to --output {self.folder}: {error}") from error

    def _introduce(self, saved: dict[str, Any] | None) -> None:
        """Prints what will be done, and why where something was chosen."""
        config, network, process = self.config, self.network, self.process
        encoder, total = network.encoder, math.prod(network.num_patches)
        rate = config["base_lr"] * config["batch_size"] / 256
        threads = f" with {torch.get_num_threads()} threads" if process.device.type == "cpu" else ""
        in_float32 = "" if encoder.engine.bf16 or config["precision"] == "float32" else "; the encoder computes in float32"
        lines = {
            "data": f"{len(self.dataset)} images in {config['data'] or 'scikit-image, its photographs'}, "
            f"{config['samples_per_epoch']} crops an epoch",
            "network": f"{config['model']}, {encoder.channels} channels at strides {encoder.strides}; {network.keep} of "
            f"{total} patches of {network.patch} pixels visible",
            "training": f"{config['epochs']} epochs of {self.steps_per_epoch} steps, batch {config['batch_size']}, peak "
            f"learning rate {rate:.2g}",
            "machine": f"{process.world} x {process.device.type}{threads}, {config['precision']}",
            "engine": f"{encoder.engine.name}: {encoder.engine_reason}{in_float32}",
            "output": f"{self.folder}" + (f", resumed after step {self.step}" if saved else ""),
        }
        for name, text in lines.items():
            print(f"{name:9s} {text}")
        for name, before in saved["config"].items() if saved else ():
            if config.get(name) != before:
                flag = "--" + name.replace("_", "-")
                print(f"{'changed':9s} {flag} from {as_text(before)} to {as_text(config.get(name))}")
        sys.stdout.flush()


def load_initial_weights(encoder: SparseEncoder, path: Path) -> None:
    """Starts the encoder from a torchvision state dict.

    Raises:
        UserError: no such file, or weights of another model.
    """
    from sparkme.interop.files import read_state_dict

    try:
        encoder.load_dense_state_dict(read_state_dict(path))
    except ValueError as error:
        raise UserError(f"--init {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
