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
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkme.errors import UserError, run_command, user_errors

PAPER_EPOCHS, PAPER_BATCH, PAPER_WARMUP = 1600, 4096, 40


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparkme.pretrain",
        description="Pretrain a convolutional network on images without labels (SparK, ICLR 2023).",
        epilog="Defaults are the paper's recipe. The same command again resumes an interrupted run.",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="DIR",
                       help="folder of images, nested or flat, labels not needed; scikit-image's photographs if left out")
    group.add_argument("--crop-scale", type=float, metavar="S",
                       help="smallest share of an image's area in a crop (0.67; 0.1 for the photographs)")
    group.add_argument("--samples-per-epoch", type=int, metavar="N",
                       help="crops in an epoch (the number of images; 512 for the photographs)")
    group.add_argument("--max-unreadable", type=int, metavar="N",
                       help="stop when more images than this cannot be read (10, or 1%% of the images if that is more)")
    group.add_argument("--workers", type=int, metavar="N", help="processes that load images (as many as cores, at most 8)")

    group = parser.add_argument_group("network")
    group.add_argument("--model", default="resnet50", help="torchvision ResNet or ConvNeXt (%(default)s)")
    group.add_argument("--init", type=Path, metavar="FILE",
                       help="start from weights of the same torchvision model, .pth or .safetensors")
    group.add_argument("--input-size", type=int, nargs="+", default=[224], metavar="PIXELS",
                       help="side of the crops, or height and width (224)")
    group.add_argument("--patch", type=int, metavar="PIXELS", help="side of a patch (the network's total stride, 32)")
    group.add_argument("--mask-ratio", type=float, default=0.6, help="share of patches to hide (%(default)s)")
    group.add_argument("--decoder-width", type=int, default=768, help="channels of the decoder's input (%(default)s)")
    group.add_argument("--densify-norm", choices=("auto", "bn", "ln", "none"), default="auto",
                       help="norm before mask tokens are filled in (the network's own kind)")
    group.add_argument("--drop-path", type=float, metavar="P",
                       help="drop path of the deepest block (the paper's for this model, else 0)")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=PAPER_EPOCHS, help="(%(default)s)")
    group.add_argument("--warmup-epochs", type=float, help=f"linear warm-up ({PAPER_WARMUP}, at most a tenth of --epochs)")
    group.add_argument("--batch-size", type=int, metavar="N",
                       help="GLOBAL batch, over all processes and accumulation steps (128 per GPU or 32 per CPU process, "
                            f"up to the paper's {PAPER_BATCH} and the number of samples)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N",
                       help="split each process's batch into N forward passes, to save memory (%(default)s)")
    group.add_argument("--base-lr", type=float, default=2e-4, help="peak learning rate per 256 images (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=0.04, help="at the start (%(default)s)")
    group.add_argument("--weight-decay-end", type=float, default=0.2, help="at the end, by a cosine (%(default)s)")
    group.add_argument("--clip-grad", type=float, default=5.0, help="largest gradient norm; 0 for no limit (%(default)s)")
    group.add_argument("--optimizer", choices=("lamb", "adamw"), default="lamb", help="(%(default)s)")
    group.add_argument("--beta2", type=float, help="second moment's decay (0.95 with batch norm, 0.999 with layer norm)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    group.add_argument("--engine", choices=("auto", "minkowski", "masked-dense"), default="auto",
                       help="kernels of the encoder (%(default)s: the fastest that this machine has)")
    group.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                       help="autocast to bf16 where the engine can (auto: on GPUs that have it)")
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="DIR", help="run folder (runs/MODEL-SIZE)")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                       help="continue the run in --output; --no-resume starts it anew (%(default)s)")
    group.add_argument("--checkpoint-minutes", type=float, default=10.0, metavar="M",
                       help="save at the end of an epoch when the last save is older; 0 saves every epoch (%(default)s)")
    group.add_argument("--keep-checkpoints", type=int, default=3, metavar="N", help="(%(default)s)")
    group.add_argument("--panel-epochs", type=int, metavar="N",
                       help="draw reconstructions every N epochs; 0 never (ten times in a run)")
    group.add_argument("--log-steps", type=int, default=10, metavar="N", help="steps between log lines (%(default)s)")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: pretrain(args))


def pretrain(args: argparse.Namespace) -> int:
    """Trains, or continues, the run that the arguments describe. Returns the exit code."""
    from sparkme.training.distributed import start_process, stop_process

    process = start_process(args.device)
    try:
        with user_errors():
            run = Run(args, process)
        with run.stop.listen():
            return run.train()
    finally:
        stop_process()


