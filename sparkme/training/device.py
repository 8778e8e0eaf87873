"""How training has a device compute."""

from __future__ import annotations

import torch

from sparkme.training.memory import keep_freed_memory


def prepare_device(device: torch.device, *, tf32: bool) -> None:
    """Sets, for the whole process, what torch leaves at other defaults.

    Args:
        device: on the CPU freed memory is kept for the next step. On a GPU cuDNN looks for its fastest kernel, since sizes do
            not change; sums of bfloat16 products stay float32 until they are complete.
        tf32: whether a GPU may round what float32 products multiply to TF32's 10 bits: all of them, dense and sparse
            convolutions and matrix products. torch's own default is yes for the former and no for the latter.
    """
    if device.type == "cpu":
        keep_freed_memory()
        return
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
