"""SparK with a contrastive term, restated on dense maps; and runs of its recipe."""

import json
import math
from pathlib import Path

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from commands import QUICKEST, asked, fails, losses, weights
from pictures import make_labelled
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor

import sparkme
from sparkme import export, probe, visualize
from sparkme.methods import contrastive
from sparkme.methods.contrastive import ContrastiveSparK, contrastive_loss
from sparkme.pretrain import main
from sparkme.training.distributed import start_process
from sparkme.training.pretraining import Pretraining

RUN = [*QUICKEST, "--recipe", "contrastive"]


def simclr(embedded: Tensor, temperature: float) -> Tensor:
    """Equation 1 of SimCLR, pair by pair."""

    def of(i: int, j: int) -> Tensor:
        return torch.exp(F.cosine_similarity(embedded[i], embedded[j], dim=0) / temperature)

    numbers = range(len(embedded))
    partners = [(i, i + 1 if i % 2 == 0 else i - 1) for i in numbers]
    return torch.stack([-torch.log(of(i, j) / sum(of(i, k) for k in numbers if k != i)) for i, j in partners]).mean()


@pytest.mark.parametrize("engine", ["cuda_ext", "minkowski", "masked-dense"])
def test_the_loss_is_sparks_and_simclrs(engine: str) -> None:
    torch.manual_seed(0)
    network = ResNet(BasicBlock, (1, 1, 1, 1), channels=(6, 8, 10, 12), num_classes=0).double()
    model = ContrastiveSparK(sparkme.sparsify(network), input_size=(64, 96), mask_ratio=0.5, decoder_width=32).double().train()
    model.encoder.set_engine(engine)
    images = torch.randn(6, 3, 64, 96, dtype=torch.float64)
    active = oracle.random_active(6, (2, 3), 3, seed=2)

    own = {name: value for name, value in model.state_dict().items() if not name.startswith(("encoder.", "head."))}
    state = {name.replace("decoder.", "dense_decoder.", 1): value for name, value in oracle.trainable(own).items()}
    trained = oracle.trainable(model.encoder.dense_state_dict())
    state |= {oracle.ENCODER_PREFIX + name: value for name, value in trained.items()}
    reference = oracle.OracleSparK(state, "resnet", model.input_size)
    maps = reference.features(images, active, training=True)
    prediction = reference.decode(reference.densify(maps, active, training=True), training=True)
    pooled = maps[-1].sum((2, 3)) / 3  # zero at the hidden half
    first, norm, _, last = model.head
    hidden = pooled @ first.weight.t()
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
    embedded = hidden.relu() @ last.weight.t() + last.bias
    expected = reference.loss_of(prediction, images, active) + contrastive.WEIGHT * simclr(embedded, contrastive.TEMPERATURE)

    loss = model(images, active)
    assert oracle.relative_error(loss, expected) < 1e-10
    loss.backward()
    expected.backward()
    with torch.no_grad():  # the gradients in the layout of the dense network
        for parameter in model.encoder.parameters():
            parameter.copy_(parameter.grad)
    stem = model.encoder.dense_state_dict()["conv1.weight"]
    assert oracle.relative_error(stem, trained["conv1.weight"].grad) < 1e-8
    with pytest.raises(ValueError, match="5 images are no pairs of crops"):
        model(images[:5], active[:5])


def test_the_contrastive_loss_is_that_of_the_paper() -> None:
    embedded = torch.randn(8, 5, dtype=torch.float64)
    assert oracle.relative_error(contrastive_loss(embedded, 0.3), simclr(embedded, 0.3)) < 1e-12
    same = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0)  # pairs that are equal, and at right angles to the rest
    assert float(contrastive_loss(same, 0.5)) == pytest.approx(math.log(1 + 6 * math.exp(-2)))


def test_a_batch_has_pairs_of_crops(tmp_path: Path) -> None:
    data = make_labelled(tmp_path / "data", {"red": 4, "blue": 4, "green": 4})
    run = Pretraining(asked(*RUN, "--data", data, "--output", tmp_path / "run"), start_process("cpu"))
    batches = [batch.images for batch in run.batches(range(4))]
    for images in batches:
        colours = images.float().mean((2, 3)).argmax(1)
        assert colours[0] == colours[1] and colours[2] == colours[3]
    assert sum(torch.equal(images[i], images[i + 1]) for images in batches for i in (0, 2)) < 4  # some show no white box
    assert run.poor_loss is None and "contrastive" in run.loss_name


def test_a_run_resumes_bit_for_bit_and_its_encoder_is_used_as_sparks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--epochs", "3", "--output", "whole"]) == 0
    assert main([*RUN, "--epochs", "3", "--output", "parts", "--checkpoint-minutes", "0", "--keep-checkpoints", "9"]) == 0
    for path in sorted(Path("parts/checkpoints").glob("*.pt"))[1:]:  # only the first is left
        path.unlink()
    Path("parts/checkpoints/last.pt").unlink(missing_ok=True)
    assert main([*RUN, "--epochs", "3", "--output", "parts"]) == 0
    assert losses(Path("parts")) == losses(Path("whole"))
    ours, other = weights(Path("parts")), weights(Path("whole"))
    assert all(torch.equal(ours[name], other[name]) for name in other) and any(name.startswith("head.") for name in other)

    words = ["--recipe", "contrastive", "--model", "timm:test_resnet", "--input-size", "64", "--samples-per-epoch", "8"]
    words += ["--batch-size", "4", "--workers", "0", "--epochs", "1", "--device", "cpu", "--decoder-width", "32"]
    assert main(words) == 0
    assert "recipe    SparK with a contrastive term" in capsys.readouterr().out
    checkpoint = Path("runs/contrastive-timm-test_resnet-64/checkpoints/last.pt")
    assert visualize.main([str(checkpoint), "--output", "picture.png"]) == 0
    assert export.main([str(checkpoint), "--to", "timm", "--output", "weights.pth"]) == 0
    missing, unexpected = timm.create_model("test_resnet").load_state_dict(torch.load("weights.pth"), strict=False)
    assert not unexpected and all(name.startswith("fc.") for name in missing)
    assert "SimCLR" in json.loads(Path("weights.pth.json").read_text())["method"]
    data = make_labelled(tmp_path / "labelled", {"red": 6, "blue": 6})
    assert probe.main([str(checkpoint), "--data", str(data), "--input-size", "64", "--workers", "0"]) == 0


def test_pairs_fit_into_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*RUN, "--output", tmp_path / "run"]
    assert "--batch-size 5 is not a multiple of 1 processes x --accumulate 1 x 2 crops of an image; use 4" in fails(
        capsys, *words, "--batch-size", "5"
    )
    assert "--accumulate 4 x 2 crops of an image; use 8" in fails(capsys, *words, "--batch-size", "4", "--accumulate", "4")
