"""The documents' YOLO and U-Net: pretrained, exported and trained on, as printed there, in an environment that is thrown away.

Neither package is a dependency. Where they are not installed, pip installs them into a virtual environment on top of this one.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from commands import SMALL
from environments import python_with
from pictures import make_images

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "weights.md").read_text().partition("\n## YOLO and U-Nets\n")[2].partition("\n## ")[0]

# Their own requirements would bring torch again, and an OpenCV that needs a screen's libraries.
PACKAGES = ["ultralytics", "ultralytics-thop", "segmentation-models-pytorch"]
REQUIREMENTS = ["opencv-python-headless", "matplotlib", "polars", "psutil", "pyyaml", "requests", "scipy"]

RUN = [*SMALL, "--data", "images", "--epochs", "1", "--panel-epochs", "0", "--output", "run"]
LAST = "run/checkpoints/last.pt"

# Prints as JSON: the largest differences of maps and of weights, after the code of the documents has trained a detector.
CHECK = """
import json, sys
from pathlib import Path
import torch
import sparkme

run, code = sys.argv[1:]
encoder = sparkme.load_encoder(run)
images = torch.rand(2, 3, 64, 96)
with torch.no_grad():
    maps = encoder(images, torch.ones(2, 1, 64 // encoder.patch, 96 // encoder.patch, dtype=torch.bool))

names = {}
loading, training = code.split("detector.train", 1)
exec(loading, names)
detector = names["detector"]
x, found = images, {}
end = int(encoder.untrained) if encoder.untrained else len(detector.model.yaml["backbone"])
with torch.no_grad():
    for layer in detector.model.model[:end]:
        x = layer(x)
        found[64 // x.shape[2]] = x
differences = [float((found[y.stride] - y.dense()).abs().max() / y.dense().abs().max()) for y in maps]
seen = detector.predict(sorted(map(str, Path("images").rglob("*.*"))), imgsz=64, conf=1e-4, verbose=False)
exec("detector.train" + training, names)
trained = detector.model.model.state_dict()
moved = {n: float((trained[n] - v).abs().max() / v.abs().max().clamp_min(1e-3)) for n, v in encoder.dense_state_dict().items()}
print()
found = {"untrained": encoder.untrained, "maps": differences, "images": len(seen), "moved": max(moved.values())}
print(json.dumps(found | {"weights": len(moved)}))
"""

CHECK_UNET = """
import json, sys
import torch
import sparkme

run, code = sys.argv[1:]
names = {}
exec(code, names)
encoder, images = sparkme.load_encoder(run), torch.rand(2, 3, 64, 96)
with torch.no_grad():
    maps = encoder(images, torch.ones(2, 1, 2, 3, dtype=torch.bool))
    for unet in (names["unet"].eval(), names["unet_of_timm"].eval()):
        found = {64 // x.shape[2]: x for x in unet.encoder(images)}
        assert unet(images).shape == (2, 2, 64, 96)
        for y in maps:
            torch.testing.assert_close(found[y.stride], y.dense(), rtol=1e-4, atol=1e-4)
print()
print(json.dumps({"strides": encoder.strides}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the packages."""
    modules = ("ultralytics", "segmentation_models_pytorch")
    return python_with(tmp_path_factory.mktemp("packages"), modules, REQUIREMENTS, ["--no-deps", *PACKAGES])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the documents' factories, images, and a labelled set of one class."""
    (tmp_path / "yolo.py").write_text(block("def yolov8n"))
    for split in ("train", "val"):
        images = tmp_path / "images" / split
        make_images(images, 4)
        for path in images.rglob("*.*"):
            label = tmp_path / "labels" / split / path.relative_to(images).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "signs.yaml").write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [sign]\n")
    return tmp_path


def block(words: str) -> str:
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", SECTION, re.S) if words in code)
    return found


def run(python: Path, folder: Path, *words: str) -> str:
    """What a command prints; ultralytics keeps its settings in the folder and asks no server."""
    own = {"YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | own | {"PYTHONPATH": path}
    done = subprocess.run([str(python), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(("name", "attention"), [("yolov8n", ""), ("yolo11n", "10")])
def test_a_pretrained_backbone_is_loaded_run_and_trained_by_ultralytics(
    name: str, attention: str, python: Path, folder: Path
) -> None:
    words = [*RUN, "--model", f"yolo:{name}", "--mean", "0", "0", "0", "--std", "1", "1", "1", "--drop-path", "0"]
    printed = run(python, folder, "-m", "sparkme.pretrain", *words)
    assert ("what follows it stay dense and untrained" in printed) == bool(attention)
    printed = run(python, folder, "-m", "sparkme.export", LAST, "--to", "ultralytics", "--output", "mine.pt")
    assert printed.count("dense and sparse features differ by") == 4 and "does not normalise" not in printed
    assert (f"{attention} and what follows it are not pretrained" in printed) == bool(attention)
    assert f"the other layers of the detector, from {11 if attention else 10} on, are random" in printed

    as_here = 'data="signs.yaml", epochs=1, imgsz=64, batch=2, workers=0, plots=False, amp=False, device="cpu", freeze=10'
    code = block("YOLO(").replace('data="signs.yaml", epochs=100', as_here)
    assert as_here in code
    found = json.loads(run(python, folder, "-c", CHECK, LAST, code).splitlines()[-1])
    assert found["untrained"] == attention and len(found["maps"]) == 4 and max(found["maps"]) < 1e-4
    assert found["images"] == 8 and found["weights"] > 100
    assert found["moved"] < 2e-3  # though frozen: ultralytics stores what it has trained in half precision


def test_the_encoder_of_a_unet_takes_the_exported_weights(python: Path, folder: Path) -> None:
    run(python, folder, "-m", "sparkme.pretrain", *RUN, "--model", "resnet34")
    run(python, folder, "-m", "sparkme.export", LAST, "--output", "resnet34.safetensors")
    printed = run(python, folder, "-c", CHECK_UNET, LAST, block("smp.Unet"))
    assert json.loads(printed.splitlines()[-1]) == {"strides": [4, 8, 16, 32]}
