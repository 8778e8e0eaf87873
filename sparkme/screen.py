"""The terminal that a command speaks to: lines above its progress bars, and streams that are gone."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm


def show(text: str, stream: TextIO) -> None:
    """Prints a line above the progress bars, if there are any. A terminal that is gone, or a full disk, ends no run."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:
        settle(stream, only_if_gone=True)


def settle(stream: TextIO, *, only_if_gone: bool = False) -> None:
    """Leaves nothing in a stream that Python would fail to write at its end, which changes the exit code."""
    try:
        stream.flush()
    except OSError as error:
        if only_if_gone and error.errno not in (errno.EIO, errno.EPIPE):  # a full disk may have room again
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
