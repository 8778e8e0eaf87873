"""Makes a set of scenes with boxes and masks, in COCO's format: photographs, with emoji laid on them.

    python -m benchmarks.scenes --output runs/scenes --train 1000 --val 200 --test 400 --unlabelled 4000 --seed 0
    python -m benchmarks.scenes --output runs/scenes --pictures cut_outs/   # a folder for each class, of transparent pictures

No set of photographs with boxes comes with a Python package, so detection and segmentation are measured on these. The
backgrounds are crops of real photographs (scikit-image's and matplotlib's). The objects are the pictures of
`emoji-datasource-google`, whose nine groups are the classes; their transparency gives exact masks. Both are scaled, turned and
changed in light and colour, objects hide parts of each other, and some scenes are blurred or noisy.

Nothing can be learnt by heart: train, val and test share no picture and no photograph. An emoji in several skin colours, as
a woman and as a man, or in two directions, is one picture here.

Scene `i` of a part depends on the seed and `i` alone, so 50 training scenes are the first 50 of 1,000.

The folder:

    annotations/instances_train.json   as COCO has it, masks as RLE; also _val and _test. An annotation says its `picture`,
                                       and an image its `photograph`
    train/ val/ test/                  000000.jpg ...
    masks/train/ ...                   000000.png: index of the class, 0 is background. Background is a class and not ignored:
                                       every pixel is known, and what is no object has to be told, too
    classes.txt                        names of the classes in a mask, in order of their index
    unlabelled/                        scenes of the train pictures and photographs, without annotations, to pretrain on
    README.txt                         the seed and the counts
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from benchmarks.emoji import EMOJI, emoji
from sparkme.errors import UserError, run_command

PARTS = ("train", "val", "test")
SHARES = (0.6, 0.15)  # of a class's pictures for train and val; the rest is for test
# In each part colour photographs and grey textures. scikit-image's motorcycle_right.png shows what motorcycle_left.png shows.
PHOTOGRAPHS = {
    "train": [
        *("astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "gravel.png", "hubble_deep_field.jpg"),
        *("ihc.png", "motorcycle_left.png", "text.png"),
    ],
    "val": ["grass.png", "page.png", "rocket.jpg"],
    "test": ["chelsea.png", "grace_hopper.jpg", "moon.png", "retina.jpg"],
}
EMPTY_SHARE = 0.02  # of scenes without an object
MOST_OBJECTS = 2  # in a scene, over the average
SMALLEST_SIDE = 14  # pixels of an object
TRIES = 8  # places for an object, before it is left out
LEAST_VISIBLE = 0.35  # share of an object's pixels that neither other objects nor the border hide
LEAST_AREA = 48  # visible pixels of an object
LEAST_CONTRAST = 30  # of 255: how much an object changes the pixels it covers, on average over pixels and channels
Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """An object as it was drawn, before later ones hid parts of it.

    Attributes:
        label: index of its class.
        picture: its name.
        alpha: (h, w) uint8; a pixel of 128 or more is the object's.
        corner: (x, y) of its upper left pixel, which can be outside of the scene.
    """

    label: int
    picture: str
    alpha: npt.NDArray[np.uint8]
    corner: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: RGB.
        photograph: name of its background.
        layers: its objects, later ones above earlier ones.
        owner: (size, size) int16, which of the layers a pixel shows, or -1 where it shows the background.
    """

    image: Image.Image
    photograph: str
    layers: list[Layer]
    owner: npt.NDArray[np.int16]


Family = list[Path]  # the pictures of one thing: skin colours, woman and man


