"""Names of weights in other libraries: a table of rules per library, used in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`layer1.{b}.bn{n}.{p}` on one side is `res2.{b}.conv{n}.norm.{p}` on the other; {..} stands for one word between dots.

    Attributes:
        hub: the name in the hub's network, see `Table`.
        theirs: the name in the library's network.
        to_theirs, to_hub: convert shapes, if they differ.
    """

    hub: str
    theirs: str
    to_theirs: Callable[[Tensor], Tensor] | None = None
    to_hub: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Table:
    """Maps a library's names for a family of networks to the family's hub naming.

    The hub naming is torchvision's for ResNets, and the authors' for ConvNeXts (facebookresearch/ConvNeXt and ConvNeXt-V2).

    Attributes:
        rules: one for each name.
        source: file that defines the library's names.
        dropped: last words of hub names that the library lacks.
        ignored: starts of the library's names that do not belong to an encoder.
    """

    rules: tuple[Rule, ...]
    source: str
    dropped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=("fc.", "head.", "norm.", "classifier."))

    def from_hub(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translates to the library's names and shapes. Raises ValueError for a weight that no rule covers."""
        rules = [(rule.hub, rule.theirs, rule.to_theirs) for rule in self.rules]
        return _translate({n: v for n, v in state.items() if n.rpartition(".")[2] not in self.dropped}, rules, self.source)

    def to_hub(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translates to the hub's names and shapes, without heads."""
        rules = [(rule.theirs, rule.hub, rule.to_hub) for rule in self.rules]
        return _translate({n: v for n, v in state.items() if not n.startswith(self.ignored)}, rules, self.source)

    def knows(self, names: Iterable[str]) -> bool:
        """Whether every name outside heads is one of the library's."""
        patterns = [_pattern(rule.theirs) for rule in self.rules]
        names = [name for name in names if not name.startswith(self.ignored)]
        return bool(names) and all(any(p.fullmatch(name) for p in patterns) for name in names)


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile("".join(rf"(?P<{part}>\w+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _translate(
    state: dict[str, Tensor], rules: list[tuple[str, str, Callable[[Tensor], Tensor] | None]], source: str
) -> dict[str, Tensor]:
    compiled = [(_pattern(before), after, change) for before, after, change in rules]
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, after, change in compiled:
            if match := pattern.fullmatch(name):
                out[after.format(**match.groupdict())] = change(value) if change else value
                break
        else:
            raise ValueError(f"weight {name!r} of {tuple(value.shape)} has no name in that library ({source})")
    return out


def vector(value: Tensor) -> Tensor:
    return value.flatten()


def resnet_rules(
    stem: str = "",
    stage: str = "layer{s}",
    norm: str = "bn{n}",
    shortcut: str = "downsample.0",
    shortcut_norm: str = "downsample.1",
) -> tuple[Rule, ...]:
    """The rules of a ResNet, from a library's names of its parts."""
    rules = [Rule("conv1.weight", f"{stem}conv1.weight"), Rule("bn1.{p}", f"{stem}{norm.format(n=1)}.{{p}}")]
    for s in range(1, 5):
        ours, theirs = f"layer{s}.{{b}}", stage.replace("{s+1}", str(s + 1)).replace("{s}", str(s)) + ".{b}"
        rules += [
            Rule(f"{ours}.downsample.0.weight", f"{theirs}.{shortcut}.weight"),
            Rule(f"{ours}.downsample.1.{{p}}", f"{theirs}.{shortcut_norm}.{{p}}"),
        ]
        for n in range(1, 4):
            rules += [
                Rule(f"{ours}.conv{n}.weight", f"{theirs}.conv{n}.weight"),
                Rule(f"{ours}.bn{n}.{{p}}", f"{theirs}.{norm.format(n=n)}.{{p}}"),
            ]
    return tuple(rules)
