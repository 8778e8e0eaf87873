"""Blocks that are computed twice: the same results, and less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import QUICKEST, fails, losses
from networks import images_and_mask
from torch import Tensor

from benchmarks.profiling import peak_memory
from sparkme.networks.create import create_encoder
from sparkme.pretrain import main


def results(name: str, engine: str, *, twice: bool) -> tuple[list[Tensor], list[str], int]:
    torch.manual_seed(0)
    encoder = create_encoder(name, drop_path=0.2).set_engine(engine).train()
    blocks = encoder.checkpoint_blocks() if twice else []
    images, active = images_and_mask(4)

    def work() -> list[Tensor]:
        torch.manual_seed(1)
        encoder.zero_grad()
        rows = [x.rows for x in encoder(images, active)]
        torch.autograd.backward(rows, [torch.arange(r.numel()).view_as(r).float() % 7 - 3 for r in rows])
        return [r.detach() for r in rows]

    rows = work()
    found = [
        *rows,
        *(p.grad.clone() for p in encoder.parameters() if p.grad is not None),
        *(b.clone() for b in encoder.buffers()),
    ]
    return found, blocks, peak_memory(work, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "count", "engine"),
    [("resnet18", 8, "masked-dense"), ("timm:resnetv2_18", 8, "cuda_ext"), ("timm:convnextv2_atto", 12, "cuda_ext")],
)
def test_results_are_equal_and_memory_is_less(name: str, count: int, engine: str) -> None:
    """Maps, gradients and running statistics, bit for bit, with drop path."""
    once, _, memory = results(name, engine, twice=False)
    again, blocks, less = results(name, engine, twice=True)
    assert len(blocks) == count and len(once) == len(again)
    assert all(torch.equal(x, y) for x, y in zip(again, once, strict=True))
    assert less < memory


def test_it_does_not_go_with_compiled_stages() -> None:
    encoder = create_encoder("resnet18", drop_path=0.0)
    encoder.compiled = True
    with pytest.raises(ValueError, match="use it or compile_stages, not both"):
        encoder.checkpoint_blocks()


def test_pretraining_comes_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICKEST, "--panel-epochs", "0"]
    for name, more in (("once", []), ("twice", ["--checkpoint-activations"])):
        assert main([*words, "--output", str(tmp_path / name), *more]) == 0
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    assert "use one of them" in fails(capsys, *words, "--compile", "--checkpoint-activations", "--output", tmp_path / "both")
