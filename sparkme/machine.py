"""What a command's processes need of the machine, and remedies for what is missing. Imports nothing heavy."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import threading
from types import FrameType

SHARED_MEMORY = "/dev/shm"
MORE_SHARED_MEMORY = "give the container more (docker run --shm-size=1g)"
LOADER = "image loader"  # name of a loader process


def is_main_thread() -> bool:
    """Whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def share_cores() -> None:
    """Lets waiting OpenMP threads release their cores soon, unless the environment is set. Call it before importing torch.

    By default they spin for milliseconds. When other processes used the same two cores, training took 30 to 60 times as long
    (0.5 to 1 images/s instead of 30), and two to six times with this setting. Alone it is as fast as before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # some tens of microseconds, in GNU's library, which torch includes


def hear_sigterm() -> None:
    """Lets SIGTERM end the first process of a container; the kernel ignores its signals without a handler."""
    if os.getpid() == 1 and is_main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def whereabouts() -> str:
    """Host and process namespace, within which a process id is unique."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def shared_memory() -> str:
    """Size and free space of /dev/shm, as text."""
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror}"
    size, free = (space.f_frsize * blocks / 2**20 for blocks in (space.f_blocks, space.f_bavail))
    return f"{SHARED_MEMORY}: {size:.0f} MB, {free:.0f} free" + (", read-only" if space.f_flag & os.ST_RDONLY else "")


def shared_memory_bytes() -> int:
    """The size of /dev/shm; 0 if it is missing."""
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return space.f_frsize * space.f_blocks


def end_loaders() -> None:
    """Ends the loader processes; one that hangs would outlive this process, or keep it from ending."""
    loaders = [child for child in multiprocessing.active_children() if child.name == LOADER]
    if loaders and is_main_thread():  # torch's handler would raise an exception here
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for loader in loaders:
        loader.kill()


def problem_of(error: Exception) -> str:
    """A known problem of the machine and its remedy in one line, else ""."""
    text = str(error)
    if "shared memory segment" in text:  # NCCL
        return f"the GPUs of a machine need shared memory to exchange gradients ({shared_memory()}): {MORE_SHARED_MEMORY}"
    if "Too many open files" in text or "Pin memory thread exited" in text or "items of ancdata" in text:
        return "too many open files; raise ulimit -n, or lower --workers"
    if found := re.search(r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal: [\w ]+)", text):
        return f"loading images failed: {found[0]} (mostly for lack of memory: lower --workers)"
    return ""
