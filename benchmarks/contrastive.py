"""Pretrains a network with a contrastive method of lightly, for comparison with masked pretraining.

    python -m benchmarks.contrastive --method simclr --data photos/ --model resnet18 --epochs 100 --output simclr.pth

lightly (MIT) is no dependency. Run this with the Python of an environment that has it on top of this project's own.

Both methods have lightly's settings for small sets (its CIFAR-10 benchmark): batches of 128, SGD with a learning rate of 0.06,
momentum 0.9 and weight decay 5e-4, a cosine to zero, no blur.

- `simclr` (Chen et al., ICML 2020): two crops of an image shall have similar features, and other features than the other images
  of the batch; temperature 0.5.
- `densecl` (Wang et al., CVPR 2021): the same against a slow copy of the network and a queue of 4,096 features, temperature 0.1
  and momentum 0.99 as lightly's MoCo; half of the loss compares each place of the last map with the most similar place of the
  other crop's.

The output is a state dict of the dense network, which `sparkme.probe` and `sparkme.finetune` take with `--model`. Beside it,
`FILE.json` says loss, crops and seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sparkme
from sparkme.data.sources.files import find_images
from sparkme.errors import UserError, run_command
from sparkme.networks.create import create_dense
from sparkme.networks.pyramid import Pyramid

METHODS = ("simclr", "densecl")
TIMED_STEPS = 20  # that say how many steps the minutes have
BATCH, RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.06, 0.9, 5e-4
QUEUE, SLOWNESS, EMBEDDING = 4096, 0.99, 128


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contrastive", description="Pretrain a network with a contrastive method of lightly."
    )
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="images")
    parser.add_argument("--model", required=True, help="network, as for sparkme.pretrain")
    parser.add_argument("--input-size", type=int, default=96, metavar="PIXELS", help="side of the crops (default: %(default)s)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=int, metavar="N")
    length.add_argument("--minutes", type=float, metavar="M", help="by the speed of the first steps")
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="images, of two crops each")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="weights, .pth")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: train(args))


class Crops(Dataset[list[Tensor]]):
    """Two random crops of each image, as lightly changes them."""

    def __init__(self, paths: list[Path], method: str, size: int) -> None:
        from lightly.transforms import DenseCLTransform, SimCLRTransform  # noqa: PLC0415  (no dependency)

        self.paths = paths
        kind = SimCLRTransform if method == "simclr" else DenseCLTransform
        self.transform = kind(input_size=size, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> list[Tensor]:
        image = Image.open(self.paths[number]).convert("RGBA")
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image)
        crops: list[Tensor] = self.transform(on_white.convert("RGB"))
        return crops


class SimCLR(nn.Module):
    """A network and a head, trained on pairs of crops."""

    def __init__(self, network: Pyramid) -> None:
        from lightly.loss import NTXentLoss  # noqa: PLC0415
        from lightly.models.modules.heads import SimCLRProjectionHead  # noqa: PLC0415

        super().__init__()
        self.network, width = network, network.channels[-1]
        self.head, self.criterion = SimCLRProjectionHead(width, width, EMBEDDING), NTXentLoss(temperature=0.5)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        embedded = self.head(self.network.maps(torch.cat([first, second]))[-1].mean((2, 3)))
        loss: Tensor = self.criterion(*embedded.chunk(2))
        return loss


class DenseCL(nn.Module):
    """A network and two heads, and their slow copies."""

    def __init__(self, network: Pyramid) -> None:
        from lightly.loss import NTXentLoss  # noqa: PLC0415
        from lightly.models.modules.heads import DenseCLProjectionHead  # noqa: PLC0415

        super().__init__()
        width = network.channels[-1]
        self.fast = nn.ModuleList([network, *(DenseCLProjectionHead(width, width, EMBEDDING) for _ in range(2))])
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        queue = {"temperature": 0.1, "memory_bank_size": (QUEUE, EMBEDDING)}
        self.of_images, self.of_places = NTXentLoss(**queue), NTXentLoss(**queue)

    def embedded(self, branch: nn.ModuleList, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of images (B, 128), of places (B, N, 128), and the places' features (B, N, C), normalised."""
        network, of_images, of_places = branch
        features: Tensor = [*network(images).values()][-1].flatten(2).transpose(1, 2)
        return of_images(features.mean(1)), of_places(features), F.normalize(features, dim=2)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                slow.lerp_(fast, 1 - SLOWNESS)
            keys, places_of_keys, features_of_keys = self.embedded(self.slow, second)
        queries, places, features = self.embedded(self.fast, first)
        with torch.no_grad():
            nearest = (features @ features_of_keys.transpose(1, 2)).argmax(2, keepdim=True)
            positives = places_of_keys.gather(1, nearest.expand(-1, -1, EMBEDDING))
        loss: Tensor = 0.5 * self.of_images(queries, keys)
        return loss + 0.5 * self.of_places(places.flatten(0, 1), positives.flatten(0, 1))


def train(args: argparse.Namespace) -> int:
    """Trains, and writes the weights. Returns the exit code."""
    paths = find_images(args.data, flag="--data")
    if len(paths) < 2:
        raise UserError(f"{args.data} has {len(paths)} images; at least 2 are needed")
    batch = min(args.batch_size, len(paths))
    torch.manual_seed(args.seed)
    pyramid = sparkme.pyramid(create_dense(args.model))
    pyramid.network.train()
    try:
        model = (SimCLR if args.method == "simclr" else DenseCL)(pyramid)
        crops = Crops(paths, args.method, args.input_size)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run this with a Python that has lightly") from None
    loader = DataLoader(crops, batch, shuffle=True, drop_last=True, num_workers=args.workers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE * batch / BATCH, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    begun, total = time.perf_counter(), (args.epochs or 1) * len(loader)
    steps, losses = 0, list[float]()
    while steps < total:
        for first, second in loader:
            for group in optimizer.param_groups:
                group["lr"] = RATE * batch / BATCH * (1 + math.cos(math.pi * steps / total)) / 2
            loss = model.loss(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            steps += 1
            seconds = time.perf_counter() - begun
            if args.minutes is not None and steps <= TIMED_STEPS:
                total = max(steps, round(args.minutes * 60 / seconds * steps))
            if steps == total:
                break
        crops_seen = 2 * batch * steps
        record = {"loss": sum(losses) / len(losses), "crops": crops_seen, "seconds": round(seconds, 1)}
        losses.clear()
        print(f"step {steps}/{total} | loss {record['loss']:.4f} | {crops_seen / seconds:.1f} crops/s", flush=True)
    save(pyramid, record, args.output)
    return 0


def save(pyramid: Pyramid, record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(pyramid.network.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
