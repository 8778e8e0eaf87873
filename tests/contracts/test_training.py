"""Optimiser, schedules, sampler, data and checkpoints: the parts of a training run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
import torchvision
from commands import asked
from pictures import make_images
from PIL import Image

import sparkme
from sparkme.data.dataset import CropDataset, EpochSampler, create_loader, denormalise, normalise, preview_images
from sparkme.data.images import load_rgb
from sparkme.data.sources.files import demo_photographs, find_images
from sparkme.errors import UserError
from sparkme.networks.create import create_encoder
from sparkme.ops import triton_conv
from sparkme.seeds import derived_seed, seed_step
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import RECIPES, SMALL_CROPS, SMALL_EPOCHS, PretrainSettings, choose_recipe, resolve
from sparkme.settings.shared import Machine
from sparkme.text import duration
from sparkme.training.checkpoint import Checkpoints
from sparkme.training.device import prepare_device
from sparkme.training.log import earlier_runs
from sparkme.training.optimizer import create_optimizer, learning_rate, parameter_groups, weight_decay
from sparkme.weights.checkpoint import load_checkpoint


def test_the_schedule_is_the_papers() -> None:
    """Expected values worked out by hand from utils/lr_control.py: 40 of 1600 epochs of warm-up, 100 steps an epoch."""
    rate = lambda step: learning_rate(step, peak=3.2e-3, warmup_steps=4000, total_steps=160000)  # noqa: E731
    assert rate(0) == pytest.approx(0.005 * 3.2e-3)
    assert rate(2000) == pytest.approx((0.005 + 0.995 / 2) * 3.2e-3)
    assert rate(4000) == pytest.approx(3.2e-3)
    assert rate(159999) == pytest.approx(0.001 * 3.2e-3)
    assert rate(4000 + 155999 // 2) == pytest.approx((0.001 + 0.999 / 2) * 3.2e-3, rel=1e-4)
    decay = lambda step: weight_decay(step, start=0.04, end=0.2, total_steps=101)  # noqa: E731
    assert [decay(s) for s in (0, 50, 100)] == pytest.approx([0.04, 0.12, 0.2])
    assert learning_rate(0, peak=1, warmup_steps=0, total_steps=1) == 1


@pytest.mark.parametrize("name", ["small_resnet:resnet", "official_networks:convnext"])
def test_vectors_are_not_decayed(name: str) -> None:
    model = sparkme.SparK(create_encoder(name), input_size=64, decoder_width=32)
    free = {id(p) for p in parameter_groups(model)[1]["params"]}
    for key, parameter in model.named_parameters():
        is_matrix = (key.endswith("weight") and parameter.ndim in (2, 4)) or key.endswith("kernel")
        assert (id(parameter) in free) != is_matrix, key


def test_lamb_scales_decayed_weights_by_the_trust_ratio_and_clips() -> None:
    weight, bias = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.zeros(2))
    module = torch.nn.Module()
    module.weight, module.bias = weight, bias
    optimizer = create_optimizer("lamb", module, beta2=0.95, clip_grad=5.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        group["weight_decay"] = 0.04 if group["decay"] else 0.0
    weight.grad, bias.grad = torch.full((2, 2), 100.0), torch.full((2,), 100.0)
    optimizer.step()
    # First step: the update is g / (|g| + eps) = 1 in every element, plus the decay 0.04 * 3; scaled to the weight's norm.
    assert weight.detach().flatten().tolist() == pytest.approx([3.0 - 0.1 * 3.0] * 4, rel=1e-4)
    assert bias.tolist() == pytest.approx([-0.1] * 2, rel=1e-4)
    clipped = 100 / (math.sqrt(6) * 100 / 5)
    assert optimizer.state[bias]["exp_avg"].tolist() == pytest.approx([0.1 * clipped] * 2, rel=1e-5)


def test_drop_path_defaults_to_the_papers() -> None:
    from torchvision.ops import StochasticDepth

    with torch.device("meta"):  # the rates are asked for, no values
        small, tiny = create_encoder("convnext_small"), create_encoder("convnext_tiny")
    rates = [m.p for m in small.modules() if isinstance(m, StochasticDepth)]
    assert (rates[0], rates[-1]) == (0.0, 0.2)
    assert not any(m.p for m in tiny.modules() if isinstance(m, StochasticDepth))


def test_seeds_depend_on_everything_and_nothing_else() -> None:
    seeds = {derived_seed(s, p, a, b) for s in range(3) for p in ("crop", "order") for a in range(3) for b in range(11)}
    assert len(seeds) == 3 * 2 * 3 * 11 and max(seeds) < 2**63
    first = torch.rand(3, generator=seed_step(0, 1, 2, torch.device("cpu"))), torch.rand(3)
    torch.rand(100)
    again = torch.rand(3, generator=seed_step(0, 1, 2, torch.device("cpu"))), torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_epoch_shows_every_image_once_and_continues_where_it_stopped() -> None:
    def make(**changed: Any) -> EpochSampler:
        usual = {"num_images": 10, "samples_per_epoch": 10, "batch_size": 2, "seed": 0, "steps": range(15)}
        return EpochSampler(**(usual | changed))

    batches = list(make())
    assert len(batches) == len(make()) == 15
    for epoch in range(3):
        drawn = [draw for batch in batches[5 * epoch : 5 * epoch + 5] for e, draw in batch]
        assert sorted(drawn) == list(range(10)) and all(e == epoch for b in batches[5 * epoch : 5 * epoch + 5] for e, _ in b)
    draws = [[draw for _, draw in batch] for batch in batches]
    assert draws[:5] != draws[5:10]
    assert list(make(steps=range(7, 15))) == batches[7:]
    halves = [list(make(rank=r, world=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(b) for b in batches]


def test_more_samples_than_images_repeat_them_evenly() -> None:
    sampler = EpochSampler(3, 12, 4, 0, range(3))
    drawn = [draw for batch in sampler for _, draw in batch]
    assert sorted(drawn) == list(range(12))  # draw modulo 3 is the image


def test_images_are_found_in_any_structure(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images")
    Image.new("L", (20, 20)).save(folder / "GREY.JPG")
    (folder / "notes.txt").write_text("no image")
    (folder / "loop").symlink_to(folder)
    (folder / "._GREY.JPG").write_text("macOS puts these beside images")
    assert len(find_images(folder)) == 7
    assert len(find_images(folder, leave_out=folder / "sub0")) == 4
    with pytest.raises(UserError, match="is not a folder"):
        find_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        find_images(tmp_path / "empty")


def test_the_photographs_of_the_demo_are_there() -> None:
    photographs = demo_photographs()
    assert len(photographs) >= 5
    assert preview_images(photographs, (64, 96), 4).shape == (4, 3, 64, 96)


def test_crops_depend_on_nothing_but_seed_epoch_and_draw(tmp_path: Path) -> None:
    paths = find_images(make_images(tmp_path))
    crops = lambda **kw: CropDataset(paths, (32, 64), min_scale=0.3, **{"seed": 0, **kw})  # noqa: E731
    state = torch.get_rng_state()
    first = crops()[3, 5]
    assert torch.equal(torch.get_rng_state(), state)
    assert first.image.shape == (3, 32, 64) and first.image.dtype == torch.uint8 and first.unreadable == ()
    torch.rand(7)
    assert torch.equal(crops()[3, 5].image, first.image)
    for other in (crops()[4, 5], crops(seed=1)[3, 5], crops()[3, 11]):
        assert not torch.equal(other.image, first.image)

    batches = []
    for workers in (0, 2):
        sampler = EpochSampler(6, 6, 3, 0, range(4))
        batches.append([b.images for b in create_loader(crops(), sampler, workers=workers, pin_memory=False)])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_an_unreadable_image_is_replaced_and_reported(tmp_path: Path) -> None:
    paths = find_images(make_images(tmp_path))
    paths[2].write_bytes(b"not an image")
    paths[3].write_bytes(paths[4].read_bytes()[:200])  # cut off
    dataset = CropDataset(paths, (32, 32), min_scale=0.5, seed=0)
    for draw in (2, 3):
        sample = dataset[0, draw]
        assert sample.image is not None and str(paths[draw]) in sample.unreadable[0]
        assert torch.equal(sample.image, dataset[0, draw].image)
    for path in paths:
        path.write_bytes(b"")
    assert CropDataset(paths, (32, 32), min_scale=0.5, seed=0)[0, 2].image is None
    assert preview_images(paths, (32, 32), 4).shape == (0, 3, 32, 32)


def test_many_broken_neighbours_do_not_stop_a_draw(tmp_path: Path) -> None:
    paths = find_images(make_images(tmp_path, 60))
    for path in paths[:20]:
        path.write_bytes(b"broken")
    dataset = CropDataset(paths, (32, 32), min_scale=0.5, seed=0)
    assert all(dataset[0, draw].image is not None for draw in range(20))


def test_images_of_any_kind_become_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "16bit.png")
    Image.fromarray(ramp).save(tmp_path / "16bit.tiff")
    for name in ("16bit.png", "16bit.tiff"):
        assert np.abs(np.asarray(load_rgb(tmp_path / name))[..., 0].astype(int) - (ramp >> 8)).max() <= 1
    for mode in ("L", "LA", "RGBA", "CMYK", "P", "1", "YCbCr"):
        suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
        Image.new("RGB", (20, 10), (200, 30, 60)).convert("L" if mode == "LA" else "RGB").convert(mode).save(
            tmp_path / f"{mode}.{suffix}"
        )
        assert load_rgb(tmp_path / f"{mode}.{suffix}").mode == "RGB"
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(OSError, match=r"float.tiff: its values are not all from 0 to 1, so their range is not known"):
        load_rgb(tmp_path / "float.tiff")
    held = Image.new("RGB", (20, 10))
    exif = held.getexif()
    exif[0x0112] = 6  # turned by a quarter
    held.save(tmp_path / "held.jpg", exif=exif)
    assert load_rgb(tmp_path / "held.jpg").size == (10, 20)


def test_normalisation_is_undone() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(normalise(images), expected, atol=1e-6)
    assert torch.equal((denormalise(normalise(images)) * 255).round().to(torch.uint8), images)


def test_checkpoints_are_written_beside_and_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15):
        checkpoints.save({"config": {}, "model": {"w": torch.tensor(step)}}, step)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["last.pt", "step_00000010.pt", "step_00000015.pt"]
    assert load_checkpoint(checkpoints.last)["model"]["w"] == 15


def test_the_newest_checkpoint_is_found_and_kept_without_the_link(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest() is None
    for step in (5, 10):
        Checkpoints(tmp_path, keep=9).save({"config": {}}, step)
    checkpoints.last.unlink()
    assert checkpoints.newest() == tmp_path / "step_00000010.pt"
    checkpoints.save({"config": {}}, 7)  # of a run that went back
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "step_00000007.pt", "step_00000010.pt"]
    assert load_checkpoint(checkpoints.newest())["step"] == 7


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save({"config": {}, "model": {}}, 5)

    def full(state: object, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*step_00000006.pt .*No space left.*last.pt is intact"):
        checkpoints.save({"config": {}, "model": {}}, 6)
    monkeypatch.undo()
    assert load_checkpoint(checkpoints.last)["step"] == 5
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["last.pt", "step_00000005.pt"]


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt is not a checkpoint of sparkme.pretrain"):
        load_checkpoint(tmp_path / "other.pt")
    (tmp_path / "last.pt").write_bytes(b"garbage")
    (tmp_path / "step_00000003.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read .*earlier ones beside it: step_00000003.pt"):
        load_checkpoint(tmp_path / "last.pt")
    torch.save({"format": 1, "config": {}, "code": Path("x")}, tmp_path / "code.pt")  # needs more than weights_only
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "code.pt")


def test_the_loss_curve_is_drawn_with_those_of_earlier_runs(tmp_path: Path) -> None:
    def write(name: str, command: str, losses: list[float], age: int) -> None:
        (tmp_path / name).mkdir()
        lines = [{"step": i, "epoch": i, "loss": loss, "learning_rate": 1} for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "config.json").write_text(json.dumps({"command": command}))
        os.utime(tmp_path / name / "metrics.jsonl", (1e9 - age, 1e9 - age))

    for i in range(6):
        write(f"run{i}", "pretrain", [1.0, i / 10], i)
    write("tuned", "finetune", [5.0], 0)
    write("empty", "pretrain", [], 0)
    assert earlier_runs(tmp_path / "run1") == {f"run{i}": [(0, 1.0), (1, i / 10)] for i in (0, 2, 3, 4)}
    assert earlier_runs(tmp_path / "tuned") == {}
    assert earlier_runs(tmp_path / "none" / "run") == {}


def test_durations_read_well() -> None:
    assert [duration(s) for s in (8, 367, 14700, 183600)] == ["8 s", "6 min 07 s", "4 h 05 min", "2 d 3 h"]


def test_freed_memory_is_kept_for_the_next_step() -> None:
    code = (
        "import resource, torch; from sparkme.training.memory import keep_freed_memory\n"
        "assert keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "step = lambda: len([torch.ones(1 << 24) for _ in range(3)])\n"
        "step(); before = faults(); [step() for _ in range(5)]; print(faults() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # 5 steps of 3 x 64 MiB are 245,760 pages, and so many faults where nothing is kept. Some come all the same: blocks do not
    # always fit into each other's places, and a virtual machine may be told to hand idle memory back.
    assert int(result.stdout) < 200_000


def test_the_recipe_follows_the_number_of_images_and_a_run_keeps_its_own() -> None:
    name, reason = choose_recipe("auto", 99_999, None)
    assert name == "small" and "99,999 images, fewer than 100,000" in reason
    name, reason = choose_recipe("auto", 100_000, None)
    assert name == "spark" and "at least 100,000" in reason
    assert choose_recipe("spark", 10, None) == ("spark", "") and choose_recipe("fcmae", 10**6, None)[0] == "fcmae"
    assert choose_recipe("auto", 10, PretrainSettings(recipe="fcmae"))[0] == "fcmae"
    assert choose_recipe("auto", 10, from_config(PretrainSettings, {}))[0] == "spark"


def test_a_small_set_gets_its_own_rate_and_as_many_epochs_as_it_needs(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images")

    def resolved(*words: object) -> PretrainSettings:
        return resolve(asked("--data", data, *words), 6 if "--recipe" not in words else 10**6, Machine())

    small = resolved()
    assert small.recipe == "small" and small.base_lr == RECIPES["small"].defaults["base_lr"]
    assert small.epochs == math.ceil(SMALL_CROPS / 6) and small.warmup_epochs == 40
    assert resolved("--samples-per-epoch", 10**6).epochs == SMALL_EPOCHS and resolved("--epochs", 7).epochs == 7
    paper = resolved("--recipe", "spark")
    assert (paper.epochs, paper.base_lr, paper.decoder_width) == (1600, 2e-4, 768)


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_products_follow_one_rule(tf32: bool) -> None:
    """Dense and sparse convolutions and matrix products; torch's defaults differ."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction
    try:
        prepare_device(torch.device("cuda"), tf32=asked(*["--tf32"] * tf32).tf32)
        assert matmul.allow_tf32 == cudnn.allow_tf32 == tf32 and triton_conv._precision(torch.float32) == (
            "tf32" if tf32 else "ieee"
        )
        assert cudnn.benchmark and not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = before
