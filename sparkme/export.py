"""Turns a checkpoint into weights for the ordinary dense network, after checking them against the sparse encoder.

    python -m sparkme.export runs/resnet50-224/checkpoints/last.pt --to torchvision --output resnet50.safetensors

What comes out loads into torchvision's own model; only the classifier's weights are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparkme.errors import UserError, run_command

if TYPE_CHECKING:
    from sparkme.sparse.encoder import SparseEncoder

# In float64 both networks differ by rounding alone: about 1e-13 for a hundred layers. A wrong layout differs by about 1.
TOLERANCE = 1e-8


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparkme.export",
        description="Export the encoder of a checkpoint as weights of the ordinary dense network, verified.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of sparkme.pretrain, such as runs/x/checkpoints/last.pt")
    parser.add_argument(
        "--to", choices=("torchvision",), default="torchvision", help="whose model the weights are for (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=".safetensors or .pth (MODEL.safetensors in the run folder)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every stage of the dense model with the sparse encoder before writing (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: export(args))


def export(args: argparse.Namespace) -> int:
    from sparkme.interop.files import TORCH_SUFFIXES, check_suffix, write_state_dict
    from sparkme.models import create_dense
    from sparkme.training.build import build_network
    from sparkme.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(args.checkpoint)
    config = checkpoint["config"]
    output = args.output or run_folder(args.checkpoint) / f"{config['model']}.safetensors"
    check_suffix(output)
    notes = output.with_name(output.name + ".json")  # what a .pth file has no place for
    for path in (output, notes) if output.suffix in TORCH_SUFFIXES else (output,):
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; choose another --output, or pass --overwrite")
    network = build_network(config)
    network.load_state_dict(checkpoint["model"])
    encoder = network.encoder
    state = encoder.dense_state_dict()

    dense = create_dense(config["model"])
    missing, unexpected = dense.load_state_dict(state, strict=False)
    if unexpected:
        raise UserError(f"torchvision's {config['model']} has no weights {', '.join(unexpected[:5])}; is it another version?")
    if args.verify:
        errors = verify(dense, encoder, (config["input_size"][0], config["input_size"][1]))
        for stride, error in zip(encoder.strides, errors, strict=True):
            print(f"stride {stride:2d}: dense and sparse features differ by {error:.1e} of their largest value")
        if not all(error <= TOLERANCE for error in errors):  # NaN too
            print(f"error: the dense model does not compute what the sparse encoder does (more than {TOLERANCE:.0e}); "
                  "nothing was written", file=sys.stderr)  # fmt: skip
            return 1

    metadata = describe(config, checkpoint["step"], args)
    write_state_dict(output, state, metadata)
    if output.suffix in TORCH_SUFFIXES:
        notes.write_text(json.dumps(metadata, indent=2) + "\n")
    size = output.stat().st_size / 1e6
    print(f"wrote {output} ({size:.1f} MB, {'verified' if args.verify else 'NOT verified'}); "
          f"left to you, the classifier: {', '.join(missing)}")  # fmt: skip
    print(f"load it:\n\n{_loading_code(config['model'], output)}")
    return 0


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, wherever it was moved."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


@torch.no_grad()
def verify(dense: nn.Module, encoder: SparseEncoder, size: tuple[int, int]) -> list[float]:
    """Compares a dense model with a sparse encoder, in float64 and eval mode, on images with every patch visible.

    Args:
        dense: the model that got the exported weights.
        encoder: the encoder they came from; moved to float64 on the CPU.
        size: height and width of the images.

    Returns:
        Per stage, shallow to deep, the largest difference over the largest value; NaN where a value is not finite.
    """
    from sparkme.sparse.hierarchy import dense_features

    dense, encoder = dense.double().eval().cpu(), encoder.double().eval().cpu().set_engine("minkowski")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_channels, *size, generator=generator, dtype=torch.float64)
    patch = encoder.strides[-1]
    active = torch.ones(2, 1, size[0] // patch, size[1] // patch, dtype=torch.bool)
    expected = dense_features(dense, encoder.hierarchy.taps, images)
    return [_difference(x.dense(), y) for x, y in zip(encoder(images, active), expected, strict=True)]


def _difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def describe(config: dict[str, Any], step: int, args: argparse.Namespace) -> dict[str, str]:
    """Where the weights come from, for the file's metadata."""
    import sparkme

    recipe = {
        k: config[k] for k in ("input_size", "mask_ratio", "epochs", "batch_size", "base_lr", "optimizer", "init", "data")
    }
    return {
        "format": "pt",
        "model": f"torchvision {config['model']}, encoder without classifier",
        "method": "SparK (Tian et al., ICLR 2023), arXiv:2301.03580",
        "recipe": json.dumps(recipe),
        "source": f"{args.checkpoint.name}, step {step}",
        "verified": str(args.verify).lower(),
        "made_by": f"sparkme {sparkme.__version__}",
    }


def _loading_code(model: str, path: Path) -> str:
    if path.suffix == ".safetensors":
        package, read = "safetensors.torch", f"safetensors.torch.load_file({str(path)!r})"
    else:
        package, read = "torch", f"torch.load({str(path)!r})"
    return (
        f"import {package}, torchvision\n"
        f"model = torchvision.models.{model}()\n"
        f"model.load_state_dict({read}, strict=False)  # all but the classifier"
    )


if __name__ == "__main__":
    sys.exit(main())
