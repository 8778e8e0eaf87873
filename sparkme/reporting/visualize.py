"""The work of `sparkme.visualize`: pictures of reconstructions."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparkme.data.dataset import centre_crop, normalise, pixels_of
from sparkme.data.images import load_image
from sparkme.data.limits import limit_pixels
from sparkme.data.planes import Pixels
from sparkme.data.sources.files import demo_photographs, find_images
from sparkme.data.statistics import Statistics, statistics_of
from sparkme.data.survey import find_pixels
from sparkme.errors import UserError, user_errors
from sparkme.files import replaced_when_whole
from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.loss import hidden_patch_loss
from sparkme.reporting.panel import COLUMNS, ERROR_CAPTION, Row, caption, draw_panel, error_pictures, masked_pictures
from sparkme.reporting.reconstructions import Result, write_page
from sparkme.settings.commands import VisualizeSettings
from sparkme.settings.pretrain import PretrainSettings
from sparkme.settings.shared import MAX_SIDE, checked_range
from sparkme.text import ended, printable
from sparkme.training.build import network_of
from sparkme.training.distributed import start_process
from sparkme.weights.checkpoint import load_checkpoint, run_folder, settings_in

MAX_ROWS, MAX_PIXELS = 400, 20e6  # rows, and pixels of a column; larger pictures are hard to open


def visualize(args: VisualizeSettings) -> int:
    """Draws reconstructions by the network of a checkpoint. Returns the exit code."""
    if args.layers is not None:
        raise UserError("--layers goes with --mask-pattern")
    if args.checkpoint is None:
        raise UserError("name a checkpoint of sparkme.pretrain, such as runs/x/checkpoints/last.pt, or pass --mask-pattern")
    seeds = chosen_seeds(args)
    checked_range(args.value_range)
    default = run_folder(args.checkpoint) / "visualize.png"
    if default.is_relative_to(Path.cwd()):
        default = default.relative_to(Path.cwd())
    output = check_output(args, default, (".png", ".html"))
    named, found = chosen_images(args.images, output)
    device = start_process(args.device).device
    checkpoint = load_checkpoint(args.checkpoint, mmap=True)
    settings = settings_in(checkpoint, args.checkpoint)
    limit_pixels(settings.max_pixels)
    network = network_of(checkpoint, args.checkpoint)
    if not all(value.isfinite().all() for value in network.parameters()):
        raise UserError(f"{args.checkpoint} has weights that are not finite; take an earlier checkpoint")
    statistics_from = args.statistics or "true"
    if statistics_from == "predicted" and not network.normalise_patches:
        raise UserError(
            "--statistics predicted does not apply to this run: with --no-norm-pix-loss its network predicts mean and "
            "deviation, too; leave the flag out"
        )
    ratios = [*dict.fromkeys(args.mask_ratio or [network.mask_ratio])]
    size = chosen_size(args) or network.input_size
    with user_errors():
        for ratio in ratios:  # checks all of them before the first image
            network.set_task(size, ratio)
        network.to(device).eval().encoder.set_engine(args.engine)
    seeds = seeds or [settings.seed]

    pixels = chosen_pixels(named + found, network, settings, args)
    images = load_images(named, found, args.max_images or max(8, len(named)), network, settings.background, pixels)
    check_rows(len(images), len(ratios), len(seeds), size)
    make_folder(output)
    masks = [(ratio, seed) for ratio in ratios for seed in seeds]
    cases = [(name, image, ratio, seed) for name, image in images.items() for ratio, seed in masks]
    results = []
    for name, image, ratio, seed in tqdm(cases, desc="drawing", disable=not sys.stderr.isatty()):
        network.set_task(size, ratio)
        results.append(reconstruct(network, image.to(device), name, seed, statistics_of(settings), statistics_from))
    text = f"{caption(network, network.encoder.in_channels, statistics_from)} {ERROR_CAPTION}"
    if output.suffix.lower() == ".html":
        title = f"{settings.model} after {checkpoint['step']} steps: reconstructions"
        about = {"checkpoint": args.checkpoint, "step": checkpoint["step"], **checkpoint["config"]}
        write_page(output, title, results, text, about)
    else:
        write_picture(output, results, text)
    print_table(results)
    print(f"wrote {output}")
    return 0


@torch.no_grad()
def reconstruct(
    network: MaskedAutoencoder, image: Tensor, name: str, seed: int, statistics: Statistics, statistics_from: str
) -> Result:
    """Hides patches of a (C, H, W) image, bytes or floats in [0, 1], and reconstructs them."""
    images = normalise(image[None], statistics)
    active = network.random_active(1, torch.Generator().manual_seed(seed)).to(image.device)
    grid = network.grid(images, active)
    prediction = network.predict(images, grid)
    loss = hidden_patch_loss(prediction, images, grid, normalise=network.normalise_patches)
    painted = network.paint(prediction, images, grid, statistics=statistics_from)
    shown = images, painted, grid.mask(1, torch.bool), statistics
    pictures = torch.cat((masked_pictures(*shown)[0], error_pictures(*shown)))
    return Result(name, network.mask_ratio, seed, network.keep, math.prod(network.num_patches), float(loss), pictures)


def chosen_seeds(args: VisualizeSettings) -> list[int]:
    """The seeds of the command line; an empty list stands for the run's. Raises UserError if they are out of range."""
    if args.seeds and args.num_seeds is not None:
        raise UserError("--seeds and --num-seeds exclude each other; leave one out")
    if args.num_seeds is not None and not 1 <= args.num_seeds <= MAX_ROWS:
        raise UserError(f"--num-seeds {args.num_seeds} must be from 1 to {MAX_ROWS}")
    if args.max_images is not None and args.max_images < 1:
        raise UserError(f"--max-images {args.max_images} must be at least 1")
    for seed in args.seeds or ():
        if not 0 <= seed < 2**63:
            raise UserError(f"--seeds {seed} must be from 0 to 2^63 - 1")
    return [*dict.fromkeys(args.seeds or range(args.num_seeds or 0))]


