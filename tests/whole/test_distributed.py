"""Two processes on the CPU give the gradients of one process that has both halves of the batch."""

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torchvision
from commands import SMALL, asked, asked_to_finetune, losses
from networks import Count
from processes import free_port, join, run_two
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

import sparkme
from sparkme.data.dataset import Batch
from sparkme.methods.contrastive import ContrastiveSparK
from sparkme.networks.create import add_drop_path, create_encoder
from sparkme.sparse.batch_norm import BatchNorm, share_batch_norms
from sparkme.training.classification import Classification
from sparkme.training.distributed import distribute, start_process, stop_process, store_of_this_start
from sparkme.training.loop import Loop
from sparkme.training.pretraining import Pretraining


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


def network(name: str) -> sparkme.SparK:
    """With batch norms that are not as they are created: at one, zero, zero and one they would not tell what went wrong."""
    torch.manual_seed(0)
    name, _, is_contrastive = name.partition(", ")
    method = ContrastiveSparK if is_contrastive else sparkme.SparK
    model = method(create_encoder(name, drop_path=0.0), input_size=64, decoder_width=32).double()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The halves are unlike each other."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
    return images * torch.tensor([1.0, 1.0, 3.0, 2.0]).view(-1, 1, 1, 1) + 1, oracle.random_active(4, 2, 2, seed=1)


def half(rank: int, folder: str, port: int, name: str) -> None:
    join(rank, port)
    images, active = batch()
    whole, model = distribute(network(name), start_process("cpu"))
    with Count() as mode:
        loss = model(images[2 * rank : 2 * rank + 2], active[2 * rank : 2 * rank + 2])
        loss.backward()
    grads = [p.grad for p in whole.parameters()]
    torch.save([loss.detach(), grads, dict(whole.named_buffers()), mode.counts], Path(folder, f"{rank}.pt"))
    stop_process()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny", "resnet18, contrastive"])
def test_two_halves_make_a_whole(name: str, tmp_path: Path) -> None:
    """Loss, gradients and running statistics, of encoder, densified maps and decoder."""
    model = network(name)
    run_two(half, str(tmp_path), free_port(), name)
    images, active = batch()
    loss = model(images, active)
    loss.backward()
    (loss_0, grads_0, buffers_0, counts), (loss_1, grads_1, buffers_1, _) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    )
    plain = {name: counts[name] for name in ("aten.native_batch_norm", "aten.relu", "aten.hardtanh") if counts[name]}
    assert plain == ({"aten.relu": 1} if "contrastive" in name else {})  # fused as in one process, but for a ReLU of the head
    assert counts["batch_norm_grad_rows"] == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert oracle.relative_error((loss_0 + loss_1) / 2, loss.detach()) < 1e-12
    for (own, parameter), first, second in zip(model.named_parameters(), grads_0, grads_1, strict=True):
        assert torch.equal(first, second), own
        assert (first - parameter.grad).norm() < 1e-10 * (1 + parameter.grad.norm()), own
    for own, buffer in model.named_buffers():
        assert torch.equal(buffers_0[own], buffers_1[own])
        assert oracle.relative_error(buffers_0[own].double(), buffer.double()) < 1e-11, own


SHARED = {  # options of a norm, and the input's shape
    "rows": ({}, (6, 3)),
    "maps": ({}, (6, 3, 4, 5)),
    "average": ({"momentum": None}, (6, 3, 2, 2)),
    "no statistics": ({"track_running_stats": False}, (6, 3, 2, 2)),
    "no weight": ({"affine": False}, (6, 3)),
    "clamped": ({"ceiling": 6.0}, (6, 3, 4, 5)),
}


