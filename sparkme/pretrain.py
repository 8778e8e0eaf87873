"""Pretrains a convolutional network on images without labels, with SparK on sparse convolutions.

    python -m sparkme.pretrain                                             # on scikit-image's photographs, no data needed
    python -m sparkme.pretrain --data photos/ --model convnext_tiny        # one GPU, or the CPU
    torchrun --nproc-per-node 8 -m sparkme.pretrain --data imagenet/train  # eight GPUs

The same command again continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkme.errors import UserError, first_line, python_command, run_command, user_errors
from sparkme.training.config import FIXED, OLDER, RECIPES, as_text, create_parser, flag_of, output_folder, resolve_config
from sparkme.training.distributed import Process, start_process, stop_process, synchronise_batch_norms

if TYPE_CHECKING:
    from sparkme.data.dataset import Batch
    from sparkme.masked import MaskedAutoencoder
    from sparkme.training.log import RunLog, Throughput


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    if args.list_models is not None:
        return run_command(lambda: list_models(args.list_models))
    return run_command(lambda: pretrain(args))


def list_models(pattern: str) -> int:
    """Prints the names of networks that are known to work. Returns the exit code."""
    from sparkme.models import model_names

    if not (names := model_names(pattern)):
        raise UserError(f"--list-models {pattern} matches none of the networks that were tried; any other may be tried, too")
    print("\n".join(names))
    return 0


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


class Run:
    """One pretraining run.

    Args:
        args: the command line.
        process: this process.

    Raises:
        UserError, ValueError: what was asked for cannot be done; says what to change.
    """

    def __init__(self, args: argparse.Namespace, process: Process) -> None:
        from sparkme.data.dataset import CropDataset, Statistics, estimate_statistics
        from sparkme.data.images import demo_photographs, find_images
        from sparkme.training.build import build_network, load_weights
        from sparkme.training.checkpoint import Checkpoints, load_checkpoint
        from sparkme.training.memory import keep_freed_memory
        from sparkme.training.optimizer import create_optimizer

        if process.device.type == "cpu":
            keep_freed_memory()
        self.process, self.stop = process, StopRequest(announce=process.is_main)
        self.folder = output_folder(args)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", args.keep_checkpoints)
        paths = find_images(args.data, leave_out=self.folder) if args.data else demo_photographs()
        newest = self.checkpoints.newest() if args.resume else None
        saved = load_checkpoint(newest) if newest else None
        self.config = config = resolve_config(args, len(paths), process, saved["config"] if saved else None)
        if config["mean"] is None:
            found = Statistics()
            if config["channels"] != 3:
                found = estimate_statistics(paths, config["channels"], config["background"], seed=config["seed"])
            config |= {"mean": [*found.mean], "std": [*found.std]}
        self.statistics = Statistics(tuple(config["mean"]), tuple(config["std"]))
        if saved is not None:
            check_same_run(saved["config"], config, newest)
            config["init"] = saved["config"].get("init")  # it has started from that, whatever the command says now

        torch.manual_seed(config["seed"])
        self.network = build_network(config)
        self._check_batch_norm()
        self.init_report = ""
        self.ignored_init = args.init if saved is not None and str(args.init) != str(config["init"]) else None
        if args.init and saved is None:
            self.init_report = load_initial_weights(self.network, args.init, config["model"])
        self.network.to(process.device)
        self.network.encoder.set_engine(config["engine"])
        self.optimizer = create_optimizer(
            config["optimizer"], self.network, beta2=config["beta2"], clip_grad=config["clip_grad"] or None
        )
        self.steps_per_epoch = config["samples_per_epoch"] // config["batch_size"]
        self.total_steps = config["epochs"] * self.steps_per_epoch
        self.step = 0
        if not any(p.requires_grad for p in self.network.encoder.parameters()):
            raise UserError(
                f"--model {config['model']}: all its parameters are frozen (requires_grad is False): nothing to train"
            )
        if saved is not None:
            try:
                load_weights(self.network, saved["model"])
                self.optimizer.load_state_dict(saved["optimizer"])
            except (ValueError, KeyError, RuntimeError) as error:
                raise UserError(f"{newest}: {first_line(error)}; use another --output, or --no-resume to start anew") from error
            self.step = saved["step"]

        if process.world > 1 and process.device.type == "cuda":
            self.network = synchronise_batch_norms(self.network)
        if config["compile"]:
            if self.network.encoder.engine.name == "minkowski":
                raise UserError("--compile cannot follow MinkowskiEngine; use --engine cuda_ext or masked-dense")
            self.network.compile_parts()
        self.model: nn.Module = DistributedDataParallel(self.network) if process.world > 1 else self.network
        self.dataset = CropDataset(
            paths,
            self.network.input_size,
            min_scale=config["crop_scale"],
            seed=config["seed"],
            channels=config["channels"],
            background=config["background"],
        )
        self.unreadable: set[str] = set()
        if process.is_main:
            self._make_folder(anew=not args.resume)
            self._introduce(saved)

    def train(self) -> int:
        """Steps, logs, draws and saves to the end, or until asked to stop. Returns the exit code."""
        from sparkme.data.dataset import EpochSampler, create_loader
        from sparkme.training.checkpoint import free_gib
        from sparkme.training.log import RunLog, Throughput

        config, process = self.config, self.process
        if self.step >= self.total_steps:
            if process.is_main:
                print(f"nothing left to do: {self.folder} is trained for {config['epochs']} epochs; --no-resume starts anew")
            return 0
        remaining = range(self.step, self.total_steps)
        sampler = EpochSampler(
            len(self.dataset), config["samples_per_epoch"], config["batch_size"], config["seed"],
            remaining, process.rank, process.world,
        )  # fmt: skip
        on_gpu = process.device.type == "cuda"
        loader = create_loader(self.dataset, sampler, workers=config["workers"], pin_memory=on_gpu)
        log = None
        speed = Throughput(config["batch_size"], self.total_steps)
        losses: list[Tensor] = []  # of the steps since the last log line, still on the device
        last_save = time.monotonic()
        self.model.train()
        try:
            if process.is_main:
                log = RunLog(self.folder, first_step=self.step, total_steps=self.total_steps, bar=sys.stderr.isatty())
            speed.restart(self.step)
            for batch in loader:
                self._report_unreadable(batch, log)
                overdue = 0 < 60 * config["checkpoint_minutes"] <= time.monotonic() - last_save
                stop, unreadable, overdue = process.agree(bool(self.stop.signal), self._is_spoiled(batch), overdue)
                if stop or unreadable:
                    self._log(log, losses, speed)
                    return self._leave(log, unreadable=unreadable)

                losses.append(self._train_step(batch.images))
                self.step += 1
                if log:
                    log.step()
                epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
                done = self.step == self.total_steps
                draw = in_epoch == 0 and self._panel_is_due(epoch)
                save = done or overdue or (in_epoch == 0 and not config["checkpoint_minutes"])
                if draw or save or self.step == 1 or self.step % config["log_steps"] == 0:
                    self._log(log, losses, speed)
                if save:
                    last_save = time.monotonic()
                if log and save:
                    self._save()
                if log and draw:
                    self._draw_panel(log, epoch)
                if log and (save or draw):
                    log.plot_loss()
                if save or draw:
                    speed.restart(self.step)
            if log:
                last = self.checkpoints.last
                skipped = f"; images that could not be read: {len(self.unreadable)}" if self.unreadable else ""
                log.finish(f"done: {last}{skipped}\npictures: {self.folder / 'loss.png'}, {self.folder / 'reconstructions'}\n"
                           f"next: {python_command()} -m sparkme.export {last}")  # fmt: skip
            return 0
        except OSError as error:  # of the log or of a picture
            saved = f"saved {self._save()}" if process.is_main else "the first process saves"
            raise UserError(f"{error} ({free_gib(self.folder):.1f} GiB free); {saved}; make room, then start again") from error
        finally:
            if log:
                with suppress(OSError):
                    log.close()

    def _train_step(self, images: Tensor) -> Tensor:
        """One update of the weights on (B, C, H, W) images, bytes or floats in [0, 1].

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
                    loss = self.model(normalise(part, self.statistics), generator=generator) / len(parts)
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
        ends = RECIPES[config["recipe"]].rate_ends
        return {
            "learning_rate": learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total, start=ends[0], end=ends[1]),
            "weight_decay": weight_decay(step, start=decay, end=decay_end, total_steps=total),
        }

    def _report_unreadable(self, batch: Batch, log: RunLog | None) -> None:
        for problem in batch.unreadable:
            if problem not in self.unreadable:
                self.unreadable.add(problem)
                if log:
                    log.warn(f"skipped unreadable image {problem}")
                else:
                    print(f"skipped unreadable image {problem}", file=sys.stderr, flush=True)

    def _is_spoiled(self, batch: Batch) -> bool:
        return batch.images is None or len(self.unreadable) > self.config["max_unreadable"]

    def _log(self, log: RunLog | None, losses: list[Tensor], speed: Throughput) -> None:
        """Reads the losses of the last steps, which waits for the device, checks them, and writes their mean."""
        if not losses:
            return
        values = self.process.mean(torch.stack(losses)).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                self._refuse(f"the loss of step {self.step - len(values) + i + 1} is {value}")
        losses.clear()
        if log:
            numbers = {"loss": sum(values) / len(values), **self._rates(self.step - 1), **speed.report(self.step)}
            log.metrics(self.step, self.step / self.steps_per_epoch, numbers)

    def _refuse(self, problem: str) -> NoReturn:
        newest = self.checkpoints.newest()
        good = f"the last good checkpoint is {newest.resolve()}" if newest else "there is no checkpoint yet"
        clip = "lower --base-lr or --clip-grad" if self.config["clip_grad"] else "lower --base-lr, set --clip-grad"
        raise UserError(f"{problem}; {good}; {clip}, or use --precision float32")

    def _panel_is_due(self, epoch: int) -> bool:
        every = self.config["panel_epochs"]
        return bool(every) and (epoch % every == 0 or epoch == self.config["epochs"])

    def _draw_panel(self, log: RunLog, epoch: int) -> None:
        from torchvision.utils import save_image

        from sparkme.data.dataset import normalise, preview_images
        from sparkme.training.panel import reconstruction_panel

        images = preview_images(
            self.dataset.paths, self.network.input_size, 6, self.config["channels"], self.config["background"]
        ).to(self.process.device)
        if not len(images):
            return
        generator = torch.Generator().manual_seed(self.config["seed"])
        active = self.network.random_active(len(images), generator)
        with self._precision():
            panel = reconstruction_panel(
                self.network, normalise(images, self.statistics), active.to(images.device), self.statistics
            )
        path = self.folder / "reconstructions" / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(panel, path)
        log.picture("reconstructions", panel, self.step)

    def _save(self) -> Path:
        """Writes a checkpoint, unless the weights are spoiled: the loss of a step says nothing of its update."""
        weights = self.network.state_dict()
        tensors = [value for value in weights.values() if isinstance(value, Tensor)]  # a module may keep other things
        finite = torch.stack([value.isfinite().all() for value in tensors if value.is_floating_point()])
        if not finite.all():
            self._refuse(f"the weights are not finite after step {self.step}")
        state = {"model": weights, "optimizer": self.optimizer.state_dict(), "config": self.config}
        return self.checkpoints.save(state, self.step)

    def _leave(self, log: RunLog | None, *, unreadable: bool) -> int:
        saved = f"saved {self._save()} after step {self.step}" if log and self.step else "nothing to save yet"
        if log:
            with suppress(OSError):
                log.plot_loss()
        if unreadable:
            listed = "\n  ".join(sorted(self.unreadable)) or "those of another process, see its lines"
            raise UserError(
                f"{len(self.unreadable)} images cannot be read, more than --max-unreadable {self.config['max_unreadable']} or "
                f"too many in a row; mend or remove them ({saved}):\n  {listed}"
            )
        number = self.stop.signal or signal.SIGTERM  # of another process, if not of this one
        if log:
            log.finish(f"{signal.Signals(number).name}: {saved}; the same command continues from here")
        return 128 + number

    def _check_batch_norm(self) -> None:
        """A batch norm needs two numbers to average. The deepest map, which is the smallest, must have as many pixels."""
        config, encoder = self.config, self.network.encoder
        per_pass = config["batch_size"] // (self.process.world * config["accumulate"])
        pixels = per_pass * self.network.keep * (self.network.patch // encoder.strides[-1]) ** 2
        if pixels < 2 and encoder.norm == "bn":
            raise UserError(
                f"--batch-size {config['batch_size']} leaves batch norm one visible pixel at stride {encoder.strides[-1]}; "
                "raise it or --input-size, or lower --mask-ratio"
            )

    def _make_folder(self, *, anew: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if anew:
                written = ("checkpoints/*.pt", "metrics.jsonl", "tensorboard/events.*", "reconstructions/epoch_*.png")
                for old in (path for pattern in written for path in self.folder.glob(pattern)):
                    old.unlink()
            (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to --output {self.folder}: {error}") from error

    def _introduce(self, saved: dict[str, Any] | None) -> None:
        """Prints what will be done, and why where something was chosen."""
        config, network, process = self.config, self.network, self.process
        encoder, total = network.encoder, math.prod(network.num_patches)
        rate = config["base_lr"] * config["batch_size"] / 256
        threads = f", threads: {torch.get_num_threads()}" if process.device.type == "cpu" else ""
        in_float32 = "" if encoder.engine.bf16 or config["precision"] == "float32" else "; the encoder computes in float32"
        lines = {
            "data": f"{len(self.dataset)} images in {config['data'] or 'scikit-image, its photographs'}, "
            f"{config['samples_per_epoch']} crops an epoch",
            "recipe": RECIPES[config["recipe"]].name,
            "network": f"{config['model']}, {encoder.channels} channels at strides {encoder.strides}; {network.keep} of "
            f"{total} patches of {network.patch} pixels visible ({100 * network.keep / total:.0f} %)",
            "training": f"{config['epochs']} epochs of {self.steps_per_epoch} steps, batch {config['batch_size']}, peak "
            f"learning rate {rate:.2g}",
            "machine": f"{process.world} x {process.device.type}{threads}, {config['precision']}"
            + (", compiled: the first steps take minutes" if config["compile"] else ""),
            "engine": f"{encoder.engine.name}: {encoder.engine_reason}{in_float32}",
            "output": f"{self.folder}" + (f", resumed after step {self.step}" if saved else ""),
        }
        if self.init_report:
            lines["init"] = self.init_report
        for name, text in lines.items():
            print(f"{name:9s} {text}")
        for name, before in saved["config"].items() if saved else ():
            if config.get(name) != before:
                print(f"{'changed':9s} {name.replace('_', ' ')} from {as_text(before)} to {as_text(config.get(name))}")
        if rate * self.total_steps < 0.2:  # a step changes a weight by about this share of its size
            advice = "raise --base-lr (make demo uses 0.25), --epochs or --samples-per-epoch"
            print(f"{'note':9s} {self.total_steps} steps at this rate will hardly move the weights; {advice}")
        if saved and self.ignored_init:
            print(f"{'note':9s} --init {self.ignored_init} is not used: this run goes on from its checkpoint")
        if saved and saved["step"] and not self.checkpoints.last.exists():
            print(f"{'note':9s} {self.checkpoints.last} was missing; continuing from the newest checkpoint beside it")
        sys.stdout.flush()


def check_same_run(saved: dict[str, Any], config: dict[str, Any], path: Path | None) -> None:
    """Refuses to continue the run of another network or with other steps.

    Raises:
        UserError: names the first flag that differs.
    """
    for name in FIXED:
        before = saved.get(name, OLDER.get(name))
        if before != config[name]:
            raise UserError(
                f"{path} was trained with {flag_of(name)} {as_text(before)}, now it is {as_text(config[name])}; use the same, "
                "another --output, or --no-resume to start anew"
            )


def load_initial_weights(network: MaskedAutoencoder, path: Path, model: str) -> str:
    """Starts from weights in a file: of torchvision, timm, the ConvNeXt authors or another library of `sparkme.interop`, of the
    official SparK code (an encoder alone, or the whole network), or a checkpoint of this project.

    Args:
        network: takes the weights.
        path: the file.
        model: the network's name.

    Returns:
        What matched, and what did not, in one line.

    Raises:
        UserError: no such file, or weights of another network.
    """
    from sparkme.interop.files import read_any_state
    from sparkme.interop.libraries import adopt
    from sparkme.models import library_of

    encoder = network.encoder
    try:
        state, checkpoint = read_any_state(path)
        if checkpoint is not None:
            kind = "a checkpoint of sparkme"
            wrong = [n for n in encoder.state_dict() if f"encoder.{n}" not in state]
            if wrong:
                raise ValueError(f"a checkpoint of another network ({checkpoint['model']}): it has no {', '.join(wrong[:3])}")
            network.load_state_dict({n: v for n, v in state.items() if n.startswith("encoder.")}, strict=False)
            rest, unused = {n: v for n, v in state.items() if not n.startswith("encoder.")}, []
            matched = len(state) - len(rest)
        else:
            own = encoder.dense_state_dict()
            state, rest, kind = adopt(state, own, library_of(model))
            unused = encoder.load_dense_state_dict(state)
            matched = len(own)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--init {path}: {first_line(error)}") from error
    theirs = network.state_dict()
    fitting = {n: v for n, v in rest.items() if n in theirs and theirs[n].shape == v.shape}
    network.load_state_dict(fitting, strict=False)
    unused += [name for name in rest if name not in fitting]
    random = [name for name in theirs if not name.startswith("encoder.") and name not in fitting]
    report = f"{path}, names of {kind}: {matched + len(fitting)} tensors taken"
    report += f"; not used: {_some(unused)}" if unused else ""
    return report + (f"; random: {_some(random)}" if random else "")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


if __name__ == "__main__":
    sys.exit(main())
