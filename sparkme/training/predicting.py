"""The work of `sparkme.predict`: what a fine-tuned network finds in images, as tables, masks and pictures.

Each task has a class that predicts a batch, and writes an image's part of the table. Images are prepared as they are for
validation, so predictions for a run's validation images have the run's figures.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sparkme.data.annotations.loading import Decoding, UnannotatedDataset, create_whole_loader
from sparkme.data.dataset import normalise
from sparkme.data.images import Decoded, load_image
from sparkme.data.inputs import FLAG, Inputs, find_inputs
from sparkme.data.labelled import WholeImages, whole_batches
from sparkme.data.limits import limit_pixels
from sparkme.data.planes import Pixels
from sparkme.data.sources import Columns
from sparkme.data.survey import find_pixels
from sparkme.errors import CannotWrite, UserError, first_line
from sparkme.files import replaced_when_whole
from sparkme.networks.detectors import Found, detect, set_score_threshold
from sparkme.networks.segmenters import predict_labels
from sparkme.reporting.predictions import LEAST_SCORE, class_sheet, draw_labels, draw_objects, index_png, to_rgb
from sparkme.screen import show
from sparkme.settings.commands import PredictSettings
from sparkme.settings.declare import to_config
from sparkme.settings.detection import MASK_HEADS
from sparkme.settings.shared import default_workers
from sparkme.training.classification import scores_of
from sparkme.training.device import prepare_device
from sparkme.training.distributed import Process, start_process, stop_process
from sparkme.training.loop import StopRequest
from sparkme.training.metrics import check_pycocotools, encode_masks
from sparkme.weights.finetuned import Finetuned, read_finetuned

ABOUT = "predict.json"  # marks a folder of predictions
WRITTEN = ("predictions.csv", "predictions.json", "images.json", "classes.txt", "pictures.png", "masks", "pictures")
LARGEST_SIDE = 1600  # pixels of a picture
MOST_IN_SHEET = 120  # pictures
TOP = 5  # classes
LABEL_SCORE = 0.5
JOINED = "|"  # between several labels

R = TypeVar("R")


class Layout(NamedTuple):
    """What stands before, between and after the entries of a table."""

    head: str
    between: str
    tail: str


class Task(Generic[R]):
    """A task's predictions.

    Args:
        tuned: the network.
        inputs: the images.
        decoding: how they are decoded.
        asked: the user's settings.
        device: where the network is.
        folder: where it writes.

    Attributes:
        table: the file of predictions.
    """

    table: ClassVar[str] = "predictions.csv"
    batch_size: ClassVar[int] = 4

    def __init__(
        self, tuned: Finetuned, inputs: Inputs, decoding: Decoding, asked: PredictSettings, device: torch.device, folder: Path
    ) -> None:
        self.tuned, self.inputs, self.decoding = tuned, inputs, decoding
        self.asked, self.device, self.folder = asked, device, folder
        on_gpu = device.type == "cuda"
        self.num_together = asked.batch_size or self.batch_size
        workers = default_workers(on_gpu=on_gpu) if asked.workers is None else asked.workers
        self.workers = min(workers, math.ceil(len(inputs.names) / self.num_together) - 1)  # none for a single batch

    @classmethod
    def check(cls, tuned: Finetuned, asked: PredictSettings) -> None:
        """Raises UserError for settings that the task does not have, or for a missing package."""
        if asked.annotations is not None:
            raise UserError(f"--annotations is for detection, and {tuned.path} is for {tuned.task}; leave it out")
        if asked.score is not None and not tuned.settings.get("several_labels"):
            kind = tuned.task if tuned.task != "classification" else "classification with one class per image"
            raise UserError(f"--score is for detection and for several labels, and {tuned.path} is for {kind}; leave it out")

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Of the table."""

    @abstractmethod
    def batches(self) -> Any:
        """The images in batches; each has `images`, None if none can be read, `numbers` and `unreadable`."""

    @abstractmethod
    def predict(self, batch: Any) -> list[R]:
        """The prediction of each readable image of a batch."""

    @abstractmethod
    def entries(self, number: int, result: R) -> list[str]:
        """An image's entries of the table; also writes what is beside the table."""

    @abstractmethod
    def draw(self, number: int, result: R) -> None:
        """Draws the prediction of one of the first images."""

    def finish(self) -> None:
        """Writes what is of all images."""

    def image(self, number: int) -> Decoded:
        """An image in its own size."""
        return load_image(self.inputs.source.read(number), *self.decoding)

    def write_picture(self, number: int, picture: Image.Image) -> None:
        with replaced_when_whole(self.folder / "pictures" / f"{self.inputs.stems[number]}.jpg") as temporary:
            picture.save(temporary, format="jpeg", quality=90)


