"""The interface of export formats. Imports no torch, since the command line of the export follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkme.settings.pretrain import PretrainSettings
from sparkme.weights.names import Table

if TYPE_CHECKING:
    from torch import Tensor, nn

STATE_DICTS = (".safetensors", ".pth", ".pt")  # files of a bare state dict


@dataclass(frozen=True)
class Whole:
    """The content of a file that holds a library's whole network, with the trained one in it.

    Attributes:
        content: what the file holds; can be pickled.
        part: the trained network in it, as the library loads it.
        notes: what a user should know about it, one line each.
    """

    content: dict[str, Any]
    part: nn.Module
    notes: list[str]


@dataclass(frozen=True)
class Format:
    """A format of exported weights; the base class writes a state dict with the network's own names.

    Attributes:
        whose: the library, for people.
        tables: names and layouts, by family of networks, see `sparkme.weights.libraries`.
        suffixes: suffixes of the files that the library reads; the first is the default.
        is_read: whether the tables are also for reading files.
    """

    whose: str
    tables: Mapping[str, Table] = field(default_factory=dict)
    suffixes: tuple[str, ...] = STATE_DICTS
    is_read: bool = True

    def counterpart(self, model: str) -> str | None:
        """The library's network for the trained `model`, as a name for `create_dense`; None if it cannot be built here."""
        return None

    def state(self, encoder: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to write: the encoder, and other trained weights if the library needs them."""
        return encoder

    def content(self, state: dict[str, Tensor]) -> Any:
        """The content of the file."""
        return state

    def whole(self, dense: nn.Module, settings: PretrainSettings) -> Whole | None:
        """The file's content for the trained network `dense`, if it is a whole network; None if it is weights alone.

        Raises:
            UserError: the library's network cannot be built.
        """
        return None

    def notes(self, settings: PretrainSettings) -> dict[str, str]:
        """Settings that the library needs, for the file's metadata."""
        return {}

    def making(self, model: str, channels: int) -> tuple[str, str] | None:
        """Modules to import and an expression that creates the library's network, if a line is enough."""
        return None

    def loading(self, path: Path, model: str, channels: int) -> str:
        """Lines of code that load the file."""
        package, function = ("safetensors.torch", "load_file") if path.suffix == ".safetensors" else ("torch", "load")
        read = f"{package}.{function}({str(path)!r})"
        if (making := self.making(model, channels)) is None:
            return f"import {package}\nstate = {read}  # for load_state_dict(state, strict=False) of the network"
        library, make = making
        load = f"model.load_state_dict({read}, strict=False)  # all but the classifier"
        return f"import {package}, {library}\nmodel = {make}\n{load}"
