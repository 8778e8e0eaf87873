"""Breaks annotations of COCO, YOLO and Pascal VOC in ways that a generator makes up: run by test_annotation_fuzz.py in a
process of its own, with limited memory.

    python tests/support/annotation_fuzz.py SEED COUNT FOLDER [-v]

Each either can be read, and then objects and masks be had of it, or gives a `UserError` of one line. Nothing else.
"""

import copy
import json
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparkme.data.annotations import find_annotated
from sparkme.errors import UserError

LIMIT_S, LIMIT_BYTES, LONGEST = 30, 3 * 2**29, 1500
SIDE = 32
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    10**30,
    10**400,
    2_000_000_000,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    "",
    "x",
    "5",
    "\0",
    "../../../etc/passwd",
    "/dev/zero",
    "a\nb",
    "\ud800",
    "é" * 3000,
    [],
    {},
    [[]],
    [None],
    [[[[1]]]],
    {"size": [2_000_000_000, 2_000_000_000], "counts": [2_000_000_000]},
    {"size": [SIDE, SIDE], "counts": [0] * 5000 + [SIDE * SIDE]},
    {"size": [SIDE, SIDE], "counts": "~" * 5000},
    {"size": [SIDE, SIDE], "counts": "oooooooooooooooooooooooooo"},
    {"size": [SIDE, SIDE], "counts": [-5, SIDE * SIDE + 5]},
    {"size": [SIDE, SIDE], "counts": [True] * (SIDE * SIDE)},
    [[0, 0, 1e9, 1e9, 0, 1e9]],
    [[0, 0, SIDE, SIDE] * 100_000],
    [[0, 0, float("nan"), 1, 2, 3]],
    [[1, 1, 5, 1, 5, 5]] * 5000,
    [0, 0, 5, 5, 5, 0],
)
WORDS = ("nan", "inf", "-1", "1e400", "9" * 400, "x", "", "0.5 " * 5000, "é", "\0", "0x10", "1_0", "½", "true", "-0", "5e-324")