class Classes(Task[Tensor]):
    """Classification: the five likeliest classes of each image, or its labels."""

    batch_size = 64

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.several = bool(self.tuned.settings.get("several_labels"))
        self.least = LABEL_SCORE if self.asked.score is None else self.asked.score
        self.num_shown = min(TOP, len(self.tuned.classes))
        self.drawn: list[tuple[Image.Image, str]] = []

    @property
    def layout(self) -> Layout:
        more = [name for i in range(2, self.num_shown + 1) for name in (f"class_{i}", f"score_{i}")]
        columns = ["image", "labels", "scores"] if self.several else ["image", "class", "score", *more]
        return Layout(csv_line(columns), "", "")

    def batches(self) -> Any:
        height, *_, width = self.tuned.settings["input_size"]
        channels, background, pixels = self.decoding
        images = WholeImages(self.inputs.source, (height, width), channels=channels, background=background, pixels=pixels)
        return whole_batches(images, batch_size=self.num_together, workers=self.workers)

    def predict(self, batch: Any) -> list[Tensor]:
        return [*scores_of(self.tuned.network(normalise(batch.images.to(self.device), self.tuned.statistics))).float().cpu()]

    def _best(self, result: Tensor) -> list[tuple[str, float]]:
        """Classes and scores from 0 to 1, the highest first."""
        shares = result.sigmoid() if self.several else result.softmax(0)
        order = result.argsort(descending=True, stable=True).tolist()
        found = [(self.tuned.classes[i], float(shares[i])) for i in order]
        return [pair for pair in found if pair[1] >= self.least] if self.several else found[: self.num_shown]

    def entries(self, number: int, result: Tensor) -> list[str]:
        name, best = self.inputs.names[number], self._best(result)
        if self.several:
            return [csv_line([name, JOINED.join(label for label, _ in best), JOINED.join(f"{s:.6g}" for _, s in best)])]
        return [csv_line([name, *(cell for label, score in best for cell in (label, f"{score:.6g}"))])]

    def draw(self, number: int, result: Tensor) -> None:
        if len(self.drawn) < MOST_IN_SHEET:
            text = ", ".join(
                f"{label} {100 * score:.0f} %" for label, score in self._best(result)[: None if self.several else 1]
            )
            self.drawn.append((to_rgb(as_bytes(self.image(number))), text or "no label"))
            self.drawn[-1][0].thumbnail((LARGEST_SIDE // 4, LARGEST_SIDE // 4))

    def finish(self) -> None:
        if self.drawn:
            with replaced_when_whole(self.folder / "pictures.png") as temporary:
                class_sheet(self.drawn).save(temporary, format="png")


class Dense(Task[R]):
    """A task whose images keep their proportions."""

    short_side: ClassVar[str]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        settings = self.tuned.settings
        self.dataset = UnannotatedDataset(
            self.inputs.source, self.decoding, settings[self.short_side], settings.get("long_side"), self.inputs.sizes
        )

    def batches(self) -> Any:
        everything = range(len(self.dataset))
        return create_whole_loader(self.dataset, batch_size=self.num_together, workers=self.workers, share=everything)

    def image(self, number: int) -> Decoded:
        with self.dataset.opened(number) as image:
            return image.decode()


class Objects(Dense[Found]):
    """Detection: boxes, and masks if the network has them, in COCO's format of results."""

    table = "predictions.json"
    short_side = "val_side"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.asked.score is not None:
            set_score_threshold(self.tuned.network, self.asked.score)
        self.category_ids: list[int] = self.tuned.settings["category_ids"]
        self.images: list[dict[str, Any]] = []

    @classmethod
    def check(cls, tuned: Finetuned, asked: PredictSettings) -> None:
        if tuned.settings["head"] in MASK_HEADS:
            check_pycocotools()

    @property
    def layout(self) -> Layout:
        return Layout("[\n", ",\n", "\n]\n")

    def predict(self, batch: Any) -> list[Found]:
        return detect(self.tuned.network, [image.to(self.device) for image in batch.images], batch.sizes)

    def entries(self, number: int, result: Found) -> list[str]:
        (height, width), id_, name = result.size, self.inputs.ids[number], self.inputs.names[number]
        self.images.append({"id": id_, "file_name": name, "height": height, "width": width})
        masks = [encode_masks(mask[None])[0] for mask in result.masks()]
        found = []
        for i, (x1, y1, x2, y2) in enumerate(result.boxes.double().tolist()):
            entry = {
                "image_id": id_,
                "file_name": name,
                "category_id": self.category_ids[int(result.labels[i])],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(result.scores[i]),
            }
            if masks:
                entry["segmentation"] = {"size": [*masks[i]["size"]], "counts": masks[i]["counts"].decode()}
            found.append(json.dumps(entry))
        return found

    def draw(self, number: int, result: Found) -> None:
        image = to_rgb(as_bytes(self.image(number)))
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        kept = result.scores >= max(LEAST_SCORE, self.asked.score or 0)
        scale = torch.tensor([image.width / result.size[1], image.height / result.size[0]]).repeat(2).to(result.boxes)
        shown = Found(
            result.boxes[kept] * scale,
            result.scores[kept],
            result.labels[kept],
            None if result.probabilities is None else result.probabilities[kept],
            (image.height, image.width),
        )
        masks = torch.stack([*shown.masks()]) if shown.probabilities is not None and len(shown.boxes) else None
        self.write_picture(number, draw_objects(image, shown.boxes, shown.labels, self.tuned.classes, shown.scores, masks))

    def finish(self) -> None:
        """Writes what pycocotools needs to read the results without annotations."""
        categories = [{"id": id_, "name": name} for id_, name in zip(self.category_ids, self.tuned.classes, strict=True)]
        with replaced_when_whole(self.folder / "images.json") as temporary:
            temporary.write_text(json.dumps({"images": self.images, "annotations": [], "categories": categories}) + "\n")


class Labels(Dense[Tensor]):
    """Segmentation: the class of each pixel, as PNG files that `sparkme.finetune --task segmentation` reads as masks."""

    short_side = "short_side"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with replaced_when_whole(self.folder / "classes.txt") as temporary:
            temporary.write_text("".join(f"{name}\n" for name in self.tuned.classes))

    @property
    def layout(self) -> Layout:
        return Layout(csv_line(["image", "mask"]), "", "")

    def predict(self, batch: Any) -> list[Tensor]:
        window, found = max(self.tuned.settings["input_size"]), []
        for image, size in zip(batch.images, batch.sizes):
            x = normalise(image[None].to(self.device), self.tuned.statistics)
            found.append(predict_labels(self.tuned.network, x, window, size).cpu())
        return found

    def entries(self, number: int, result: Tensor) -> list[str]:
        mask = Path("masks", f"{self.inputs.stems[number]}.png")
        with replaced_when_whole(self.folder / mask) as temporary:
            index_png(result, self.tuned.classes).save(temporary, format="png")
        return [csv_line([self.inputs.names[number], str(mask)])]

    def draw(self, number: int, result: Tensor) -> None:
        image = to_rgb(as_bytes(self.image(number)))
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        labels = F.interpolate(result[None, None], (image.height, image.width), mode="nearest")[0, 0]
        self.write_picture(number, draw_labels(image, labels, self.tuned.classes))


TASKS: dict[str, type[Task[Any]]] = {"classification": Classes, "detection": Objects, "segmentation": Labels}


def predict(asked: PredictSettings) -> tuple[Path, int]:
    """Predicts, and writes tables, masks and pictures. Returns the folder and the exit code."""
    limit_pixels(asked.max_pixels)
    process = start_process(asked.device)
    if process.world > 1:
        stop_process()
        raise UserError("sparkme.predict runs in one process; start it with python")
    tuned = read_finetuned(asked.run)
    if not all(bool(value.isfinite().all()) for value in (*tuned.network.parameters(), *tuned.network.buffers())):
        raise UserError(f"{tuned.path} has weights that are not finite; train again")
    TASKS[tuned.task].check(tuned, asked)
    folder = asked.output or tuned.path.parent / "predictions"
    check_folder(folder, overwrite=asked.overwrite)
    inputs = find_inputs(
        asked.images,
        output=folder,
        annotations=asked.annotations,
        root=asked.root,
        cache=asked.shard_cache,
        cache_gib=asked.shard_cache_gib,
        columns=Columns(asked.image_column, None),
    )
    known = {"known": tuned.pixels, "given": None, "upright": None, "flag": FLAG}
    pixels, seen = find_pixels(inputs.source, tuned.channels, tuned.background, **known)  # type: ignore[arg-type]
    precision = precision_of(tuned, asked, process)
    classes = f"{len(tuned.classes)} {'labels' if tuned.settings.get('several_labels') else 'classes'}"
    print(f"network   {tuned.path}: {tuned.task}, {tuned.model}, {classes}")
    print(f"images    {len(inputs.names):,} of {inputs.source.description}: {seen}")
    for remark in inputs.source.remarks:
        print(f"note      {remark}")
    print(f"machine   {process.device.type}, {precision}", flush=True)
    clear_folder(folder)
    prepare_device(process.device, tf32=False)
    torch.backends.cudnn.benchmark = tuned.task == "classification"  # else each size of images would be a new search
    tuned.network.to(process.device)
    return folder, _run(tuned, inputs, pixels, asked, process, precision, folder)


def _run(
    tuned: Finetuned,
    inputs: Inputs,
    pixels: Pixels,
    asked: PredictSettings,
    process: Process,
    precision: str,
    folder: Path,
) -> int:
    """The loop over all images. Returns the exit code."""
    about: dict[str, Any] = {"command": "predict", "task": tuned.task, "weights": str(tuned.path), "classes": tuned.classes}
    about |= {"config": to_config(asked), "precision": precision, "num_images": len(inputs.names)}
    unreadable: list[str] = []
    write_about(folder, about | {"finished": False})
    task = TASKS[tuned.task](tuned, inputs, Decoding(tuned.channels, tuned.background, pixels), asked, process.device, folder)
    stop, count = StopRequest(announce=True), 0
    autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=precision == "bf16")
    bar = tqdm(total=len(inputs.names), desc="predicting", unit=" images", leave=False, disable=not sys.stderr.isatty())
    with stop.listen(), bar, Table(folder / task.table, task.layout) as table:
        for batch in task.batches():
            for problem in batch.unreadable:
                show(f"skipped unreadable image {problem}", sys.stderr)
            unreadable += batch.unreadable
            if asked.max_unreadable is not None and len(unreadable) > asked.max_unreadable:
                raise UserError(f"{len(unreadable)} images cannot be read, more than --max-unreadable {asked.max_unreadable}")
            if batch.images is not None:
                with torch.no_grad(), autocast:
                    results = task.predict(batch)
                for number, result in zip([int(i) for i in batch.numbers], results, strict=True):
                    for entry in task.entries(number, result):
                        table.write(entry)
                    if count < asked.pictures:
                        draw(task, number, result)
                    count += 1
            bar.update(len(batch.numbers) + len(batch.unreadable))
            if stop.signal:
                break
        if not count and not stop.signal:
            raise UserError(f"{FLAG}: none of the {len(unreadable)} images can be read, such as {unreadable[0]}")
        task.finish()
    finished = count + len(unreadable) == len(inputs.names)
    write_about(folder, about | {"num_predicted": count, "unreadable": unreadable, "finished": finished})
    print(last_words(folder, task, count, len(inputs.names), len(unreadable), asked.pictures))
    if finished:
        return 0
    print(f"stopped by {signal.Signals(stop.signal).name} before the last image", file=sys.stderr, flush=True)
    return 128 + stop.signal


def draw(task: Task[Any], number: int, result: Any) -> None:
    try:
        task.draw(number, result)
    except OSError as error:  # part of a file may be readable at a fraction of its size only
        show(f"no picture: {error}", sys.stderr)


def last_words(folder: Path, task: Task[Any], count: int, total: int, num_unreadable: int, pictures: int) -> str:
    of = "" if count == total else f" of {total:,}"
    missing = f", {num_unreadable:,} unreadable" if num_unreadable else ""
    drawn = next((path for path in (folder / "pictures", folder / "pictures.png") if path.exists()), None)
    masks = f"; masks in {folder / 'masks'}" if (folder / "masks").is_dir() else ""
    seen = f"; pictures of the first {min(count, pictures)}: {drawn}" if drawn else ""
    return f"predicted {count:,}{of} images{missing}: {folder / task.table}{masks}{seen}"


def precision_of(tuned: Finetuned, asked: PredictSettings, process: Process) -> str:
    """float32 or bf16."""
    if asked.precision != "auto":
        return asked.precision
    return str(tuned.settings.get("precision", "float32")) if process.machine.has_bf16 else "float32"


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises UserError if the folder is of something else, or of earlier predictions that may not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is not a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / ABOUT).is_file():
        raise UserError(f"{folder} holds other files; choose another --output")
    if not overwrite:
        raise UserError(f"{folder} holds earlier predictions; choose another --output, or pass --overwrite")


