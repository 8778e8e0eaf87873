"""Output to a terminal: lines above progress bars, and streams that no longer exist."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm


def show(text: str, stream: TextIO) -> None:
    """Prints a line above any progress bars. A closed terminal or a full disk does not end the run."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:
        settle(stream, only_if_gone=True)


def settle(stream: TextIO, *, only_if_gone: bool = False) -> None:
    """Flushes a stream or discards its content, since Python's failure to write it at exit would change the exit code."""
    try:
        stream.flush()
    except OSError as error:
        if only_if_gone and error.errno not in (errno.EIO, errno.EPIPE):  # a full disk may have room again
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
