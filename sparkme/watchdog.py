"""Ends a process that makes no progress: waiting for ever, for a disk, a loader or another process, costs a night."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sparkme.machine import end_loaders, whereabouts

IDLE_S = 600.0  # that a start, of which nobody knows how long it takes, may do nothing
BUSY_S = 0.003  # that a process computes in a second in which it does something; one that waits looks up now and then
STARTING_S = 3600.0  # for what has no usual length: compiling, the first step, measuring and drawing
SAVING_S = 600.0  # for what waits for a disk
ANSWER_S = 5.0  # that the advice may take, which looks at the disk, and the error stream


class Watchdog:
    """Counts the seconds since the main thread last said what it does, and ends the process where they are too many.

    A process that is stopped (Ctrl-Z) does not count. Before the first word of the main thread only seconds count in which the
    process does nothing.

    Args:
        limit_s: how long a step, an exchange with other processes, or waiting for images may take; 0: for ever.
        advice: what to do next, asked for when it is needed.
        peers: `whereabouts` and process number of each that trains with this one, by rank.
    """

    def __init__(self, limit_s: float, advice: Callable[[], str] = str, peers: Sequence[tuple[str, int]] = ()) -> None:
        self.limit_s, self.advice, self.peers = limit_s, advice, peers
        self._now = self._start = ("starting", max(limit_s, IDLE_S))
        self._ended = threading.Event()
        self._main = threading.get_ident()

    def expect(self, doing: str, limit_s: float = 0.0) -> None:
        """Says what the main thread does from here, and how long it may take; never less than the limit for all."""
        self._now = (doing, max(self.limit_s, limit_s))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches while it is open."""
        if not self.limit_s:
            yield
            return
        counting = threading.Thread(target=self._count, name="watchdog", daemon=True)
        counting.start()
        try:
            yield
        finally:
            self._ended.set()
            counting.join(ANSWER_S)  # a thread that is left when Python ends can end the process by a signal

    def _count(self) -> None:
        seen, seconds, computed_s = self._now, 0, time.process_time()
        while not self._ended.wait(1):  # not by the clock, which goes on while the process is stopped
            before_s, computed_s = computed_s, time.process_time()
            is_busy = seen is self._start and computed_s - before_s > BUSY_S
            if self._now is not seen or is_busy:
                seen, seconds = self._now, 0
            seconds += 1
            if seconds > seen[1]:
                self._end(seen[0], seconds)

    def _end(self, doing: str, seconds: int) -> None:
        """Says why, and leaves at once: the main thread may never answer."""
        leave = threading.Timer(3 * ANSWER_S, os._exit, (1,))
        leave.daemon = True
        leave.start()
        with suppress(Exception):  # nothing may keep it from leaving
            text = f"error: no progress for {seconds} s while {doing}{self._place()}{self._stopped()}{self._advice()}"
            end_loaders()
            os.write(2, f"\n{text}\n".encode(errors="replace"))
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
        for rank, (where, number) in enumerate(self.peers):
            if where != whereabouts() or number == os.getpid():
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

    def _advice(self) -> str:
        """What to do next, unless the disk that it is looked up on is what hangs."""
        found: list[str] = []

        def ask() -> None:
            with suppress(Exception):
                found.append(self.advice())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return f"; {found[0]}" if found else ""