def clear_folder(folder: Path) -> None:
    """Removes earlier predictions, and nothing else. Raises UserError if that fails."""
    try:
        for path in (folder / name for name in WRITTEN if (folder / ABOUT).is_file()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: earlier predictions cannot be removed: {error}") from error


def write_about(folder: Path, about: dict[str, Any]) -> None:
    with replaced_when_whole(folder / ABOUT) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")


class Table:
    """A text file of entries, which takes its place once it is whole; after an exception nothing of it is left.

    Raises:
        CannotWrite: the disk is full, or the folder is read-only.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout, self.is_empty = path, layout, True
        self.temporary = path.with_name(path.name + ".writing")

    def __enter__(self) -> Self:
        with self._explained():
            self.file = self.temporary.open("w", encoding="utf-8", newline="")
            self.file.write(self.layout.head)
        return self

    def write(self, entry: str) -> None:
        with self._explained():
            self.file.write(entry if self.is_empty else self.layout.between + entry)
        self.is_empty = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._explained():
                if kind is None:
                    self.file.write(self.layout.tail)
                self.file.close()
                if kind is None:
                    os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {first_line(error)}") from error


def csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def as_bytes(image: Decoded) -> Image.Image | Tensor:
    """For pictures: Pillow's image, or (C, H, W) uint8."""
    return (image * 255).round().byte() if isinstance(image, Tensor) else image
