"""The images that `sparkme.predict` is given, and their names in what it writes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparkme.data.annotations.coco import read_images
from sparkme.data.sources import Columns, Files, ImageSource, find_source
from sparkme.data.sources.files import Names, is_image
from sparkme.data.sources.several import Several
from sparkme.errors import UserError
from sparkme.text import printable, shown

FLAG = "IMAGES"


class Inputs(NamedTuple):
    """Images and their names.

    Attributes:
        source: the images.
        names: for tables; a file's is its path below the folder that all files share.
        stems: the names of files that are written for the images, without a suffix; no two are equal, in upper or lower case.
        ids: COCO's numbers.
        sizes: height and width of each image, (0, 0) where they are not known; None without annotations.
    """

    source: ImageSource
    names: list[str]
    stems: list[str]
    ids: Sequence[int]
    sizes: list[tuple[int, int]] | None = None


def find_inputs(
    texts: Sequence[str],
    *,
    output: Path,
    annotations: Path | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    cache_gib: float = 50.0,
    columns: Columns = Columns(),  # noqa: B008
) -> Inputs:
    """Finds the images of files, folders, lists, shards and others, see `sparkme.data.sources`.

    Args:
        texts: what the user names.
        output: folder for what is written, whose pictures do not count.
        annotations: a file of COCO's, which knows the images' numbers and sizes; images that it lacks are left out.
        root, cache, cache_gib, columns: see `find_source`.

    Raises:
        UserError: there are no images, or the file cannot be read.
    """
    files = [text for text in dict.fromkeys(texts) if _is_single(text)]
    others = [text for text in texts if not _is_single(text)]
    sources: list[ImageSource] = [_of(files)] if files else []
    if others:
        words = {"root": root, "cache": cache, "cache_gib": cache_gib, "columns": columns, "flag": FLAG, "leave_out": output}
        found = find_source(others, **words)  # type: ignore[arg-type]
        sources += found.sources if isinstance(found, Several) else [found]
    else:
        columns.refuse(f"{FLAG} {' '.join(texts)}")
    source = sources[0] if len(sources) == 1 else Several(sources)
    paths = [_paths(each) for each in sources]
    names = _names(sources, paths)
    if annotations is None:
        return Inputs(source, [*map(printable, names)], stems_of(names), range(1, len(names) + 1))
    return _annotated(source, names, [path for each in paths for path in each], annotations)


def _is_single(text: str) -> bool:
    """Whether it is a single image; a .npy is an array of several."""
    return is_image(text) and not text.lower().endswith(".npy") and os.path.isfile(text)


def _of(files: Sequence[str]) -> Files:
    paths = [os.path.abspath(name) for name in files]
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Files(Path(top), Names.pack(os.path.relpath(path, top) for path in paths), f"{len(files)} files")


def _paths(source: ImageSource) -> list[str]:
    """The path of each file, or what the source calls each image."""
    if not isinstance(source, Files):
        return [source.name(number).rpartition("/")[2] for number in range(len(source))]
    root = os.path.abspath(source.root)
    return [os.path.normpath(os.path.join(root, name)) for name in source.names]


def _names(sources: Sequence[ImageSource], paths: Sequence[list[str]]) -> list[str]:
    """The paths of files below the folder that all share, and what other sources call their images."""
    tops = [_top(source, of_it) for source, of_it in zip(sources, paths) if isinstance(source, Files)]
    top = os.path.commonpath(tops) if tops else ""
    return [
        path[len(top) :].lstrip(os.sep) if isinstance(source, Files) else path
        for source, of_it in zip(sources, paths)
        for path in of_it
    ]


def _top(source: Files, paths: list[str]) -> str:
    """The folder that all files of a source are below: its own, unless a list names files elsewhere."""
    root = os.path.abspath(source.root)
    inside = all(path.startswith(root.rstrip(os.sep) + os.sep) for path in paths)
    return root if inside else os.path.commonpath([os.path.dirname(path) for path in paths])


def stems_of(names: Sequence[str]) -> list[str]:
    """Names of files without a suffix. Where several would be equal, they keep their suffix, or else get a number.

    A file is never called as a folder that another is in.
    """
    plain = [_stem(name) for name in names]
    counts = Counter(stem.lower() for stem in plain)
    folders = {"/".join(parts[:i]).lower() for stem in plain for parts in [stem.split("/")] for i in range(1, len(parts))}
    taken: set[str] = set()
    stems: list[str] = []
    for name, stem in zip(names, plain):
        stem = stem if counts[stem.lower()] == 1 else _whole(name)
        wanted, number = stem, 1
        while wanted.lower() in taken or {f"{wanted.lower()}.png", f"{wanted.lower()}.jpg"} & folders:
            number += 1
            wanted = f"{stem}-{number}"
        taken.add(wanted.lower())
        stems.append(wanted)
    return stems


def _stem(name: str) -> str:
    return os.path.splitext(name)[0] if is_image(name) else _whole(name)


def _whole(name: str) -> str:
    """A name with its suffix, and without commas and spaces of names such as `train-000.tar, image 3`."""
    return name if is_image(name) else re.sub(r"[^\w.\-/]+", "_", name).strip("_")


def _annotated(source: ImageSource, names: list[str], paths: list[str], annotations: Path) -> Inputs:
    """The images that a file of COCO's names, with its numbers: the longest of its names that a path ends with."""
    known, kept, missing = read_images(annotations), dict[int, int](), list[str]()
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        parts = path.split("/")
        found = next((known[below] for i in range(len(parts)) if (below := "/".join(parts[i:])) in known), None)
        if found is None:
            missing.append(name)
        elif found.id in kept:
            raise UserError(
                f"{FLAG}: {shown(names[kept[found.id]], 80)} and {shown(name, 80)} are the same image {found.id} of "
                f"--annotations {annotations}; leave one out"
            )
        else:
            kept[found.id] = number
    if not kept:
        raise UserError(f"--annotations {annotations} names none of the {len(names)} images, such as {shown(names[0], 80)}")
    numbers, sizes = [*kept.values()], {image.id: image.size for image in known.values()}
    part = source if not missing else source.subset(numbers)
    if missing:
        note = f"left out: images that {annotations.name} does not name: {len(missing):,}, such as {shown(missing[0], 80)}"
        part.notes = [*part.notes, note]
    chosen = [names[i] for i in numbers]
    return Inputs(part, [*map(printable, chosen)], stems_of(chosen), [*kept], [sizes[i] for i in kept])
