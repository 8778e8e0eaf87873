"""Labelled images: one folder per class, a table of paths and labels, or a data set with its own split."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from sparkme.data.copies import first_copies, first_links
from sparkme.data.dataset import Sample, as_source, collate
from sparkme.data.handover import Loader
from sparkme.data.images import load_image
from sparkme.data.label_columns import TRAIN, VAL, read_label_columns
from sparkme.data.planes import Pixels
from sparkme.data.sources import LISTS, Columns, Files, ImageSource, find_source
from sparkme.data.sources.files import Names, is_image, look_through
from sparkme.data.sources.left_out import LeftOut, is_passed_over
from sparkme.data.sources.table import open_table
from sparkme.errors import UserError
from sparkme.seeds import derived_seed
from sparkme.text import printable


@dataclass
class Labelled:
    """Images with their classes or labels.

    Attributes:
        images: the source.
        labels: (N,) int64 class numbers, or (N, classes) bool if an image may have several labels.
        classes: names of the numbers or columns.
    """

    images: ImageSource
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_several(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    @property
    def paths(self) -> list[Path]:
        """The paths of images that are files."""
        assert isinstance(self.images, Files)
        return [self.images.path(i) for i in range(len(self))]

    def name(self, number: int) -> str:
        """The name of an image, with its class."""
        labels = compress(self.classes, self.labels[number]) if self.has_several else [self.classes[int(self.labels[number])]]
        return f"{self.images.name(number)} ({', '.join(map(printable, labels))})"

    def differ(self, numbers: Tensor, others: Tensor) -> Tensor:
        """(N,) bool: whether two images of a pair differ in their labels."""
        return (self.labels[numbers] != self.labels[others]).view(len(numbers), -1).any(1)

    def members(self, label: int) -> Tensor:
        return (self.labels[:, label] if self.has_several else self.labels == label).nonzero().flatten()

    @property
    def counts(self) -> Tensor:
        """(classes,) int64: the number of images of each class."""
        return self.labels.sum(0) if self.has_several else torch.bincount(self.labels, minlength=len(self.classes))

    def subset(self, numbers: Tensor) -> Labelled:
        return Labelled(self.images.subset(numbers.tolist()), self.labels[numbers], self.classes)

    def draw(self, count: int, seed: int) -> Tensor:
        """The numbers of `count` random images of each class. Raises UserError for a class with fewer, or several labels."""
        if self.has_several:
            raise UserError(f"--shots {count} needs images with one label each, these have several; leave it out")
        chosen = []
        if count < 1:
            raise UserError(f"--shots {count} must be at least 1")
        for label, name in enumerate(self.classes):
            members = self.members(label)
            if len(members) < count:
                raise UserError(f"--shots {count}: class {name!r} has {len(members)} training images; lower it")
            chosen.append(members[_order(len(members), seed, "shots", label)[:count]])
        return torch.cat(chosen).sort().values

    def shots(self, count: int, seed: int) -> Labelled:
        """The images that `draw` chooses."""
        return self.subset(self.draw(count, seed))


class Split(NamedTuple):
    """Training and validation images, and a note about the split."""

    train: Labelled
    val: Labelled
    note: str

    @property
    def remarks(self) -> list[str]:
        """Notes to print once, at the start."""
        remarks = [*dict.fromkeys(self.train.images.remarks + self.val.images.remarks)]
        if self.val.has_several and not self.val.counts.all():
            names = ", ".join(compress(self.val.classes, self.val.counts == 0))
            remarks.append(f"no validation image has these labels, so the mean leaves them out: {names[:300]}")
        return remarks


def find_labelled(
    where: Path | str,
    labels: str | None = None,
    *,
    label_separator: str | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    flag: str = "--data",
    root: Path | None = None,
    cache: Path | None = None,
    cache_gib: float = 50.0,
    columns: Columns = Columns(),  # noqa: B008
) -> Split:
    """Labelled images, split into training and validation images.

    Args:
        where: a folder with one folder per class, or with folders `train` and `val` of that form; a table; or any other source
            with labels, see `sparkme.data.sources`.
        labels: a table of `path,label` with paths below `where`, and optionally a column that says `train` or `val`. If `where`
            is a table: the names of its label columns, separated by commas; with several, an image may have several labels.
        label_separator: text between several labels in a cell of a table; see `read_label_columns`.
        val_share: share of each class to validate on, if the data has no split.
        seed: of that random split.
        flag: the command-line flag of `where`, for messages.
        root: folder that names in a .csv are below; its own folder if None.
        cache, cache_gib: for shards.
        columns: of Parquet.

    Raises:
        UserError: there are no such labelled images; says what is expected.
    """
    if not 0 < val_share < 1:
        raise UserError(f"--val-share {val_share} is outside (0, 1)")
    data = Path(where)
    # os.path.isfile, since `data.is_file()` raises for a name that is too long.
    if data.suffix.lower() in LISTS and os.path.isfile(data):
        columns.refuse(f"{flag} {data}")
        return _from_table(root or data.parent, data, val_share, seed, labels, label_separator)
    if labels is not None and (os.path.isfile(labels) or Path(labels).suffix.lower() in LISTS):
        if not os.path.isdir(data):
            raise UserError(f"{flag} {data} must be the folder that holds the images named in --labels")
        columns.refuse(str(labels))
        return _from_table(data, Path(labels), val_share, seed, separator=label_separator)
    if labels is not None or label_separator is not None:
        given = f"--labels {labels}" if labels is not None else f"--label-separator {label_separator!r}"
        raise UserError(f"{given} is for a table, such as {flag} FILE.csv --root FOLDER; {flag} {data} is not a table")
    if not os.path.isdir(data) or not _folders_in(data):
        return split(_from_source(str(where), cache, cache_gib, flag, columns), val_share, seed)
    columns.refuse(f"{flag} {data}")
    train, val, unused = _parts_of(data, flag)
    if train and not val and _has_classes(train):
        raise UserError(f"{flag} {data} has a folder {train.name} but no folder val; add one, or pass {flag} {train}")
    if train and val:
        found = _from_folders(train, flag)
        other = _from_folders(val, flag, found.classes)
        note = f"{len(found)} training images in {train.name}, {len(other)} validation images in {val.name}"
        return Split(found, other, note + (f"; not used: {', '.join(unused)}" if unused else ""))
    return split(_from_folders(data, flag), val_share, seed)


def _parts_of(data: Path, flag: str) -> tuple[Path | None, Path | None, list[str]]:
    """The train and val folders of a data set, if any, and the names of other folders.

    Raises:
        UserError: the names of two folders differ in case only.
    """
    folders: dict[str, str] = {}
    for name in _folders_in(data):
        if name.lower() in (*TRAIN, *VAL) and (other := folders.get(name.lower())):
            raise UserError(f"{flag} {data} has both {other} and {name}; leave one out")
        folders[name.lower()] = name
    train, val = (next((folders[name] for name in names if name in folders), None) for names in (TRAIN, VAL))
    unused = [printable(name) for name in folders.values() if name not in (train, val)]
    return data / train if train else None, data / val if val else None, unused


def split(labelled: Labelled, val_share: float, seed: int) -> Split:
    """Draws a share of every class for validation, see `hold_out`."""
    chosen, note = hold_out(labelled, val_share, seed)
    train, val = (labelled.subset(part.nonzero().flatten()) for part in (~chosen, chosen))
    return Split(train, val, note)


def hold_out(labelled: Labelled, val_share: float, seed: int) -> tuple[Tensor, str]:
    """Draws a share of every class for validation, at least one image. Copies of an image stay on one side.

    Returns:
        (N,) bool, the validation images; and a line for people.

    Raises:
        UserError: a class has a single image.
    """
    first = first_copies(labelled.images)
    is_first = first == torch.arange(len(first))
    copied = _describe_copies(labelled, first)
    if labelled.has_several:
        chosen = _draw_of_labels(labelled, is_first, val_share, seed)[first]
    else:
        chosen = _draw_of_classes(labelled, is_first, bool(copied), val_share, seed)[first]
    kind = "label" if labelled.has_several else "class"
    count = int(chosen.sum())
    note = f"{len(chosen) - count} training and {count} validation images, drawn from every {kind} (seed {seed})"
    return chosen, f"{note}, since the data has no split{copied}"


def _draw_of_classes(labelled: Labelled, is_first: Tensor, has_copies: bool, val_share: float, seed: int) -> Tensor:
    """(N,) bool: the validation images among those that are no copies."""
    chosen = torch.zeros(len(labelled), dtype=torch.bool)
    for label, name in enumerate(labelled.classes):
        members = labelled.members(label)
        members = members[is_first[members]]
        if len(members) < 2:
            which = " without its copies" if has_copies else ""
            raise UserError(f"class {name!r} has {len(members)} image{which}; it needs one to train and one to validate on")
        count = min(len(members) - 1, max(1, round(val_share * len(members))))
        chosen[members[_order(len(members), seed, "split", label)[:count]]] = True
    return chosen


def _draw_of_labels(labelled: Labelled, is_first: Tensor, val_share: float, seed: int) -> Tensor:
    """As `_draw_of_classes`, for several labels: goes from the rarest label to images without any. Each keeps a training image
    (after Sechidis et al., ECML 2011). Raises UserError if no validation image is left.
    """
    chosen, is_learnt = torch.zeros(2, len(labelled), dtype=torch.bool)
    labels = [labelled.labels[:, label] for label in labelled.counts.argsort(stable=True).tolist()]
    for group, has in enumerate([*labels, ~labelled.labels.any(1)]):
        members = (has & is_first).nonzero().flatten()
        left = members[~(chosen | is_learnt)[members]]
        wanted = max(1, round(val_share * len(members))) - int(chosen[members].sum())
        count = max(0, min(wanted, len(left) - int(not is_learnt[members].any())))
        left = left[_order(len(left), seed, "split", group)]
        chosen[left[:count]] = True
        is_learnt[left[count:]] = True
    if not chosen.any():
        raise UserError(f"{len(labelled)} images are too few for a training and a validation split")
    return chosen


def _describe_copies(labelled: Labelled, first: Tensor) -> str:
    """A note about images that are copies of others, or ""."""
    copies = (first != torch.arange(len(first))).nonzero().flatten()
    if not len(copies):
        return ""
    odd = copies[labelled.differ(copies, first[copies])]
    two = f", {len(odd)} of them with another class" if len(odd) else ""
    shown = int(odd[0] if len(odd) else copies[0])
    names = f"{labelled.name(shown)} of {labelled.name(int(first[shown]))}"
    return f"; {len(copies)} images are copies of others{two}, such as {names}; copies stay on one side"


def _refuse_two_labels(labelled: Labelled) -> None:
    """Raises UserError for a file that appears in two classes through links."""
    if not isinstance(labelled.images, Files):
        return
    first = first_links(labelled.images)
    odd = labelled.differ(torch.arange(len(first)), first).nonzero().flatten()
    if len(odd):
        one, other = labelled.name(int(first[odd[0]])), labelled.name(int(odd[0]))
        raise UserError(f"{one} and {other} are one file with two labels ({len(odd)} such pairs); remove one of each pair")


def _has_classes(folder: Path) -> bool:
    """Whether it holds at least two folders and nothing else."""
    entries = [entry for entry in os.scandir(folder) if not is_passed_over(entry.name)]
    return len(entries) > 1 and all(entry.is_dir() for entry in entries)


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if not is_passed_over(entry.name) and os.path.isdir(entry))


def split_digest(train: Labelled, val: Labelled) -> str:
    """Twelve digits that change with the names of the images, their classes and their split."""
    parts = [
        (*_last_names(part.images, i), _names_of(part, label), name)
        for name, part in (("train", train), ("val", val))
        for i, label in enumerate(part.labels.tolist())
    ]
    order = [train.classes] if train.has_several else []  # classes are in alphabetical order
    return digest_of(parts + order)


def digest_of(parts: Sequence[Any]) -> str:
    """Twelve hexadecimal digits of plain values."""
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:12]


def _names_of(part: Labelled, label: int | list[bool]) -> str | list[str]:
    return [*compress(part.classes, label)] if isinstance(label, list) else part.classes[label]


def _last_names(images: ImageSource, number: int) -> tuple[str, ...]:
    """A name that does not depend on the folder of the data."""
    return images.path(number).parts[-2:] if isinstance(images, Files) else (os.path.basename(images.name(number)),)


def _from_source(where: str, cache: Path | None, cache_gib: float, flag: str, columns: Columns) -> Labelled:
    source = find_source(where, cache=cache, cache_gib=cache_gib, flag=flag, columns=columns)
    try:
        labels, classes = source.labels()
    except ValueError as error:
        more = "; make one folder per class, or pass --labels FILE.csv with lines of path,label" if Path(where).is_dir() else ""
        raise UserError(f"{flag} {error}{more}") from error
    if not bool((labels >= 0).all()):
        source, labels = source.subset((labels >= 0).nonzero().flatten().tolist()), labels[labels >= 0]
    used, labels = torch.unique(labels, return_inverse=True)  # a part of a data set may lack some classes
    classes = [classes[i] for i in used.tolist()]
    if len(classes) < 2:
        raise UserError(f"{flag} {where} has {len(classes)} class; two or more are needed")
    return Labelled(source, labels, classes)


def _from_folders(folder: Path, flag: str, known: list[str] | None = None) -> Labelled:
    """One class per folder, with images at any depth; `known` lists the allowed classes."""
    names: list[str] = []
    labels: list[int] = []
    problems: list[str] = []
    classes = list(known or [])
    left_out = LeftOut(
        Counter(entry.name for entry in os.scandir(folder) if is_passed_over(entry.name) and os.path.isdir(entry))
    )
    if loose := sum(is_image(entry.name) for entry in os.scandir(folder) if os.path.isfile(entry)):
        problems.append(f"{loose} image{'s' * (loose > 1)} outside the class folders")
    for name in _folders_in(folder):
        listed = look_through(folder / name)
        left_out.add(listed.left_out)
        problems += listed.problems
        if not listed:
            problems.append(f"the folder {printable(name)}, which has no images")
            continue
        images = [os.path.join(name, image) for image in listed.names]
        if known is None:
            classes.append(name)
        elif name not in known:
            raise UserError(f"{flag}: {folder} has a class {name!r} that the training images lack")
        labels += [classes.index(name)] * len(images)
        names += images
    if len(classes) < 2:
        raise UserError(
            f"{flag} {folder} has {len(classes)} folders with images; make one per class, or pass --labels FILE.csv with lines "
            f"of path,label{''.join(f'; {line}' for line in left_out.lines)}"
        )
    if not names:
        raise UserError(f"{flag}: {folder} has no images in its class folders")
    found = Labelled(
        Files(folder, Names.pack(names), str(folder), problems=problems, left_out=left_out), torch.tensor(labels), classes
    )
    _refuse_two_labels(found)
    return found


def _from_table(
    root: Path, table: Path, val_share: float, seed: int, columns: str | None = None, separator: str | None = None
) -> Split:
    names = None if columns is None else [name.strip() for name in next(csv.reader([columns], skipinitialspace=True))]
    rows = read_label_columns(open_table(table, root), names, separator)
    images = Files(Path(os.path.abspath(root)), Names.pack(rows.images), str(table), notes=rows.notes)
    labelled = Labelled(images, rows.labels, rows.classes)
    _refuse_two_labels(labelled)
    if rows.is_val is None:
        return _with_labels(split(labelled, val_share, seed), table)
    train, val = (labelled.subset(part.nonzero().flatten()) for part in (~rows.is_val, rows.is_val))
    if not len(train) or not len(val):
        raise UserError(f"{table} has {len(train)} lines for train and {len(val)} for val; both need at least one")
    if not labelled.has_several and (unknown := set(rows.classes) - {rows.classes[label] for label in train.labels.tolist()}):
        raise UserError(f"{table}: class {min(unknown)!r} has no training image")
    note = f"{len(train)} training and {len(val)} validation images, as {table.name} says"
    return _with_labels(Split(train, val, note), table)


def _with_labels(found: Split, table: Path) -> Split:
    """Refuses a split in which no image has a label."""
    for part, purpose in ((found.train, "training"), (found.val, "validation")):
        if not part.counts.any():
            raise UserError(f"{table}: none of the {len(part)} {purpose} images has a label")
    return found


def _order(count: int, seed: int, purpose: str, label: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, purpose, label)))


class NumberedSample(NamedTuple):
    """A sample and its number in the data set."""

    sample: Sample
    number: int


class WholeBatch(NamedTuple):
    """The readable images (B, C, H, W) or None, their numbers (B,), and the errors of the others."""

    images: Tensor | None
    numbers: Tensor
    unreadable: tuple[str, ...]


class WholeImages(Dataset[NumberedSample]):
    """Validation images: resized, so that the centre crop keeps `crop_share` of the shorter side.

    Args:
        images: a source, or files.
        size: height and width.
        channels, background: see `load_image`.
        pixels: conversion of pixel values.
        crop_share: 0.95 as in the official fine-tuning code (downstream_imagenet/data.py).
    """

    def __init__(
        self,
        images: ImageSource | Sequence[Path],
        size: tuple[int, int],
        *,
        channels: int = 3,
        background: str = "white",
        pixels: Pixels = Pixels(),  # noqa: B008
        crop_share: float = 0.95,
    ) -> None:
        self.source, self.channels, self.background, self.pixels = as_source(images), channels, background, pixels
        self.resized = [round(side / crop_share) for side in size]
        self.crop = v2.Compose([v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> NumberedSample:
        try:
            image = load_image(self.source.read(number), self.channels, self.background, self.pixels)
        except OSError as error:
            return NumberedSample(Sample(None, (str(error),)), number)
        height, width = v2.functional.get_size(image)
        factor = max(self.resized[0] / height, self.resized[1] / width)  # the smallest that covers the crop
        size = [max(least, round(side * factor)) for least, side in zip(self.resized, (height, width), strict=True)]
        image = v2.functional.resize(image, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        crop = self.crop(image)
        return NumberedSample(Sample(crop if crop.dtype == torch.uint8 else crop.clamp(0, 1), ()), number)


def whole_batches(dataset: WholeImages, *, batch_size: int, workers: int, share: Sequence[int] | None = None) -> Loader:
    """Batches of a data set in its order, or of the images `share` in that order."""
    return Loader(dataset, workers=workers, batch_size=batch_size, sampler=share, collate_fn=_collate)


def _collate(samples: list[NumberedSample]) -> WholeBatch:
    readable = [entry for entry in samples if entry.sample.image is not None]
    images = collate([entry.sample for entry in readable]).images if readable else None
    unreadable = tuple(reason for entry in samples for reason in entry.sample.unreadable)
    return WholeBatch(images, torch.tensor([entry.number for entry in readable], dtype=torch.long), unreadable)


def class_counts(labelled: Labelled) -> str:
    """The number of classes and of their images, for people."""
    counts, kind = labelled.counts, "labels" if labelled.has_several else "classes"
    few, many = int(counts.argmin()), int(counts.argmax())
    if counts[few] == counts[many]:
        return f"{len(labelled.classes)} {kind} of {counts[few]} images each"
    names = [printable(Path(labelled.classes[i])) for i in (few, many)]
    return f"{len(labelled.classes)} {kind} of {counts[few]} ({names[0]}) to {counts[many]} ({names[1]}) images"