def coco(folder: Path) -> Path:
    """A good set of 4 images, as a file of instances."""
    annotations = [
        {
            "id": i + 1,
            "image_id": 1 + i % 4,
            "category_id": (3, 7)[i % 2],
            "bbox": [i, 2, 10, 12.5],
            "area": 60.5,
            "iscrowd": int(i == 5),
            "segmentation": {"size": [SIDE, SIDE], "counts": [50, 200, SIDE * SIDE - 250]}
            if i % 3 == 0
            else [[i, 2, i + 10, 2, i + 10, 14.5]],
        }
        for i in range(12)
    ]
    images = [{"id": i + 1, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(4)]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    path = folder / "all.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    return path


def yolo(folder: Path) -> Path:
    (folder / "labels").mkdir()
    for i in range(4):
        lines = (f"{i % 2} 0.5 0.5 0.{i + 2} 0.4\n", f"{(i + 1) % 2} 0.1 0.1 0.9 0.2 0.5 0.{i + 3}\n")
        (folder / "labels" / f"{i}.txt").write_text("".join(lines))
    path = folder / "data.yaml"
    path.write_text("path: .\ntrain: images\nnames:\n  0: cat\n  1: dog\nnc: 2\n")
    return path


def voc(folder: Path) -> Path:
    (folder / "images").rename(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for i in range(4):
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{i + 1}</xmin><ymin>2</ymin><xmax>20</xmax>"
            f"<ymax>25</ymax></bndbox></object>"
            for name in ("cat", "dog")
        )
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
        text = f"<annotation><filename>{i}.png</filename>{size}{objects}</annotation>"
        (folder / "Annotations" / f"{i}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("0\n1\n2\n3\n")
    return folder


def places(value: Any) -> list[tuple[Any, Any]]:
    """All containers in a value of JSON, and the keys in them."""
    found = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        found += places(value[key])
    return found


def break_json(rng: random.Random, path: Path) -> None:
    """A few odd values, missing keys, or doubled entries."""
    content = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where, key = rng.choice(places(content))
        kind = rng.random()
        if kind < 0.2:
            del where[key]
        elif kind < 0.3 and isinstance(where, list):
            where += copy.deepcopy(where)
        else:
            where[key] = copy.deepcopy(rng.choice(ODD))
        if not places(content):
            break
    path.write_bytes(json.dumps(content, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass"))


def break_text(rng: random.Random, path: Path) -> None:
    """Odd words in place of some, or lines in another order."""
    text = path.read_text()
    words = re.split(r"([\s<>:]+)", text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        words[rng.randrange(len(words))] = rng.choice((*WORDS, " ", "</", "<object>", ": [", "- ", "&a [*a]", "\n\n"))
    path.write_text("".join(words))


def break_bytes(rng: random.Random, path: Path) -> None:
    """What crashes, disks and editors make of files."""
    content = path.read_bytes()
    kind = rng.randrange(9)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 10)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        content = bytes(changed)
    elif kind == 2:
        text = content.decode().replace("cat", "Kätzchen")
        content = text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp500")))
    elif kind == 3:
        content = rng.choice((b"[", b'{"a":', b"<a>", b"- ", b"{", b"&a [")) * rng.choice((50, 100_000)) + content
    elif kind == 4:
        entities = b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 10 if i else b"lol") for i in range(9))
        content = b"<!DOCTYPE x [" + entities + b"]><annotation>&a8;</annotation>"
    elif kind == 5:
        content = rng.randbytes(3000)
    elif kind == 6:
        content = b""
    elif kind == 7:
        content = b"\0" * 5000
    else:
        content = content.replace(b"0", b"9" * 5000, 1)
    path.write_bytes(content)


def break_files(rng: random.Random, folder: Path, path: Path) -> None:
    """Files that are missing, of another kind, or that lead in circles."""
    target = rng.choice([path, *(p for p in folder.rglob("*") if p.is_file())])
    if target.is_dir():
        shutil.rmtree(target)
        return
    target.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        target.symlink_to(target)
    elif kind == 1:
        target.symlink_to("/dev/zero")
    elif kind == 2:
        target.mkdir()


def bombs(folder: Path) -> list[Path]:
    """Files that promise far more than they hold, or hold far more than they need."""
    made = []
    for name, text in (
        (
            "huge.json",
            '{"images": [{"id": 1, "file_name": "0.png", "height": 2000000000, "width": 2000000000}], "annotations": []}',
        ),
        ("deep.yaml", "train: images\nnames: " + "[" * 200_000),
        ("circle.yaml", "train: &t [*t]\nnames: &n {0: *n}\n"),
        (
            "laughs.yaml",
            "a0: &a0 [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
            + "names: *a11\ntrain: images\n",
        ),
        ("many.yaml", "train: images\nnames: [" + "a, " * 300_000 + "a]\n"),
        ("count.yaml", "train: images\nnc: 2000000000\n"),
    ):
        (folder / name).write_text(text)
        made.append(folder / name)
    return made


def try_one(path: Path) -> str:
    """ "read", or "refused"; anything else is what is wrong."""
    signal.alarm(LIMIT_S)
    try:
        split = find_annotated(path)
        for part in split.train, split.val:
            for number in range(min(4, len(part))):
                objects, (height, width) = part.objects(number), part.sizes[number].tolist()
                boxes = objects.boxes.numpy()
                assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
                assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
                assert ((objects.labels >= 0) & (objects.labels < len(part.classes))).all() and objects.areas.isfinite().all()
                if height * width <= 2**12:
                    assert objects.masks(height, width).shape == (len(objects), height, width)
            assert all("\n" not in line and len(line) < LONGEST for line in split.remarks), split.remarks
        return "read"
    except UserError as error:
        text = str(error)
        if "-v" in sys.argv:
            print(f"    {text[:200]!r}")
        return "refused" if 10 < len(text) < LONGEST and "\n" not in text else f"a message that is no line: {text[:3000]!r}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)


def too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"it took longer than {LIMIT_S} s")


def main() -> int:
    seed, count, top = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    signal.signal(signal.SIGALRM, too_long)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    outcomes, bad = Counter[str](), 0
    for i in range(count):
        rng, folder = random.Random(f"{seed} {i}"), top / str(i)
        (folder / "images").mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (SIDE, SIDE), (60 * k, i % 256, 0)).save(folder / "images" / f"{k}.png")
        make = (coco, yolo, voc)[i % 3]
        path = make(folder)
        files = [p for p in folder.rglob("*") if p.suffix in (".json", ".yaml", ".txt", ".xml")]
        tries = [path]
        if i < 3:
            tries = bombs(folder) if make is not voc else tries
        elif i >= 6:  # of each kind one is whole
            kind = rng.random()
            if kind < 0.15:
                break_files(rng, folder, path)
            elif kind < 0.45:
                break_bytes(rng, rng.choice(files))
            elif make is coco:
                break_json(rng, path)
            else:
                break_text(rng, rng.choice(files))
        for tried in tries:
            outcome = try_one(tried)
            if outcome not in ("read", "refused") or (3 <= i < 6 and outcome != "read"):
                bad += 1
                print(f"{make.__name__} {i} ({tried.name}): {outcome}\n", flush=True)
            if "-v" in sys.argv:
                print(f"{make.__name__} {i} {tried.name} {outcome[:10]}", flush=True)
            outcomes[f"{make.__name__} {outcome if len(outcome) < 8 else 'wrong'}"] += 1
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{count} sets, {bad} ended badly: {json.dumps(outcomes)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
