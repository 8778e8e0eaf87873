"""Random visible patches and values for the tests of operators."""

import torch
from torch import Tensor


def make_sites(seed: int, keep: int, batch: int = 3, f_h: int = 3, f_w: int = 4) -> tuple[Tensor, Tensor]:
    """Slots and patches of a random mask with `keep` visible patches in every image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, f_h * f_w, generator=generator).argsort(1)
    active = torch.zeros(batch, f_h * f_w, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    patches = active.flatten().nonzero().flatten()
    slots = torch.full((batch * f_h * f_w,), -1).scatter_(0, patches, torch.arange(len(patches)))
    return slots.view(batch, f_h, f_w).int(), patches.int()


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; NaN where one has NaN."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double().cpu() - expected.double().cpu()).norm()
    return float(difference / expected.double().norm().cpu().clamp_min(1e-300)) if expected.numel() else 0.0
