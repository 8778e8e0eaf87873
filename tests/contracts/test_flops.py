"""The count of multiply-accumulates, against torch's own counter, brute force, and the figures that were agreed on."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from sparkme.methods.decoder import Decoder
from sparkme.sparse.forms import SparseConv2d
from sparkme.sparse.grid import Grid

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "flops.json"


def count(name: str, size: tuple[int, int] = (64, 96), **kwargs) -> list[flops.Count]:  # type: ignore[no-untyped-def]
    settings = {"mask_ratio": 0.6, "decoder_width": 64, "patch": None, **kwargs}
    return flops.count_network(flops.build(name, list(size), **settings))


def macs_of(counts: list[flops.Count], part: str) -> flops.Macs:
    return flops.total(c for c in counts if c.part == part)


@torch.no_grad()
def torchs_count(model: nn.Module, x: torch.Tensor | dict[int, torch.Tensor]) -> float:
    """MACs that torch counts in the operators that run, by formulas of its own."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() / 2


def headless(name: str) -> nn.Module:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    if name.startswith("convnext"):
        model.classifier = nn.Identity()
    else:
        model.fc = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "convnext_tiny"])
def test_dense_encoder_is_what_torch_counts_in_torchvisions_model(name: str) -> None:
    expected = torchs_count(headless(name), torch.empty(1, 3, 64, 96, device="meta"))
    assert macs_of(count(name), "encoder").dense == expected


def test_decoder_is_what_torch_counts_and_the_same_in_every_column() -> None:
    decoder = Decoder(32, 64).to("meta")
    maps = {i: torch.empty(1, 64 >> i, 2 << i, 3 << i, device="meta") for i in range(4)}
    assert macs_of(count("resnet18"), "decoder") == flops.every(torchs_count(decoder, maps))


def test_nothing_of_the_whole_network_is_missed() -> None:
    network = flops.build("convnext_tiny", [64, 96], 0.6, 64, None)  # its engine computes dense convolutions
    assert flops.total(flops.count_network(network)).dense == torchs_count(network, torch.zeros(1, 3, 64, 96))
    assert not any(m._forward_hooks for m in network.densify_projs.modules())  # the counter leaves the network as it was


@pytest.mark.parametrize("keep", [1, 3, 6])
@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(1, 1, 1),
        nn.Conv2d(1, 1, 1, stride=2),
        nn.Conv2d(1, 1, 3, padding=1),
        nn.Conv2d(1, 1, 3, padding=1, stride=2),
        nn.Conv2d(1, 1, 3, padding=2, dilation=2),
        nn.Conv2d(1, 1, 7, padding=3),
        nn.Conv2d(1, 1, 7, padding=3, stride=2),
        nn.Conv2d(1, 1, (5, 3), padding=(2, 1)),
        nn.Conv2d(1, 1, 2, stride=2),
    ],
    ids=str,
)
def test_pairs_are_the_mean_over_all_masks(conv: nn.Conv2d, patch: int, keep: int) -> None:
    found = []
    for visible in combinations(range(6), keep):
        active = torch.zeros(6)
        active[list(visible)] = 1
        pixels = torch.kron(active.view(2, 3), torch.ones(patch, patch))[None, None]
        ones = torch.ones_like(conv.weight)
        neighbours = F.conv2d(pixels, ones, None, conv.stride, conv.padding, conv.dilation)
        found.append((neighbours * pixels[..., :: conv.stride[0], :: conv.stride[0]]).sum().item())
    grid = Grid(active.view(1, 1, 2, 3).bool(), patch)
    assert flops.mean_visible_pairs(SparseConv2d(conv), grid, 1) == pytest.approx(sum(found) / len(found), rel=1e-12)


