"""Shows why convolutions should be sparse: how dense and sparse layers change the mask, and the distribution of pixel values.

These are two of SparK's reasons (Tian et al., ICLR 2023, section 3). A stack of 3x3 convolutions runs as a dense network on an
image whose hidden pixels are zero, and again through `sparkme.sparsify`. The figure shows where the maps are not zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from sparkme.data.dataset import centre_crop, normalise
from sparkme.data.images import load_image
from sparkme.errors import UserError, user_errors
from sparkme.files import replaced_when_whole
from sparkme.methods.masking import random_active
from sparkme.reporting.visualize import check_output, chosen_images, chosen_seeds, chosen_size, make_folder
from sparkme.settings.commands import VisualizeSettings
from sparkme.sparse.grid import Grid
from sparkme.sparse.sparsify import sparsify
from sparkme.training.distributed import start_process

CHANNELS = 8
MAX_LAYERS = 64
VISIBLE, LEAKED, EMPTY = "#2b5c8a", "#e8963a", "#eceff1"  # the first two differ in lightness, too
INK = "#222222"


def draw_pattern(args: VisualizeSettings) -> int:
    """Draws the mask after dense and after sparse convolutions. Returns the exit code."""
    alone = {
        "a CHECKPOINT": args.checkpoint,
        "--statistics": args.statistics,
        "--max-images": args.max_images,
        "--value-range": args.value_range,
        "--upright": args.upright,
    }
    if given := [name for name, value in alone.items() if value is not None]:
        raise UserError(f"--mask-pattern draws no reconstructions; leave out {', '.join(given)}")
    seeds, ratios, layers = chosen_seeds(args) or [0], args.mask_ratio or [0.6], 16 if args.layers is None else args.layers
    if len(seeds) > 1 or len(ratios) > 1:
        raise UserError("--mask-pattern draws one mask; give one of --mask-ratio and of --seeds")
    if not 1 <= layers <= MAX_LAYERS:
        raise UserError(f"--layers {layers} must be from 1 to {MAX_LAYERS}")
    output = check_output(args, Path("mask_pattern.png"), (".png",))
    photograph = chosen_images([], output)[1][:2][-1]  # the second photograph: few of its pixels share a colour
    image = centre_crop(load_image(photograph, 3), chosen_size(args) or (224, 224))
    device = start_process(args.device).device
    with user_errors():
        pattern = trace_mask(
            image, layers=layers, mask_ratio=ratios[0], patch=32, seed=seeds[0], engine=args.engine, device=device
        )
    make_folder(output)
    figure = draw_mask_pattern(pattern)
    with replaced_when_whole(output) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print("3x3 convolutions  " + "  ".join(f"{depth:5}" for depth in pattern.shown))
    for name, maps in (("dense", pattern.dense), ("sparse", pattern.sparse)):
        print(f"{name:<6} not zero, %  " + "  ".join(f"{float(share(maps[depth])):5.1f}" for depth in pattern.shown))
    print(f"wrote {output}")
    return 0


class MaskPattern(NamedTuple):
    """`dense` and `sparse` are (N + 1, H, W) bool, True where a map is not zero after 0, 1, ..., N convolutions.

    `image` is (3, H, W), normalised; `visible` is (H, W) bool.
    """

    image: Tensor
    visible: Tensor
    dense: Tensor
    sparse: Tensor

    @property
    def layers(self) -> int:
        return len(self.dense) - 1

    @property
    def shown(self) -> list[int]:
        """The depths in the figure: 0, 1, 2, 4, ... and the last."""
        return [0, *(2**i for i in range(self.layers.bit_length()) if 2**i < self.layers), self.layers]


@torch.no_grad()
def trace_mask(
    image: Tensor,
    *,
    layers: int,
    mask_ratio: float,
    patch: int,
    seed: int,
    engine: str = "auto",
    device: str | torch.device = "cpu",
) -> MaskPattern:
    """Runs an image through dense and sparse 3x3 convolutions with the same random weights, without bias.

    Args:
        image: (3, H, W), bytes or floats in [0, 1].
        layers: number of convolutions.
        mask_ratio: share of hidden patches.
        patch: side of a patch in pixels.
        seed: seed of mask and weights.
        engine: engine of the sparse convolutions.
        device: device of both networks.

    Raises:
        ValueError: size, patch and ratio do not fit together, or the engine cannot run on the device.
    """
    height, width = image.shape[1:]
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"an image of {height}x{width} pixels is not a multiple of the patch of {patch}")
    active = random_active(
        1, (height // patch, width // patch), mask_ratio, generator=torch.Generator().manual_seed(seed), device=device
    )
    if active.all():
        raise ValueError(f"mask ratio {mask_ratio} hides none of {active.numel()} patches; raise it or the size")
    images = normalise(image[None]).to(device)
    visible = Grid(active, patch).mask(1, torch.bool)
    network = _convolutions(layers, seed).to(device)
    sparse = sparsify(network, taps=[str(layers - 1)]).set_engine(engine)
    dense_maps, sparse_maps = [images * visible], [images * visible]
    for layer in network:
        dense_maps.append(layer(dense_maps[-1]))
    for layer in [*sparse.network.children()][:-1]:  # the last one's map is what the encoder returns
        layer.register_forward_hook(lambda _, __, out: sparse_maps.append(out.dense()))
    sparse_maps.append(sparse(images, active)[-1].dense())
    nonzero = [torch.stack([(x != 0).any(1)[0].cpu() for x in maps]) for maps in (dense_maps, sparse_maps)]
    return MaskPattern(images[0].cpu(), visible[0, 0].cpu(), *nonzero)


def _convolutions(layers: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = nn.Sequential(*(nn.Conv2d(CHANNELS if i else 3, CHANNELS, 3, padding=1, bias=False) for i in range(layers)))
        for layer in network.children():  # with this gain values neither vanish nor overflow at any depth
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")  # type: ignore[arg-type]
    return network


def share(pattern: Tensor) -> Tensor:
    """Percentage of True in (..., H, W) bool, of shape (...)."""
    return 100 * pattern.float().mean((-2, -1))


def draw_mask_pattern(pattern: MaskPattern) -> Any:
    """The matplotlib figure: patterns by depth, their shares, and the distribution of pixel values."""
    shown = pattern.shown
    columns = len(shown)
    width = max(10, 1.9 * columns + 1.2)
    height, across = pattern.visible.shape
    patterns = min(24, max(4.2, 2 * (width - 1.2) / columns * height / across + 1.4))  # two rows, in inches
    figure: Any = Figure(figsize=(width, patterns + 2.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(patterns, 2.8))
    above.suptitle("Non-zero pixels of a map after 3x3 convolutions", fontsize=12, color=INK)
    grid = above.subplots(2, columns, squeeze=False)
    for name, maps, row in (("dense", pattern.dense, grid[0]), ("sparse", pattern.sparse, grid[1])):
        for depth, axes in zip(shown, row, strict=True):
            axes.imshow(_coloured(maps[depth], pattern.visible).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{share(maps[depth]):.0f} %", fontsize=10, color=INK)
            if name == "dense":
                axes.set_title("the mask" if depth == 0 else f"after {depth}", fontsize=10, color=INK)
            for spine in axes.spines.values():
                spine.set_color("#b0b6bb")
        row[0].set_ylabel(f"{name} convolutions", fontsize=10, color=INK)
    kinds = {VISIBLE: "visible", LEAKED: "hidden, but no longer zero", EMPTY: "zero"}
    patches = [Patch(facecolor=colour, edgecolor="#b0b6bb", label=label) for colour, label in kinds.items()]
    above.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    lines, histogram = below.subplots(1, 2)
    _draw_shares(lines, pattern)
    _draw_intensities(histogram, pattern)
    return figure


def _coloured(pattern: Tensor, visible: Tensor) -> Tensor:
    """(H, W, 3) in [0, 1], with a colour each for zeros, non-zero hidden pixels and non-zero visible pixels."""
    colours = torch.tensor([to_rgb(EMPTY), to_rgb(LEAKED), to_rgb(VISIBLE)])
    return colours[pattern.long() * (1 + visible.long())]


def _draw_shares(axes: Any, pattern: MaskPattern) -> None:
    depths = range(pattern.layers + 1)
    axes.plot(depths, share(pattern.dense).tolist(), color=LEAKED, marker=".", label="dense: hidden patches fill up")
    axes.plot(depths, share(pattern.sparse).tolist(), color=VISIBLE, marker=".", label="sparse: the mask stays")
    axes.set(xlabel="3x3 convolutions", ylabel="non-zero pixels, %", ylim=(0, 104))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


def _draw_intensities(axes: Any, pattern: MaskPattern) -> None:
    """SparK's other reason: hidden pixels at zero shift the distribution of the network's input."""
    pixels = pattern.image.mean(0)
    whole, visible = pixels.flatten(), pixels[pattern.visible]
    zeroed = (pixels * pattern.visible).flatten()
    edges = torch.linspace(-2.5, 2.5, 41)
    for values, label, style in (
        (whole, "whole image", {"color": "#9aa3aa", "histtype": "stepfilled", "alpha": 0.6}),
        (zeroed, "hidden pixels at zero (dense)", {"color": LEAKED, "histtype": "step", "linewidth": 1.6}),
        (visible, "hidden pixels left out (sparse)", {"color": VISIBLE, "histtype": "step", "linewidth": 1.6}),
    ):
        weights = torch.full_like(values, 100 / len(values))
        axes.hist(values.numpy(), bins=edges.numpy(), weights=weights.numpy(), label=label, **style)
    axes.set(xlabel="normalised pixel value", ylabel="input pixels, %", yscale="log", xlim=(-2.5, 2.5))
    axes.grid(alpha=0.3)
    axes.legend(
        frameon=False, fontsize=8.5, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1, handlelength=1.4
    )
