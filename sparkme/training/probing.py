"""The work of `sparkme.probe`: accuracy of frozen features under several weights, as a table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparkme.data.labelled import Labelled, Split, WholeImages, class_counts, find_labelled, whole_batches
from sparkme.data.limits import limit_pixels
from sparkme.data.planes import Pixels
from sparkme.data.sources import Columns
from sparkme.data.survey import find_pixels
from sparkme.errors import UserError, user_errors
from sparkme.files import replaced_when_whole
from sparkme.settings.commands import ProbeSettings
from sparkme.settings.declare import to_config
from sparkme.settings.shared import checked_range, default_workers, fixed_size
from sparkme.training.distributed import start_process, stop_process
from sparkme.training.features import PooledFeatures, knn_accuracy, linear_accuracy, pooled_features
from sparkme.weights.prefixes import Choice
from sparkme.weights.pretrained import Pretrained, read_pretrained


def probe(args: ProbeSettings) -> list[dict[str, Any]]:
    """Measures, prints a table and writes the numbers. Returns the rows of the table, see `measure`."""
    limit_pixels(args.max_pixels)
    process = start_process(args.device)
    if process.world > 1:
        stop_process()
        raise UserError("sparkme.probe runs in one process; start it with python")
    split = find_labelled(
        args.data,
        args.labels,
        label_separator=args.label_separator,
        val_share=args.val_share,
        seed=args.seed,
        root=args.root,
        cache=args.shard_cache,
        cache_gib=args.shard_cache_gib,
        columns=Columns(args.image_column, args.label_column),
    )
    if split.train.has_several:
        raise UserError("sparkme.probe needs one class per image, these have several labels; use sparkme.finetune")
    if args.shots is not None:
        split.train.shots(args.shots, args.seed)  # raises now if a class has too few
    main_weights = read_pretrained(args.weights, args.model, Choice(args.weights_key, args.adapt_stem))
    args = replace(args, input_size=fixed_size(args.input_size or main_weights.input_size or (224,)))  # one for all rows
    # Other files name their own model; --model is for those that do not.
    others = [main_weights.random() if what == "random" else _read_other(Path(what), main_weights) for what in args.compare]
    print(f"data      {args.data}: {split.note}; {class_counts(split.train)}")
    for remark in split.remarks:
        print(f"note      {remark}")
    records: list[dict[str, Any]] = []
    told = ""
    for pretrained in (main_weights, *others):
        pixels, seen = find_pixels(
            split.train.images,
            pretrained.channels,
            pretrained.background,
            known=pretrained.pixels,
            given=checked_range(args.value_range),
            upright=args.upright,
        )
        if seen != told:  # weights of other runs may convert pixel values differently
            print(f"images    {seen}")
            told = seen
        with user_errors():
            train, val = extract(pretrained, args, [split.train, split.val], process.device, pixels)
        for problem in dict.fromkeys((*train.unreadable, *val.unreadable)):
            print(f"skipped unreadable image {problem}", file=sys.stderr)
        if not len(train.numbers) or not len(val.numbers):
            raise UserError(f"--data {args.data}: none of its images can be read")
        for stride in chosen_strides(args.stage, sorted(train.maps)):
            score = measure(train, val, stride, split.train, split.val, args)
            records.append({"weights": pretrained.origin, "model": pretrained.model, **score})
    print(table(records))
    if args.output:
        _write(args.output, args, split, records)
    return records


def _write(output: Path, args: ProbeSettings, split: Split, records: list[dict[str, Any]]) -> None:
    content = {
        "config": to_config(args),
        "classes": split.train.classes,
        "num_train": len(split.train),
        "num_val": len(split.val),
        "scores": records,
    }
    with replaced_when_whole(output) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {output}")


def _read_other(path: Path, like: Pretrained) -> Pretrained:
    try:
        return read_pretrained(path)
    except UserError as error:
        if "pass --model" not in str(error):
            raise UserError(f"--compare: {error}") from error
        return read_pretrained(path, like.model)


def chosen_strides(stages: Sequence[str], strides: list[int]) -> list[int]:
    """The strides that --stage names.

    Raises:
        UserError: the network has no such map.
    """
    if "all" in stages:
        return strides
    chosen = {strides[-1] if stage == "last" else int(stage) for stage in stages}
    if missing := chosen - set(strides):
        raise UserError(f"--stage {min(missing)}: the network has maps at strides {', '.join(map(str, strides))}")
    return sorted(chosen)


def extract(
    pretrained: Pretrained, args: ProbeSettings, parts: list[Labelled], device: torch.device, pixels: Pixels
) -> list[PooledFeatures]:
    """Features of whole images for some weights."""
    encoder, taken = pretrained.encoder(args.seed)
    if taken:
        print(f"weights   {pretrained.origin}, {taken}")
    encoder.to(device).set_engine(args.engine)
    size = whole_size(args.input_size, encoder.patch)
    workers = default_workers(on_gpu=device.type == "cuda") if args.workers is None else args.workers
    found = []
    for part in parts:
        images = WholeImages(part.images, size, channels=pretrained.channels, background=pretrained.background, pixels=pixels)
        batches = whole_batches(images, batch_size=args.batch_size, workers=workers)
        bar = tqdm(batches, desc=f"features, {pretrained.origin}"[:60], leave=False, disable=not sys.stderr.isatty())
        found.append(pooled_features(encoder, bar, pretrained.statistics, device))
    return found


def whole_size(size: list[int] | tuple[int, ...], patch: int) -> tuple[int, int]:
    """Height and width. Raises UserError unless they are multiples of the network's total stride."""
    height, width = size[0], size[-1]
    if height % patch or width % patch:
        nearest = max(1, round(height / patch)) * patch
        raise UserError(f"--input-size {height} is not a multiple of the network's total stride {patch}; use {nearest}")
    return height, width