def share_norms(rank: int, folder: str, port: int, operators: bool) -> None:
    join(rank, port)
    start_process("cpu")
    if not operators:
        sparkme.ops.unavailable = lambda **_: "not built"  # type: ignore[assignment]
    found = {}
    for name, (options, shape) in SHARED.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            norm, x, grad = norm_and_input(options, shape, dtype)
            net = nn.Sequential(norm)
            assert not share_batch_norms(net) and type(net[0]) is BatchNorm
            mine = slice(3 * rank, 3 * rank + 3)
            part = x[mine].requires_grad_()
            out = net(part)
            out.backward(grad[mine])
            sums = [p.grad.clone() for p in net.parameters()]
            for value in sums:
                dist.all_reduce(value)
            with torch.no_grad():
                later = net.eval()(part)
            found[name, dtype] = [out.detach(), part.grad, later], [*sums, *net.buffers()]
    torch.save(found, Path(folder, f"{rank}.pt"))
    stop_process()


def norm_and_input(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Channels whose mean is far larger than their deviation are where variances get lost."""
    torch.manual_seed(0)
    kind = BatchNorm if "ceiling" in options else nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    norm: nn.Module = kind(shape[1], **options)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(shape) * 2 + torch.tensor([100.0, 0.0, -3.0]).view(1, 3, *[1] * (len(shape) - 2))
    x = (x + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    return (norm.double() if dtype == torch.float64 else norm), x, torch.randn(shape).to(dtype)


@pytest.mark.parametrize("operators", [True, False])
def test_shared_batch_norms_equal_torchs_of_the_whole_batch(operators: bool, tmp_path: Path) -> None:
    run_two(share_norms, str(tmp_path), free_port(), operators)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (name, dtype), (parts, sums) in first.items():
        norm, x, grad = norm_and_input(*SHARED[name], dtype)
        x.requires_grad_()
        out = norm(x)
        out.backward(grad)
        with torch.no_grad():
            later = norm.eval()(x)
        tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2}[dtype]
        for (mine, theirs), expected in zip(zip(parts, second[name, dtype][0], strict=True), [out, x.grad, later], strict=True):
            if name == "no statistics" and expected is later:
                continue  # of one process's part
            assert mine.dtype == dtype
            assert oracle.relative_error(torch.cat([mine, theirs]).double(), expected.double()) < tolerance, (name, dtype)
        for got, other, expected in zip(
            sums, second[name, dtype][1], [*(p.grad for p in norm.parameters()), *norm.buffers()], strict=True
        ):
            assert torch.equal(got, other)
            assert oracle.relative_error(got.double(), expected.double()) < tolerance, (name, dtype)


def train(rank: int, folder: str, port: int) -> None:
    join(rank, port)
    process = start_process("cpu")
    run = Pretraining(asked(*SMALL, "--accumulate", 2, "--output", folder), process)
    assert Loop(run).run() == 0
    torch.save(dict(run.network.named_parameters()), Path(folder, f"{rank}.pt"))


def test_processes_that_train_together_keep_the_same_weights(tmp_path: Path) -> None:
    run_two(train, str(tmp_path), free_port())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int, tmp_path: Path) -> None:
    gradients = []
    for accumulate in (1, parts):
        flags = [*SMALL, "--model", "convnext_tiny", "--drop-path", "0", "--accumulate", accumulate, "--output", tmp_path]
        run = Pretraining(asked(*flags), start_process("cpu"))
        for module in run.network.decoder.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        run.network.double()
        run.optimizer.step = lambda run=run: gradients.append([p.grad.clone() for p in run.network.parameters()])
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        monkey = pytest.MonkeyPatch()
        monkey.setattr("sparkme.training.pretraining.normalise", lambda x, *_: x.double() / 100)
        run.train_step(Batch(images, ()))
        monkey.undo()
    for whole, accumulated in zip(*gradients, strict=True):
        assert oracle.relative_error(accumulated, whole) < 1e-10


def test_processes_mask_differently() -> None:
    from sparkme.seeds import seed_step

    draw = lambda rank: sparkme.random_active(  # noqa: E731
        8, (7, 7), 0.6, generator=seed_step(0, rank, 3, torch.device("cpu"))
    )
    assert not torch.equal(draw(0), draw(1))


def test_batch_norms_with_code_of_their_own_keep_it() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), norm(b))
        for a, b, norm in [(3, 4, nn.BatchNorm2d), (4, 6, BatchNormAct2d), (6, 8, Shifted), (8, 8, nn.BatchNorm2d)]
    ]
    encoder = sparkme.sparsify(nn.Sequential(*stages))
    assert share_batch_norms(encoder) == ["network.2.1 (Shifted)"]
    kinds = [type(m) for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [BatchNorm, BatchNorm, Shifted, BatchNorm]


def test_synchronised_batch_norms_still_drop_residual_branches() -> None:
    """A drop path is a hook on a branch's last norm."""
    network = torchvision.models.resnet18()
    add_drop_path(network, 0.5)
    assert not share_batch_norms(network)
    assert sum(len(m._forward_hooks) for m in network.modules()) == 7
    assert isinstance(network.layer4[1].bn2, BatchNorm) and network.layer4[1].bn2._forward_hooks


def measure(rank: int, data: str, folder: str, port: int) -> None:
    join(rank, port)
    words = [
        "--from-scratch",
        "--model",
        "timm:test_resnet",
        "--data",
        data,
        "--input-size",
        "64",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--output",
        f"{folder}/run",
    ]
    run = Classification(asked_to_finetune(*words), start_process("cpu"))
    for name, buffer in run.network.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(rank)
    run._measure(run.network)
    torch.save(dict(run.network.named_buffers()), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_processes_measure_the_first_ones_batch_norms(labelled: Path, tmp_path: Path) -> None:
    run_two(measure, str(labelled), str(tmp_path), free_port())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())
    assert all((value == 0).all() for name, value in first.items() if name.endswith("running_mean"))


def train_on_shards(rank: int, folder: str, port: int) -> None:
    """One epoch, in which each process notes what it reads, and the gradients of the first step."""
    join(rank, port)
    words = [
        *SMALL,
        "--data",
        f"{folder}/part-{{0..3}}.tar",
        "--samples-per-epoch",
        "24",
        "--epochs",
        "1",
        "--drop-path",
        "0",
        "--model",
        "convnext_tiny",
        "--shard-cache",
        f"{folder}/cache",
        "--output",
        f"{folder}/run",
    ]
    run = Pretraining(asked(*words), start_process("cpu"))
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
    from pictures import write_shard

    for i in range(4):
        write_shard(tmp_path / f"part-{i}.tar", range(6 * i, 6 * i + 6))
    run_two(train_on_shards, str(tmp_path), free_port())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert sorted(first["read"] + second["read"]) == list(range(24))
    shards = [{number // 6 for number in part["read"]} for part in (first, second)]
    assert not shards[0] & shards[1]  # each reads its own, two of the four
    assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True))


def train_compiled(rank: int, folder: str, ports: list[int]) -> None:
    """The same training twice, the second time compiled."""

    def compile_parts(self: sparkme.SparK) -> sparkme.SparK:  # as the command does, but without minutes of code generation
        self.encoder.compile_stages(backend="aot_eager")
        self.decoder.compile(backend="aot_eager")
        return self

    sparkme.SparK.compile_parts = compile_parts  # type: ignore[assignment]
    for name, port in zip(("eager", "compiled"), ports, strict=True):
        join(rank, port)
        words = [*SMALL, "--model", "timm:test_resnet", "--drop-path", "0", "--epochs", "2", "--panel-epochs", "0"]
        words += ["--output", f"{folder}/{name}", *(["--compile"] if name == "compiled" else [])]
        assert Loop(Pretraining(asked(*words), start_process("cpu"))).run() == 0
        stop_process()


def test_compiled_parts_train_in_several_processes(tmp_path: Path) -> None:
    run_two(train_compiled, str(tmp_path), [free_port(), free_port()])
    eager, compiled_losses = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert len(eager) == 4 and compiled_losses == pytest.approx(eager, rel=1e-5)
