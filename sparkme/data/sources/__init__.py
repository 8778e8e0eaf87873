"""Where images come from: one description for every command.

photos/                            a folder, nested or flat
list.txt, table.csv                one file name per line, or the column of a table that holds them
shards/train-{000..146}.tar        tar shards, also in a folder, by a pattern with *, or from a URL
data/train-*.parquet               Parquet with the bytes of images
stack.npy                          an array of images, (N, H, W), (N, H, W, C) or (N, C, H, W)
package.module:dataset             an object with __len__ and __getitem__
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparkme.data.sources.array import ArrayImages
from sparkme.data.sources.base import ImageSource
from sparkme.data.sources.dataset import DatasetImages
from sparkme.data.sources.files import Files, list_folder, without_others
from sparkme.data.sources.left_out import advice, suffix_of
from sparkme.data.sources.parquet import Columns, ParquetImages
from sparkme.data.sources.several import Several
from sparkme.data.sources.shards import Cache, Shards, default_cache, expand_braces, is_remote, is_shard
from sparkme.data.sources.table import TABLES, read_list
from sparkme.errors import UserError

LISTS = (".txt", ".lst", ".list", *TABLES)
_DATASET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def find_source(
    text: str | Sequence[str],
    *,
    leave_out: Path | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    cache_gib: float = 50.0,
    index: Path | None = None,
    flag: str = "--data",
    columns: Columns = Columns(),  # noqa: B008
) -> ImageSource:
    """Finds the images of one or several sources.

    Args:
        text: one or several sources, see the module.
        leave_out: a folder whose images do not count, such as the run's own pictures.
        root: folder that the names in a list are relative to.
        cache: folder for copies of shards.
        cache_gib: GiB of shards kept in the cache.
        index: file for the list of a large folder, see `Files.write_index`.
        flag: the command-line flag of the source, for messages.
        columns: of Parquet.

    Raises:
        UserError: there are no images; or a column is named for a source without columns.
    """
    if not 0 <= cache_gib < 1e9:
        raise UserError(f"--shard-cache-gib {cache_gib} must be at least 0, and finite")
    texts, how = [text] if isinstance(text, str) else text, _How(cache, cache_gib, columns, flag)
    if (twice := next((text for i, text in enumerate(texts) if text in texts[:i]), None)) is not None:
        raise UserError(f"{flag} {twice} is given twice; leave one out")
    shards = [text for text in texts if is_shard(text) and not os.path.isdir(text)]
    if len(shards) < 2:
        shards = []
    single = index if len(texts) == 1 else None
    sources = [_find(text, leave_out, root, single, how) for text in texts if text not in shards]
    if shards:  # one source for all, since each keeps some files open
        sources.append(_of_files([name for text in shards for name in _expanded(text, flag)], ", ".join(shards[:3]), how))
    if not any(isinstance(source, ParquetImages) for source in sources):
        columns.refuse(f"{flag} {' '.join(texts)}")
    return sources[0] if len(sources) == 1 else Several(sources)


class _How(NamedTuple):
    """How to open shards and Parquet files, and the flag that names them."""

    cache: Path | None
    cache_gib: float
    columns: Columns
    flag: str


def _find(text: str, leave_out: Path | None, root: Path | None, index: Path | None, how: _How) -> ImageSource:
    path, flag = Path(text), how.flag
    if os.path.isdir(path):  # False for a name that is too long
        return _in_folder(path, leave_out, index, how)
    if os.path.isfile(path) and path.suffix.lower() in LISTS:
        return without_others(read_list(path, root, flag=flag))
    if os.path.isfile(path) and path.suffix.lower() == ".npy":
        return ArrayImages(path, flag=flag)
    if not os.path.exists(path) and _DATASET.fullmatch(text):
        return DatasetImages(text, flag=flag)
    return _of_files(_expanded(text, flag), text, how)


def _expanded(text: str, flag: str) -> list[str]:
    """The files that a text with braces and * stands for. Raises UserError if there are none."""
    try:
        found = [name for pattern in expand_braces(text) for name in _matching(pattern)]
    except ValueError as error:
        raise UserError(f"{flag} {error}") from error
    if not found:
        raise UserError(f"{flag} {text} is not a folder and matches no file")
    return found


def _in_folder(path: Path, leave_out: Path | None, index: Path | None, how: _How) -> ImageSource:
    """The images in a folder, or else its shards, or else its Parquet files."""
    try:
        return list_folder(path, leave_out, flag=how.flag, index=index)
    except UserError as error:
        try:
            names = sorted(entry.path for entry in os.scandir(path) if os.path.isfile(entry.path))
        except OSError:
            raise error from None
        found = [name for name in names if is_shard(name)] or [name for name in names if name.lower().endswith(".parquet")]
        if not found:
            raise error
    return _of_files(found, str(path), how)


def _matching(pattern: str) -> list[str]:
    """The files that a pattern with * stands for, or the name itself."""
    if is_remote(pattern) or os.path.exists(pattern):  # also a name that contains * or [
        return [pattern]
    return sorted(glob.glob(pattern))


def _of_files(names: list[str], text: str, how: _How) -> ImageSource:
    flag = how.flag
    if (pipe := next((name for name in names if not is_remote(name) and not os.path.isfile(name)), None)) is not None:
        raise UserError(f"{flag} {pipe} is not a file")  # opening a pipe would wait for ever
    if all(map(is_shard, names)):
        return Shards(names, Cache(how.cache or default_cache(), int(how.cache_gib * 2**30)), text, flag=flag)
    if all(name.lower().endswith(".parquet") and not is_remote(name) for name in names):
        return ParquetImages([Path(name) for name in names], text, flag=flag, columns=how.columns)
    odd = next((name for name in names if not is_shard(name) and not name.lower().endswith(".parquet")), None)
    if odd is None:
        raise UserError(f"{flag} {text} must be either .tar shards or Parquet, not both; and Parquet files must be local")
    if words := advice(suffix_of(odd)):
        raise UserError(f"{flag} {odd} is not a readable image; {words}")
    raise UserError(
        f"{flag} {odd} is neither a folder of images, nor a list ({', '.join(LISTS)}), nor .tar shards, nor Parquet, nor .npy; "
        "put single images into a folder"
    )


__all__ = ["ArrayImages", "Columns", "DatasetImages", "Files", "ImageSource", "find_source"]