def measure(
    train: PooledFeatures, val: PooledFeatures, stride: int, train_set: Labelled, val_set: Labelled, args: ProbeSettings
) -> dict[str, Any]:
    """Scores of one map, from 0 to 1, with standard errors: over the draws of --shots, or else binomial."""
    x, y = train.maps[stride], train_set.labels[train.numbers]
    xv, yv = val.maps[stride], val_set.labels[val.numbers]
    readable = train_set.subset(train.numbers)
    draws = [readable.draw(args.shots, args.seed + i) for i in range(args.draws)] if args.shots else [slice(None)]
    knn = [knn_accuracy(x[d], y[d], xv, yv) for d in draws]
    out: dict[str, Any] = {"stride": stride, "channels": x.shape[1], "knn": _mean(knn), "knn_error": _error(knn, len(yv))}
    if args.linear:
        linear = [linear_accuracy(x[d], y[d], xv, yv) for d in draws]
        shares = [share for share, _ in linear]
        out |= {"linear": _mean(shares), "linear_error": _error(shares, len(yv)), "decay": [decay for _, decay in linear]}
    return out


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float], count: int) -> float:
    mean = _mean(values)
    if len(values) == 1:
        return math.sqrt(mean * (1 - mean) / count)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(records: list[dict[str, Any]]) -> str:
    """The table of scores in percent."""
    names = [record["weights"] for record in records]
    width = max(7, *map(len, names))
    head = f"{'weights':{width}s}  stride  channels  {'kNN':>13s}" + (f"  {'linear':>13s}" if "linear" in records[0] else "")
    lines, before = [head], None
    for record in records:
        shown = "" if record["weights"] == before else record["weights"]
        before = record["weights"]
        cells = [f"{100 * record[k]:5.1f} ± {100 * record[k + '_error']:3.1f} %" for k in ("knn", "linear") if k in record]
        lines.append(
            f"{shown:{width}s}  {record['stride']:6d}  {record['channels']:8d}  {'  '.join(f'{c:>13s}' for c in cells)}"
        )
    return "\n".join(lines)