def test_pairs_counted_by_hand() -> None:
    conv = SparseConv2d(nn.Conv2d(1, 1, 3, padding=1))
    one, both = torch.tensor([[[[True, False]]]]), torch.tensor([[[[True, True]]]])
    # A patch of 2x2 pixels alone: each of the four sees all four. Two of them, 2x4: (2 + 2) down times (2 + 3 + 3 + 2) across.
    assert flops.mean_visible_pairs(conv, Grid(one, 2), 1) == 16
    assert flops.mean_visible_pairs(conv, Grid(both, 2), 1) == 40


def test_columns_of_each_kind_of_layer() -> None:
    counts = count("convnext_tiny", (224, 224))
    kinds = flops.by_kind([c for c in counts if (c.part, c.stride) == ("encoder", 16)])
    assert list(kinds) == ["2x2", "depthwise 7x7", "linear"]
    assert kinds["linear"].dense == 9 * 2 * 14 * 14 * 384 * 4 * 384  # nine blocks of two linear layers
    assert kinds["depthwise 7x7"].dense == 9 * 14 * 14 * 384 * 49
    assert all(macs.sparse * 49 == macs.dense * 20 for macs in kinds.values())
    assert kinds["linear"].submanifold == kinds["linear"].sparse and kinds["2x2"].submanifold == kinds["2x2"].sparse
    assert kinds["depthwise 7x7"].submanifold < kinds["depthwise 7x7"].sparse / 2


def test_stages_and_kinds_of_a_resnet() -> None:
    counts = count("resnext50_32x4d", (224, 224))
    found = {(c.part, c.stride, c.kind) for c in counts}
    encoder = {("encoder", s, kind) for s in (4, 8, 16, 32) for kind in ("1x1", "grouped 3x3")} | {("encoder", 4, "7x7")}
    densify = {("densify", 32, "1x1")} | {("densify", s, "3x3") for s in (4, 8, 16)}
    decoder = {("decoder", s, kind) for s in (16, 8, 4, 2, 1) for kind in ("transposed 4x4", "3x3")} | {("decoder", 1, "1x1")}
    assert found == encoder | densify | decoder
    (stem,) = (c.macs for c in counts if c.kind == "7x7")
    assert stem.dense == 112 * 112 * 64 * 3 * 49


@pytest.mark.parametrize(
    ("name", "dense", "submanifold", "ratio"),
    [
        ("resnet50", "8.17", "2.89", "0.353"),
        ("convnext_small", "17.4", "7.0", "0.404"),
        ("convnext_base", "30.7", "12.4", "0.405"),
    ],
)
def test_agreed_figures(name: str, dense: str, submanifold: str, ratio: str) -> None:
    """GFLOP at 224 pixels, 20 of 49 patches visible: the project's design, which counts visible pairs as sparse."""
    counts = count(name, (224, 224), decoder_width=768)
    encoder = macs_of(counts, "encoder")
    same_digits = lambda value, text: f"{value:.{len(text.partition('.')[2])}f}" == text  # noqa: E731
    assert same_digits(2e-9 * encoder.dense, dense)
    assert same_digits(2e-9 * encoder.submanifold, submanifold)
    assert same_digits(encoder.submanifold / encoder.dense, ratio)
    assert encoder.sparse / encoder.dense == pytest.approx(20 / 49)
    assert same_digits(2e-9 * macs_of(counts, "decoder").dense, "20.2")
    if name == "resnet50":
        assert same_digits(2e-9 * macs_of(counts, "densify").dense, "4.3")


def test_larger_patches_leave_fewer_borders() -> None:
    small, large = (macs_of(count("resnet18", (128, 128), mask_ratio=0.5, patch=p), "encoder") for p in (32, 64))
    assert small.dense == large.dense and small.sparse == large.sparse
    assert small.submanifold < large.submanifold < large.sparse


def test_the_engine_does_not_change_the_count() -> None:
    network = flops.build("resnet18", [64, 96], 0.6, 64, None)
    expected = flops.count_network(network)
    network.encoder.set_engine("minkowski")
    assert flops.count_network(network) == expected


