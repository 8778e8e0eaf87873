"""Broken annotations that a generator with a seed makes up: each can be read, or is refused in one line, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import annotation_fuzz
import pytest

SEED, COUNT = 5, 300

pytest.importorskip("pycocotools", reason="pycocotools is not installed")


def test_broken_annotations_end_well(tmp_path: Path) -> None:
    words = [sys.executable, annotation_fuzz.__file__, str(SEED), str(COUNT), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1].partition(": ")[2])
    for kind in ("coco", "yolo", "voc"):  # it tries what can be read, and what cannot
        assert outcomes[f"{kind} read"] >= 10 and outcomes[f"{kind} refused"] >= 25, outcomes
