"""What waits to be computed together: that it does, and that it makes no difference."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
from networks import Count, images_and_mask
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import sparkme
from benchmarks.host_time import AsOnCuda
from benchmarks.profiling import peak_memory
from sparkme.methods.decoder import Decoder
from sparkme.networks.create import create_encoder
from sparkme.sparse.batch_norm import use_operators
from sparkme.sparse.engines.cuda_ext import CudaExtEngine


def counted(name: str, patches: int = 2, **options: Any) -> Counter[str]:
    encoder = create_encoder(name, **options).set_engine("cuda_ext").train()
    with Count() as mode:
        maps = encoder(*images_and_mask(patches))
        torch.autograd.backward([x.rows for x in maps], [torch.ones_like(x.rows) for x in maps])
    return mode.counts


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_batch_norms_take_with_them_what_follows(drop_path: float) -> None:
    found = counted("resnet18", drop_path=drop_path)
    assert found["norm_statistics"] == found["batch_norm_grad_sums"] == 20
    assert found["batch_norm"] == 20 + 8  # what a block's second convolution reads is computed again
    assert not {"aten.native_batch_norm", "aten.relu", "aten.clamp_min", "aten.threshold_backward"} & found.keys()


def test_wide_products_wait_for_their_norm() -> None:
    """Those of the first stage, and of its shortcut; the others have too few pixels here."""
    found = counted("resnet50", patches=4, drop_path=0.0)
    assert found["linear_batch_norm"] == found["linear_batch_norm_grad"] == 4
    assert found["batch_norm"] == 53 - 4 + 2 * 16 and "aten.relu" not in found


def test_what_a_convolution_reads_is_computed_again_and_not_kept() -> None:
    encoder = create_encoder("resnet18", drop_path=0.0).set_engine("cuda_ext").train()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # those of the branches start at zero, and then so do gradients
    seen: list[torch.Size] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: (seen.append(saved.shape), saved)[1], lambda kept: kept)
    found: list[list[Tensor]] = []

    def forward() -> list[Tensor]:
        return [x.rows for x in encoder(*images_and_mask(4))]

    with hooks:  # somebody else's, who gets to see all that is kept
        all_kept = peak_memory(forward, torch.device("cpu"))
    for context in (nullcontext(), hooks):
        encoder.zero_grad()
        with context:
            maps = forward()
        torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found)) and len(seen) > 100
    # Two blocks at each of four strides, 16 visible patches.
    saved = all_kept - peak_memory(forward, torch.device("cpu"))
    expected = 2 * 16 * 4 * sum(channels * pixels for channels, pixels in ((64, 64), (128, 16), (256, 4), (512, 1)))
    assert 0.98 * expected < saved <= expected


@pytest.mark.parametrize("name", ["convnext_tiny", "timm:convnext_atto.d2_in1k"])
def test_linear_layers_take_gelu_and_layer_scale_with_them(name: str) -> None:
    found = counted(name.partition(".")[0], drop_path=0.0)
    blocks = 18 if name == "convnext_tiny" else 12
    assert found["mlp"] + found["linear"] >= blocks and "aten.native_batch_norm" not in found
    if name == "convnext_tiny":
        assert found["mlp"] == found["mlp_grad"] == blocks and "aten.gelu" not in found


class Block(nn.Module):
    """A network of two scales, whose blocks do something unusual with their norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.a, self.b, self.c = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(32)
        self.conv, self.wide = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 32, 1, bias=False)
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)
        self.drop, self.none = StochasticDepth(0.5, "row"), nn.Dropout(0.0)
        self.down = nn.Conv2d(32, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(self.conv(x))
        if self.kind == "read twice":
            y = y.relu() + y + y * self.gain
        elif self.kind == "norm of a norm":
            y = self.b(y).relu()
        elif self.kind == "two norms":
            y = (y + self.b(x)).relu().relu()
        elif self.kind == "in place":
            z = y
            y += x
            torch.relu_(y)
            y = z + self.b(x)
        elif self.kind == "with itself":
            y = y + y
        elif self.kind == "residual, then product":
            y = (y + x) * self.gain
        elif self.kind == "drop path":
            y = self.drop(self.none(y)) + x
        elif self.kind == "reversed":
            y = x + y
            y = y.sub_(x).relu()
        elif self.kind == "linear":
            z = y.permute(0, 2, 3, 1)
            hidden = self.none(nn.functional.gelu(self.first(z)))
            z = self.second(hidden).permute(0, 3, 1, 2) * self.gain
            y = y + z + hidden.mean(3).unsqueeze(1)
        elif self.kind == "gelu twice":
            z = self.second(nn.functional.gelu(nn.functional.gelu(self.first(y.permute(0, 2, 3, 1)))))
            y = z.permute(0, 3, 1, 2)
        wide = self.wide(y)
        if self.kind == "product read twice":
            return self.down(self.c(wide) + wide)
        return self.down(self.c(wide).relu())


KINDS = (
    "read twice",
    "norm of a norm",
    "two norms",
    "in place",
    "with itself",
    "residual, then product",
    "drop path",
    "reversed",
    "linear",
    "gelu twice",
    "product read twice",
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_go_on_in_other_ways(kind: str, training: bool) -> None:
    """Features, gradients and running statistics are those of the engine that computes everything at once."""
    torch.manual_seed(0)
    encoder = sparkme.sparsify(Block(kind).double(), num_scales=2).train(training)
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.bias), nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 1)
    images, active = images_and_mask(4)
    results: list[dict[str, Tensor]] = []
    for engine in ("cuda_ext", "masked-dense"):
        own = copy.deepcopy(encoder).set_engine(engine)
        torch.manual_seed(1)
        rows = [x.rows for x in own(images.double(), active)]
        torch.autograd.backward(rows, [torch.arange(r.numel()).view_as(r).double() % 7 - 3 for r in rows])
        gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        results.append({**{f"map {i}": r.detach() for i, r in enumerate(rows)}, **gradients, **dict(own.named_buffers())})
    assert results[0].keys() == results[1].keys()
    for name, y in results[1].items():  # some gradients are zero but for rounding
        assert (results[0][name] - y).double().norm() <= 1e-11 * (1e3 + y.double().norm()), name


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_running_statistics_are_torchs(options: dict[str, Any]) -> None:
    """Over three batches, then in eval mode."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8, **options), nn.Conv2d(8, 8, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.conv(x)))

    net = Net().double()
    encoder = sparkme.sparsify(net, num_scales=2).set_engine("cuda_ext").train()
    net.train()
    whole = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    for i in range(4):
        images = torch.randn(2, 3, 32, 32).double() + i
        if i == 3:
            net.eval(), encoder.eval()
        expected, got = net(images), encoder(images, whole)[-1].dense()
        assert oracle.relative_error(got, expected) < 1e-12
    for x, y in zip(encoder.network.norm.bn.buffers(), net.norm.buffers(), strict=True):
        assert oracle.relative_error(x.double(), y.double()) < 1e-12


def test_one_pixel_cannot_be_trained_on() -> None:
    encoder = create_encoder("resnet18", drop_path=0.0).set_engine("cuda_ext").train()
    with pytest.raises(ValueError, match="a batch norm cannot train on a single visible pixel"):
        encoder(torch.randn(1, 3, 32, 32), torch.ones(1, 1, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_convnexts_blocks_are_four_operators(drop_path: float) -> None:
    """Depthwise convolution with its bias, layer norm, and an MLP with layer scale, drop path and the residual."""
    found = counted("convnext_tiny", drop_path=drop_path)
    assert found["mlp"] == found["mlp_grad"] == found["depthwise_conv"] == 18
    assert found["layer_norm"] == found["layer_norm_grad"] == 18 + 4  # the stem's, and three before a downsampling
    assert not {"aten.native_layer_norm", "aten.gelu", "aten.gelu_backward"} & found.keys()
    encoder = create_encoder("convnext_tiny", drop_path=drop_path).set_engine("cuda_ext").train()
    with Count() as forward:
        encoder(*images_and_mask(2))
    assert forward.counts["aten.add.Tensor"] == 5  # the biases of stem and downsampling, and in the grid; no residual


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("name", ["convnext_tiny", "timm:convnext_atto"])
def test_what_is_fused_on_cuda(name: str, drop_path: float) -> None:
    """Layer scale takes drop path and the residual along; the same maps and gradients as on the CPU, of the same layout."""
    images, active = images_and_mask(2)
    results = []
    for engine in (CudaExtEngine(), AsOnCuda()):
        torch.manual_seed(0)
        encoder = create_encoder(name, drop_path=drop_path).double().train()
        encoder.set_engine("cuda_ext").engine = engine
        with Count() as mode:
            torch.manual_seed(1)
            maps = [x.rows for x in encoder(images.double(), active)]
            torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        parameters = dict(encoder.named_parameters())
        results.append([*maps, *(p.grad for p in parameters.values())])
        for key, parameter in parameters.items():  # or DistributedDataParallel copies it
            steps = [(n, a, b) for n, a, b in zip(parameter.shape, parameter.stride(), parameter.grad.stride(), strict=True)]
            assert all(a == b for n, a, b in steps if n > 1), key
    blocks = 18 if name == "convnext_tiny" else 12
    assert mode.counts["mlp"] == 0 and mode.counts["batch_norm"] == mode.counts["batch_norm_grad_rows"] == blocks
    assert not {"aten.mul.Tensor"} & mode.counts.keys() or mode.counts["aten.mul.Tensor"] < blocks
    for x, y in zip(*results, strict=True):
        assert oracle.relative_error(x, y) < 1e-10


def test_relu6_is_part_of_its_norm() -> None:
    found = counted("mobilenet_v2")
    assert not {"aten.hardtanh", "aten.hardtanh_", "aten.hardtanh_backward", "aten.native_batch_norm"} & found.keys()


def test_the_decoders_norms_in_one_pass_equal_torchs() -> None:
    """Prediction, gradients and running statistics; only in training, and hooks are called."""
    torch.manual_seed(0)
    plain = Decoder(8, 32).double().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    maps = {i: torch.randn(2, 32 >> i, 3 << i, 2 << i).double().to(memory_format=torch.channels_last) * 9 for i in range(2)}
    results = []
    for decoder, fuses in ((plain, False), (fused, True)):
        use_operators(decoder, fuses)
        with Count() as mode:
            out = decoder(maps)
            (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        assert mode.counts["batch_norm"] == mode.counts["batch_norm_grad_rows"] == (6 if fuses else 0)
        results.append([out, *(p.grad for p in decoder.parameters()), *decoder.buffers()])
    for x, y in zip(*results, strict=True):
        assert (x - y).double().norm() < 1e-10 * (1 + y.double().norm())  # biases before a norm have no gradient but rounding
    assert oracle.relative_error(fused.eval()(maps), plain.eval()(maps)) < 1e-10
    calls = []
    fused.train().dec[0].conv[1].register_forward_hook(lambda *_: calls.append(1))
    fused(maps)
    assert calls == [1]


def test_pretraining_takes_the_decoders_norms_in_one_pass() -> None:
    model = sparkme.SparK(create_encoder("resnet18"), input_size=64, decoder_width=32)
    for engine, norms in (("cuda_ext", 10), ("masked-dense", 0)):
        model.encoder.set_engine(engine)
        with Count() as mode:
            model(torch.randn(2, 3, 64, 64))
        assert mode.counts["batch_norm"] == (norms and norms + 20)
