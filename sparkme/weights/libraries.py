"""Translates weights between the names of libraries, through their tables."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from sparkme.weights import minkowski
from sparkme.weights.formats import FORMATS
from sparkme.weights.names import Table

# By family of networks and library: the names that can be read.
TABLES: dict[str, dict[str, Table]] = {
    family: {name: form.tables[family] for name, form in FORMATS.items() if family in form.tables and form.is_read}
    for family in dict.fromkeys(family for form in FORMATS.values() for family in form.tables)
}
TABLES["convnext"]["minkowski"] = minkowski.CONVNEXT  # read, and not written


@dataclass(frozen=True)
class Origin:
    """The naming of some weights: a library, and a family of `TABLES` if one has these names."""

    library: str
    family: str | None

    def targets(self) -> list[str]:
        """The libraries to whose names they can be translated."""
        return list(dict.fromkeys([self.library, *(name for name, form in FORMATS.items() if self.family in form.tables)]))


def origin_of(library: str, state: dict[str, Tensor]) -> Origin:
    """The naming of the weights of a library's network."""
    families = (family for family, tables in TABLES.items() if library in tables and tables[library].knows(state))
    return Origin(library, next(families, None))


def translate(state: dict[str, Tensor], origin: Origin, library: str) -> dict[str, Tensor]:
    """An encoder's weights with the names and shapes of another library. Raises ValueError, which lists the possible ones."""
    if library == origin.library:
        return state
    tables = TABLES.get(origin.family or "", {})
    table = FORMATS[library].tables.get(origin.family or "") if library in FORMATS else tables.get(library)
    if table is None:
        others = [target for target in origin.targets() if target != origin.library]
        whose = "your own network" if origin.library == "own" else f"this network of {origin.library}"
        kind = whose if origin.family is None else f"a {origin.family} of {origin.library}"
        hint = f", or use --to {' or '.join(others)}" if others else ""
        raise ValueError(f"{kind} has no names in {library}; leave out --to to keep its own names{hint}")
    return table.from_hub(tables[origin.library].to_hub(state))


@dataclass(frozen=True)
class Form:
    """A library's names for a network's weights, without their common start.

    Attributes:
        kind: the library.
        start: the common start, such as `backbone.`.
        expected: tensors of the expected shapes by the rest of their names, in the order of the network.
        own: the network's own name of each.
        origin: the naming, for the translation back.
        library: the library of the network.
    """

    kind: str
    start: str
    expected: dict[str, Tensor]
    own: dict[str, str]
    origin: Origin
    library: str

    def to_own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translates tensors with the form's names to the network's."""
        return translate({self.start + name: value for name, value in state.items()}, self.origin, self.library)


def forms_of(own: dict[str, Tensor], library: str) -> list[Form]:
    """All namings of a network's weights (`own`) that a file may use, its own library's first."""
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
    """The leading modules, with dots, that all names share."""
    columns = zip(*(name.split(".")[:-1] for name in names))
    return "".join(f"{column[0]}." for column in takewhile(lambda column: len({*column}) == 1, columns))
