"""What a library expects of a file of weights. Imports no torch: the command line of the export follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkme.settings.pretrain import PretrainSettings
from sparkme.weights.names import Table

if TYPE_CHECKING:
    from torch import Tensor

STATE_DICTS = (".safetensors", ".pth", ".pt")  # files of a bare state dict


@dataclass(frozen=True)
class Format:
    """A form that an encoder's weights are written in; by itself the network's own names, in a file of a state dict.

    Attributes:
        whose: whose names and layouts these are, for people.
        tables: names and layouts, by family of networks, see `sparkme.weights.libraries`.
        suffixes: of the files that the library reads; the first is taken where nobody names a file.
        is_read: whether names of a file are looked up in the tables.
    """

    whose: str
    tables: Mapping[str, Table] = field(default_factory=dict)
    suffixes: tuple[str, ...] = STATE_DICTS
    is_read: bool = True

    def counterpart(self, model: str) -> str | None:
        """The library's network that the weights must fit and be compared in, as `create_dense` calls it; None: it is not here.

        `model` is the name of the network that was trained.
        """
        return None

    def state(self, encoder: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written: the encoder alone, under the library's names, unless that takes more of what was `trained`."""
        return encoder

    def content(self, state: dict[str, Tensor]) -> Any:
        """What a file holds of it."""
        return state

    def notes(self, settings: PretrainSettings) -> dict[str, str]:
        """What the library has to be told of the run, for the file's metadata."""
        return {}

    def making(self, model: str, channels: int) -> tuple[str, str] | None:
        """Modules to import and the expression that makes the library's network, where a line is enough."""
        return None

    def loading(self, path: Path, model: str, channels: int) -> str:
        """The lines that load the file, for people."""
        package, function = ("safetensors.torch", "load_file") if path.suffix == ".safetensors" else ("torch", "load")
        read = f"{package}.{function}({str(path)!r})"
        if (making := self.making(model, channels)) is None:
            return f"import {package}\nstate = {read}  # for load_state_dict(state, strict=False) of the network"
        library, make = making
        load = f"model.load_state_dict({read}, strict=False)  # all but the classifier"
        return f"import {package}, {library}\nmodel = {make}\n{load}"
