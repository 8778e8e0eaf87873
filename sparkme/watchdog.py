"""Ends a process without progress; it might wait for ever for a disk, a loader or another process."""

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

IDLE_S = 600.0  # limit for a start that does nothing
BUSY_S = 0.003  # processor time per second above which a process works; a waiting one wakes up now and then
STARTING_S = 3600.0  # limit for work of unknown length: compilation, the first step, evaluation, pictures
SAVING_S = 600.0  # limit for writing to a disk
ANSWER_S = 5.0  # limit for the advice, which reads the disk, and for the error stream


class Watchdog:
    """Counts the seconds since the main thread last called `expect`, and ends the process if they are too many.

    Time in which the process is stopped (Ctrl-Z) does not count. Before the first call of `expect`, only idle seconds count.

    Args:
        limit_s: limit for a step, an exchange with other processes, or a wait for images; 0: none.
        advice: called for a line about what to do next.
        peers: `whereabouts` and process id of each process of the run, by rank.
    """

    def __init__(self, limit_s: float, advice: Callable[[], str] = str, peers: Sequence[tuple[str, int]] = ()) -> None:
        self.limit_s, self.advice, self.peers = limit_s, advice, peers
        self._now = self._start = ("starting", max(limit_s, IDLE_S))
        self._ended = threading.Event()
        self._main = threading.get_ident()

    def expect(self, doing: str, limit_s: float = 0.0) -> None:
        """Records the main thread's next task and its limit, at least the general one."""
        self._now = (doing, max(self.limit_s, limit_s))

    @contextmanager
    def watch(self) -> Iterator[None]:
        if not self.limit_s:
            yield
            return
        counting = threading.Thread(target=self._count, name="watchdog", daemon=True)
        counting.start()
        try:
            yield
        finally:
            self._ended.set()
            counting.join(ANSWER_S)  # a thread that outlives Python's shutdown can crash it

    def _count(self) -> None:
        seen, seconds, computed_s = self._now, 0, time.process_time()
        while not self._second():
            before_s, computed_s = computed_s, time.process_time()
            is_busy = seen is self._start and computed_s - before_s > BUSY_S
            if self._now is not seen or is_busy:
                seen, seconds = self._now, 0
            seconds += 1
            if seconds > seen[1]:
                self._end(seen[0], seconds)

    def _second(self) -> bool:
        """Waits a second of running time. Returns whether watching has ended."""
        return self._ended.wait(1)

    def _end(self, doing: str, seconds: int) -> None:
        """Prints the reason and exits at once, since the main thread may never answer."""
        leave = threading.Timer(3 * ANSWER_S, os._exit, (1,))
        leave.daemon = True
        leave.start()
        with suppress(Exception):  # nothing may prevent the exit
            text = f"error: no progress for {seconds} s while {doing}{self._place()}{self._stopped()}{self._advice()}"
            end_loaders()
            os.write(2, f"\n{text}\n".encode(errors="replace"))
        os._exit(1)

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return ""
        return f" ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}, line {frame.f_lineno}, {frame.f_code.co_name})"

    def _stopped(self) -> str:
        """Names processes of this machine that are gone or stopped; stopped ones are killed, since they would remain."""
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
        """The advice, unless it hangs on the disk."""
        found: list[str] = []

        def ask() -> None:
            with suppress(Exception):
                found.append(self.advice())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return f"; {found[0]}" if found else ""
