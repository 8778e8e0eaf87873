"""Processes that tests start, each a fork of one that has imported torch and the package: a start takes no five seconds."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from sparkme.sparse import sparsify

# A fork of the tests' own process would inherit its threads' locks; this one has no threads.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["sparkme.pretrain", "sparkme.finetune", "torchvision", "timm", "pytest"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def join(rank: int, port: int) -> None:
    """Says what torchrun would say to this process, one of two."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def run_two(function: Callable[..., None], *arguments: object) -> None:
    """Calls function(rank, *arguments) in two processes and waits for them. Networks that were tried here count as tried there.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what one of them raised.
    """
    torch.multiprocessing.start_processes(
        _run, (function, dict(sparsify._tried), arguments), nprocs=2, start_method="forkserver"
    )


def _run(rank: int, function: Callable[..., None], tried: dict[str, dict[str, Any]], arguments: tuple[object, ...]) -> None:
    sparsify._tried.update(tried)
    function(rank, *arguments)
