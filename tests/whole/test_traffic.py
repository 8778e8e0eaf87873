"""What is counted on fake tensors of a GPU: bytes, types, and that nothing waits for the device."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from random_models import BASIC, BOTTLENECK, CONVNEXT
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import host_time
from benchmarks.traffic import KINDS, Traffic, count, create_parser, kind_of, main, run_pass


def test_bytes_of_operators_by_hand() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(10, 6, device="cuda"), torch.empty(6, 5, device="cuda")
        with Traffic() as seen:
            y = x @ weight
            z = y.t().unsqueeze(0)  # views
            z = z.to(torch.bfloat16)
            z.add_(z)
            torch.zeros(7, device="cuda")
            torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)
    assert seen.bytes["mm"] == 4 * (60 + 30 + 50)
    assert seen.bytes["_to_copy"] == (4 + 2) * 50
    assert seen.bytes["add_"] == 2 * 3 * 50
    assert seen.bytes["zeros"] == 4 * 7
    (norm,) = (moved for name, moved in seen.bytes.items() if "batch_norm" in name)
    assert norm == 4 * (3 * 60 + 2 * 6)  # twice in, once out; mean and deviation
    assert seen.calls == 5


def test_kinds() -> None:
    kinds = {
        "mm": "products",
        "sparse_conv_grad_kernel": "products",
        "depthwise_conv_grad_rows": "products",
        "convolution_backward": "products",
        "native_layer_norm_backward": "norms",
        "_to_copy": "casts",
        "clone": "copies",
        "densify": "copies",
        "sum": "sums",
        "relu": "pointwise",
        "add_": "pointwise",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


@pytest.mark.parametrize("what", ["encoder", "step"])
@pytest.mark.parametrize("model", [BASIC, CONVNEXT])
def test_a_pass_never_waits_for_the_gpu(model: str, what: str) -> None:
    """A look at data, as `.item()` is one, ends a pass on fake tensors."""
    words = ["--model", model, "--what", what, "--batch-size", "4", "--input-size", "64"]
    case = count(model, create_parser().parse_args(words))
    assert case["operators"] > 100 and case["gigabytes"]["products"] > 0
    twice = count(model, argparse.Namespace(**vars(create_parser().parse_args([*words, "--batch-size", "8"]))))
    assert 1 < sum(twice["gigabytes"].values()) / sum(case["gigabytes"].values()) < 2.1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traffic.json"
    assert main(["--model", "resnet18", "--batch-size", "2", "--input-size", "64", "--json", str(path)]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert list(case["gigabytes"]) == list(KINDS)
    assert sum(case["gigabytes"].values()) == pytest.approx(sum(case["largest"].values()))
    assert "GB in" in capsys.readouterr().out
    assert main(["--model", "no_such_network"]) == 2


@pytest.mark.parametrize(
    ("model", "engine"),
    [(BOTTLENECK, "cuda_ext"), (CONVNEXT, "cuda_ext"), ("mobilenet_v2", "cuda_ext"), (CONVNEXT, "masked-dense")],
)
def test_under_autocast_nothing_of_the_encoder_is_float32(model: str, engine: str) -> None:
    """On CUDA autocast makes layer norms float32, which the CPU hides; and a float32 parameter, such as layer scale, promotes.

    The batch is so large that maps have more numbers than weights, which are cast, and their gradients, which are cast back.
    """
    args = create_parser().parse_args(["--model", model, "--batch-size", "8192", "--input-size", "64", "--engine", engine])
    seen = Traffic()
    seen.large = 3_000_000
    run_pass(model, args, seen)
    wide = Counter({name: number for (name, dtype), number in seen.types.items() if dtype == torch.float32})
    assert len(seen.types) > 5
    of_images = Counter(dict.fromkeys(("voxelise", "clone", "index_select", "new_zeros", "index_copy_"), 1))
    assert not wide - of_images, wide


def test_the_hosts_time_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "host_time.json"
    threads = torch.get_num_threads()
    try:
        assert host_time.main(["--network", "resnet50", "--rounds", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(path.read_text())
    (case,) = record["cases"]
    assert case["layers"] == 53 + 53 and case["engines"].keys() == {"cuda_ext", "masked-dense"} and case["optimiser_us"] > 0
    assert record["operators"].keys() >= {"torch.mm", "linear", "sparse_conv"}
    assert "us/layer" in capsys.readouterr().out
