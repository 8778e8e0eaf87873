"""What the processes of a command need of the machine, and what an error says is lacking. Imports nothing heavy."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import threading
from types import FrameType

SHARED_MEMORY = "/dev/shm"
MORE_SHARED_MEMORY = "give a container more of it (docker run --shm-size=1g)"
LOADER = "image loader"  # the name of a process that loads images


def is_main_thread() -> bool:
    """Whether this is the thread that Python leaves signals to, and that alone may set their handlers."""
    return threading.current_thread() is threading.main_thread()


def share_cores() -> None:
    """Has threads of OpenMP that wait for each other give their cores away soon. To be called before torch is imported.

    By default they keep them busy for milliseconds. Where other processes wanted the two cores, a training then took 30 to 60
    times as long (0.5 to 1 images/s instead of 30), and with this two to six times. Alone it is as fast as before. What the
    user's environment says stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # some tens of microseconds; GNU's library, which torch brings


def hear_sigterm() -> None:
    """Lets SIGTERM end the first process of a container, which the kernel spares from signals that it does not handle."""
    if os.getpid() == 1 and is_main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def whereabouts() -> str:
    """Where a process number means the same process: the host and, of containers on it, the process namespace."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def shared_memory() -> str:
    """How large /dev/shm is and what of it is free, for people."""
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror}"
    size, free = (space.f_frsize * blocks / 2**20 for blocks in (space.f_blocks, space.f_bavail))
    return f"{SHARED_MEMORY}: {size:.0f} MB, {free:.0f} free" + (", read-only" if space.f_flag & os.ST_RDONLY else "")


def shared_memory_bytes() -> int:
    """How large /dev/shm is; 0 where there is none."""
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return space.f_frsize * space.f_blocks


def end_loaders() -> None:
    """Ends the processes that load images; one that hangs would outlive this process, or keep it."""
    loaders = [child for child in multiprocessing.active_children() if child.name == LOADER]
    if loaders and is_main_thread():  # to which torch raises where one of them is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for loader in loaders:
        loader.kill()


def problem_of(error: Exception) -> str:
    """What an error says about the machine, in one line with the remedy; "" if it says nothing known."""
    text = str(error)
    if "shared memory segment" in text:  # of NCCL
        return f"the GPUs of a machine exchange gradients through shared memory, and {shared_memory()}: {MORE_SHARED_MEMORY}"
    if "Too many open files" in text or "Pin memory thread exited" in text or "items of ancdata" in text:
        return "too many open files; raise ulimit -n, or lower --workers"
    if found := re.search(r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal: [\w ]+)", text):
        return f"loading images ended: {found[0]} (mostly for want of memory: lower --workers)"
    return ""