@dataclass
class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the run can save before it leaves; a second one ends it at once."""

    signal: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)

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
    """One pretraining run: its configuration resolved, its data, network, optimiser and log set up, its state resumed."""

    def __init__(self, args: argparse.Namespace, process: Any) -> None:
        from sparkme.data.dataset import CropDataset, EpochSampler
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
        self._make_folder(anew=not args.resume)

        torch.manual_seed(config["seed"])
        self.network = build_network(config)
        if args.init and saved is None:
            load_initial_weights(self.network, args.init)
        self.network.to(process.device)
        self.network.encoder.set_engine(config["engine"])
        self.autocast = config["precision"] == "bf16"

        self.steps_per_epoch = config["samples_per_epoch"] // config["batch_size"]
        self.total_steps = config["epochs"] * self.steps_per_epoch
        self.images_per_process = config["batch_size"] // process.world
        beta2 = config["beta2"]
        self.optimizer = create_optimizer(
            config["optimizer"], self.network, beta2=beta2, clip_grad=config["clip_grad"] or None
        )
        self.step = 0
        if saved is not None:
            self._restore(saved)

        if process.world > 1 and process.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.model: nn.Module = DistributedDataParallel(self.network) if process.world > 1 else self.network
        self.dataset = CropDataset(
            paths, self.network.input_size, min_scale=config["crop_scale"], seed=config["seed"]
        )
        self.sampler = EpochSampler(
            len(paths), config["samples_per_epoch"], config["batch_size"], config["seed"],
            range(self.step, self.total_steps), process.rank, process.world,
        )  # fmt: skip
        self.unreadable: set[str] = set()
        if process.is_main:
            self._introduce(len(paths), resumed=saved is not None)

    def train(self) -> int:
        """Steps, logs, draws and saves to the end, or until asked to stop. Returns the exit code."""
        from sparkme.data.dataset import create_loader
        from sparkme.training.log import RunLog, Throughput

        if self.step >= self.total_steps:
            self._say(f"nothing left to do: {self.folder} is trained for {self.config['epochs']} epochs")
            return 0
        log = None
        if self.process.is_main:
            log = RunLog(self.folder, first_step=self.step, total_steps=self.total_steps, bar=sys.stderr.isatty())
        loader = create_loader(
            self.dataset, self.sampler, workers=self.config["workers"], pin_memory=self.process.device.type == "cuda"
        )
        log_steps = self.config["log_steps"]
        losses = torch.zeros(log_steps, device=self.process.device)
        pending = 0  # losses of steps that have not been logged yet
        speed = Throughput(self.config["batch_size"], self.total_steps)
        speed.restart(self.step)
        last_save = time.monotonic()
        self.model.train()
        try:
            for batch in loader:
                images = self._take(batch)
                losses[pending] = self._train_step(images)
                pending += 1
                self.step += 1
                epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
                done, epoch_ends = self.step == self.total_steps, in_epoch == 0
                if log:
                    log.step()
                if pending == log_steps or done or self.stop.signal or epoch_ends:
                    mean_loss = self._check_finite(losses[:pending])
                    if log and (pending == log_steps or done):
                        log.metrics(self.step, self.step / self.steps_per_epoch, {
                            "loss": mean_loss, **self._rates(self.step - 1), **speed.report(self.step)})  # fmt: skip
                    pending = 0 if pending == log_steps or done else pending
                    if self.process.any(bool(self.stop.signal)):
                        return self._leave(log)
                if epoch_ends:
                    overdue = time.monotonic() - last_save >= 60 * self.config["checkpoint_minutes"]
                    if self._panel_is_due(epoch) and log:
                        self._draw_panel(log, epoch)
                    if self.process.any(overdue) or done:
                        if log:
                            self._save()
                            log.plot_loss()
                        last_save = time.monotonic()
                    speed.restart(self.step)
            if log:
                log.plot_loss()
                log.say(f"done: weights in {self.checkpoints.last}; export them with\n"
                        f"  python -m sparkme.export {self.checkpoints.last} --to torchvision "
                        f"--output {self.config['model']}.safetensors")  # fmt: skip
            return 0
        finally:
            if log:
                log.close()

    def _train_step(self, images: Tensor) -> Tensor:
        """One update of the weights. Returns the mean loss, on the device; nothing waits for it."""
        from sparkme.data.dataset import normalise
        from sparkme.masking import random_active
        from sparkme.training.optimizer import update_schedule
        from sparkme.training.random import seed_step

        config, device = self.config, self.process.device
        rates = self._rates(self.step)
        update_schedule(self.optimizer, rates["learning_rate"], rates["weight_decay"])
        generator = seed_step(config["seed"], self.process.rank, self.step, device)
        parts = images.to(device, non_blocking=True).chunk(config["accumulate"])
        total = torch.zeros((), device=device)
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            sync = nullcontext() if is_last or self.process.world == 1 else self.model.no_sync()  # type: ignore[operator]
            active = random_active(len(part), self.network.num_patches, config["mask_ratio"], generator=generator)
            with sync:
                with self._precision():
                    loss = self.model(normalise(part), active) / len(parts)
                loss.backward()
            total += loss.detach()
        if config["optimizer"] == "adamw" and config["clip_grad"]:
            nn.utils.clip_grad_norm_(self.network.parameters(), config["clip_grad"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.process.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def _rates(self, step: int) -> dict[str, float]:
        from sparkme.training.optimizer import learning_rate, weight_decay

        config = self.config
        peak = config["base_lr"] * config["batch_size"] / 256
        warmup = round(config["warmup_epochs"] * self.steps_per_epoch)
        return {
            "learning_rate": learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=self.total_steps),
            "weight_decay": weight_decay(
                step, start=config["weight_decay"], end=config["weight_decay_end"], total_steps=self.total_steps
            ),
        }

    def _take(self, batch: Any) -> Tensor:
        """The images of a batch; counts those that could not be read, and stops when they are too many."""
        new = [problem for problem in dict.fromkeys(batch.unreadable) if problem not in self.unreadable]
        for problem in new:
            self.unreadable.add(problem)
            print(f"skipped unreadable image {problem}", file=sys.stderr, flush=True)
        if len(self.unreadable) > self.config["max_unreadable"] or batch.images is None:
            self._save_before_leaving()
            listed = "\n  ".join(sorted(self.unreadable))
            raise UserError(
                f"{len(self.unreadable)} images cannot be read; mend or remove them, or raise --max-unreadable "
                f"({self.config['max_unreadable']}):\n  {listed}"
            )
        images: Tensor = batch.images
        return images

    def _check_finite(self, losses: Tensor) -> float:
        """Mean of the losses since the last log line. Reads them from the device, which waits for it."""
        values = self.process.mean(losses).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                step = self.step - len(values) + i + 1
                last = self.checkpoints.last.resolve() if self.checkpoints.last.exists() else None
                good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
                raise UserError(
                    f"the loss of step {step} is {value}; {good}; lower --base-lr or --clip-grad, or use "
                    "--precision float32"
                )
        return sum(values) / len(values)

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

    def _save_before_leaving(self) -> None:
        if self.process.is_main and self.step:
            self._say(f"saved {self._save()}")

    def _leave(self, log: Any) -> int:
        name = signal.Signals(self.stop.signal).name if self.stop.signal else "a signal to another process"
        if log:
            log.say(f"{name}: saved {self._save()} after step {self.step}; the same command continues from here")
            log.plot_loss()
        return 128 + (self.stop.signal or signal.SIGTERM)

    def _saved_run(self) -> dict[str, Any] | None:
        """The state to continue from, if the run folder has one; refuses that of another run."""
        from sparkme.training.checkpoint import load_checkpoint

        if not self.checkpoints.last.exists():
            return None
        saved = load_checkpoint(self.checkpoints.last)
        for name in _FIXED:
            if saved["config"].get(name) != self.config[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{self.checkpoints.last} was trained with {flag} {_text(saved['config'].get(name))}, now "
                    f"{_text(self.config[name])}; use that, another --output, or --no-resume"
                )
        return saved

    def _make_folder(self, *, anew: bool) -> None:
        try:
            if self.process.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                if anew:
                    for old in (self.folder / "checkpoints").glob("*.pt"):
                        old.unlink()
                    (self.folder / "metrics.jsonl").unlink(missing_ok=True)
                (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to --output {self.folder}: {error}") from error

    def _restore(self, saved: dict[str, Any]) -> None:
        self.network.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self._introduced_changes = {
            name: (value, self.config[name])
            for name, value in saved["config"].items()
            if name in self.config and self.config[name] != value
        }

    def _introduce(self, num_images: int, *, resumed: bool) -> None:
        config, encoder, process = self.config, self.network.encoder, self.process
        visible, total = self.network.keep, math.prod(self.network.num_patches)
        rate = config["base_lr"] * config["batch_size"] / 256
        source = config["data"] or "scikit-image's photographs"
        threads = f" ({torch.get_num_threads()} threads)" if process.device.type == "cpu" else ""
        print(f"data      {num_images} images in {source}, {config['samples_per_epoch']} crops an epoch")
        print(f"network   {config['model']}, maps of {encoder.channels} channels at strides {encoder.strides}; "
              f"{visible} of {total} patches of {self.network.patch} pixels visible")
        print(f"training  {config['epochs']} epochs of {self.steps_per_epoch} steps, batch {config['batch_size']}, "
              f"peak learning rate {rate:.2g}")
        print(f"machine   {process.world} x {process.device.type}{threads}, {config['precision']}, "
              f"engine {encoder.engine.name} ({encoder.engine_reason})")
        print(f"output    {self.folder}" + (f", resumed after step {self.step}" if resumed else ""))
        for name, (before, now) in getattr(self, "_introduced_changes", {}).items():
            print(f"          --{name.replace('_', '-')} changed from {_text(before)} to {_text(now)}")
        sys.stdout.flush()  # fmt: skip

    def _say(self, text: str) -> None:
        if self.process.is_main:
            print(text, flush=True)


# What a resumed run must share with its checkpoint: the network, and what a step is.
_FIXED = ("model", "input_size", "patch", "decoder_width", "densify_norm", "optimizer", "batch_size",
          "samples_per_epoch", "seed")  # fmt: skip


def resolve_config(args: argparse.Namespace, num_images: int, process: Any) -> dict[str, Any]:
    """The configuration with every default filled in, as config.json and the checkpoints keep it.

    Raises:
        UserError: values that do not fit together; names the flag.
    """
    from sparkme.models import PAPER_DROP_PATH

    config = {name: value for name, value in vars(args).items() if name not in ("resume", "init")}
    on_gpu = process.device.type == "cuda"
    if len(args.input_size) > 2:
        raise UserError(f"--input-size takes a side, or height and width; got {len(args.input_size)} numbers")
    config["input_size"] = [args.input_size[0], args.input_size[-1]]
    for name in ("epochs", "accumulate", "log_steps", "keep_checkpoints", "batch_size", "samples_per_epoch", "patch"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {config[name]} must be at least 1")
    if config["crop_scale"] is None:
        config["crop_scale"] = 0.67 if args.data else 0.1
    if not 0 < config["crop_scale"] <= 1:
        raise UserError(f"--crop-scale {config['crop_scale']} is outside (0, 1]")
    if config["samples_per_epoch"] is None:
        config["samples_per_epoch"] = num_images if args.data else 512
    samples = config["samples_per_epoch"]
    share = process.world * args.accumulate  # the global batch is a multiple of it
    if config["batch_size"] is None:
        wanted = min(PAPER_BATCH, (128 if on_gpu else 32) * process.world, samples)
        config["batch_size"] = max(wanted // share, 1) * share
    if config["batch_size"] % share:
        raise UserError(
            f"--batch-size {config['batch_size']} is not a multiple of {process.world} processes x --accumulate "
            f"{args.accumulate}; use {max(1, round(config['batch_size'] / share)) * share}"
        )
    if config["batch_size"] > samples:
        raise UserError(
            f"--batch-size {config['batch_size']} is more than the {samples} crops of an epoch; lower it, or raise "
            f"--samples-per-epoch to at least {config['batch_size']}"
        )
    if config["warmup_epochs"] is None:
        config["warmup_epochs"] = min(PAPER_WARMUP, args.epochs / 10)
    if not 0 <= config["warmup_epochs"] < args.epochs:
        raise UserError(f"--warmup-epochs {config['warmup_epochs']} must be at least 0 and less than --epochs {args.epochs}")
    if config["drop_path"] is None:
        config["drop_path"] = PAPER_DROP_PATH.get(args.model, 0.0)
    if config["beta2"] is None:
        config["beta2"] = 0.999 if args.model.startswith("convnext") else 0.95
    if config["precision"] == "auto":
        config["precision"] = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
    if config["workers"] is None:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        config["workers"] = min(8, max(1, (os.cpu_count() or 1) // local_world))
    if config["max_unreadable"] is None:
        config["max_unreadable"] = max(10, num_images // 100)
    if config["panel_epochs"] is None:
        config["panel_epochs"] = max(1, args.epochs // 10)
    if config["output"] is None:
        config["output"] = Path("runs", f"{args.model}-{'x'.join(map(str, args.input_size))}")
    config["data"] = str(args.data) if args.data else None
    config["output"] = str(config["output"])
    return config


def load_initial_weights(network: Any, path: Path) -> None:
    """Starts the encoder from a torchvision state dict.

    Raises:
        UserError: no such file, or weights of another model.
    """
    from sparkme.interop.files import read_state_dict

    try:
        network.encoder.load_dense_state_dict(read_state_dict(path))
    except ValueError as error:
        raise UserError(f"--init {path}: {error}") from error


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
