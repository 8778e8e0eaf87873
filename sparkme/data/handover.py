"""Passes batches from loader processes without /dev/shm, which is 64 MB in a container, or missing.

torch puts batches there, and a process dies or waits if it is full. Here a batch is an anonymous file in memory (memfd), whose
descriptor the reader gets. If the system refuses one, the batch goes through the pipe, which is slower.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.queues import Queue
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from sparkme.errors import first_line
from sparkme.machine import LOADER, MORE_SHARED_MEMORY, end_loaders, shared_memory
from sparkme.screen import show

# Forked loaders share the arrays of the source. Other start methods would copy them into each process.
FORK = "fork"
SMALL_BYTES = 2**16  # a pipe takes this much at once
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
SPARE_FILES = 16  # left free, since the thread that passes descriptors hangs without one


class Loader(DataLoader[Any]):
    """A `DataLoader` whose processes need no shared memory. If they cannot start, this process loads the images itself.

    Locks between processes are files in /dev/shm, so processes cannot start without it; a note says so once.

    Args:
        dataset: the data set.
        workers: number of loader processes; 0: this process loads.
        prefetch: batches that each process loads ahead; torch's default if None.
        others: further arguments of `DataLoader`.
    """

    def __init__(self, dataset: Any, *, workers: int, prefetch: int | None = None, **others: Any) -> None:
        of_workers: dict[str, Any] = {
            "worker_init_fn": start_worker,
            "multiprocessing_context": FORK,
            "prefetch_factor": prefetch,
        }
        super().__init__(dataset, num_workers=workers, **others, **(of_workers if workers else {}))

    def __iter__(self) -> Any:
        before = multiprocessing.active_children()
        try:
            batches: Any = super().__iter__()
            if self.num_workers and not self.pin_memory:
                # Only loaders write here, so one that is killed in mid-batch leaves an end of file instead of an endless wait.
                batches._worker_result_queue._writer.close()
            return _ending_loaders(batches) if self.num_workers else batches
        except OSError as error:
            _clear_away(error, _since(before))
            _say_once(
                f"note: this process loads the images itself, since loader processes cannot start ({first_line(error)}); "
                f"{remedy(error)}, or pass --workers 0"
            )
            self.num_workers = 0
            return super().__iter__()
        finally:
            for worker in _since(before):
                worker.name = LOADER


def _clear_away(error: OSError, started: list[Any]) -> None:
    """Ends the processes of an iterator that could not start all of them. It fails to do so itself, with long messages."""
    for process in started:
        process.kill()
        process.join(1)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(iterator := frame.f_locals.get("self"), _BaseDataLoaderIter):
            iterator._shutdown = True  # type: ignore[attr-defined]


def remedy(error: OSError) -> str:
    """How to let processes start."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise ulimit -n, or lower --workers"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return "raise ulimit -u or the memory, or lower --workers"
    return f"they need locks in shared memory ({shared_memory()}): {MORE_SHARED_MEMORY}"


def _ending_loaders(batches: Iterator[Any]) -> Iterator[Any]:
    """Ends the loaders at once when an exception ends the wait for a batch; torch would wait for each that hangs."""
    try:
        yield from batches
    except GeneratorExit:
        raise
    except EOFError as error:  # torch has not noticed yet that a process is gone
        end_loaders()
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
    except BaseException:
        end_loaders()
        raise


def _since(before: list[Any]) -> list[Any]:
    return [child for child in multiprocessing.active_children() if child not in before]


@cache
def _say_once(text: str) -> None:
    show(text, sys.stderr)


def start_worker(number: int) -> None:
    """Prepares a loader process. It ignores signals, since the main process saves before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(AttributeError):  # Linux only: ends a hanging loader when the main process is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ForkingPickler.register(Tensor, hand_over)
    # Python only prints an error here, and the main process would wait for the batch for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, batch: Any) -> None:
    text = f"error: a loader process cannot pass on a batch: {first_line(error)}; lower --workers or --batch-size"
    os.write(2, f"{text}\n".encode(errors="replace"))
    os._exit(1)


def hand_over(tensor: Tensor) -> tuple[Any, ...]:
    """Pickles a tensor: the function that builds it, and its arguments."""
    values = tensor.detach().contiguous().numpy()
    if values.nbytes > SMALL_BYTES:
        try:
            with open(os.memfd_create("batch"), "wb") as file:
                if file.fileno() + SPARE_FILES > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                    raise OSError(errno.EMFILE, "too few descriptors left for the socket that passes them")
                file.write(values.data.cast("B"))
                file.flush()
                return take_over, (DupFd(file.fileno()), tensor.shape, tensor.dtype)
        except (OSError, RuntimeError, AttributeError):  # no free file or thread, no room for sockets, not Linux
            pass
    return torch.from_numpy, (values,)


def take_over(descriptor: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    with open(descriptor.detach(), "rb") as file:
        file.seek(0)
        file.readinto(tensor.numpy().data.cast("B"))
    return tensor
