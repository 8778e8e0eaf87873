"""Two processes on the CPU give the gradients of one process that has both halves of the batch."""

import os
import socket
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from test_pretrain import SMALL, losses
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparkme
from sparkme.data.dataset import Batch
from sparkme.finetune import Finetuning
from sparkme.models import add_drop_path, create_encoder
from sparkme.pretrain import Pretraining
from sparkme.training.config import create_parser
from sparkme.training.distributed import start_process, store_of_this_start, synchronise_batch_norms
from sparkme.training.finetune_config import create_parser as finetune_parser
from sparkme.training.loop import Loop


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def test_a_restart_does_not_find_the_addresses_of_the_start_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store outlives its processes. Without torchrun, and on several machines, the choice is torch's."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    words = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "GROUP_WORLD_SIZE": "1",
    }
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert store_of_this_start() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    stores = []
    for start in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        stores += [store_of_this_start(), store_of_this_start()]
    stores[0].set("address of 0", "port of a process that ended")
    assert stores[1].check(["address of 0"])
    assert not stores[2].check(["address of 0"]) and not stores[3].check(["address of 0"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert store_of_this_start() is None


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


def train(rank: int, folder: str, port: int) -> None:
    join(rank, port)
    process = start_process("cpu")
    run = Pretraining(create_parser().parse_args([*SMALL, "--accumulate", "2", "--output", folder]), process)
    assert Loop(run).run() == 0
    torch.save(dict(run.network.named_parameters()), Path(folder, f"{rank}.pt"))


def test_processes_that_train_together_keep_the_same_weights(tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int, tmp_path: Path) -> None:
    gradients = []
    for accumulate in (1, parts):
        flags = [*SMALL, "--model", "convnext_tiny", "--drop-path", "0", "--accumulate", accumulate, "--output", tmp_path]
        run = Pretraining(create_parser().parse_args([*map(str, flags)]), start_process("cpu"))
        for module in run.network.decoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        run.network.double()
        run.optimizer.step = lambda run=run: gradients.append([p.grad.clone() for p in run.network.parameters()])
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        monkey = pytest.MonkeyPatch()
        monkey.setattr("sparkme.data.dataset.normalise", lambda x, *_: x.double() / 100)
        run.train_step(Batch(images, ()))
        monkey.undo()
    for whole, accumulated in zip(*gradients, strict=True):
        assert oracle.relative_error(accumulated, whole) < 1e-10


def test_processes_mask_differently() -> None:
    from sparkme.training.random import seed_step

    draw = lambda rank: sparkme.random_active(  # noqa: E731
        8, (7, 7), 0.6, generator=seed_step(0, rank, 3, torch.device("cpu"))
    )
    assert not torch.equal(draw(0), draw(1))


def test_batch_norms_with_code_of_their_own_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), norm(b)) for a, b, norm in
              [(3, 4, nn.BatchNorm2d), (4, 6, BatchNormAct2d), (6, 8, Shifted), (8, 8, nn.BatchNorm2d)]]  # fmt: skip
    encoder = synchronise_batch_norms(sparkme.sparsify(nn.Sequential(*stages)))
    kinds = [type(m) for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [nn.SyncBatchNorm, nn.SyncBatchNorm, Shifted, nn.SyncBatchNorm]
    assert "network.2.1 (Shifted)" in capsys.readouterr().out


def test_synchronised_batch_norms_still_drop_residual_branches() -> None:
    """A drop path is a hook on a branch's last norm; torch leaves hooks behind when it exchanges the layer."""
    network = torchvision.models.resnet18()
    add_drop_path(network, 0.5)
    hooks = sum(len(m._forward_hooks) for m in synchronise_batch_norms(network).modules())
    assert hooks == 7 and isinstance(network.layer4[1].bn2, nn.SyncBatchNorm) and network.layer4[1].bn2._forward_hooks


def measure(rank: int, data: str, folder: str, port: int) -> None:
    join(rank, port)
    words = ["--from-scratch", "--model", "timm:test_resnet", "--data", data, "--input-size", "64", "--batch-size", "8",
             "--workers", "0", "--output", f"{folder}/run"]  # fmt: skip
    run = Finetuning(finetune_parser().parse_args(words), start_process("cpu"))
    for name, buffer in run.network.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(rank)
    run._measure(run.network)
    torch.save(dict(run.network.named_buffers()), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_processes_measure_the_first_ones_batch_norms(labelled: Path, tmp_path: Path) -> None:
    mp.spawn(measure, (str(labelled), str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())
    assert all((value == 0).all() for name, value in first.items() if name.endswith("running_mean"))


def train_on_shards(rank: int, folder: str, port: int) -> None:
    """One epoch, in which each process notes what it reads, and the gradients of the first step."""
    join(rank, port)
    words = [*SMALL, "--data", f"{folder}/part-{{0..3}}.tar", "--samples-per-epoch", "24", "--epochs", "1", "--drop-path", "0",
             "--model", "convnext_tiny", "--shard-cache", f"{folder}/cache", "--output", f"{folder}/run"]  # fmt: skip
    run = Pretraining(create_parser().parse_args(words), start_process("cpu"))
    read: list[int] = []
    right = run.dataset.source.read
    run.dataset.source.read = lambda number: read.append(number) or right(number)  # type: ignore[method-assign,func-returns-value]
    gradients: list[torch.Tensor] = []
    own_step = run.optimizer.step

    def step() -> None:
        gradients.extend(p.grad.clone() for p in run.network.parameters() if not gradients or len(gradients) < 200)
        own_step()

    run.optimizer.step = step  # type: ignore[method-assign]
    assert Loop(run).run() == 0
    torch.save({"read": read[:12], "gradients": gradients}, Path(folder, f"{rank}.pt"))


def test_two_processes_read_every_image_of_shards_once_and_share_gradients(tmp_path: Path) -> None:
    from test_sources import write_shard

    for i in range(4):
        write_shard(tmp_path / f"part-{i}.tar", range(6 * i, 6 * i + 6))
    mp.spawn(train_on_shards, (str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert sorted(first["read"] + second["read"]) == list(range(24))
    shards = [{number // 6 for number in part["read"]} for part in (first, second)]
    assert not shards[0] & shards[1]  # each reads its own, two of the four
    assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True))


def train_compiled(rank: int, folder: str, port: int, compiled: bool) -> None:
    join(rank, port)

    def compile_parts(self: sparkme.SparK) -> sparkme.SparK:  # as the command does, but without minutes of code generation
        self.encoder.compile_stages(backend="aot_eager")
        self.decoder.compile(backend="aot_eager")
        return self

    sparkme.SparK.compile_parts = compile_parts  # type: ignore[assignment]
    words = [*SMALL, "--model", "timm:test_resnet", "--drop-path", "0", "--epochs", "2", "--output", f"{folder}/{compiled}"]
    words += ["--compile"] if compiled else []
    run = Pretraining(create_parser().parse_args(words), start_process("cpu"))
    assert Loop(run).run() == 0


@pytest.mark.slow
def test_compiled_parts_train_in_several_processes(tmp_path: Path) -> None:
    for compiled in (False, True):
        mp.spawn(train_compiled, (str(tmp_path), free_port(), compiled), nprocs=2)
    eager, compiled_losses = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert len(eager) == 4 and compiled_losses == pytest.approx(eager, rel=1e-5)
