"""Sets torch's options for training on a device."""

from __future__ import annotations

import torch

from sparkme.training.memory import keep_freed_memory


def prepare_device(device: torch.device, *, tf32: bool) -> None:
    """Sets process-wide options.

    On the CPU, freed memory is kept for the next step. On a GPU, cuDNN searches its fastest kernels, since sizes do not change,
    and sums of bfloat16 products stay float32. `tf32` allows TF32 in all convolutions and matrix products; torch's default
    allows it in convolutions only.
    """
    if device.type == "cpu":
        keep_freed_memory()
        return
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
