"""The operators with the kernels of lesser processors than this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPERATORS = Path(__file__).parents[1] / "contracts" / "test_ops.py"


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_kernels_of_other_processors(capability: str) -> None:
    """The inner loops are compiled for several, and torch's own variable chooses lesser ones. It chooses greater ones, too, and
    torch itself dies of them."""
    has = {"default": True, "avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}
    if not has[capability]:
        pytest.skip(f"this processor has no {capability}")
    chosen = (
        "many_channels or test_mlp or batch_norm or layer_norm or (test_depthwise_conv and 7x7 and some) "
        "or (test_pooling and some)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", OPERATORS, "-k", chosen],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
