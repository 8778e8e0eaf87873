"""How processes that load images hand their batches over: without /dev/shm, of which a container has 64 MB and may have none.

torch puts batches there, and where it is full a process dies or waits. Here a batch is a file in memory that has no name and
no place, of which the reader gets the descriptor. Where the system refuses one, the batch goes through the pipe, slower.
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

# Processes that load images share what the source keeps. By other ways of starting them each would get a copy of its own.
FORK = "fork"
SMALL_BYTES = 2**16  # up to here a pipe takes it at once
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SPARE_FILES = 16  # that may still be opened; the thread that gives descriptors away does not stop where one is lacking


class Loader(DataLoader[Any]):
    """A `DataLoader` whose processes need no shared memory; where they cannot start, this process loads the images itself.

    Locks between processes are files in /dev/shm, so without it there are none. That is said once.

    Args:
        dataset: what is loaded.
        workers: how many processes load it; 0: this one.
        prefetch: how many batches each of them loads ahead; as torch does if None.
        others: what a `DataLoader` takes.
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
                # Only those that load write here. One that is killed in mid-batch leaves an end of file, and no wait for ever.
                batches._worker_result_queue._writer.close()
            return _ending_loaders(batches) if self.num_workers else batches
        except OSError as error:
            _clear_away(error, _since(before))
            _say_once(
                f"note: this process loads the images itself, since it cannot start others ({first_line(error)}); "
                f"{remedy(error)}, or ask for none with --workers 0"
            )
            self.num_workers = 0
            return super().__iter__()
        finally:
            for worker in _since(before):
                worker.name = LOADER


def _clear_away(error: OSError, started: list[Any]) -> None:
    """Ends the processes of an iterator that could not start all of them; it cannot do so itself, and says that at length."""
    for process in started:
        process.kill()
        process.join(1)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(iterator := frame.f_locals.get("self"), _BaseDataLoaderIter):
            iterator._shutdown = True  # type: ignore[attr-defined]


def remedy(error: OSError) -> str:
    """What has to be changed so that processes can start."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise ulimit -n, or lower --workers"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return "raise ulimit -u or the memory, or lower --workers"
    return f"their locks are files in shared memory ({shared_memory()}): {MORE_SHARED_MEMORY}"


def _ending_loaders(batches: Iterator[Any]) -> Iterator[Any]:
    """What ends the wait for a batch ends the processes at once; torch waits for each that hangs."""
    try:
        yield from batches
    except GeneratorExit:
        raise
    except EOFError as error:  # before torch has seen that a process is gone
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
    """Prepares a process that loads images. It leaves signals to the main process, which saves before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(AttributeError):  # of Linux: where the main process is killed, one that hangs would outlive it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ForkingPickler.register(Tensor, hand_over)
    # Python only prints what goes wrong here, and the main process would wait for the batch for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, batch: Any) -> None:
    text = f"error: a process that loads images cannot hand over a batch: {first_line(error)}; lower --workers or --batch-size"
    os.write(2, f"{text}\n".encode(errors="replace"))
    os._exit(1)


def hand_over(tensor: Tensor) -> tuple[Any, ...]:
    """What pickle keeps of a tensor: how to build it again, and from what."""
    values = tensor.detach().contiguous().numpy()
    if values.nbytes > SMALL_BYTES:
        try:
            with open(os.memfd_create("batch"), "wb") as file:
                if file.fileno() + SPARE_FILES > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                    raise OSError(errno.EMFILE, "too few for the socket that descriptors go through")
                file.write(values.data.cast("B"))
                file.flush()
                return take_over, (DupFd(file.fileno()), tensor.shape, tensor.dtype)
        except (OSError, RuntimeError, AttributeError):  # no file or thread is left, a full folder for sockets, no Linux
            pass
    return torch.from_numpy, (values,)


def take_over(descriptor: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor that `hand_over` wrote."""
    tensor = torch.empty(shape, dtype=dtype)
    with open(descriptor.detach(), "rb") as file:
        file.seek(0)
        file.readinto(tensor.numpy().data.cast("B"))
    return tensor
