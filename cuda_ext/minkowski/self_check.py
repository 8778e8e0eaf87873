"""Compares convolutions of a newly built MinkowskiEngine with dense ones; build.py runs it as a process.

python -P self_check.py FOLDER --expect cpu|cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def relative_error(got: Any, expected: Any) -> float:
    difference = got.detach().cpu().double() - expected
    return float(difference.norm() / expected.norm())


def check_convolution(ME: Any, torch: Any, *, stride: int, device: str, dtype: Any) -> float:
    """The largest relative error of output, input gradient and kernel gradient of a 3x3 convolution.

    The visible patches of 4x4 pixels include an isolated one. The random kernel would reveal a transposition.
    """
    batch, c_in, c_out, patches, patch = 2, 5, 6, 4, 4
    generator = torch.Generator().manual_seed(stride)
    active = torch.zeros(batch, patches, patches, dtype=torch.bool)
    active[0, :2, 1:] = active[0, 3, 0] = active[1, 2, 3] = True
    mask = active.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    image = torch.randn(batch, c_in, *mask.shape[1:], generator=generator, dtype=torch.float64) * mask[:, None]
    kernel = torch.randn(9, c_in, c_out, generator=generator, dtype=torch.float64)
    mask_out = mask[:, ::stride, ::stride]
    weight_out = torch.randn(batch, c_out, *mask_out.shape[1:], generator=generator, dtype=torch.float64)

    # Dense: with coordinates (sample, y, x), y is the fastest axis of MinkowskiEngine's kernel.
    dense_image = image.clone().requires_grad_()
    dense_kernel = kernel.clone().requires_grad_()
    weight = dense_kernel.reshape(3, 3, c_in, c_out).permute(3, 2, 1, 0)
    dense = torch.nn.functional.conv2d(dense_image, weight, stride=stride, padding=1) * mask_out[:, None]
    (dense * weight_out).sum().backward()

    sites = mask.nonzero().int().contiguous()
    rows = image.permute(0, 2, 3, 1)[mask].to(device, dtype).requires_grad_()
    layer = ME.MinkowskiConvolution(c_in, c_out, kernel_size=3, stride=stride, dimension=2).to(device, dtype)
    with torch.no_grad():
        layer.kernel.copy_(kernel)
    output = layer(ME.SparseTensor(rows, coordinates=sites.to(device)))
    sample, y, x = output.C.long().cpu().unbind(1)
    y, x = y // stride, x // stride
    if len(output) != int(mask_out.sum()) or not bool(mask_out[sample, y, x].all()):
        raise SystemExit(f"stride {stride}, {device}: the output sites differ from the visible ones at that stride")
    (output.F * weight_out.permute(0, 2, 3, 1)[sample, y, x].to(output.F)).sum().backward()

    got_and_expected = [
        (output.F, dense.detach().permute(0, 2, 3, 1)[sample, y, x]),
        (rows.grad, dense_image.grad.permute(0, 2, 3, 1)[mask]),
        (layer.kernel.grad, dense_kernel.grad),
    ]
    return max(relative_error(got, expected) for got, expected in got_and_expected)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder of the unpacked wheel")
    parser.add_argument("--expect", choices=["cpu", "cuda"], required=True)
    arguments = parser.parse_args(argv)
    sys.path.insert(0, arguments.folder)
    import MinkowskiEngine as ME
    import torch

    if ME.is_cuda_available() != (arguments.expect == "cuda"):
        raise SystemExit(f"built for {arguments.expect}, but MinkowskiEngine.is_cuda_available() is {ME.is_cuda_available()}")
    devices = ["cpu"] + (["cuda"] if arguments.expect == "cuda" and torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            for stride in (1, 2):
                error = check_convolution(ME, torch, stride=stride, device=device, dtype=dtype)
                name = str(dtype).removeprefix("torch.")
                print(f"3x3 stride {stride} {name} on {device}: relative error {error:.1e}")
                if not error <= TOLERANCE[name]:
                    raise SystemExit(f"that exceeds {TOLERANCE[name]:.0e}")
    print(f"self-check passed on {', '.join(devices)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
