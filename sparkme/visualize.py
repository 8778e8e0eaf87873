"""Pictures of what a pretrained network makes of hidden patches, and of why its convolutions are sparse.

python -m sparkme.visualize runs/mine/checkpoints/last.pt                               # scikit-image's photographs
python -m sparkme.visualize runs/mine/checkpoints/last.pt photos/ cat.jpg --output page.html
python -m sparkme.visualize runs/mine/checkpoints/last.pt --mask-ratio 0.4 0.6 0.8 --statistics predicted
python -m sparkme.visualize --mask-pattern --output mask_pattern.png
"""

from __future__ import annotations

import argparse
import sys

from sparkme.errors import Parser, run_command
from sparkme.training.config import add_device, add_engine, add_pixels, path_argument


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.visualize",
        description="Draw images, what a pretrained network sees of them, what it makes of the rest, and how far it is off.",
        epilog="Images stand before flags that take several values, such as --mask-ratio.",
    )
    group = parser.add_argument_group("what is shown")
    group.add_argument("checkpoint", nargs="?", type=path_argument, metavar="CHECKPOINT", help="of sparkme.pretrain")
    group.add_argument(
        "images", nargs="*", type=path_argument, metavar="IMAGE",
        help="image files, and folders of them, nested or flat (scikit-image's photographs)",
    )  # fmt: skip
    group.add_argument("--max-images", type=int, metavar="N", help="show at most so many, spread over what was given (8)")
    group.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help="of the images, side or height and width: any "
                       "multiple of the patch (the run's --input-size)")  # fmt: skip
    group.add_argument(
        "--statistics",
        choices=("true", "predicted"),
        help="where hidden patches get their mean and deviation from: their own, as in the paper, or from the visible patches "
        "around, without a look at hidden pixels (true)",
    )
    add_pixels(group)
    group = parser.add_argument_group("masks")
    group.add_argument("--mask-ratio", type=float, nargs="+", metavar="R", help="share of patches to hide (the run's)")
    group.add_argument("--seeds", type=int, nargs="+", metavar="N", help="a mask for each, the same for all images (the run's)")
    group.add_argument("--num-seeds", type=int, metavar="N", help="the seeds 0 to N - 1")
    group = parser.add_argument_group("why sparse convolutions")
    group.add_argument("--mask-pattern", action="store_true", help="needs no checkpoint: draw what becomes of a mask in dense "
                       "convolutions and in this project's sparse ones")  # fmt: skip
    group.add_argument("--layers", type=int, metavar="N", help="how many convolutions (16)")
    group = parser.add_argument_group("machine")
    add_device(group)
    add_engine(group)
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=path_argument, metavar="FILE", help=".png, or .html for one page that needs no other "
                       "file (visualize.png in the run's folder, mask_pattern.png)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_intermixed_args(argv)
    return run_command(lambda: run(args), watch=True)


def run(args: argparse.Namespace) -> int:
    if args.mask_pattern:
        from sparkme.reporting.mask_pattern import draw_pattern  # noqa: PLC0415  (torch, which --help does not need)

        return draw_pattern(args)
    from sparkme.reporting.visualize import visualize  # noqa: PLC0415

    return visualize(args)


if __name__ == "__main__":
    sys.exit(main())
