"""Weights from one library's names to another's, through the table of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparkme.interop import convnext, detectron2, mmpretrain, timm, torchvision
from sparkme.interop.names import Table
from sparkme.interop.spark import is_official, split_official_state

TABLES: dict[str, dict[str, Table]] = {
    "resnet": {
        "torchvision": torchvision.RESNET, "timm": timm.RESNET, "mmpretrain": mmpretrain.RESNET,
        "detectron2": detectron2.RESNET,
    },
    "convnext": {
        "torchvision": torchvision.CONVNEXT, "timm": timm.CONVNEXT, "convnext": convnext.CONVNEXT,
        "mmpretrain": mmpretrain.CONVNEXT,
    },
}  # fmt: skip
LIBRARIES = ("torchvision", "timm", "convnext", "mmpretrain", "detectron2", "spark")


@dataclass(frozen=True)
class Origin:
    """Whose names some weights have: a family of `TABLES` and a library; no family where no table knows them."""

    library: str
    family: str | None

    def targets(self) -> list[str]:
        """The libraries whose names they can be given."""
        tables = sorted(TABLES.get(self.family or "", {}))
        return list(dict.fromkeys([self.library, *tables, *(["spark"] if self.family else [])]))


def origin_of(library: str, state: dict[str, Tensor]) -> Origin:
    """The family that the weights of a network of a library belong to."""
    families = (family for family, tables in TABLES.items() if library in tables and tables[library].knows(state))
    return Origin(library, next(families, None))


def translate(state: dict[str, Tensor], origin: Origin, library: str) -> dict[str, Tensor]:
    """An encoder's weights under the names and in the shapes of another library.

    Raises:
        ValueError: there is no table for that; says what there is.
    """
    if library == origin.library:
        return state
    tables = TABLES.get(origin.family or "", {})
    # The official SparK code trains timm's ResNets and the authors' ConvNeXts.
    target = {"resnet": "timm", "convnext": "convnext"}.get(origin.family or "", "") if library == "spark" else library
    if target not in tables:
        others = [target for target in origin.targets() if target != origin.library]
        whose = "your own network" if origin.library == "own" else f"this network of {origin.library}"
        kind = whose if origin.family is None else f"a {origin.family} of {origin.library}"
        hint = f"; with --to it can go to {', '.join(others)}" if others else ""
        raise ValueError(f"{kind} has no names in {library}; leave out --to to keep its own{hint}")
    return tables[target].from_hub(tables[origin.library].to_hub(state))


def recognise(names: list[str], library: str, family: str | None) -> list[str]:
    """The libraries of a family whose names these are, the given one first."""
    tables = TABLES.get(family or "", {})
    found = [name for name, table in tables.items() if table.knows(names)]
    return sorted(found, key=lambda name: name != library)


def adopt(state: dict[str, Tensor], own: dict[str, Tensor], library: str) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Weights from a file, whosever they are, under the names of a network.

    Args:
        state: the weights, with a classifier or a SparK decoder or without.
        own: those the network has, by name.
        library: whose network it is.

    Returns:
        The network's weights, with what the file has beyond them; the rest of an official SparK network; and whose names
        they had.

    Raises:
        ValueError: the official names are there, but not all of them.
    """
    family, kind = origin_of(library, own).family, library
    rest: dict[str, Tensor] = {}
    if is_official(list(state)):
        kind = "the official SparK code"
        state, rest = split_official_state(state)
    if not own.keys() <= state.keys() and (found := recognise(list(state), library, family)):
        kind = found[0] if kind == library else kind
        state = translate(state, Origin(found[0], family), library)
    return state, rest, kind
