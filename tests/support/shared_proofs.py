"""The proofs of networks that were tried, shared by the processes of a test run, so that each network is tried once."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any


class SharedProofs(dict[str, dict[str, Any]]):
    """What `sparkme.sparse.sparsify` keeps of a process, and in a folder of all of them.

    Args:
        folder: of this test run, as a proof holds for the code as it is.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __setitem__(self, key: str, proof: dict[str, Any]) -> None:
        super().__setitem__(key, proof)
        temporary = self.folder / f"{key}.{os.getpid()}"
        temporary.write_bytes(pickle.dumps(proof))
        temporary.replace(self.folder / key)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self and (kept := self.folder / key).is_file():
            super().__setitem__(key, pickle.loads(kept.read_bytes()))
        return super().get(key, default)

    def clear(self) -> None:
        super().clear()
        for kept in self.folder.iterdir():
            kept.unlink(missing_ok=True)
