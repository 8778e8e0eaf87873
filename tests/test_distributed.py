"""Two processes on the CPU give the gradients of one process that has both halves of the batch."""

import os
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import sparkme
from sparkme.models import create_encoder


def network() -> sparkme.SparK:
    torch.manual_seed(0)
    model = sparkme.SparK(create_encoder("convnext_tiny"), input_size=64, decoder_width=32).double()
    for module in model.decoder.modules():  # its batch norms couple the halves of a batch; layer norms do not
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64), oracle.random_active(4, 2, 2, seed=1)


def half(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    images, active = batch()
    model = DistributedDataParallel(network())
    model(images[2 * rank : 2 * rank + 2], active[2 * rank : 2 * rank + 2]).backward()
    torch.save([p.grad for p in model.parameters()], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_halves_make_a_whole(tmp_path: Path) -> None:
    mp.spawn(half, (f"file://{tmp_path}/meeting", str(tmp_path)), nprocs=2)
    images, active = batch()
    model = network()
    model(images, active).backward()
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for parameter, first, second in zip(model.parameters(), *halves, strict=True):
        assert torch.equal(first, second)
        assert oracle.relative_error(first, parameter.grad) < 1e-10


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores to finish in time")
def test_processes_mask_differently() -> None:
    from sparkme.training.random import seed_step

    draw = lambda rank: sparkme.random_active(  # noqa: E731
        8, (7, 7), 0.6, generator=seed_step(0, rank, 3, torch.device("cpu"))
    )
    assert not torch.equal(draw(0), draw(1))
