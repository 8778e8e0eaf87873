"""What all tests share."""

import os
from pathlib import Path

import pytest

# Set before torch starts its threads, for the tests and for the commands they run. Many small operations on few cores run
# several times slower with threads that wait for each other; pytest-xdist runs one process per core instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of the tests that have more: threads that wait leave their cores to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session", autouse=True)
def proofs_of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The processes of a test run share what they found out about networks, so that each is tried once."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from shared_proofs import SharedProofs

        from sparkme.sparse import sparsify

        sparsify._tried = SharedProofs(tmp_path_factory.getbasetemp().parent / "proofs")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of pictures that their colour tells apart: 12 red, 12 blue, 10 green."""
    from pictures import make_labelled

    return make_labelled(tmp_path_factory.mktemp("labelled"), {"red": 12, "blue": 12, "green": 10})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a ResNet-18 after two steps."""
    from commands import SMALL

    from sparkme.pretrain import main

    folder = tmp_path_factory.mktemp("trained")
    assert main([*SMALL, "--epochs", "1", "--output", str(folder)]) == 0
    return folder / "checkpoints" / "last.pt"