def chosen_size(args: VisualizeSettings) -> tuple[int, int] | None:
    if args.size is None:
        return None
    if len(args.size) > 2:
        raise UserError(f"--size takes a side, or height and width; got {len(args.size)} numbers")
    if not 1 <= min(args.size) <= max(args.size) <= MAX_SIDE:
        raise UserError(f"--size {' '.join(map(str, args.size))} must be from 1 to {MAX_SIDE}")
    return args.size[0], args.size[-1]


def check_rows(images: int, ratios: int, seeds: int, size: tuple[int, int]) -> None:
    """Raises UserError if the picture would be too large to open."""
    rows, most = images * ratios * seeds, min(MAX_ROWS, int(MAX_PIXELS / math.prod(size)))
    if rows > most:
        raise UserError(
            f"{images} images, {ratios} mask ratios and {seeds} seeds are {rows} rows, more than {most} of "
            f"{size[1]} x {size[0]} pixels; lower --max-images, --num-seeds or --size"
        )


def chosen_pixels(paths: list[Path], network: MaskedAutoencoder, settings: PretrainSettings, args: VisualizeSettings) -> Pixels:
    """The conversion of pixel values, which it also prints. Unreadable images are reported later, one by one."""
    try:
        pixels, seen = find_pixels(
            paths,
            network.encoder.in_channels,
            settings.background,
            known=pixels_of(settings),
            given=checked_range(args.value_range),
            upright=args.upright,
            flag="IMAGE",
        )
    except UserError:
        return pixels_of(settings)
    print(f"images    {seen}")
    return pixels


def check_output(args: VisualizeSettings, default: Path, suffixes: tuple[str, ...]) -> Path:
    """The file to write. Raises UserError if its suffix is not one of `suffixes`, or if it exists."""
    output: Path = args.output or default
    if output.suffix.lower() not in suffixes:
        raise UserError(f"--output {output}: the suffix must be {' or '.join(suffixes)}")
    if output.is_dir():
        raise UserError(f"{output} is a folder; choose another --output")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; choose another --output, or pass --overwrite")
    return output


def make_folder(output: Path) -> None:
    """Makes the folder of the output, before long work. Raises UserError if it cannot be made or written to."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output} cannot be written: {output.parent} is read-only")


def chosen_images(given: Sequence[Path], output: Path) -> tuple[list[Path], list[Path]]:
    """Image files of the command line, and those in its folders except `output`; without arguments, the demo photographs.

    Raises:
        UserError: there are none.
    """
    if not given:
        try:
            return [], demo_photographs()
        except UserError:
            raise UserError(
                "the default images are scikit-image's photographs, which are not installed; name images or folders, or "
                "pip install 'sparkme[demo]'"
            ) from None
    named: list[Path] = []
    in_folders: list[Path] = []
    for path in given:
        if path.is_file():
            named.append(path)
        elif path.is_dir():
            in_folders += [found for found in find_images(path, flag="the folder") if found.absolute() != output.absolute()]
        else:
            raise UserError(f"there is no image or folder {path}")
    if not named and not in_folders:
        raise UserError(f"{given[0]} contains no image except the --output {output}")
    return [*dict.fromkeys(named)], [*dict.fromkeys(path for path in in_folders if path not in named)]


def load_images(
    named: list[Path], found: list[Path], count: int, network: MaskedAutoencoder, background: str, pixels: Pixels
) -> dict[str, Tensor]:
    """Centre crops (C, H, W) of `count` images by name: the named ones first, then a selection spread over the others.

    Unreadable images are reported and skipped. Raises UserError if none can be read.
    """
    paths = named + found
    names = [path.name for path in paths]
    loaded: dict[Path, Tensor] = {}
    step = math.ceil(len(found) / max(1, count - len(named)))
    for path in dict.fromkeys([*named, *found[:: max(1, step)], *found]):
        if len(loaded) == count:
            break
        try:
            image = load_image(path, network.encoder.in_channels, background, pixels)
            loaded[path] = centre_crop(image, network.input_size)
        except OSError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
    if not loaded:
        raise UserError(f"none of {len(paths)} images can be read")
    if len(paths) > count:
        print(f"showing {len(loaded)} of {len(paths)} images; --max-images N shows more")
    # The file's name alone, unless two files share it.
    return {
        printable(Path(path.name) if names.count(path.name) == 1 else path): loaded[path] for path in paths if path in loaded
    }


def write_picture(output: Path, results: list[Result], text: str) -> None:
    rows = [Row(result.pictures, f"{result.name}: {result.setting}, loss {result.loss:.3f}") for result in results]
    picture = draw_panel(COLUMNS, rows, text, error_bar=True)
    with replaced_when_whole(output) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def print_table(results: list[Result]) -> None:
    names = [ended(result.name, 60) for result in results]
    width = max(len("image"), *map(len, names))
    print(f"{'image':<{width}}  mask ratio  {'seed':>6}    loss")
    for name, result in zip(names, results, strict=True):
        print(f"{name:<{width}}  {result.mask_ratio:>10g}  {result.seed:>6}  {result.loss:6.4f}")
    if len(results) > 1:
        print(f"{'mean':<{width}}  {'':>10}  {'':>6}  {sum(result.loss for result in results) / len(results):6.4f}")
