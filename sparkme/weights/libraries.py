"""Weights from one library's names to another's, through the table of each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from sparkme.weights import minkowski
from sparkme.weights.formats import FORMATS
from sparkme.weights.names import Table

# By family of networks and library: all names that files are read by.
TABLES: dict[str, dict[str, Table]] = {
    family: {name: form.tables[family] for name, form in FORMATS.items() if family in form.tables and form.is_read}
    for family in dict.fromkeys(family for form in FORMATS.values() for family in form.tables)
}
TABLES["convnext"]["minkowski"] = minkowski.CONVNEXT  # read, and not written


@dataclass(frozen=True)
class Origin:
    """Whose names some weights have: a family of `TABLES` and a library; no family where no table knows them."""

    library: str
    family: str | None

    def targets(self) -> list[str]:
        """The libraries whose names they can be given."""
        return list(dict.fromkeys([self.library, *(name for name, form in FORMATS.items() if self.family in form.tables)]))


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
    table = FORMATS[library].tables.get(origin.family or "") if library in FORMATS else tables.get(library)
    if table is None:
        others = [target for target in origin.targets() if target != origin.library]
        whose = "your own network" if origin.library == "own" else f"this network of {origin.library}"
        kind = whose if origin.family is None else f"a {origin.family} of {origin.library}"
        hint = f"; with --to it can go to {', '.join(others)}" if others else ""
        raise ValueError(f"{kind} has no names in {library}; leave out --to to keep its own{hint}")
    return table.from_hub(tables[origin.library].to_hub(state))


@dataclass(frozen=True)
class Form:
    """A network's weights as a library names them, without the beginning that all names share.

    Attributes:
        kind: the library.
        start: that beginning, such as `backbone.`.
        expected: tensors of the expected shapes by their names behind `start`, in the order of the network.
        own: the network's own name of each.
        origin: for the way back.
        library: whose network it is.
    """

    kind: str
    start: str
    expected: dict[str, Tensor]
    own: dict[str, str]
    origin: Origin
    library: str

    def to_own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the form's names, as the network has them."""
        return translate({self.start + name: value for name, value in state.items()}, self.origin, self.library)


def forms_of(own: dict[str, Tensor], library: str) -> list[Form]:
    """All names that a network's weights may have in a file, its own first.

    Args:
        own: those the network has, by name.
        library: whose network it is.
    """
    origin = origin_of(library, own)
    forms = []
    for kind in [library, *(name for name in TABLES.get(origin.family or "", {}) if name != library)]:
        try:
            theirs = translate(own, origin, kind)
        except ValueError:  # torchvision has no ConvNeXt V2
            continue
        back = Origin(kind, origin.family)
        start = shared_start([*theirs])
        names = [name.removeprefix(start) for name in theirs]
        ours = [*translate(theirs, back, library)]
        forms.append(
            Form(
                kind, start, dict(zip(names, theirs.values(), strict=True)), dict(zip(names, ours, strict=True)), back, library
            )
        )
    return forms


def shared_start(names: list[str]) -> str:
    """The modules, with their dots, that all names begin with."""
    columns = zip(*(name.split(".")[:-1] for name in names))
    return "".join(f"{column[0]}." for column in takewhile(lambda column: len({*column}) == 1, columns))
