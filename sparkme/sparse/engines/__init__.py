"""Engines: which kernels run under the sparse layers.

| name | kernels |
|---|---|
| `cuda_ext` | this project's own operators, on the CPU and on CUDA |
| `minkowski` | stock MinkowskiEngine |
| `masked-dense` | dense convolutions times the mask |
| `auto` | the first of these that can run |
"""

import MinkowskiEngine as ME
import torch

from sparkme import ops
from sparkme.sparse.engines.base import Engine
from sparkme.sparse.engines.cuda_ext import CudaExtEngine
from sparkme.sparse.engines.masked_dense import MaskedDenseEngine
from sparkme.sparse.engines.minkowski import MinkowskiEngine

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (CudaExtEngine, MinkowskiEngine, MaskedDenseEngine)}


def why_not(name: str, device: torch.device | str) -> str:
    """Why an engine cannot run on a device, and how to fix that; "" if it can."""
    on_gpu = torch.device(device).type == "cuda"
    if name == "cuda_ext":
        reason = ops.unavailable(on_gpu=on_gpu)
        return f"{reason}; build it with `FORCE_CUDA={int(on_gpu)} pip install --no-build-isolation -e .`" if reason else ""
    if name == "minkowski" and on_gpu and not ME.is_cuda_available():
        return "MinkowskiEngine was built without CUDA; rebuild it with `python cuda_ext/minkowski/build.py --cuda --install`"
    return ""


def create_engine(name: str, device: torch.device | str = "cpu") -> tuple[Engine, str]:
    """Makes an engine for a device. Returns it with the reason for the choice, for the log.

    Raises:
        ValueError: an unknown name, or an engine that cannot run on this device.
    """
    if name == "auto":
        problems = {engine: why_not(engine, device) for engine in ENGINES}
        chosen = next(engine for engine, problem in problems.items() if not problem)
        passed_over = [f"{engine} cannot run: {problem}" for engine, problem in problems.items() if problem]
        reason = "the fastest here" if not passed_over else "; ".join(passed_over)
        return ENGINES[chosen](), reason
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(['auto', *ENGINES])}")
    if problem := why_not(name, device):
        raise ValueError(f"--engine {name} cannot run on this {torch.device(device).type}: {problem}; or use --engine auto")
    return ENGINES[name](), "as asked"
