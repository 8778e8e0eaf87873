"""The benchmark of throughput: what it times has been checked, what it writes is documented; the tables and the GPU script."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from official_networks import V2

from benchmarks import plot, profiling, throughput
from sparkme.sparse import sparsify
from sparkme.sparse.engines import ENGINES
from sparkme.sparse.engines.cuda_ext import CudaExtEngine

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
TINY = [
    "--model",
    "resnet18",
    "--input-size",
    "64",
    "--batch-size",
    "2",
    "--decoder-width",
    "32",
    "--device",
    "cpu",
    "--mask-ratio",
    "0.5",
    "--rounds",
    "3",
    "--warmup",
    "1",
]
SMALLER = ["--model", "timm:test_resnet"]  # where it does not matter which network it is
CPU = torch.device("cpu")


def run(tmp_path: Path, *words: str, code: int = 0) -> dict[str, Any]:
    path = tmp_path / "numbers.json"
    assert throughput.main([*TINY, *words, "--json", str(path)]) == code
    return json.loads(path.read_text())


def test_the_file_has_what_the_head_of_the_module_says(tmp_path: Path) -> None:
    names = ("cuda_ext", "minkowski", "masked-dense")
    record = run(tmp_path, *SMALLER, "--contenders", *names)
    assert record.keys() >= {"date", "commit", "versions", "command", "hardware", "settings", "cases"}
    assert record["versions"].keys() >= {"python", "torch", "MinkowskiEngine", "cuda"}
    assert record["hardware"].keys() == {"device", "gpu", "cpu", "cores", "threads"}
    assert [case["what"] for case in record["cases"]] == list(throughput.WHAT)
    for case in record["cases"]:
        assert (case["model"], case["input_size"], case["batch_size"], case["mask_ratio"]) == ("timm:test_resnet", 64, 2, 0.5)
        assert (case["recipe"], case["decoder_width"]) == ("spark", 32)
        assert (case["patch"], case["num_patches"], case["visible_patches"]) == (32, 4, 2)
        assert (case["precision"], case["compile"], case["left_out"]) == ("float32", False, {})
        assert case["contenders"].keys() == case["agreement"].keys() == set(names)
        for name in names:
            for dtype in ("float64", "float32"):
                assert case["agreement"][name][dtype].keys() == {"maps", "gradients", "loss"}
            result = case["contenders"][name]
            assert len(result["seconds"]) == 3 and all(value > 0 for value in result["seconds"])
            assert result["median_s"] == pytest.approx(sorted(result["seconds"])[1], rel=1e-4)
            assert result["quartiles_s"][0] <= result["median_s"] <= result["quartiles_s"][1]
            assert result["images_per_s"] == pytest.approx(2 / result["median_s"])
            assert result["activation_bytes"] > 2 * 3 * 32 * 32 * 4 and result["precision"] == "float32"
        medians = {name: case["contenders"][name]["median_s"] for name in names}
        assert case["ratios"]["minkowski"] == pytest.approx(medians["minkowski"] / medians["cuda_ext"])
        assert case["ratios"]["tuned masked-dense"] == case["ratios"]["masked-dense"]
    weighed = [case["contenders"]["cuda_ext"]["activation_bytes"] for case in record["cases"]]
    assert weighed[0] < weighed[1] <= weighed[2]  # gradients come on top, then the decoder


def test_the_tuned_masked_dense_is_the_faster_of_the_two() -> None:
    found = throughput.ratios({"cuda_ext": 2.0, "masked-dense": 5.0, "masked-dense-nchw": 4.0, "official": 8.0})
    assert found == {"masked-dense": 2.5, "masked-dense-nchw": 2, "official": 4, "tuned masked-dense": 2}
    assert throughput.ratios({"masked-dense": 5.0}) == {}


def test_everything_visible_is_timed_for_the_encoder(tmp_path: Path) -> None:
    record = run(
        tmp_path, *SMALLER, "--mask-ratio", "0", "--what", "encoder", "--contenders", "cuda_ext", "--precision", "bf16"
    )
    (case,) = record["cases"]
    assert case["visible_patches"] == 4 and case["contenders"]["cuda_ext"]["precision"] == "bf16"


def test_fcmaes_step_is_timed_for_every_contender(tmp_path: Path) -> None:
    words = ["--recipe", "fcmae", "--model", V2, "--what", "step", "--mask-ratio", "0.6", "--rounds", "1", "--warmup", "0"]
    (case,) = run(tmp_path, *words)["cases"]
    assert list(case["contenders"]) == list(throughput.CONTENDERS) and case["left_out"] == {}
    assert case["recipe"] == "fcmae" and case["visible_patches"] == 1  # of 4; SparK has 2


def test_every_width_of_the_decoder_is_a_case(tmp_path: Path) -> None:
    words = ["--recipe", "fcmae", "--model", V2, "--what", "step", "--contenders", "cuda_ext", "--decoder-width", "16", "32"]
    cases = run(tmp_path, *words)["cases"]
    assert [case["decoder_width"] for case in cases] == [16, 32]
    less, more = (case["contenders"]["cuda_ext"]["activation_bytes"] for case in cases)
    assert less < more


def setting(*words: str) -> throughput.Setting:
    args = throughput.create_parser().parse_args([*TINY, *words])
    throughput.check_arguments(args)
    return throughput.create_setting(args.model[0], args.decoder_width[0], 2, args.mask_ratio[0], "float32", CPU, args)


@pytest.mark.parametrize("name", ["cuda_ext", "official"])
@pytest.mark.parametrize(("recipe", "model", "kind"), [("spark", "resnet18", "Lamb"), ("fcmae", V2, "AdamW")])
def test_the_optimiser_is_the_recipes(recipe: str, model: str, kind: str, name: str) -> None:
    of = setting("--recipe", recipe, "--model", model)
    (contender,), _ = throughput.admit([name], of)
    group = contender.optimizer.param_groups[0]
    assert type(contender.optimizer).__name__ == kind and group["betas"] == (0.9, 0.95)
    assert (group["weight_decay"], group.get("max_grad_norm")) == {"Lamb": (0.04, 5.0), "AdamW": (0.05, None)}[kind]
    before = [parameter.clone() for parameter in contender.model.parameters()]
    contender.step()
    moved = [not torch.equal(x, y) for x, y in zip(before, contender.model.parameters(), strict=True)]
    assert all(moved) and len(moved) > 20


def test_a_recipe_brings_its_network_and_its_decoders_width() -> None:
    for recipe, model, width in (("spark", "resnet50", 768), ("fcmae", "timm:convnextv2_tiny", 512)):
        args = throughput.create_parser().parse_args(["--recipe", recipe])
        throughput.check_arguments(args)
        assert (args.model, args.decoder_width, args.mask_ratio) == ([model], [width], [0.6])


def test_the_encoder_of_fcmae_may_hide_nothing(tmp_path: Path) -> None:
    words = ["--recipe", "fcmae", "--model", V2, "--what", "encoder", "--rounds", "1"]
    (case,) = run(tmp_path, *words, "--mask-ratio", "0", "--contenders", "cuda_ext", "official")["cases"]
    assert case["visible_patches"] == 4 and list(case["contenders"]) == ["cuda_ext", "official"]


class WrongForward(CudaExtEngine):
    def convolution(self, x, *operands):  # type: ignore[no-untyped-def]
        out = super().convolution(x, *operands)
        return out.replace(out.data + out.data.square() / 100)


class WrongBackward(CudaExtEngine):
    """Right maps; the gradient of every linear operation on them is 2 % too large."""

    def convolution(self, x, *operands):  # type: ignore[no-untyped-def]
        out = super().convolution(x, *operands)
        return out.replace(_Louder.apply(out.data))


class _Louder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * 1.02


@pytest.mark.parametrize(("engine", "kind"), [(WrongForward, "maps"), (WrongBackward, "gradients")])
def test_a_contender_that_computes_something_else_is_not_timed(
    engine: type[CudaExtEngine], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsify, "try_out", lambda *_: None)  # which would refuse to build on such an engine
    monkeypatch.setitem(ENGINES, "cuda_ext", engine)
    (case,) = run(tmp_path, "--what", "encoder", "--contenders", "cuda_ext", "minkowski", code=1)["cases"]
    assert case["left_out"]["cuda_ext"].startswith("disagrees with masked-dense in torch.float64: ")
    assert kind in case["left_out"]["cuda_ext"]
    assert list(case["contenders"]) == ["minkowski"] and case["ratios"] == {}
    assert case["agreement"]["cuda_ext"]["float64"][kind] > throughput.LIMITS[torch.float64][kind]


class WrongInBf16(CudaExtEngine):
    """Right in float64 and float32; in bf16 its maps are 5 % too large."""

    def convolution(self, x, kernel, bias, *geometry):  # type: ignore[no-untyped-def]
        out = super().convolution(x, kernel, bias, *geometry)
        return out.replace(1.05 * out.data) if out.data.dtype == torch.bfloat16 and bias is not None else out


def test_a_contender_that_is_wrong_in_bf16_only_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--what", "encoder-forward", "--contenders", "cuda_ext", "minkowski", "rows-dense", "--precision", "bf16"]
    words += ["--model", "timm:convnext_atto"]
    (case,) = run(tmp_path, *words)["cases"]
    assert set(case["contenders"]) == {"cuda_ext", "minkowski", "rows-dense"}
    assert case["agreement"]["minkowski"]["bf16"]["maps"] < 0.1 < case["agreement"]["cuda_ext"]["bf16"]["maps"] < 1.5
    monkeypatch.setattr(sparsify, "try_out", lambda *_: None)  # which would refuse to build on such an engine
    monkeypatch.setitem(ENGINES, "cuda_ext", WrongInBf16)
    (case,) = run(tmp_path, *words, code=1)["cases"]
    assert set(case["contenders"]) == {"minkowski", "rows-dense"}
    assert case["left_out"]["cuda_ext"].startswith("disagrees with masked-dense in bf16: ")


def test_a_contender_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails_later(self, images, grid):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no memory\nmore lines")
        return CudaExtEngine.voxelise(self, images, grid)

    monkeypatch.setattr(sparsify, "try_out", lambda *_: None)  # which would refuse to build on such an engine
    monkeypatch.setitem(ENGINES, "cuda_ext", type("Failing", (CudaExtEngine,), {"voxelise": fails_later}))
    (case,) = run(tmp_path, "--what", "encoder", "--contenders", "cuda_ext", "masked-dense")["cases"]
    assert case["left_out"] == {"cuda_ext": "OutOfMemoryError: no memory"} and list(case["contenders"]) == ["masked-dense"]


def test_a_contender_without_memory_for_its_network_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = throughput.Contender._prepare

    def lacking(self: throughput.Contender) -> None:
        if self.name == "minkowski":
            raise torch.OutOfMemoryError("no memory")
        prepare(self)

    monkeypatch.setattr(throughput.Contender, "_prepare", lacking)
    (case,) = run(tmp_path, "--what", "encoder", "--contenders", "cuda_ext", "minkowski", "masked-dense")["cases"]
    assert case["left_out"] == {"minkowski": "OutOfMemoryError: no memory"}
    assert list(case["contenders"]) == ["cuda_ext", "masked-dense"]


def test_of_a_large_batch_a_part_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    answer = throughput.answer
    monkeypatch.setattr(throughput, "AGREEING_IMAGES", 3)
    monkeypatch.setattr(throughput, "answer", lambda c, with_loss: sizes.append(len(c.setting.images)) or answer(c, with_loss))
    words = ["--what", "encoder", "--contenders", "cuda_ext", "--batch-size", "4", "--precision", "bf16"]
    (case,) = run(tmp_path, *SMALLER, *words)["cases"]
    assert set(sizes) == {2, 3} and list(case["contenders"]) == ["cuda_ext"]
    assert set(case["agreement"]["cuda_ext"]) == {"float64", "float32", "bf16"}


def test_peak_memory_counted_by_hand() -> None:
    x = torch.randn(250_000)
    unit = x.nbytes

    def chain() -> torch.Tensor:
        y = x.exp()  # 1
        z = y * 2  # 2
        w = z + y  # 3
        del y, z  # 1
        return w + 1  # 2

    def leaves_one_of_three() -> torch.Tensor:
        return (x.exp() + 1).sqrt()  # each needs its operand: 2 at once, and the first is gone by the third

    assert profiling.peak_memory(chain, CPU) == pytest.approx(3 * unit, rel=1e-3)
    assert profiling.peak_memory(leaves_one_of_three, CPU) == pytest.approx(2 * unit, rel=1e-3)
    weight = torch.randn(250_000, requires_grad=True)
    # exp keeps its result, the sum's gradient is a broadcast scalar, its product with the result is the weight's gradient.
    assert profiling.peak_memory(lambda: weight.exp().sum().backward(), CPU) == pytest.approx(2 * unit, rel=1e-3)


def test_overlapping_kernels_count_once() -> None:
    assert profiling.union_length([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 6
    assert profiling.union_length([]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19'; did you mean"),
        (["--contenders", "cuda_ext", "fast"], "--contenders fast is unknown; choose from cuda_ext, minkowski"),
        (["--what", "decoder"], "--what decoder is unknown; choose from encoder-forward, encoder, step"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--input-size", "65"], "65x65 is not a multiple of the patch of 32; use 64"),
        (["--mask-ratio", "0"], "mask ratio 0.0 hides none of 4 patches"),
        (["--recipe", "fcmae", "--mask-ratio", "0.8"], "mask ratio 0.8 leaves none of 4 patches visible"),
        (["--decoder-width", "32", "48"], "decoder width 48 is not a multiple of 32"),
        (["--recipe", "fcmae", "--decoder-width", "16", "0"], "decoder width 0 is outside 1 to 8192"),
        (["--mask-ratio", "0.5", "1"], "mask ratio 1.0 leaves none of 4 patches visible"),
        (["--sweep"], "--sweep sets the mask ratios"),
        (["--host-wait"], "--host-wait needs a GPU"),
        (["--json", "missing/numbers.json"], "--json missing/numbers.json must be a file in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert throughput.main([*TINY, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_help_works_and_a_wrong_word_ends_with_code_2(capsys: pytest.CaptureFixture) -> None:
    for module in (throughput, plot):
        for words, code in ((["--help"], 0), (["--colour"], 2), (["--recipe", "small"], 2)):
            with pytest.raises(SystemExit) as stop:
                module.main(words)
            assert stop.value.code == code
        assert f"python -m {module.__name__}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- tables, pictures


def case(what: str, ratio: float, **medians_ms: float) -> dict[str, Any]:
    contenders = {
        name.replace("_dense", "-dense"): {
            "precision": "float32",
            "seconds": [ms / 1e3] * 3,
            "median_s": ms / 1e3,
            "quartiles_s": [0.9e-3 * ms, 1.1e-3 * ms],
            "images_per_s": 8e3 / ms,
            "activation_bytes": 3 * 2**29,
        }
        for name, ms in medians_ms.items()
    }
    return {
        "model": "resnet18",
        "input_size": 64,
        "batch_size": 8,
        "mask_ratio": ratio,
        "precision": "float32",
        "compile": False,
        "what": what,
        "left_out": {"official": "not there"},
        "contenders": contenders,
        "ratios": throughput.ratios({name: result["median_s"] for name, result in contenders.items()}),
    }


def record(*cases: dict[str, Any]) -> dict[str, Any]:
    hardware = {"device": "cpu", "gpu": None, "cpu": "Some CPU", "cores": 2, "threads": 2}
    return {"commit": "abc1234", "hardware": hardware, "cases": list(cases)}


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.json"
    sweep = [case("encoder", ratio, cuda_ext=40 - 40 * ratio, masked_dense=50) for ratio in (0, 0.5, 0.75)]
    path.write_text(json.dumps(record(case("step", 0.6, cuda_ext=16, masked_dense=40), *sweep)))
    return path


def test_tables_and_pictures_of_a_small_file(numbers: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    words = [str(numbers), "--page", str(readme), "--pictures", str(tmp_path)]
    assert plot.main(words) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{plot.BEGIN}\n**") and text.endswith(f"\n{plot.END}\nafter\n") and "old" not in text
    lines = text.splitlines()
    title = "Some CPU, 2 threads, float32, batch 8, 64 pixels, mask ratio 0.6 (`numbers.json`, commit abc1234)"
    assert f"**Whole training step**: {title}" in lines
    assert "| resnet18, `cuda_ext` | 16.0 | 14.4 to 17.6 | 500 | 1.50 | 1x |" in lines
    assert "| resnet18, `masked-dense` | 40.0 | 36.0 to 44.0 | 200 | 1.50 | 2.50x |" in lines
    assert "| 0.75 | 10.0 | 50.0 | 5.00x |" in lines and "| 0 | 40.0 | 50.0 | 1.25x |" in lines
    assert lines.count("Left out: `official` (resnet18): not there.") == 2
    for name in ("numbers_times.png", "numbers_sweep.png"):
        assert f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert plot.main(words) == 0 and readme.read_text() == text


def test_precisions_get_panels_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = []
    monkeypatch.setattr(plot, "save", lambda figure, *_: panels.extend(axis for axis in figure.axes if axis.get_visible()))
    both = [case("step", 0.6, cuda_ext=16, masked_dense=40) | {"precision": name} for name in ("float32", "bf16")]
    plot.draw("numbers", record(*both), tmp_path)
    assert [len(axis.patches) for axis in panels] == [2, 2]
    assert ["bf16" in axis.get_title("left") for axis in panels] == [False, True]
    limits = [axis.get_xlim()[1] for axis in panels]
    assert min(limits) > 44  # the upper quartile in milliseconds


def test_methods_and_widths_of_the_decoder_get_tables_and_panels_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = []
    monkeypatch.setattr(plot, "save", lambda figure, *_: panels.extend(axis for axis in figure.axes if axis.get_visible()))
    settings = [("spark", 768), ("fcmae", 256), ("fcmae", 512)]
    steps = [case("step", 0.6, cuda_ext=16) | {"recipe": recipe, "decoder_width": width} for recipe, width in settings]
    blocks = plot.throughput_tables("numbers.json", record(*steps))
    names = ["SparK, decoder width 768", "FCMAE, decoder width 256", "FCMAE, decoder width 512"]
    titles = [block for block in blocks if block.startswith("**")]
    assert all(f"64 pixels, {name}, mask ratio 0.6" in title for name, title in zip(names, titles, strict=True))
    plot.draw("numbers", record(*steps), tmp_path)
    assert all(axis.get_title("left").endswith(name) for name, axis in zip(names, panels, strict=True))


def test_counts_get_a_table(capsys: pytest.CaptureFixture) -> None:
    assert plot.main([str(ROOT / "benchmarks" / "results" / "flops.json"), "--no-pictures"]) == 0
    assert "| resnet50 | 8.17 | 2.89 | 0.353 | 4.32 | 20.24 |" in capsys.readouterr().out.splitlines()


def test_mistakes_in_plotting_are_one_line(numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "README.md").write_text("no marks\n")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    for words, message in (
        ([str(numbers), "--page", str(tmp_path / "README.md")], "lacks the lines <!-- benchmarks:begin -->"),
        ([str(tmp_path / "other.json")], "is a file of neither benchmarks.throughput nor benchmarks.flops"),
        ([str(tmp_path / "broken.json")], "cannot read"),
        ([str(tmp_path / "none.json")], "cannot read"),
        ([str(numbers), "--pictures", str(tmp_path / "nowhere")], "is not a folder"),
    ):
        assert plot.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


# ------------------------------------------------------------------------------------------------ the script for a GPU


def bash(*words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, check=False, env=environment)


def test_the_gpu_script_parses_and_explains_itself(tmp_path: Path) -> None:
    assert bash("-n", SCRIPT).returncode == 0
    explained = bash(SCRIPT, "--help")
    assert explained.returncode == 0 and explained.stdout.startswith("usage: benchmarks/on_gpu.sh ARCHIVES RESULTS")
    steps = re.search(r'ALL_STEPS="(.*)"', SCRIPT.read_text())
    assert steps and all(f"\n    {step} " in explained.stdout for step in steps[1].split())
    for words in ([], [tmp_path / "none", tmp_path / "results"], [tmp_path, tmp_path / "results", "cook"]):
        refused = bash(SCRIPT, *words)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: ")


def test_a_failed_step_of_the_gpu_script_does_not_stop_the_next(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho this Python is broken; exit 3\n")
    broken.chmod(0o755)
    (tmp_path / "archives").mkdir()
    results = tmp_path / "results"
    variables = {"PYTHON": str(broken), "WORK": str(tmp_path / "work"), "DRY_RUN": "1"}
    done = bash(SCRIPT, tmp_path / "archives", results, "resnet50", "operators", "setup", **variables)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert done.returncode == 1 and [line.split()[0] for line in lines] == ["setup", "operators", "resnet50"]
    assert all("failed (3)" in line for line in lines[:2]) and "MinkowskiEngine is not there" in lines[2]
    assert (results / "log.txt").read_text().count("this Python is broken") == 2
