"""Ends a process that makes no progress: waiting for ever, for a disk, a loader or another process, costs a night."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparkme.training.distributed import Process

STARTING_S = 3600.0  # for what has no usual length: compiling, the first step, measuring and drawing


class Watchdog:
    """Counts the seconds since the main thread last said what it does, and ends the process where they are too many.

    A process that is stopped (Ctrl-Z) does not count.

    Args:
        process: this process.
        limit_s: how long a step, an exchange with other processes, or waiting for images may take; 0: for ever.
        advice: what to do next, asked for when it is needed.
    """

    def __init__(self, process: Process, limit_s: float, advice: Callable[[], str]) -> None:
        self.process, self.limit_s, self.advice = process, limit_s, advice
        self._doing, self._allowed_s, self._counted_s = "starting", STARTING_S, 0.0
        self._ended = threading.Event()
        self._main = threading.get_ident()

    def expect(self, doing: str, limit_s: float | None = None) -> None:
        """Says what the main thread does from here, and how long it may take; never less than the limit for all."""
        self._doing, self._allowed_s, self._counted_s = doing, max(self.limit_s, limit_s or 0), 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches while it is open."""
        if not self.limit_s:
            yield
            return
        threading.Thread(target=self._count, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _count(self) -> None:
        while not self._ended.wait(1):
            self._counted_s += 1
            if self._counted_s > self._allowed_s:
                self._end()

    def _end(self) -> None:
        """Says why, and leaves at once: the main thread may never answer."""
        with suppress(Exception):  # nothing may keep it from leaving
            text = f"error: no progress for {self._counted_s:.0f} s while {self._doing}{self._place()}{self._stopped()}"
            os.write(2, f"\n{text}; {self.advice()}\n".encode(errors="replace"))
        os._exit(1)

    def _place(self) -> str:
        """Where the main thread is."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return ""
        return f" ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}, line {frame.f_lineno}, {frame.f_code.co_name})"

    def _stopped(self) -> str:
        """Names processes of this machine that are gone or stopped; the latter would be left behind, so they are killed."""
        found = ""
        for rank, (host, number) in enumerate(self.process.peers):
            if host != socket.gethostname() or number == os.getpid():
                continue
            try:
                state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = "Z"
            if state in "TtZX":
                found += f"; process {rank} (pid {number}) {'is stopped, and is killed' if state in 'Tt' else 'is gone'}"
            if state in "Tt":
                with suppress(OSError):
                    os.kill(number, signal.SIGKILL)
        return found
