"""One process or several, started by torchrun, and their communication."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sparkme.data.planes import Pixels
from sparkme.data.survey import find_pixels
from sparkme.errors import UserError, first_line
from sparkme.machine import whereabouts
from sparkme.settings.shared import Machine
from sparkme.sparse.batch_norm import share_batch_norms

LEAVING_S = 60  # a process ends at most so long after an error
MEETING_S = 300.0  # limit for the processes to connect


@dataclass(frozen=True)
class Process:
    """This process among the `world` processes that train together.

    Attributes:
        hosts: a gloo group of all processes, for communication between hosts.
        peers: `whereabouts` and process id of each, by rank.
    """

    rank: int
    world: int
    device: torch.device
    hosts: Any = None
    peers: tuple[tuple[str, int], ...] = ()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def machine(self) -> Machine:
        on_gpu = self.device.type == "cuda"
        return Machine(self.world, on_gpu, has_bf16=on_gpu and torch.cuda.is_bf16_supported())

    def agree(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process. Processes wait for each other, but not for their devices."""
        if self.world == 1:
            return list(flags)
        values = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.hosts)
        return [bool(value) for value in values]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the processes."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's buffers, such as running statistics."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def share(self, value: Any) -> Any:
        """The first process's value, sent between hosts."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.hosts)
        return values[0]

    def check_same(self, value: Any, what: str) -> None:
        """Raises UserError if a process has another value than the first, since their steps would differ."""
        first = self.share(value)
        if any(self.agree(value != first)):
            raise UserError(f"the processes do not see the same data: the {what} is {first} in the first, {value} in another")

    def gather(self, value: Any) -> list[Any]:
        """In the first process the values of all, elsewhere this one's; sent between hosts."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.is_main else None
        dist.gather_object(value, values, group=self.hosts)
        return values if values is not None else [value]


def start_process(device: str) -> Process:
    """Joins the processes of torchrun, if any, and chooses a device.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: the device does not exist here.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device.startswith("cuda") and not has_gpu:
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu, or see `python -m sparkme.doctor`")
    try:
        chosen = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is not a device; use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f"--device {chosen}, but there are {torch.cuda.device_count()} GPUs; start fewer processes")
        torch.cuda.set_device(chosen)
    if world == 1:
        return Process(rank, world, chosen)
    if device.startswith("cuda:"):
        raise UserError(f"--device {device} puts {world} processes on one GPU; use --device cuda")
    try:
        with ending_after(MEETING_S, f"the {world} processes did not connect"):
            return _meet(rank, world, chosen)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{world} processes cannot connect ({first_line(error)}); start them with torchrun") from error


def _meet(rank: int, world: int, device: torch.device) -> Process:
    backend, store = "nccl" if device.type == "cuda" else "gloo", store_of_this_start()
    if store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    hosts: Any = dist.new_group(backend="gloo")
    peers: list[Any] = [None] * world
    dist.all_gather_object(peers, (whereabouts(), os.getpid()), group=hosts)
    return Process(rank, world, device, hosts, tuple(peers))


def find_pixels_together(process: Process, *args: Any, **words: Any) -> tuple[Pixels, str]:
    """`find_pixels` in the first process, for all."""
    found, problem = None, ""
    if process.is_main:
        try:
            found = find_pixels(*args, **words)
        except UserError as error:
            problem = str(error)
    found, problem = process.share((found, problem))
    if found is None:
        raise UserError(problem)
    return Pixels(*found[0]), found[1]


def store_of_this_start() -> dist.Store | None:
    """The store in which processes exchange addresses; None leaves it to torch.

    torchrun keeps one store over all restarts, in which restarted processes may find addresses of ended ones. On one machine
    the number of the restart keeps them apart. Launchers of several machines count restarts separately; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun use a new store each time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def ending_after(seconds: float, problem: str) -> Iterator[None]:
    """Ends this process if the body takes too long, since gloo may wait half an hour for a lost connection. torchrun may then
    restart all processes."""

    def end() -> None:
        os.write(2, f"\nerror: {problem} within {seconds:.0f} s; start them again\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def stop_process(*, in_order: bool = True) -> None:
    """Leaves the process group. After an error it does not wait, since NCCL would wait for processes that are gone."""
    if not dist.is_initialized():
        return
    if in_order:
        dist.destroy_process_group()
    else:
        signal.alarm(LEAVING_S)


def is_of_others(error: Exception) -> bool:
    """Whether an exception says that another process does not answer."""
    text = str(error).lower()
    named = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    return named or (isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection closed")))


def distribute(network: Any, process: Process, prepare: Callable[[], None] | None = None) -> tuple[Any, nn.Module]:
    """Lets several processes train a network together, with shared gradients and batch-norm statistics.

    Args:
        network: on the process's device.
        process: this process.
        prepare: called in between, for example to compile.

    Returns:
        The network, and the module that a step calls.
    """
    if process.world > 1 and (own_code := share_batch_norms(network)) and process.is_main:
        print(f"note: these batch norms have their own code and are not synchronised over processes: {', '.join(own_code[:4])}")
    if prepare is not None:
        prepare()
    return network, DistributedDataParallel(network) if process.world > 1 else network
