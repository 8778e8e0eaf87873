"""Files in a folder or archive that are no training images, and the notes about them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from importlib.util import find_spec

from sparkme.text import printable

# Folders of network storage, Windows, macOS and file systems for thumbnails, snapshots and deleted files.
_OF_SYSTEMS = re.compile(
    r"@eaDir|@tmp|@recycle|@recently-snapshot|@__thumb|#recycle|#snapshot|~snapshot|\$recycle\.bin|system volume information"
    r"|lost\+found|found\.\d{3}|__macosx|network trash folder|temporary items|\.trash.*",
    re.IGNORECASE,
)
_MOST_NAMED = 8

_AVIF = (".avif", ".avifs")  # Pillow reads them from 11.3 on
EXTENSIONS = frozenset(
    {
        ".apng",
        ".bmp",
        ".dib",
        ".gif",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".npy",
        ".pbm",
        ".pgm",
        ".pjp",
        ".pjpeg",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
        *(_AVIF if find_spec("PIL._avif") else ()),
    }
)

# How to use files of other kinds.
_ADVICE = {
    (".dcm", ".dicom", ".ima"): "DICOM, save each slice as a 16-bit .png or as .npy, such as with pydicom",
    (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"): "volumes, save their slices as .npy, such as with nibabel or SimpleITK",
    (".npz",): "several arrays, save each as its own .npy",
    _AVIF: "pip install --upgrade 'pillow>=11.3'",
    (".heic", ".heif", ".jxl"): "convert to .jpg or .png, such as with pillow-heif or pillow-jxl-plugin",
    (".arw", ".cr2", ".cr3", ".dng", ".nef", ".raf", ".orf"): "raw camera files, develop to .tif, such as with rawpy",
    (".svs", ".ndpi", ".mrxs", ".czi", ".scn"): "whole slides, cut them into tiles, such as with openslide",
    (".exr", ".hdr", ".pfm"): "floating-point pixels, save as .npy with values from 0 to 1",
    (".eps", ".pdf", ".psd", ".svg", ".xcf"): "save as .png",
    (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"): "videos, extract frames, such as with ffmpeg",
    (".tar", ".tgz", ".tar.gz", ".parquet"): "archives, name them: --data 'FOLDER/*.tar' or '*.parquet'",
    (".7z", ".rar", ".zip"): "unpack",
    (
        ".arrow",
        ".h5",
        ".hdf5",
        ".lmdb",
        ".mat",
        ".mdb",
        ".pkl",
        ".pt",
        ".rec",
        ".tfrecord",
        ".zarr",
    ): "use a dataset of your own, --data package.module:dataset",
}


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as `.png` or `.nii.gz`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + suffix if suffix == ".gz" else suffix


def advice(suffix: str) -> str:
    """How to use files with this suffix, or ""."""
    return next(
        (f"{suffix}: {words}" for suffixes, words in _ADVICE.items() if suffix in suffixes and suffix not in EXTENSIONS), ""
    )


def begins_like_image(path: str) -> bool:
    """Whether a file without a suffix starts like a common image format."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(16)
    except OSError:
        return False
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4)
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP"))


def is_passed_over(folder: str) -> bool:
    """Whether a folder with this name is hidden or a system folder, such as `@eaDir`."""
    return _OF_SYSTEMS.fullmatch(folder) is not None or (folder.startswith(".") and folder not in (".", ".."))


def passed_over_in(name: str, *, hidden: bool) -> str | None:
    """The first system folder, or with `hidden` also hidden folder, in a file's path."""
    folders = name.split("/")[:-1]
    return next((f for f in folders if is_passed_over(f) and (hidden or _OF_SYSTEMS.fullmatch(f))), None)


class LeftOut:
    """Counts skipped files and folders.

    Attributes:
        folders: hidden and system folders, by name.
        files: entries of a list or archive inside such a folder, by the folder's name.
        suffixes: suffixes of files that are no images.
    """

    def __init__(
        self,
        folders: dict[str, int] | None = None,
        files: dict[str, int] | None = None,
        suffixes: dict[str, int] | None = None,
    ) -> None:
        self.folders, self.files, self.suffixes = Counter(folders), Counter(files), Counter(suffixes)

    def add(self, other: LeftOut) -> None:
        for counter, more in zip(self._counters, other._counters, strict=True):
            counter.update(more)

    @property
    def _counters(self) -> tuple[Counter[str], ...]:
        return self.folders, self.files, self.suffixes

    def to_json(self) -> str:
        return json.dumps(self._counters)

    @classmethod
    def from_json(cls, text: str) -> LeftOut:
        return cls(*json.loads(text))

    @property
    def lines(self) -> list[str]:
        kinds = (
            (f"{_many(self.folders, 'hidden or system folder')}", self.folders),
            (f"{_many(self.files, 'file')} in hidden or system folders", self.files),
            (f"{_many(self.suffixes, 'file')} of other kinds", self.suffixes),
        )
        lines = [f"left out: {kind}: {_named(counter)}" for kind, counter in kinds if counter]
        lines[-1:] = ["; ".join([*lines[-1:], *filter(None, map(advice, sorted(self.suffixes)))])] if lines else []
        return lines


def _many(counter: Counter[str], noun: str) -> str:
    count = counter.total()
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _named(counter: Counter[str]) -> str:
    named = [f"{printable(name) or 'without a suffix'} ({count:,})" for name, count in counter.most_common(_MOST_NAMED)]
    return ", ".join([*named, "others"] if len(counter) > _MOST_NAMED else named)
