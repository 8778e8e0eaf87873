"""One run of `sparkme.pretrain`: from its command line to its checkpoints and pictures."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from sparkme.data.dataset import (
    Batch,
    CropDataset,
    EpochSampler,
    create_loader,
    estimate_statistics,
    normalise,
    pixels_of,
    preview_images,
)
from sparkme.data.images import check_background
from sparkme.data.labelled import Labelled, Split, WholeImages, find_labelled, whole_batches
from sparkme.data.limits import limit_pixels
from sparkme.data.planes import Pixels
from sparkme.data.sources import Columns, Files, ImageSource, find_source
from sparkme.data.sources.files import demo_photographs
from sparkme.data.statistics import Statistics
from sparkme.errors import UserError, python_command
from sparkme.files import replaced_when_whole
from sparkme.methods.base import MaskedAutoencoder
from sparkme.networks.names import library_of
from sparkme.state_dict import state_dict_of
from sparkme.training.build import build_network
from sparkme.training.config import FIXED, OLDER, RECIPES, as_text, output_folder, resolve_config
from sparkme.training.device import prepare_device
from sparkme.training.distributed import Process, distribute, find_pixels_together, start_process
from sparkme.training.features import knn_accuracy, pooled_features
from sparkme.training.folder import RunFolder, check_same_run
from sparkme.training.graph import GraphedLoss
from sparkme.training.log import RunLog
from sparkme.training.loop import Training, run_training
from sparkme.training.optimizer import create_optimizer, learning_rate, weight_decay
from sparkme.weights.checkpoint import load_weights, print_trial
from sparkme.weights.prefixes import Choice, Wanted, find_weights, shortened
from sparkme.weights.pretrained import read_weights, weights_in
from sparkme.weights.spark import beside_encoder

MOST_PROBED = 10_000, 5_000  # images of --probe-data, to learn from and to measure on


def pretrain(args: argparse.Namespace) -> int:
    """Trains, or continues, the run that the arguments describe. Returns the exit code."""
    process = start_process(args.device)
    return run_training(lambda: Pretraining(args, process), args.hang_seconds)


class Pretraining(Training):
    """One pretraining run.

    Args:
        args: the command line.
        process: this process.

    Raises:
        UserError, ValueError: what was asked for cannot be done; says what to change.
    """

    network: MaskedAutoencoder
    loss_name = "loss on hidden patches"

    def __init__(self, args: argparse.Namespace, process: Process) -> None:
        prepare_device(process.device, tf32=args.tf32)
        limit_pixels(args.max_pixels)
        self.process = process
        self.folder = folder = RunFolder(output_folder(args), args, command="pretrain", process=process)
        index = folder.path / "images.npz"
        images: ImageSource = Files.of(demo_photographs()) if args.data is None else find_source(
            args.data, leave_out=folder.path, root=args.root, cache=args.shard_cache, cache_gib=args.shard_cache_gib,
            index=index, columns=Columns(args.image_column),
        )  # fmt: skip
        process.check_same(len(images), "number of images")
        self.config = config = resolve_config(args, len(images), process.machine, folder.saved_config)
        check_background(config["background"])
        self.recipe_reason = config.pop("recipe_reason")
        if folder.saved_config is not None:
            check_same_run(folder.saved_config, config, folder.newest, FIXED, OLDER)
            for name in ("init", "weights_key", "adapt_stem"):  # it has started so, whatever the command says now
                config[name] = folder.saved_config.get(name)
        self.pixels, self.seen = self._find_pixels(images, args)
        self.statistics = self._find_statistics(images)
        self.probe_split = self._find_probe_data(args)
        self.probe_pixels, self.probe_seen = self._find_probe_pixels(args)

        torch.manual_seed(config["seed"])
        self.network = build_network(config, folder.saved.get("proof") if folder.saved is not None else None)
        if process.is_main:
            print_trial(self.network.encoder, folder.newest)
        self._check_batch_norm()
        self.init_report = ""
        self.graphed: GraphedLoss | None = None
        if args.init and folder.saved is None:
            choice = Choice(args.weights_key, args.adapt_stem)
            self.init_report = load_initial_weights(self.network, args.init, config["model"], choice)
        self.network.to(process.device)
        self.network.encoder.set_engine(config["engine"])
        self.optimizer = create_optimizer(
            config["optimizer"], self.network, beta2=config["beta2"], clip_grad=config["clip_grad"] or None
        )
        self.clip_norm = config["clip_grad"] if config["optimizer"] == "adamw" else None  # LAMB clips by itself
        self.steps_per_epoch = config["samples_per_epoch"] // config["batch_size"]
        self.total_steps = config["epochs"] * self.steps_per_epoch
        self.poor_loss = 1.0 if config["norm_pix_loss"] else None  # of patches whose mean is 0 and variance 1
        if not any(p.requires_grad for p in self.network.encoder.parameters()):
            raise UserError(
                f"--model {config['model']}: all its parameters are frozen (requires_grad is False): nothing to train"
            )
        self.resume()
        self.network, self.model = distribute(self.network, process, self._prepare)
        self.dataset = CropDataset(
            images,
            self.network.input_size,
            min_scale=config["crop_scale"],
            seed=config["seed"],
            channels=config["channels"],
            background=config["background"],
            reduced_jpeg=config["reduced_jpeg"],
            pixels=self.pixels,
        )
        if process.is_main:
            folder.prepare(config, pictures=("reconstructions/epoch_*.png", "images.npz"))
            images.write_index(index)
            self._introduce(args)

    def batches(self, steps: range) -> Iterable[Batch]:
        config, process = self.config, self.process
        sampler = EpochSampler(
            len(self.dataset), config["samples_per_epoch"], config["batch_size"], config["seed"],
            steps, process.rank, process.world, blocks=self.dataset.source.blocks, window=self.dataset.source.window,
        )  # fmt: skip
        return create_loader(self.dataset, sampler, workers=config["workers"], pin_memory=process.device.type == "cuda")

    def loss(self, *tensors: Tensor, generator: torch.Generator) -> Tensor:
        (images,) = tensors  # (B, C, H, W) bytes, or floats in [0, 1]
        pixels = normalise(images, self.statistics)
        if self.graphed is not None:
            loss: Tensor = self.graphed(pixels, self.network.random_active(len(pixels), generator, pixels.device))
        else:
            loss = self.model(pixels, generator=generator)
        return loss

    def rates(self, step: int) -> dict[str, float]:
        config, total = self.config, self.total_steps
        peak = config["base_lr"] * config["batch_size"] / 256
        warmup = round(config["warmup_epochs"] * self.steps_per_epoch)
        decay, decay_end = config["weight_decay"], config["weight_decay_end"]
        ends = RECIPES[config["recipe"]].rate_ends
        return {
            "learning_rate": learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total, start=ends[0], end=ends[1]),
            "weight_decay": weight_decay(step, start=decay, end=decay_end, total_steps=total),
        }

    def is_due(self, epoch: int) -> bool:
        draws = epoch > 0 and self._is_due("panel_epochs", epoch)
        return draws or self._is_due("probe_epochs", epoch)

    def _is_due(self, name: str, epoch: int) -> bool:
        every = self.config[name]
        return bool(every) and (epoch % every == 0 or epoch == self.config["epochs"])

    def report(self, epoch: int, log: RunLog | None) -> None:
        if self._is_due("probe_epochs", epoch):
            self._probe(epoch, log)
        if log and epoch and self._is_due("panel_epochs", epoch):
            self._draw_panel(log, epoch)

    def last_words(self, checkpoint: Path) -> str:
        folder = self.folder.path
        return (f"pictures: {folder / 'loss.png'}, {folder / 'reconstructions'}; on one page: "
                f"{python_command()} -m sparkme.report {folder}\n"
                f"next: {python_command()} -m sparkme.export {checkpoint}")  # fmt: skip

    def _probe(self, epoch: int, log: RunLog | None) -> None:
        """kNN accuracy of the deepest map on the labelled images of --probe-data; the processes share the images."""
        assert self.probe_split is not None
        config, process, network = self.config, self.process, self.network
        stride = network.encoder.strides[-1]
        parts: list[tuple[Tensor, Tensor]] = []
        for part in (self.probe_split.train, self.probe_split.val):
            images = WholeImages(
                part.images, network.input_size, channels=config["channels"], background=config["background"],
                pixels=self.probe_pixels,
            )  # fmt: skip
            share = range(process.rank, len(part), process.world)
            batches = whole_batches(images, batch_size=64, workers=config["workers"], share=share)
            with self.precision():
                found = pooled_features(network.encoder, batches, self.statistics, process.device)
            for problem in found.unreadable if epoch == 0 else ():
                print(f"--probe-data: skipped unreadable image {problem}", file=sys.stderr, flush=True)
            gathered = process.gather((found.maps[stride], part.labels[found.numbers]))
            parts.append((torch.cat([x for x, _ in gathered]), torch.cat([y for _, y in gathered])))
        if log and all(len(labels) for _, labels in parts):
            accuracy = knn_accuracy(*parts[0], *parts[1])
            text = f"kNN {100 * accuracy:.1f} % of {len(parts[1][1])} images of --probe-data right"
            log.measured(self.step, epoch, {"knn": accuracy}, text)

    def _draw_panel(self, log: RunLog, epoch: int) -> None:
        from sparkme.reporting.panel import reconstruction_panel  # noqa: PLC0415  (matplotlib, in the first process alone)

        images = preview_images(
            self.dataset.source, self.network.input_size, 6, self.config["channels"], self.config["background"], self.pixels
        ).to(self.process.device)
        if not len(images):
            return
        generator = torch.Generator().manual_seed(self.config["seed"])
        active = self.network.random_active(len(images), generator)
        with self.precision():
            panel = reconstruction_panel(
                self.network, normalise(images, self.statistics), active.to(images.device), self.statistics
            )
        with replaced_when_whole(self.folder.path / "reconstructions" / f"epoch_{epoch:04d}.png") as temporary:
            save_image(panel, temporary, format="png")
        log.picture("reconstructions", panel, self.step)

    def _find_pixels(self, images: ImageSource, args: argparse.Namespace) -> tuple[Pixels, str]:
        """How the images' numbers become values, and for people what they are; a run that goes on stays with what it has."""
        config, saved = self.config, self.folder.saved_config
        found, seen = find_pixels_together(
            self.process, images, config["channels"], config["background"], known=pixels_of(saved) if saved else None,
            given=args.value_range, upright=args.upright,
        )  # fmt: skip
        config |= {"value_range": found.ranges, "upright": found.upright}
        return found, seen

    def _find_statistics(self, images: ImageSource) -> Statistics:
        """Mean and deviation that images are normalised by: the command's, ImageNet's for colour, or estimated once."""
        config = self.config
        if config["mean"] is None:
            found = Statistics()
            if config["channels"] != 3:
                found = estimate_statistics(
                    images, config["channels"], config["background"], seed=config["seed"], pixels=self.pixels
                )
            config |= {"mean": [*found.mean], "std": [*found.std]}
        return Statistics(tuple(config["mean"]), tuple(config["std"]))

    def _find_probe_data(self, args: argparse.Namespace) -> Split | None:
        """Labelled images to measure the encoder on; of many, some at random."""
        if self.config["probe_data"] is None:
            return None
        split = find_labelled(
            self.config["probe_data"], seed=self.config["seed"], flag="--probe-data", cache=args.shard_cache,
            cache_gib=args.shard_cache_gib, columns=Columns(label=args.label_column),
        )  # fmt: skip

        def some(part: Labelled, most: int) -> Labelled:
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(self.config["seed"]))
            return part.subset(drawn[:most].sort().values)

        return Split(some(split.train, MOST_PROBED[0]), some(split.val, MOST_PROBED[1]), split.note)

    def _find_probe_pixels(self, args: argparse.Namespace) -> tuple[Pixels, str]:
        """As the run's own; numbers of kinds that its images do not have are looked at by themselves."""
        if self.probe_split is None:
            return self.pixels, ""
        return find_pixels_together(
            self.process, self.probe_split.train.images, self.config["channels"], self.config["background"], known=self.pixels,
            given=args.value_range, upright=args.upright, flag="--probe-data",
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {**super().state(), "proof": self.network.encoder.proof}

    def load(self, saved: dict[str, Any]) -> None:
        load_weights(self.network, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def _prepare(self) -> None:
        if self.config["checkpoint_activations"]:
            if self.config["compile"]:
                raise UserError("--compile and --checkpoint-activations do not go together; use one of them")
            if not self.network.encoder.checkpoint_blocks():
                raise UserError(f"--checkpoint-activations: {self.config['model']} has no rows of blocks; leave it out")
        for flag in ("compile", "cuda_graph"):
            if self.config[flag] and self.network.encoder.engine.name == "minkowski":
                raise UserError(
                    f"--{flag.replace('_', '-')} cannot follow MinkowskiEngine; use --engine cuda_ext or masked-dense"
                )
        if self.config["compile"]:
            self.network.compile_parts()
        if self.config["cuda_graph"]:
            self._capture()

    def _capture(self) -> None:
        """Puts the forward and the backward pass into a CUDA graph; before the first images are loaded, by threads that may not
        call CUDA meanwhile."""
        config, process = self.config, self.process
        if process.device.type != "cuda":
            raise UserError("--cuda-graph needs a GPU; leave it out")
        if process.world > 1:
            raise UserError(f"--cuda-graph trains in one process, not in {process.world}; leave it out")
        for flag in ("accumulate", "compile", "checkpoint_activations"):
            if config[flag] > (1 if flag == "accumulate" else 0):
                raise UserError(f"--cuda-graph and --{flag.replace('_', '-')} do not go together; use one of them")
        size = config["batch_size"], config["channels"], *self.network.input_size
        precision = torch.bfloat16 if config["precision"] == "bf16" else None
        self.graphed = GraphedLoss(self.network.train(), torch.zeros(size, device=process.device), precision)

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

    def _introduce(self, args: argparse.Namespace) -> None:
        """Prints what will be done, and why where something was chosen."""
        config, network, process = self.config, self.network, self.process
        encoder, total = network.encoder, math.prod(network.num_patches)
        rate = config["base_lr"] * config["batch_size"] / 256
        threads = f", threads: {torch.get_num_threads()}" if process.device.type == "cpu" else ""
        in_float32 = "" if encoder.engine.bf16 or config["precision"] == "float32" else "; the encoder computes in float32"
        data = config["data"] or "scikit-image, its photographs"
        where = f"{as_text(data[:3])} and {len(data) - 3} others" if isinstance(data, list) and len(data) > 3 else as_text(data)
        lines = {
            "data": f"{len(self.dataset)} images in {where}, {config['samples_per_epoch']} crops an epoch",
            "images": self.seen,
            "recipe": RECIPES[config["recipe"]].name + self.recipe_reason,
            "network": f"{config['model']}, {encoder.channels} channels at strides {encoder.strides}; {network.keep} of "
            f"{total} patches of {network.patch} pixels visible ({100 * network.keep / total:.0f} %)"
            + (f"; left out: {', '.join(encoder.head[:4])}{' ...' * (len(encoder.head) > 4)}" if encoder.head else ""),
            "training": f"{config['epochs']} epochs of {self.steps_per_epoch} steps, batch {config['batch_size']}, peak "
            f"learning rate {rate:.2g}",
            "machine": f"{process.world} x {process.device.type}{threads}, {config['precision']}"
            + (", compiled: the first steps take minutes" if config["compile"] else ""),
            "engine": f"{encoder.engine.name}: {encoder.engine_reason}{in_float32}",
            "output": f"{self.folder.path}" + (f", resumed after step {self.step}" if self.folder.saved else ""),
        }
        if self.init_report:
            lines["init"] = self.init_report
        if self.probe_split is not None:
            lines["probe"] = f"kNN every {config['probe_epochs']} epochs on {config['probe_data']}: {self.probe_split.note}; "
            lines["probe"] += self.probe_seen
        for name, text in lines.items():
            print(f"{name:9s} {text}")
        for remark in self.dataset.source.remarks:
            print(f"{'note':9s} {remark}")
        for remark in self.probe_split.remarks if self.probe_split else ():
            print(f"{'note':9s} --probe-data: {remark}")
        self.folder.print_changes(config)
        if rate * self.total_steps < 0.2:  # a step changes a weight by about this share of its size
            rates = "take --recipe small" if config["recipe"] == "spark" else "raise --base-lr"
            advice = f"{rates}, or raise --epochs or --samples-per-epoch"
            print(f"{'note':9s} {self.total_steps} steps at this rate will hardly move the weights; {advice}")
        if args.init and self.folder.saved and str(args.init) != str(config["init"]):
            print(f"{'note':9s} --init {args.init} is not used: this run goes on from its checkpoint")
        sys.stdout.flush()


def load_initial_weights(network: MaskedAutoencoder, path: Path, model: str, choice: Choice = Choice()) -> str:  # noqa: B008
    """Starts from weights in a file: of torchvision, timm, the ConvNeXt authors or another library of `sparkme.weights`, of the
    official SparK code (an encoder alone, or the whole network), or a checkpoint of this project; wrapped in whatever way.

    Args:
        network: takes the weights.
        path: the file.
        model: the network's name.
        choice: what the user says of how the weights are found in it.

    Returns:
        What matched, and what did not, in one line.

    Raises:
        UserError: no such file, or weights of another network.
    """
    encoder = network.encoder
    tensors, checkpoint = read_weights(path)
    source = tensors = weights_in(checkpoint, path) if checkpoint is not None else tensors
    wanted = Wanted(model, library_of(model), encoder.dense_state_dict(), encoder.in_channels)
    found = find_weights(tensors, wanted, f"--init {path}", choice)
    encoder.load_dense_state_dict(found.state)
    rest = beside_encoder(tensors, found.prefix)
    if checkpoint is not None and checkpoint["config"].get("command") != "finetune":
        source = checkpoint["model"]
        rest = {name: name for name in source if not name.startswith("encoder.")}
    theirs = {name: value for name, value in state_dict_of(network).items() if not name.startswith("encoder.")}
    taken = {name: own for name, own in rest.items() if own in theirs and source[name].shape == theirs[own].shape}
    network.load_state_dict({own: source[name] for name, own in taken.items()}, strict=False)
    left = [name for name in dict.fromkeys((*found.left, *rest)) if name not in taken]
    random = [name for name in theirs if name not in taken.values()]
    report = f"{path}, {replace(found, left=left).note()}" + (f"; {len(taken)} of the decoder" if taken else "")
    return report + (f"; random: {shortened(random)}" if random else "")
