"""A run of `sparkme.pretrain`, from its settings to its checkpoints and pictures."""

from __future__ import annotations

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
from sparkme.data.statistics import Statistics, statistics_of
from sparkme.errors import UserError, python_command
from sparkme.files import replaced_when_whole
from sparkme.methods.base import MaskedAutoencoder
from sparkme.networks.names import library_of
from sparkme.settings.declare import as_text, flag_of
from sparkme.settings.pretrain import RECIPES, PretrainSettings, choose_recipe, resolve
from sparkme.state_dict import state_dict_of
from sparkme.training.build import build_network
from sparkme.training.device import prepare_device
from sparkme.training.distributed import Process, distribute, find_pixels_together, start_process
from sparkme.training.features import knn_accuracy, pooled_features
from sparkme.training.folder import RunFolder, check_same_run
from sparkme.training.graph import GraphedLoss
from sparkme.training.log import RunLog
from sparkme.training.loop import Outcome, Training, run_training
from sparkme.training.optimizer import create_optimizer, learning_rate, weight_decay
from sparkme.weights.checkpoint import load_weights, print_trial
from sparkme.weights.prefixes import Choice, Wanted, find_weights, shortened
from sparkme.weights.pretrained import read_weights, weights_in
from sparkme.weights.spark import beside_encoder

MOST_PROBED = 10_000, 5_000  # training and validation images of --probe-data


def pretrain(asked: PretrainSettings) -> Outcome:
    """Starts or continues a run."""
    process = start_process(asked.device)
    return run_training(lambda: Pretraining(asked, process), asked.hang_seconds)


