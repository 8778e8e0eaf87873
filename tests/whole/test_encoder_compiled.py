"""Encoders and pyramids under torch.compile, and encoders in processes with several threads."""

import os
import subprocess
import sys

import oracle
import pytest
import torch
import torchvision
from networks import ENGINES
from random_models import features_and_gradients, images_and_mask

import sparkme
from sparkme.networks.create import create_encoder

REPEAT = """
import torch, sparkme, random_models
torch.set_num_threads(2)
encoder = sparkme.sparsify(random_models.random_model("{name}")).float()
images, active = random_models.images_and_mask(batch=8, size=(128, 128), visible=6)
for engine in {engines}:
    encoder.set_engine(engine)
    results = []
    for _ in range(3):
        encoder.zero_grad()
        sum(x.rows.square().mean() for x in encoder(images.float(), active)).backward()
        results.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for others in results[1:] for a, b in zip(results[0], others, strict=True)), engine
assert torch.get_num_threads() == 2
"""


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_gradients_repeat_bit_for_bit_with_several_threads(name: str) -> None:
    """In a process of its own: MinkowskiEngine reads the number of threads when it is imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to others
    done = subprocess.run(
        [sys.executable, "-c", REPEAT.format(name=name, engines=ENGINES)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ["cuda_ext", "masked-dense"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_stages_compile_without_graph_breaks(name: str, engine: str) -> None:
    encoder = create_encoder(name, drop_path=0.0).set_engine(engine).train()
    images, active = images_and_mask()
    images = images.float()
    expected = features_and_gradients(encoder, images, active)
    torch._dynamo.reset()
    for stage in encoder.compile_stages(backend="aot_eager", fullgraph=True):
        assert stage in ("layer1", "layer2", "layer3", "layer4", *(f"features.{i}" for i in range(8)))
    for x, y in zip(features_and_gradients(encoder, images, active), expected, strict=True):
        assert oracle.relative_error(x, y) < 1e-5


def test_a_pyramid_is_compiled_and_exported() -> None:
    pyramid = sparkme.pyramid(torchvision.models.resnet18().double().eval())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pyramid.maps(x)
        torch._dynamo.reset()
        compiled = torch.compile(pyramid, backend="aot_eager", fullgraph=True)
        for value, reference in zip(compiled(x).values(), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
        for strict in (False, True):
            exported = torch.export.export(pyramid, (x,), strict=strict)
            for value, reference in zip(exported.module()(x).values(), expected, strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
            assert not any("linear" in str(node.target) for node in exported.graph.nodes)
