"""Randomness that survives an interruption: every draw depends only on the run's seed, a purpose and a position."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, *where: int) -> int:
    """A 63-bit seed for a purpose and a position in a run."""
    text = ":".join((str(seed), purpose, *map(str, where)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_step(seed: int, rank: int, step: int, device: torch.device) -> torch.Generator:
    """Makes a step's randomness independent of earlier steps.

    Seeds the default generators of torch (drop path), NumPy and Python (timm's mixup and random erasing), and returns the
    generator of the step's masks, on `device`, without waiting for the device.
    """
    number = derived_seed(seed, "step", rank, step)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
    return torch.Generator(device).manual_seed(derived_seed(seed, "mask", rank, step))