@dataclass(frozen=True)
class Sources:
    """What the scenes of a part are made of: families of pictures by class, and photographs."""

    families: dict[str, list[Family]]
    photographs: list[Path]


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scenes",
        description="Make scenes with boxes and masks in COCO's format: photographs, with emoji laid on them.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    for part, count in zip(PARTS, (1000, 200, 400)):
        parser.add_argument(f"--{part}", type=int, default=count, metavar="N", help="annotated scenes (%(default)s)")
    parser.add_argument("--unlabelled", type=int, default=4000, metavar="N", help="scenes to pretrain on (%(default)s)")
    parser.add_argument("--size", type=int, default=192, metavar="PIXELS", help="width and height (%(default)s)")
    parser.add_argument("--objects", type=float, default=6, metavar="N", help="objects per scene, on average (%(default)s)")
    parser.add_argument(
        "--object-sides",
        type=float,
        nargs=2,
        default=[0.08, 0.6],
        metavar=("LOW", "HIGH"),
        help="side of an object over the scene's; small ones are more frequent, as in COCO (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(%(default)s)")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="a folder for each class, of transparent PNGs (emoji, by `npm pack`)"
    )
    parser.add_argument(
        "--emoji", type=Path, default=Path("runs/emoji"), metavar="DIR", help="where the emoji are, or go (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: make_scenes(args))


def make_scenes(args: argparse.Namespace) -> int:
    """Writes all parts. Returns the exit code.

    Raises:
        UserError: a flag is out of range, the folder is not empty, or pictures or photographs are missing.
    """
    check(args)
    classes, sources = find_sources(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "annotations").mkdir()
    (args.output / "classes.txt").write_text("\n".join(["background", *classes]) + "\n")
    counts = {part: write_part(part, classes, sources[part], args) for part in PARTS if getattr(args, part)}
    (args.output / "unlabelled").mkdir()
    for number in progress("unlabelled", args.unlabelled):
        scene = draw_scene(np.random.default_rng((args.seed, len(PARTS), number)), classes, sources["train"], args)
        scene.image.save(args.output / "unlabelled" / f"{number:06d}.jpg", quality=92)
    (args.output / "README.txt").write_text(readme(classes, sources, counts, args))
    total = sum(sum(count.values()) for count in counts.values())
    print(f"wrote {total} objects of {len(classes)} classes, and {args.unlabelled} scenes without labels, to {args.output}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be meant, before anything is fetched or written."""
    for name, least in (("train", 1), ("val", 0), ("test", 0), ("unlabelled", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    if not 64 <= args.size <= 1024:
        raise UserError(f"--size {args.size} is outside of 64 to 1024")
    if not 1 <= args.objects <= 20:
        raise UserError(f"--objects {args.objects:g} is outside of 1 to 20")
    low, high = args.object_sides
    if not 0.02 <= low <= high <= 1:
        raise UserError(f"--object-sides {low:g} {high:g}: two shares from 0.02 to 1, the lower one first")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output} is not an empty folder; choose another, or remove it")
    if find_spec("pycocotools") is None:
        raise UserError("pycocotools, which encodes the masks, is not installed; pip install 'sparkme[detection]'")


def progress(what: str, count: int) -> Any:
    return tqdm(range(count), desc=what, unit="scene", disable=not sys.stderr.isatty())


def find_sources(args: argparse.Namespace) -> tuple[list[str], dict[str, Sources]]:
    """The names of the classes, and what each part is made of.

    Raises:
        UserError: a class has too few pictures, a picture cannot be read, or a photograph is missing.
    """
    variants: dict[str, list[Path]] = {}
    folder = args.pictures
    if folder is None:
        folder, variants = emoji(args.emoji, instead="--pictures DIR")
    elif not folder.is_dir():
        raise UserError(f"--pictures {folder} is not a folder")
    pictures = {each.name: sorted(each.glob("*.png")) for each in sorted(folder.iterdir()) if each.is_dir()}
    classes = [name for name, found in pictures.items() if found]
    if not classes:
        raise UserError(f"--pictures {folder} has no folder with PNG files in it")
    split: dict[str, dict[str, list[Family]]] = {part: {} for part in PARTS}
    for number, name in enumerate(classes):
        families: dict[str, Family] = {}
        for path in pictures[name]:
            families.setdefault(family_of(path.name), []).extend([path, *variants.get(path.name, [])])
        if len(families) < len(PARTS):
            raise UserError(f"{folder / name} has {len(families)} different pictures; each of {', '.join(PARTS)} needs one")
        for path in (path for family in families.values() for path in family):
            load_picture(path)  # a bad one ends this before something is written
        order = np.random.default_rng((args.seed, len(PARTS) + 1, number)).permutation(len(families))
        shuffled = [list(families.values())[place] for place in order]
        first = min(max(1, round(SHARES[0] * len(families))), len(families) - 2)
        second = min(first + max(1, round(SHARES[1] * len(families))), len(families) - 1)
        for part, (start, end) in zip(PARTS, ((0, first), (first, second), (second, None))):
            split[part][name] = shuffled[start:end]
    return classes, {part: Sources(split[part], find_photographs(part)) for part in PARTS}


def family_of(name: str) -> str:
    """What the files of an emoji's variants have in common: no sex, no direction.

    The name has the emoji's code points: 1f3c3-200d-2640-fe0f.png is a woman running, and 1f3c3-200d-2642-fe0f.png a man.
    """
    adult = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man and woman, each a person
    codes = [adult.get(code, code) for code in Path(name).stem.split("-")]
    if "1f550" <= codes[0] <= "1f567":
        return "clock"  # of 24, each with another time
    return "-".join(code for code in codes if code not in ("200d", "fe0f", "2640", "2642", "27a1"))


def find_photographs(part: str) -> list[Path]:
    """Raises UserError where a photograph, or scikit-image, is missing."""
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("scikit-image, which brings the photographs, is not installed; pip install 'sparkme[demo]'")
    folders = [Path(spec.submodule_search_locations[0], "data"), Path(matplotlib.get_data_path(), "sample_data")]
    found = []
    for name in PHOTOGRAPHS[part]:
        paths = [folder / name for folder in folders if (folder / name).is_file()]
        if not paths:
            raise UserError(f"this version of scikit-image or matplotlib does not bring {name}; install another")
        found.append(paths[0])
    return found


def write_part(part: str, classes: list[str], sources: Sources, args: argparse.Namespace) -> Counter[str]:
    """Writes the scenes of a part, their masks and their annotations. Returns the number of objects of each class."""
    from pycocotools import mask as coco_mask  # noqa: PLC0415  (optional)

    images, masks = args.output / part, args.output / "masks" / part
    images.mkdir()
    masks.mkdir(parents=True)
    record: dict[str, Any] = {
        "info": {"description": f"{part} scenes of benchmarks.scenes", "seed": args.seed},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name, "supercategory": ""} for i, name in enumerate(classes)],
    }
    for number in progress(part, getattr(args, part)):
        scene = draw_scene(np.random.default_rng((args.seed, PARTS.index(part), number)), classes, sources, args)
        name = f"{number:06d}.jpg"
        scene.image.save(images / name, quality=92)
        index_mask(scene).save(masks / f"{number:06d}.png")
        record["images"].append(
            {"id": number + 1, "file_name": name, "width": args.size, "height": args.size, "photograph": scene.photograph}
        )
        visible = scene.owner[..., None] == np.arange(len(scene.layers))
        encoded = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
        for layer, rle in zip(scene.layers, encoded, strict=True):
            record["annotations"].append(
                {
                    "id": len(record["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": layer.label + 1,
                    "bbox": [int(value) for value in coco_mask.toBbox(rle)],
                    "area": int(coco_mask.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": [args.size, args.size], "counts": rle["counts"].decode()},
                    "picture": layer.picture,
                }
            )
    (args.output / "annotations" / f"instances_{part}.json").write_text(json.dumps(record))
    return Counter(classes[each["category_id"] - 1] for each in record["annotations"])


def index_mask(scene: Scene) -> Image.Image:
    """The class of each pixel, 0 for background, in colours that tell classes apart."""
    index = np.array([0, *(layer.label + 1 for layer in scene.layers)], dtype=np.uint8)
    mask = Image.fromarray(index[scene.owner + 1]).convert("P")
    hues = [0, 0, 0, *(value for i in range(255) for value in _colour(i))]
    mask.putpalette(hues)
    return mask


def _colour(number: int) -> tuple[int, ...]:
    """Of a class: hues a golden angle apart."""
    return tuple(int(127 + 120 * math.cos(2.4 * number + phase)) for phase in (0, 2.1, 4.2))


def draw_scene(rng: np.random.Generator, classes: list[str], sources: Sources, args: argparse.Namespace) -> Scene:
    """Draws a background and objects on it, each where it leaves enough to see of itself and of those below it."""
    size: int = args.size
    path = sources.photographs[rng.integers(len(sources.photographs))]
    canvas = background(rng, path, size)
    owner = np.full((size, size), -1, dtype=np.int16)
    layers: list[Layer] = []
    areas: list[int] = []  # of the layers, with what is hidden
    count = 0 if rng.random() < EMPTY_SHARE else min(1 + rng.poisson(args.objects - 1), round(MOST_OBJECTS * args.objects))
    for _ in range(count):
        label = int(rng.integers(len(classes)))
        families = sources.families[classes[label]]
        family = families[rng.integers(len(families))]
        picture = family[rng.integers(len(family))]
        colours, alpha = cut_out(rng, picture, size, args.object_sides)
        for _ in range(TRIES):
            x, y = place(rng, alpha.shape, owner, layers)
            if drawn := paste(canvas, owner, areas, colours, alpha, (x, y)):
                canvas, owner = drawn
                layers.append(Layer(label, picture.name, alpha, (x, y)))
                areas.append(int((alpha >= 128).sum()))
                break
    return Scene(develop(rng, canvas), path.name, layers, owner)


def background(rng: np.random.Generator, path: Path, size: int) -> Pixels:
    """A square of a photograph, scaled, flipped, turned by right angles, in another light. (size, size, 3) from 0 to 255."""
    photograph, is_grey = load_photograph(path)
    shortest = min(photograph.size)
    side = rng.uniform(min(shortest, max(0.35 * shortest, 0.7 * size)), shortest)
    x, y = (rng.uniform(0, length - side) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side), reducing_gap=2.0)
    turns = (None, *Image.Transpose)
    turn = turns[rng.integers(len(turns))]
    pixels = np.asarray(crop if turn is None else crop.transpose(turn), dtype=np.float32)
    tint = rng.uniform(0.6, 1.1, 3) if is_grey else rng.uniform(0.85, 1.15, 3)
    return recolour(pixels, hue=rng.normal(0, 0.5), saturation=rng.uniform(0.5, 1.5), light=rng.uniform(0.6, 1.2) * tint)


@cache
def load_photograph(path: Path) -> tuple[Image.Image, bool]:
    """In RGB, and whether it is grey."""
    with Image.open(path) as image:
        return image.convert("RGB"), image.mode == "L"


@cache
def load_picture(path: Path) -> Image.Image:
    """In RGBA, cut to what is not transparent.

    Raises:
        UserError: it cannot be read, or all of it is transparent.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGBA")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    box = picture.getchannel("A").point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None:
        raise UserError(f"{path} is transparent everywhere; remove it")
    return picture.crop(box)


def recolour(pixels: Pixels, *, hue: float, saturation: float, light: npt.ArrayLike) -> Pixels:
    """Turns hues around the axis of greys by an angle, scales how far colours are from grey, and then the channels."""
    grey = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turned = grey + saturation * (math.cos(hue) * (np.eye(3) - grey) + math.sin(hue) * across)
    matrix = np.asarray(light).reshape(-1, 1) * turned
    changed: Pixels = np.clip(pixels @ matrix.T.astype(np.float32), 0, 255)
    return changed


def cut_out(rng: np.random.Generator, path: Path, size: int, sides: Sequence[float]) -> tuple[Pixels, npt.NDArray[np.uint8]]:
    """A picture scaled, turned, sometimes mirrored or blurred, in another light: colours (h, w, 3), transparency (h, w)."""
    picture = load_picture(path)
    low, high = (math.log(share) for share in sides)
    side = max(SMALLEST_SIDE, size * math.exp(low + (high - low) * rng.random() ** 1.3))
    stretch = math.exp(rng.uniform(-0.15, 0.15))
    scale = side / max(picture.size)
    width, height = (max(2, round(scale * length)) for length in (picture.width * stretch, picture.height / stretch))
    if rng.random() < 0.25:  # fewer pixels first: blurred
        share = rng.uniform(0.5, 0.9)
        picture = picture.resize((max(2, round(share * width)), max(2, round(share * height))), Image.Resampling.BOX)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(rng.normal(0, 25), Image.Resampling.BICUBIC, expand=True)
    values = np.asarray(picture)
    light = rng.uniform(0.65, 1.2) * rng.uniform(0.9, 1.1, 3)
    colours = recolour(
        values[..., :3].astype(np.float32), hue=rng.normal(0, 0.25), saturation=rng.uniform(0.6, 1.3), light=light
    )
    return colours, values[..., 3]


def place(
    rng: np.random.Generator, shape: tuple[int, ...], owner: npt.NDArray[np.int16], layers: list[Layer]
) -> tuple[int, int]:
    """The upper left corner of an object: anywhere, or beside one that is there, so that one hides the other."""
    height, width = shape
    size = len(owner)
    if layers and rng.random() < 0.4:
        other = layers[rng.integers(len(layers))]
        angle, apart = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.5)
        x = other.corner[0] + (other.alpha.shape[1] - width) / 2 + apart * (other.alpha.shape[1] + width) * math.cos(angle)
        y = other.corner[1] + (other.alpha.shape[0] - height) / 2 + apart * (other.alpha.shape[0] + height) * math.sin(angle)
    else:
        x, y = rng.uniform(-0.3 * width, size - 0.7 * width), rng.uniform(-0.3 * height, size - 0.7 * height)
    return round(x), round(y)


def paste(
    canvas: Pixels,
    owner: npt.NDArray[np.int16],
    areas: list[int],
    colours: Pixels,
    alpha: npt.NDArray[np.uint8],
    corner: tuple[int, int],
) -> tuple[Pixels, npt.NDArray[np.int16]] | None:
    """The scene with one more object; None if too little of this object, or of another, could be seen then."""
    size, (x, y), (height, width) = len(owner), corner, alpha.shape
    rows, columns = slice(max(0, y), min(size, y + height)), slice(max(0, x), min(size, x + width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    inside = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
    is_object = alpha[inside] >= 128
    before = canvas[rows, columns]
    share = alpha[inside][..., None].astype(np.float32) / 255
    after = before + share * (colours[inside] - before)
    area = int(is_object.sum())
    if area < max(LEAST_AREA, LEAST_VISIBLE * (alpha >= 128).sum()):
        return None
    if np.abs(after - before)[is_object].mean() < LEAST_CONTRAST:
        return None
    new_owner = owner.copy()
    new_owner[rows, columns][is_object] = len(areas)
    if areas:
        visible = np.bincount(new_owner.ravel() + 1, minlength=len(areas) + 1)[1:-1]
        if (visible < np.maximum(LEAST_AREA, LEAST_VISIBLE * np.array(areas))).any():
            return None
    new_canvas = canvas.copy()
    new_canvas[rows, columns] = after
    return new_canvas, new_owner


def develop(rng: np.random.Generator, canvas: Pixels) -> Image.Image:
    """The picture of a scene as a camera would take it: contrast, sometimes blur, noise."""
    contrast, brightness = rng.uniform(0.8, 1.15), rng.uniform(-15, 15)
    pixels = (canvas - 128) * np.float32(contrast) + np.float32(128 + brightness)
    if rng.random() < 0.3:
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9))), dtype=np.float32)
    noise = np.float32(rng.uniform(0, 8)) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def readme(classes: list[str], sources: dict[str, Sources], counts: dict[str, Counter[str]], args: argparse.Namespace) -> str:
    """What is in the folder, and how it was made."""
    pictures = f"those of --pictures {args.pictures.name}" if args.pictures else f"{EMOJI} (Google's Noto Emoji)"
    numbers = " ".join(f"--{name} {getattr(args, name)}" for name in (*PARTS, "unlabelled", "size", "objects", "seed"))
    numbers += " --object-sides {:g} {:g}".format(*args.object_sides)
    lines = [
        f"Scenes made by `python -m benchmarks.scenes {numbers}`.",
        f"Pictures: {pictures}. Versions: numpy {np.__version__}, Pillow {Image.__version__}.",
        "annotations/ are COCO's, with masks as RLE. masks/ have the index of the class, see classes.txt; 0 is background.",
        "",
        f"{'objects':24}" + "".join(f"{part:>8}" for part in counts),
    ]
    lines += [f"{name:24}" + "".join(f"{count[name]:8}" for count in counts.values()) for name in classes]
    lines += [f"{'all':24}" + "".join(f"{sum(count.values()):8}" for count in counts.values()), "", f"{'pictures':24}"]
    for part in PARTS:
        families = [family for each in sources[part].families.values() for family in each]
        names = " ".join(path.name for path in sources[part].photographs)
        lines.append(f"{part}: {sum(map(len, families))} files of {len(families)} pictures, on {names}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
