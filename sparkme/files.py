"""Atomic replacement of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sparkme.errors import CannotWrite, first_line


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary file, which replaces `path` once it is written. Raises CannotWrite and keeps `path` on failure."""
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CannotWrite(f"cannot write {path}: {first_line(error)}") from error
