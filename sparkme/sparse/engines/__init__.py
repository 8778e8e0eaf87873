"""Engines: which kernels run under the sparse layers.

| name | kernels |
|---|---|
| `minkowski` | stock MinkowskiEngine |
| `masked-dense` | dense convolutions times the mask |
| `auto` | `minkowski` where it can run, else `masked-dense`, with the reason |
"""

import MinkowskiEngine as ME
import torch

from sparkme.sparse.engines.base import Engine
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.sparse.engines.minkowski import MinkowskiEngine

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (MinkowskiEngine, MaskedDenseEngine)}


def create_engine(name: str, device: torch.device | str = "cpu") -> tuple[Engine, str]:
    """Makes an engine for a device. Returns it with the reason for the choice, for the log.

    Raises:
        ValueError: an unknown name, or an engine that cannot run on this device.
    """
    on_gpu = torch.device(device).type == "cuda"
    usable = not on_gpu or ME.is_cuda_available()
    if name == "auto":
        if usable:
            return MinkowskiEngine(), "sparse convolutions on visible pixels"
        return MaskedDenseEngine(), "MinkowskiEngine was built without CUDA here; see `python -m sparkme.doctor`"
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(['auto', *ENGINES])}")
    if name == "minkowski" and not usable:
        raise ValueError(
            "engine minkowski cannot run on a GPU: MinkowskiEngine was built without CUDA; rebuild it with "
            "`python cuda_ext/minkowski/build.py --cuda --install`, or use --engine masked-dense"
        )
    return ENGINES[name](), "as asked"
