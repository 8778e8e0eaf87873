"""SparK pretraining of convolutional networks on genuine MinkowskiEngine sparse convolutions.

The public names below are imported on first use, so that every `--help` is there at once, and `python -m sparkme.doctor` says
what is missing on a machine where MinkowskiEngine is not installed yet.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkme.errors import UnsupportedLayerError
    from sparkme.methods.fcmae import FCMAE
    from sparkme.methods.masking import random_active
    from sparkme.methods.spark import SparK
    from sparkme.sparse.encoder import SparseEncoder
    from sparkme.sparse.grid import Grid
    from sparkme.sparse.map import SparseMap
    from sparkme.sparse.sparsify import sparsify
    from sparkme.weights.pretrained import load_encoder, pyramid

__version__ = "0.1.0"

__all__ = [
    "FCMAE",
    "Grid",
    "SparK",
    "SparseEncoder",
    "SparseMap",
    "UnsupportedLayerError",
    "load_encoder",
    "pyramid",
    "random_active",
    "sparsify",
]

_MODULES = {
    "FCMAE": "sparkme.methods.fcmae",
    "Grid": "sparkme.sparse.grid",
    "SparK": "sparkme.methods.spark",
    "SparseEncoder": "sparkme.sparse.encoder",
    "SparseMap": "sparkme.sparse.map",
    "UnsupportedLayerError": "sparkme.errors",
    "load_encoder": "sparkme.weights.pretrained",
    "pyramid": "sparkme.weights.pretrained",
    "random_active": "sparkme.methods.masking",
    "sparsify": "sparkme.sparse.sparsify",
}

if not TYPE_CHECKING:  # it would make any name a public one

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'sparkme' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