class Pretraining(Training):
    """One pretraining run.

    Args:
        asked: the user's settings.
        process: this process.

    Raises:
        UserError, ValueError: the settings or the data do not work; says what to change.
    """

    settings: PretrainSettings
    network: MaskedAutoencoder

    def __init__(self, asked: PretrainSettings, process: Process) -> None:
        prepare_device(process.device, tf32=asked.tf32)
        limit_pixels(asked.max_pixels)
        self.asked, self.process = asked, process
        self.folder = folder = RunFolder(asked.run_folder(), asked, process)
        index = folder.path / "images.npz"
        images = self._find_images(index)
        process.check_same(len(images), "number of images")
        self.saved = saved = folder.saved_as(PretrainSettings)
        self.settings = resolve(asked, len(images), process.machine, saved)
        check_background(self.settings.background)
        if saved is not None and folder.saved_config is not None:
            check_same_run(folder.saved_config, self.settings, folder.newest)
            # The run has started from these weights, whatever the command says now.
            self.settings = replace(self.settings, init=saved.init, weights_key=saved.weights_key, adapt_stem=saved.adapt_stem)
        self.pixels, self.seen = self._find_pixels(images)
        self.statistics = self._find_statistics(images)
        self.probe_split = self._find_probe_data()
        self.probe_pixels, self.probe_seen = self._find_probe_pixels()
        self._build()
        self.resume()
        self.network, self.model = distribute(self.network, process, self._prepare)
        settings = self.settings
        self.dataset = CropDataset(
            images,
            self.network.input_size,
            min_scale=settings.crop_scale,
            seed=settings.seed,
            channels=settings.channels,
            background=settings.background,
            reduced_jpeg=settings.reduced_jpeg,
            pixels=self.pixels,
        )
        if process.is_main:
            folder.prepare(settings, pictures=("reconstructions/epoch_*.png", "images.npz"))
            images.write_index(index)
            self._introduce()

    def _find_images(self, index: Path) -> ImageSource:
        asked = self.asked
        if asked.data is None:
            return Files.of(demo_photographs())
        return find_source(
            asked.data,
            leave_out=self.folder.path,
            root=asked.root,
            cache=asked.shard_cache,
            cache_gib=asked.shard_cache_gib,
            index=index,
            columns=Columns(asked.image_column),
        )

    def _build(self) -> None:
        """Creates the network with its initial weights, and the optimizer."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.network = build_network(settings, self.folder.saved.get("proof") if self.folder.saved is not None else None)
        if self.process.is_main:
            print_trial(self.network.encoder, self.folder.newest)
        self._check_batch_norm()
        self.init_report = ""
        self.graphed: GraphedLoss | None = None
        if settings.init and self.saved is None:
            choice = Choice(settings.weights_key, settings.adapt_stem)
            self.init_report = load_initial_weights(self.network, settings.init, settings.model, choice)
        self.network.to(self.process.device)
        self.network.encoder.set_engine(settings.engine)
        self.optimizer = create_optimizer(
            settings.optimizer, self.network, beta2=settings.beta2, clip_grad=settings.clip_grad or None
        )
        self.clip_norm = settings.clip_grad if settings.optimizer == "adamw" else None  # LAMB clips by itself
        self.steps_per_epoch = settings.samples_per_epoch // settings.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.loss_name, self.poor_loss = self.network.loss_name, self.network.poor_loss if settings.norm_pix_loss else None
        if not any(p.requires_grad for p in self.network.encoder.parameters()):
            raise UserError(f"--model {settings.model}: all its parameters are frozen (requires_grad is False)")

    def batches(self, steps: range) -> Iterable[Batch]:
        settings, process = self.settings, self.process
        sampler = EpochSampler(
            len(self.dataset),
            settings.samples_per_epoch,
            settings.batch_size,
            settings.seed,
            steps,
            process.rank,
            process.world,
            repeats=RECIPES[settings.recipe].crops,
            blocks=self.dataset.source.blocks,
            window=self.dataset.source.window,
        )
        return create_loader(self.dataset, sampler, workers=settings.workers, pin_memory=process.device.type == "cuda")

    def loss(self, *tensors: Tensor, generator: torch.Generator) -> Tensor:
        (images,) = tensors  # (B, C, H, W) bytes, or floats in [0, 1]
        pixels = normalise(images, self.statistics)
        if self.graphed is not None:
            loss: Tensor = self.graphed(pixels, self.network.random_active(len(pixels), generator, pixels.device))
        else:
            loss = self.model(pixels, generator=generator)
        return loss

    def rates(self, step: int) -> dict[str, float]:
        settings, total = self.settings, self.total_steps
        warmup = round(settings.warmup_epochs * self.steps_per_epoch)
        start, end = RECIPES[settings.recipe].rate_ends
        rate = learning_rate(step, peak=settings.peak_rate, warmup_steps=warmup, total_steps=total, start=start, end=end)
        decay = weight_decay(step, start=settings.weight_decay, end=settings.weight_decay_end, total_steps=total)
        return {"learning_rate": rate, "weight_decay": decay}

    def is_due(self, epoch: int) -> bool:
        draws = epoch > 0 and self._is_due(self.settings.panel_epochs, epoch)
        return draws or self._is_due(self.settings.probe_epochs, epoch)

    def _is_due(self, every: int, epoch: int) -> bool:
        return bool(every) and (epoch % every == 0 or epoch == self.settings.epochs)

    def report(self, epoch: int, log: RunLog | None) -> None:
        if self._is_due(self.settings.probe_epochs, epoch):
            self._probe(epoch, log)
        if log and epoch and self._is_due(self.settings.panel_epochs, epoch):
            self._draw_panel(log, epoch)

    def last_words(self, checkpoint: Path) -> str:
        folder = self.folder.path
        return (
            f"pictures: {folder / 'loss.png'}, {folder / 'reconstructions'}; on one page: "
            f"{python_command()} -m sparkme.report {folder}\n"
            f"next: {python_command()} -m sparkme.export {checkpoint}"
        )

    def _probe(self, epoch: int, log: RunLog | None) -> None:
        """Measures kNN accuracy of the deepest map on --probe-data; the processes share the images."""
        assert self.probe_split is not None
        settings, process, network = self.settings, self.process, self.network
        stride = network.encoder.strides[-1]
        parts: list[tuple[Tensor, Tensor]] = []
        for part in (self.probe_split.train, self.probe_split.val):
            images = WholeImages(
                part.images,
                network.input_size,
                channels=settings.channels,
                background=settings.background,
                pixels=self.probe_pixels,
            )
            share = range(process.rank, len(part), process.world)
            batches = whole_batches(images, batch_size=64, workers=settings.workers, share=share)
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
            self.dataset.source, self.network.input_size, 6, self.settings.channels, self.settings.background, self.pixels
        ).to(self.process.device)
        if not len(images):
            return
        generator = torch.Generator().manual_seed(self.settings.seed)
        active = self.network.random_active(len(images), generator)
        with self.precision():
            panel = reconstruction_panel(
                self.network, normalise(images, self.statistics), active.to(images.device), self.statistics
            )
        with replaced_when_whole(self.folder.path / "reconstructions" / f"epoch_{epoch:04d}.png") as temporary:
            save_image(panel, temporary, format="png")
        log.picture("reconstructions", panel, self.step)

    def _find_pixels(self, images: ImageSource) -> tuple[Pixels, str]:
        """The conversion of pixel values, and a line about the images; a resumed run keeps its conversion."""
        settings, saved = self.settings, self.saved
        found, seen = find_pixels_together(
            self.process,
            images,
            settings.channels,
            settings.background,
            known=pixels_of(saved) if saved else None,
            given=settings.value_range,
            upright=settings.upright,
        )
        self.settings = replace(settings, value_range=found.ranges, upright=found.upright)
        return found, seen

    def _find_statistics(self, images: ImageSource) -> Statistics:
        """Mean and standard deviation of the images: given, ImageNet's for colour, or estimated once."""
        settings = self.settings
        if settings.mean is None:
            found = estimate_statistics(images, settings.channels, settings.background, seed=settings.seed, pixels=self.pixels)
            self.settings = replace(settings, mean=found.mean, std=found.std)
        return statistics_of(self.settings)

    def _find_probe_data(self) -> Split | None:
        """The images of --probe-data, or a random part of many."""
        settings = self.settings
        if settings.probe_data is None:
            return None
        split = find_labelled(
            settings.probe_data,
            seed=settings.seed,
            flag="--probe-data",
            cache=settings.shard_cache,
            cache_gib=settings.shard_cache_gib,
            columns=Columns(label=settings.label_column),
        )

        def some(part: Labelled, most: int) -> Labelled:
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(settings.seed))
            return part.subset(drawn[:most].sort().values)

        return Split(some(split.train, MOST_PROBED[0]), some(split.val, MOST_PROBED[1]), split.note)

    def _find_probe_pixels(self) -> tuple[Pixels, str]:
        """As for the training images; kinds of pixel types that those lack are sampled here."""
        if self.probe_split is None:
            return self.pixels, ""
        return find_pixels_together(
            self.process,
            self.probe_split.train.images,
            self.settings.channels,
            self.settings.background,
            known=self.pixels,
            given=self.asked.value_range,
            upright=self.asked.upright,
            flag="--probe-data",
        )

    def state(self) -> dict[str, Any]:
        return {**super().state(), "proof": self.network.encoder.proof}

    def load(self, saved: dict[str, Any]) -> None:
        load_weights(self.network, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def _prepare(self) -> None:
        if self.settings.checkpoint_activations:
            if self.settings.compile:
                raise UserError("--compile and --checkpoint-activations exclude each other; use one of them")
            if not self.network.encoder.checkpoint_blocks():
                raise UserError(f"--checkpoint-activations: {self.settings.model} has no sequence of blocks; leave it out")
        for name in ("compile", "cuda_graph"):
            if getattr(self.settings, name) and self.network.encoder.engine.name == "minkowski":
                raise UserError(f"{flag_of(name)} does not work with MinkowskiEngine; use --engine cuda_ext or masked-dense")
        if self.settings.compile:
            self.network.compile_parts()
        if self.settings.cuda_graph:
            self._capture()

    def _capture(self) -> None:
        """Captures a CUDA graph, before loader threads start, which must not call CUDA meanwhile."""
        settings, process = self.settings, self.process
        if process.device.type != "cuda":
            raise UserError("--cuda-graph needs a GPU; leave it out")
        if process.world > 1:
            raise UserError(f"--cuda-graph works in one process only, not in {process.world}; leave it out")
        for name in ("accumulate", "compile", "checkpoint_activations"):
            if getattr(settings, name) > (1 if name == "accumulate" else 0):
                raise UserError(f"--cuda-graph and {flag_of(name)} exclude each other; use one of them")
        size = settings.batch_size, settings.channels, *self.network.input_size
        precision = torch.bfloat16 if settings.precision == "bf16" else None
        self.graphed = GraphedLoss(self.network.train(), torch.zeros(size, device=process.device), precision)

    def _check_batch_norm(self) -> None:
        """Raises UserError if the deepest map has a single pixel: batch norm needs two."""
        settings, encoder = self.settings, self.network.encoder
        pixels = settings.images_per_pass * self.network.keep * (self.network.patch // encoder.strides[-1]) ** 2
        if pixels < 2 and encoder.norm == "bn":
            raise UserError(
                f"--batch-size {settings.batch_size} leaves batch norm one visible pixel at stride {encoder.strides[-1]}; "
                "raise it or --input-size, or lower --mask-ratio"
            )

    def _introduce(self) -> None:
        """Prints the settings, with the reasons for automatic choices."""
        settings, network, process = self.settings, self.network, self.process
        encoder, total = network.encoder, math.prod(network.num_patches)
        threads = f", threads: {torch.get_num_threads()}" if process.device.type == "cpu" else ""
        in_float32 = "" if encoder.engine.bf16 or settings.precision == "float32" else "; the encoder runs in float32"
        data = settings.data or "scikit-image's photographs"
        where = (
            f"{as_text(data[:3])} and {len(data) - 3} others" if isinstance(data, tuple) and len(data) > 3 else as_text(data)
        )
        lines = {
            "data": f"{len(self.dataset)} images in {where}, {settings.samples_per_epoch} crops per epoch",
            "images": self.seen,
            "recipe": RECIPES[settings.recipe].name + choose_recipe(self.asked.recipe, settings.num_images, self.saved)[1],
            "network": f"{settings.model}, {encoder.channels} channels at strides {encoder.strides}; {network.keep} of "
            f"{total} patches of {network.patch} pixels visible ({100 * network.keep / total:.0f} %)"
            + (f"; left out: {', '.join(encoder.head[:4])}{' ...' * (len(encoder.head) > 4)}" if encoder.head else ""),
            "training": f"{settings.epochs} epochs of {self.steps_per_epoch} steps, batch {settings.batch_size}, peak "
            f"learning rate {settings.peak_rate:.2g}",
            "machine": f"{process.world} x {process.device.type}{threads}, {settings.precision}"
            + (", compiled: the first steps take minutes" if settings.compile else ""),
            "engine": f"{encoder.engine.name}: {encoder.engine_reason}{in_float32}",
            "output": f"{self.folder.path}" + (f", resumed after step {self.step}" if self.folder.saved else ""),
        }
        if self.init_report:
            lines["init"] = self.init_report
        if self.probe_split is not None:
            lines["probe"] = f"kNN every {settings.probe_epochs} epochs on {settings.probe_data}: {self.probe_split.note}; "
            lines["probe"] += self.probe_seen
        if encoder.untrained:
            lines["attention"] = (
                f"{encoder.untrained} and what follows it stay dense and untrained: attention has no sparse form"
            )
        for name, text in lines.items():
            print(f"{name:9s} {text}")
        for remark in self.dataset.source.remarks:
            print(f"{'note':9s} {remark}")
        for remark in self.probe_split.remarks if self.probe_split else ():
            print(f"{'note':9s} --probe-data: {remark}")
        self.folder.print_changes(settings)
        if settings.peak_rate * self.total_steps < 0.2:  # a step changes a weight by about this share of its size
            rates = "use --recipe small" if settings.recipe == "spark" else "raise --base-lr"
            advice = f"{rates}, or raise --epochs or --samples-per-epoch"
            print(f"{'note':9s} {self.total_steps} steps at this learning rate will hardly change the weights; {advice}")
        init = self.asked.init
        if init and self.saved and init != settings.init:
            print(f"{'note':9s} --init {init} is not used: the run continues from its checkpoint")
        sys.stdout.flush()


def load_initial_weights(network: MaskedAutoencoder, path: Path, model: str, choice: Choice = Choice()) -> str:  # noqa: B008
    """Loads initial weights from a file of any library of `sparkme.weights`, of the official SparK code (encoder or whole
    network), or from a checkpoint of this project, under any prefix.

    Args:
        network: takes the weights.
        path: the file.
        model: the network's name.
        choice: the user's choice among several sets of weights.

    Returns:
        A line about the weights that matched, and those that did not.

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
