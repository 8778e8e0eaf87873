"""`--cuda-graph`: the same training, queued at once. Refusals run anywhere; the rest needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import SMALL, fails, losses

from sparkme.methods.spark import SparK
from sparkme.networks.create import create_encoder
from sparkme.pretrain import main
from sparkme.training.graph import GraphedLoss, unchanged

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
WORDS = [word if word != "cpu" else "cuda" for word in SMALL]


def test_a_mask_whose_number_of_patches_is_known_gives_the_same_loss() -> None:
    torch.manual_seed(0)
    network = SparK(create_encoder("resnet18", drop_path=0.0), input_size=64, mask_ratio=0.5, decoder_width=32)
    images, active = torch.randn(3, 3, 64, 64), network.random_active(3)
    assert torch.equal(network(images, active), network(images, active, keep=network.keep))


def test_it_is_refused_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--cuda-graph needs a GPU; leave it out" in fails(capsys, *SMALL, "--cuda-graph", "--output", tmp_path)
    assert "does not work with MinkowskiEngine" in fails(
        capsys, *SMALL, "--cuda-graph", "--engine", "minkowski", "--output", tmp_path
    )


@on_gpu
@pytest.mark.parametrize("flag", [["--accumulate", "2"], ["--compile"], ["--checkpoint-activations"]])
def test_it_is_refused_with_what_it_cannot_be_combined_with(
    flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exclude each other" in fails(capsys, *WORDS, "--cuda-graph", *flag, "--output", tmp_path)


@on_gpu
@pytest.mark.parametrize("model", ["resnet18", "timm:convnext_atto"])
def test_pretraining_comes_to_the_same(model: str, tmp_path: Path) -> None:
    """With drop path, whose random numbers are new in every step."""
    for name, more in (("eager", []), ("graph", ["--cuda-graph"])):
        assert main([*WORDS, "--model", model, "--output", str(tmp_path / name), *more]) == 0
    eager, graph = losses(tmp_path / "eager"), losses(tmp_path / "graph")
    assert len(eager) == len(graph) == 6 and len(set(eager)) == 6
    assert graph == pytest.approx(eager, rel=1e-4)
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.pt", map_location="cpu")["model"] for name in ("eager", "graph")
    ]
    for key, value in weights[0].items():
        assert torch.allclose(weights[1][key].double(), value.double(), rtol=1e-3, atol=1e-4), key


@on_gpu
def test_capturing_changes_nothing() -> None:
    torch.manual_seed(0)
    network = SparK(create_encoder("resnet18", drop_path=0.1), input_size=64, mask_ratio=0.5, decoder_width=32).cuda().train()
    before, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.cuda.get_rng_state()
    GraphedLoss(network, torch.randn(4, 3, 64, 64, device="cuda"), torch.bfloat16)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert all(p.grad is None for p in network.parameters())


@on_gpu
def test_what_was_changed_is_put_back() -> None:
    norm = torch.nn.BatchNorm1d(3).cuda()
    with unchanged(norm):
        norm(torch.randn(4, 3, device="cuda"))
    assert norm.running_mean is not None and not norm.running_mean.any()