def test_the_command_prints_and_writes_what_it_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "flops.json"
    words = ["--model", "resnet18", "convnext_tiny", "--input-size", "64", "96", "--decoder-width", "64", "--json", str(path)]
    assert flops.main(words) == 0
    record = json.loads(path.read_text())
    assert record["command"] == "python -m benchmarks.flops " + " ".join(words)
    assert record["versions"].keys() == {"python", "sparkme", "torch", "torchvision", "MinkowskiEngine"} and "commit" in record
    result = record["results"][0]
    assert (result["model"], result["input_size"], result["num_patches"]) == ("resnet18", [64, 96], 6)
    assert (result["visible_patches"], result["decoder_width"], result["patch"]) == (2, 64, 32)
    encoder = macs_of(count("resnet18"), "encoder")
    assert result["gflop"]["encoder"] == {k: round(v / 5e8, 4) for k, v in vars(encoder).items()}
    assert sum(kind["dense"] for stage in result["macs"]["encoder"].values() for kind in stage.values()) == encoder.dense
    assert sum(result["share_of_all"][part]["sparse"] for part in flops.PARTS) == pytest.approx(1, abs=2e-4)
    assert record["results"][1]["model"] == "convnext_tiny"
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines[: lines.index("") + 40] if line.startswith("encoder"))
    assert line.split()[1:4] == [f"{v / 1e9:.3f}" for v in vars(encoder).values()]
    assert line.split()[4:7] == [f"{v / 5e8:.2f}" for v in vars(encoder).values()]
    assert line.split()[7:9] == ["0.333", f"{encoder.submanifold / encoder.dense:.3f}"]
    assert sum(line.startswith("all ") and line.endswith("100.0%") for line in lines) == 2


def test_written_results_are_still_what_the_code_counts() -> None:
    results = {result["model"]: result for result in json.loads(RESULTS.read_text())["results"]}
    assert list(results) == ["resnet50", "convnext_tiny", "convnext_small", "convnext_base"]
    for name in ("resnet50", "convnext_tiny"):
        expected = flops.summary(count(name, (224, 224), decoder_width=768))
        assert {key: results[name][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet51"], "unknown model 'resnet51'; did you mean"),
        (["--input-size", "230"], "230x230 is not a multiple of the patch of 32; use 224"),
        (["--input-size", "1", "2", "3"], "--input-size takes a side, or height and width; got 3 numbers"),
        (["--mask-ratio", "1.5"], r"mask ratio 1.5 is outside [0, 1]"),
        (["--mask-ratio", "0"], "mask ratio 0.0 hides none of 49 patches"),
        (["--mask-ratio", "1"], "mask ratio 1.0 leaves none of 49 patches visible"),
        (["--decoder-width", "50"], "decoder width 50 is not a multiple of 32"),
        (["--patch", "-32"], "--patch -32 must be at least 1"),
        (["--patch", "48"], "patch 48 is not a multiple of the encoder's total stride 32"),
        (["--json", "missing/flops.json"], "--json missing/flops.json must be a file in a folder that exists"),
        (["--json", "."], "--json . must be a file in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert flops.main(["--model", "resnet18", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_a_file_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture) -> None:
    words = ["--model", "resnet18", "--input-size", "64", "--mask-ratio", "0.5", "--decoder-width", "32", "--json", "/dev/full"]
    assert flops.main(words) == 2
    assert capsys.readouterr().err == "error: cannot write /dev/full: [Errno 28] No space left on device\n"


def test_help_works_and_a_wrong_word_ends_with_code_2(capsys: pytest.CaptureFixture) -> None:
    for words, code in ((["--help"], 0), (["--mask-ratio", "x"], 2)):
        with pytest.raises(SystemExit) as stop:
            flops.main(words)
        assert stop.value.code == code
    assert "python -m benchmarks.flops" in capsys.readouterr().out
