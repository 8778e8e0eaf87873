"""SparK pretraining of convolutional networks on genuine MinkowskiEngine sparse convolutions.

The public names below are imported on first use, so that `python -m sparkme.doctor` and every `--help` work, and say
what is missing, on a machine where MinkowskiEngine is not installed yet.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "FCMAE": "sparkme.fcmae",
    "Grid": "sparkme.grid",
    "SparK": "sparkme.spark",
    "SparseEncoder": "sparkme.sparse.encoder",
    "SparseMap": "sparkme.sparse.map",
    "UnsupportedLayerError": "sparkme.sparse.sparsify",
    "load_encoder": "sparkme.pretrained",
    "random_active": "sparkme.masking",
    "sparsify": "sparkme.sparse.sparsify",
}
__all__ = [
    "FCMAE", "Grid", "SparK", "SparseEncoder", "SparseMap", "UnsupportedLayerError", "load_encoder", "random_active",
    "sparsify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sparkme' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
