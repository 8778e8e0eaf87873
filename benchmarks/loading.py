"""Measures the speed of loading images, and computes what GPUs need.

    python -m benchmarks.loading --json benchmarks/results/loading.json
    python -m benchmarks.loading --data photos/ --input-size 224        # your own photographs
    python -m benchmarks.loading --scale                                # the table in the README, computed

It measures crops on one core, in turns with plain torchvision (decode, RandomResizedCrop, flip, bytes), and the effect of
decoding JPEG files at reduced size. Then it measures whole batches by loader processes, listing a million files, and the memory
of a loader process. Images are scikit-image's photographs, tiled if they are small, saved as JPEG of quality 90.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.flops import build, count_network, provenance, total
from benchmarks.throughput import write_json
from sparkme.data.dataset import CropDataset, EpochSampler, create_loader
from sparkme.data.images import load_rgb
from sparkme.data.sources.files import Files, Names, demo_photographs, find_images, list_folder
from sparkme.errors import UserError, run_command
from sparkme.settings.pretrain import RECIPES
from sparkme.settings.shared import default_workers

ROOFLINE_TFLOPS = 790.0  # bf16, a large matrix product of torch's on an H200
REACHED = 0.308  # share of it in ResNet-50's training step: 256 images in 87.9 ms (benchmarks/results/h200_graph.json)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description="Measure how fast images are loaded.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="photographs to load (default: scikit-image's)")
    parser.add_argument(
        "--input-size", type=int, default=224, metavar="PIXELS", help="side of the crops (default: %(default)s)"
    )
    parser.add_argument(
        "--crop-scale", type=float, nargs="+", default=[0.67, 0.2, 0.08], metavar="S", help="smallest areas of a crop"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each contender (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=48, metavar="N", help="crops per turn (default: %(default)s)")
    parser.add_argument("--files", type=int, default=1_000_000, metavar="N", help="files to list; 0: none")
    parser.add_argument("--scale", action="store_true", help="only compute the needs of data sets and GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, with versions, commit and command")
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: loading(args, words))


def loading(args: argparse.Namespace, words: list[str]) -> int:
    if args.input_size < 1 or args.rounds < 1 or args.crops < 1 or args.files < 0:
        raise UserError("--input-size, --rounds and --crops must be at least 1, --files at least 0")
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": "images per second and core, and what GPUs need; see benchmarks/loading.py",
        "command": shlex.join(["python", "-m", "benchmarks.loading", *words]),
        **provenance(),
        "cores": len(os.sched_getaffinity(0)),
    }
    record["gpu_rates"] = gpu_rates()
    if not args.scale:
        with tempfile.TemporaryDirectory() as folder:
            sets = {"--data": find_images(args.data)} if args.data else make_photographs(Path(folder))
            record["crops"] = [
                measure_crops(name, paths, scale, args) for name, paths in sets.items() for scale in args.crop_scale
            ]
            record["batches"] = measure_batches(next(iter(sets.values())), args)
        record["sharing"] = measure_sharing()
        if args.files:
            record["listing"] = measure_listing(args.files)
        fastest = next(row for row in record["crops"] if row["crop_scale"] == args.crop_scale[0])["images_per_s"]["sparkme"]
        record["cores_for_an_h200"] = {name: round(rate / fastest) for name, rate in record["gpu_rates"].items()}
        for name, cores in record["cores_for_an_h200"].items():
            print(f"{name}: {record['gpu_rates'][name]:.0f} images/s on an H200 (computed), {cores} cores like this one")
    record["scale"] = scale_rows(record["gpu_rates"])
    print("\n" + scale_table(record["scale"]))
    write_json(args.json, record)
    return 0


def make_photographs(folder: Path) -> dict[str, list[Path]]:
    """Photographs of 1,000 pixels and more, and the same photographs at about ImageNet's usual size."""
    from skimage import data  # noqa: PLC0415  (optional)

    small = [load_rgb(path).resize((640, 427), Image.Resampling.LANCZOS) for path in demo_photographs()]
    large = [Image.fromarray(data.retina()), Image.fromarray(data.hubble_deep_field())]  # 1411 x 1411, 1000 x 872
    for i in range(4):
        wall = Image.new("RGB", (1280, 854))
        for j in range(4):
            wall.paste(small[(i + 3 * j) % len(small)], (640 * (j % 2), 427 * (j // 2)))
        large.append(wall)
    sets = {
        "1,000 pixels and more": large,
        "500 x 375": [image.resize((500, 375), Image.Resampling.LANCZOS) for image in large],
    }
    found: dict[str, list[Path]] = {}
    for name, images in sets.items():
        found[name] = []
        for i, image in enumerate(images):
            path = folder / f"{len(found)}-{i}.jpg"
            image.save(path, quality=90)
            found[name].append(path)
    return found


def measure_crops(name: str, paths: list[Path], scale: float, args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of one core, in turns, and the difference between reduced and full decoding."""
    size = (args.input_size, args.input_size)
    whole, reduced = (CropDataset(Files.of(paths), size, min_scale=scale, seed=0, reduced_jpeg=flag) for flag in (False, True))
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    contenders: dict[str, Callable[[int], Any]] = {
        "torchvision": lambda i: theirs(Image.open(paths[i % len(paths)]).convert("RGB")),
        "sparkme, decoded as a whole": lambda i: whole[0, i],
        "sparkme": lambda i: reduced[0, i],
    }
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for work in contenders.values():
        work(0)
    for _ in range(args.rounds):
        for contender, work in contenders.items():
            start = time.perf_counter()
            for i in range(args.crops):
                work(i)
            seconds[contender].append((time.perf_counter() - start) / args.crops)
    rates = {contender: 1 / median(values) for contender, values in seconds.items()}
    apart = torch.stack([(crop(whole, i) - crop(reduced, i)).abs() for i in range(args.crops)])
    row = {
        "photographs": name,
        "crop_scale": scale,
        "images_per_s": {contender: round(rate, 1) for contender, rate in rates.items()},
        "over_torchvision": round(rates["sparkme"] / rates["torchvision"], 2),
        "difference_mean": round(float(apart.mean()), 2),
        "difference_99_percent": float(apart.flatten().sort().values[int(0.99 * apart.numel())]),
        "psnr_db": round(10 * float((255**2 / apart.square().mean()).log10()), 1),
    }
    print(
        f"{name}, crops from {scale}: "
        + ", ".join(f"{contender} {rate:.0f} images/s" for contender, rate in rates.items())
        + f"; {row['over_torchvision']} x torchvision; crops differ by {row['difference_mean']} of 255 in the mean, "
        f"{row['difference_99_percent']:.0f} at 99 % ({row['psnr_db']} dB)"
    )
    return row


def crop(dataset: CropDataset, number: int) -> torch.Tensor:
    image = dataset[0, number].image
    assert image is not None
    return image.float()


def measure_batches(paths: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Whole batches, with a worker per core."""
    size, workers, batch = (args.input_size, args.input_size), default_workers(on_gpu=torch.cuda.is_available()), 32
    dataset = CropDataset(Files.of(paths), size, min_scale=args.crop_scale[0], seed=0)
    steps = 4 + max(4, args.rounds * args.crops // batch)
    sampler = EpochSampler(len(paths), steps * batch, batch, 0, range(steps))
    start = 0.0
    for i, _ in enumerate(create_loader(dataset, sampler, workers=workers, pin_memory=False)):
        if i == 3:
            start = time.perf_counter()
    rate = (steps - 4) * batch / (time.perf_counter() - start)
    print(f"{workers} worker processes: {rate:.0f} images/s")
    return {"workers": workers, "images_per_s": round(rate, 1)}


def measure_sharing(count: int = 1_000_000) -> dict[str, Any]:
    """Memory that a loader process no longer shares after it read the names of a million files."""
    names = (f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(count))
    files = Files(Path(), _packed(names), "names")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = _private_mib()
        for i in range(count):
            _ = files.names[i]
        os.write(writer, f"{_private_mib() - before:.2f}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    grown = float(os.read(reader, 99))
    shared = (files.names.text.nbytes + files.names.ends.nbytes) / 2**20
    print(f"names of {count:,} files: {shared:.0f} MiB, shared; each worker copies {grown:.1f} MiB of them")
    return {"files": count, "shared_mib": round(shared, 1), "of_each_worker_mib": grown}


def _packed(names: Any) -> Any:
    return Names.pack(names)


def _private_mib() -> float:
    found = re.search(r"Private_Dirty: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure_listing(count: int) -> dict[str, Any]:
    """Lists empty files in folders of a thousand, and lists them again from the index."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"making {count:,} files ...", flush=True)
        for first in range(0, count, 1000):
            below = Path(folder, "data", f"n{first // 1000:08d}")
            below.mkdir(parents=True)
            for i in range(first, min(first + 1000, count)):
                os.close(os.open(f"{below}/n{first // 1000:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
        seconds = {}
        for name in ("first", "again"):
            start = time.perf_counter()
            files = list_folder(Path(folder, "data"))
            seconds[name] = time.perf_counter() - start
        assert len(files) == count
        index = Path(folder, "images.npz")
        files.write_index(index)
        start = time.perf_counter()
        assert len(list_folder(Path(folder, "data"), index=index)) == count
        seconds["from the index"] = time.perf_counter() - start
    print(f"listing {count:,} files: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    return {"files": count, "seconds": {name: round(value, 2) for name, value in seconds.items()}}


def gpu_rates() -> dict[str, float]:
    """Images per second of a training step on an H200: the step's arithmetic over 40 % of the measured roofline."""
    rates = {}
    for model in ("resnet50", "convnext_base"):
        forward = 2 * total(count_network(build(model, [224], 0.6, 768, None))).sparse
        rates[model] = REACHED * ROOFLINE_TFLOPS * 1e12 / (3 * forward)  # a backward pass is two forward ones
    return rates


def scale_rows(rates: dict[str, float], images_per_core: float = 300.0) -> list[dict[str, Any]]:
    """Computes the time and cores for pretraining a ResNet-50.

    Args:
        rates: images per second of a GPU.
        images_per_core: images of ImageNet's usual size that a server's core decodes and crops per second.
    """
    rows = []
    for name, images, epochs in (("ImageNet-1k", 1_281_167, RECIPES["spark"].defaults["epochs"]), ("100 M images", 10**8, 20)):
        for gpus in (8, 64):
            rate, bytes_each = rates["resnet50"], 110_000
            shards = int(np.ceil(images * bytes_each / 1e9))
            rows.append(
                {
                    "data": name,
                    "images": images,
                    "epochs": epochs,
                    "gpus": gpus,
                    "days": round(images * epochs / (rate * gpus) / 86400, 2),
                    "images_per_s": round(rate * gpus),
                    "loader_cores_per_gpu": round(rate / images_per_core, 1),
                    "read_gb_per_s": round(rate * gpus * bytes_each / 1e9, 2),
                    "shards_of_1_gb": shards,
                    "shards_per_process_and_epoch": round(shards / gpus, 1),
                    "order_mib": round((images * 8 if name == "ImageNet-1k" else 16_384 * 8) / 2**20, 2),
                    "names_mib": round(images * (40 + 8) / 2**20) if name == "ImageNet-1k" else round(images * 16 / 2**20),
                }
            )
    return rows


def scale_table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| data | GPUs | epochs | days | images/s | loader cores per GPU | read | 1 GB shards | shards per process and epoch "
        "| index in memory | order in memory |"
    )
    lines = [head, "|---|" + "---:|" * 10]
    for row in rows:
        lines.append(
            f"| {row['data']} | {row['gpus']} | {row['epochs']} | {row['days']:g} | {row['images_per_s']:,} | "
            f"{row['loader_cores_per_gpu']:g} | {row['read_gb_per_s']:g} GB/s | {row['shards_of_1_gb']:,} | "
            f"{row['shards_per_process_and_epoch']:,g} | {row['names_mib']:,} MiB | {row['order_mib']:g} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
