"""Names of networks: their library, the paper's drop path, and the list of networks that are known to work.

`python -m benchmarks.networks` writes that list, networks.txt, so that listing imports no library.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

# The paper's drop path (models/__init__.py:34 of the official code), for networks of these names in torchvision and timm.
PAPER_DROP_PATH = {
    "resnet50": 0.05,
    "resnet101": 0.08,
    "resnet152": 0.10,
    "resnet200": 0.15,
    "convnext_small": 0.2,
    "convnext_base": 0.3,
    "convnext_large": 0.4,
}


def paper_drop_path(name: str) -> float:
    """The paper's drop path for a network of this name; 0 if it has none."""
    return PAPER_DROP_PATH.get(name.removeprefix("timm:").partition(".")[0], 0.0)


def model_names(pattern: str = "*") -> list[str]:
    """The names of networks that are known to work and match a shell pattern."""
    lines = Path(__file__).with_name("networks.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#") and fnmatch(line, pattern)]


def library_of(name: str) -> str:
    """The library of a network: torchvision, timm or own."""
    kind, colon, _ = name.rpartition(":")
    return "torchvision" if not colon else "timm" if kind == "timm" else "own"
