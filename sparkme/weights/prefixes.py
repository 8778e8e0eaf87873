"""Finds a network's weights in a file by one rule: strip a prefix, then read the rest as one library's names.

Every tensor in a file has one dotted name, including containers: `state_dict.module.encoder_q.conv1.weight`. Wrappers of an
encoder (`module.`, `model.backbone.`, `encoder_q.`, `backbone.body.`) are prefixes that all its names share. A prefix is used
if it explains every name and shape that the network needs. Unused names are reported.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparkme.errors import UserError
from sparkme.weights.libraries import Form, forms_of, shared_start
from sparkme.weights.spark import ENCODER

# Words in the names of averages and copies of trained weights. If a file has both, the trained weights are the default.
_FOLLOWERS = {
    "ema",
    "average",
    "averaged",
    "avg",
    "swa",
    "polyak",
    "shadow",
    "teacher",
    "momentum",
    "target",
    "key",
    "k",
    "optimizer",
}
# torch puts these words into names; they are removed.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTER = "num_batches_tracked"  # files of old torch versions lack it


@dataclass(frozen=True)
class Wanted:
    """The weights that a network needs.

    Attributes:
        model: the network's name, for people.
        library: its library, see `sparkme.networks.names.library_of`.
        own: its tensors by name, in the order of its layers.
        channels: channels of its images.
        head: names of `own` that are never loaded.
        whole: whether all other names must exist; else only those before the last one found.
    """

    model: str
    library: str
    own: dict[str, Tensor]
    channels: int
    head: Collection[str] = ()
    whole: bool = True

    @property
    def body(self) -> list[str]:
        return [name for name in self.own if name not in self.head]

    def forms(self) -> list[Form]:
        return forms_of({name: self.own[name] for name in self.body}, self.library)


@dataclass(frozen=True)
class Choice:
    """The user's choice.

    Attributes:
        key: part of the prefix, if several prefixes fit.
        adapt_stem: how to fit the first convolution to another number of channels: `sum`, `mean`, `repeat`.
    """

    key: str | None = None
    adapt_stem: str | None = None


@dataclass(frozen=True)
class Found:
    """Weights found in a file.

    Attributes:
        state: the network's tensors, with its names and shapes.
        prefix: the prefix of the file's names.
        kind: the library whose names follow it.
        left: unused names of the file, those near the used ones first.
        others: other prefixes that fit.
        inside: number of unused names inside used layers, a sign of another kind of network.
        stem: a note on changes of the first convolution.
    """

    state: dict[str, Tensor]
    prefix: str
    kind: str
    left: list[str]
    others: list[str]
    inside: int = 0
    stem: str = ""

    def note(self) -> str:
        """A line about the result."""
        under = f"under {self.prefix.rstrip('.')!r}, " if self.prefix else ""
        note = f"{under}names of {self.kind}: {len(self.state)} tensors loaded{self.stem}"
        note += f"; {len(self.left)} not used: {shortened(self.left)}" if self.left else ""
        note += f" ({self.inside} of them inside loaded layers: is it another kind of network?)" if self.inside else ""
        also = ", ".join(prefix.rstrip(".") or "the bare names" for prefix in self.others)
        return note + (f"; other weights in the file, for --weights-key: {also}" if also else "")


def find_weights(tensors: dict[str, Tensor], wanted: Wanted, origin: str, choice: Choice = Choice()) -> Found:
    """Finds a network's weights among the tensors of a file.

    If several prefixes fit, trained weights come before averages of them (EMA, teacher, momentum or key encoder, see
    `_FOLLOWERS`), then the first in the file; `choice.key` selects another.

    Args:
        tensors: the file's, see `sparkme.weights.files.read_tensors`.
        wanted: the weights that the network needs.
        origin: the file, for messages.
        choice: the user's choice.

    Raises:
        UserError: no prefix explains all names; shows the file's names beside the expected ones.
    """
    if not any(_is_wrapped(name) for name in wanted.own):
        tensors = {_without_wrappers(name): value for name, value in tensors.items()}
    fits = [fit for form in wanted.forms() for fit in _fits(tensors, wanted, form)]
    good = _best_first(fits, len(wanted.body) / 4)
    chosen = [fit for fit in good if choice.key is None or _is_under(fit.prefix, choice.key)]
    if not chosen:
        near = [fit for fit in fits if choice.key is None or _is_under(fit.prefix, choice.key)]
        raise UserError(_refusal(tensors, wanted, origin, choice.key, near))
    best = chosen[0]
    more, inside = _between(tensors, best)
    if more:
        raise UserError(f"{origin} has more than {wanted.model}: {shortened(more)}; is it of a larger network?")
    stems, done = _adapt(tensors, best, wanted, origin, choice.adapt_stem)
    theirs = {n: stems.get(n, tensors[name]).reshape(best.form.expected[n].shape) for n, name in best.taken.items()}
    used = {name for fit in good for name in fit.taken.values()}
    left = sorted((n for n in tensors if n not in used), key=lambda n: -len(shared_start([n, best.prefix])))
    kind = "the official SparK code" if best.prefix.endswith(ENCODER) else best.form.kind
    others = [fit.shown_prefix for fit in good if fit is not best]
    own = {name: value.reshape(wanted.own[name].shape) for name, value in best.form.to_own(theirs).items()}
    return Found(own, best.shown_prefix, kind, left, others, len(inside), done)


def shortened(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class _Fit:
    """One way to read a file.

    Attributes:
        form: the naming.
        prefix: the prefix of the file's names.
        taken: the file's name of each tensor that fits, by the form's name, in the order of the network.
        stems: those that fit except for the number of input channels.
        missing, wrong: the network's names of missing tensors and of wrong shapes.
    """

    form: Form
    prefix: str
    taken: dict[str, str] = field(default_factory=dict)
    stems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def shown_prefix(self) -> str:
        """The prefix without the common start of the form's names."""
        return self.prefix.removesuffix(self.form.start)

    def name_of(self, own: str) -> str:
        """The file's name of one of the network's tensors."""
        return self.prefix + next((their for their, name in self.form.own.items() if name == own), own)


def _fits(tensors: dict[str, Tensor], wanted: Wanted, form: Form) -> list[_Fit]:
    """One fit for each prefix of the form's names, in the order of the file."""
    prefixes: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in form.expected:
                prefixes["".join(f"{part}." for part in parts[:i])] = None
    return [_fit(tensors, wanted, form, prefix) for prefix in prefixes]


def _fit(tensors: dict[str, Tensor], wanted: Wanted, form: Form, prefix: str) -> _Fit:
    fit = _Fit(form, prefix)
    for their, expected in form.expected.items():
        own, value = form.own[their], tensors.get(prefix + their)
        if value is None:
            continue
        if _is_stem(value, expected, wanted.channels):
            fit.stems.append(their)
        if _is_alike(value, expected) or their in fit.stems:
            fit.taken[their] = prefix + their
        elif not own.endswith(COUNTER):
            fit.wrong.append(own)
    order = [name for name in wanted.body if not name.endswith(COUNTER)]
    there = {form.own[their] for their in fit.taken}
    last = len(order) if wanted.whole else max((i for i, name in enumerate(order) if name in there), default=-1)
    fit.missing = [name for name in order[:last] if name not in there and name not in fit.wrong]
    return fit


def _is_alike(value: Tensor, expected: Tensor) -> bool:
    """Whether the shapes are equal except for axes of size one, since a linear layer may be a 1x1 convolution."""
    shapes = [[n for n in tensor.shape if n != 1] for tensor in (value, expected)]
    return shapes[0] == shapes[1] and value.is_floating_point() == expected.is_floating_point()


def _is_stem(value: Tensor, expected: Tensor, channels: int) -> bool:
    if value.ndim != 4 or expected.ndim != 4 or expected.shape[1] != channels or not value.is_floating_point():
        return False
    return value.shape[1] != channels and value.select(1, 0).shape == expected.select(1, 0).shape


def _best_first(fits: list[_Fit], least: float) -> list[_Fit]:
    """The complete fits, one per prefix, without small ones; the default first."""
    by_prefix: dict[str, _Fit] = {}
    for fit in fits:
        if len(fit.taken) >= least and not fit.missing and not fit.wrong:
            before = by_prefix.get(fit.prefix)
            if before is None or len(fit.taken) > len(before.taken):
                by_prefix[fit.prefix] = fit
    most = max((len(fit.taken) for fit in by_prefix.values()), default=0)
    large = [fit for fit in by_prefix.values() if 2 * len(fit.taken) >= most]
    return sorted(large, key=lambda fit: (bool(fit.stems), _follows(fit.prefix), -len(fit.taken)))


def _without_wrappers(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _is_wrapped(name: str) -> bool:
    return name != _without_wrappers(name)


def _follows(prefix: str) -> bool:
    return not _FOLLOWERS.isdisjoint(re.split(r"[\W_]+", prefix.lower()))


def _is_under(prefix: str, key: str) -> bool:
    return f".{key.strip('.')}." in f".{prefix}"


def _between(tensors: dict[str, Tensor], fit: _Fit) -> tuple[list[str], list[str]]:
    """Unused names between the network's layers: further members of a series of layers, and further parts of single layers.

    The former belong to a deeper network, the latter to another kind of layer. Later names may be a neck or head.
    """
    last: dict[str, int] = {}  # of each module, the number of its last tensor
    series = set()
    for i, name in enumerate(fit.taken):
        parts = name.split(".")
        for end in range(1, len(parts)):
            module = ".".join(parts[:end])
            last[module] = i
            if parts[end].isdecimal():
                series.add(module)
    taken = set(fit.taken.values())
    more: list[str] = []
    inside: list[str] = []
    for name in tensors:
        if name in taken or not name.startswith(fit.prefix) or not tensors[name].ndim:
            continue
        parts = name.removeprefix(fit.prefix).split(".")
        shared = max((end for end in range(1, len(parts)) if ".".join(parts[:end]) in last), default=0)
        if shared and last[".".join(parts[:shared])] < len(fit.taken) - 1:
            is_number = ".".join(parts[:shared]) in series and parts[shared].isdecimal()
            (more if is_number else inside).append(name)
    return more, inside


def _adapt(
    tensors: dict[str, Tensor], fit: _Fit, wanted: Wanted, origin: str, how: str | None
) -> tuple[dict[str, Tensor], str]:
    """The first convolutions' weights for the network's channels, and a note. Raises UserError without `how`."""
    if not fit.stems:
        return {}, f"; --adapt-stem {how} had nothing to do" if how else ""
    given = tensors[fit.taken[fit.stems[0]]].shape[1]
    if how is None:
        names = shortened([fit.taken[name] for name in fit.stems])
        raise UserError(
            f"{origin}: {names} is for {given} channels, but {wanted.model} here has {wanted.channels}; pass "
            f"--adapt-stem (sum, mean or repeat) to adapt it, or pretrain with --channels {given}"
        )
    changed = {name: adapted_stem(tensors[fit.taken[name]], wanted.channels, how) for name in fit.stems}
    return changed, f"; {shortened([*changed])} adapted from {given} to {wanted.channels} channels by --adapt-stem {how}"


def adapted_stem(weight: Tensor, channels: int, how: str) -> Tensor:
    """A convolution's weights for another number of input channels.

    Args:
        weight: (C_out, C, kh, kw).
        channels: the new number n.
        how: `sum`: each channel gets 1/n of the sum over C, so that equal channels give the same output as before; `mean`: each
            gets the mean; `repeat`: repeats the C channels and multiplies by C / n, to keep the size of outputs.

    Returns:
        (C_out, n, kh, kw) in float32 or more.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    given = weight.shape[1]
    if how == "repeat":
        return weight[:, torch.arange(channels) % given] * (given / channels)
    total = weight.sum(1, keepdim=True) / (channels if how == "sum" else given)
    return total.expand(-1, channels, -1, -1)


def _refusal(tensors: dict[str, Tensor], wanted: Wanted, origin: str, key: str | None, fits: list[_Fit]) -> str:
    """The file's names beside the expected ones, the nearest first."""
    if key is not None and not any(_is_under(name, key) for name in tensors):
        heads = Counter(name.split(".")[0] for name in tensors)
        return f"{origin} has no names that contain --weights-key {key!r}; they start with {shortened([*heads])}"
    nearest = max(fits, key=lambda fit: len(fit.taken) - len(fit.wrong), default=None)
    if nearest is None:
        nearest = _Fit(wanted.forms()[0], "", missing=wanted.body)
    if not nearest.missing and not nearest.wrong:  # too small a part
        nearest.missing = [own for own in wanted.body if nearest.name_of(own) not in tensors]
    pairs = [*_wrong_pairs(tensors, wanted, nearest), *_missing_pairs(tensors, wanted, nearest)]
    shown = "; ".join(text for _, text in sorted(pairs, key=lambda pair: -pair[0])[:4])
    if not any(nearness for nearness, _ in pairs):
        names = [f"{name} {_shape(value)}" for name, value in tensors.items()]
        shown += f"; the file has {shortened(names)}"
    under = f" under {nearest.shown_prefix!r}" if nearest.shown_prefix else ""
    there = f"{len(nearest.taken)} of its {len(wanted.body)} tensors match{under}"
    return f"{origin} does not fit {wanted.model}: {there}, no prefix explains all names; {shown}"


def _wrong_pairs(tensors: dict[str, Tensor], wanted: Wanted, fit: _Fit) -> Iterator[tuple[float, str]]:
    for own in fit.wrong:
        name = fit.name_of(own)
        yield 1.0, f"{name} is {_shape(tensors[name])}, not {_shape(wanted.own[own])}"


def _missing_pairs(tensors: dict[str, Tensor], wanted: Wanted, fit: _Fit) -> Iterator[tuple[float, str]]:
    """Similarity of the nearest name in the file, from 0 to 1, and a line with both names."""
    free = [name for name in tensors if name not in fit.taken.values()]
    for own in fit.missing[:20]:
        expected, text = fit.name_of(own), f"{fit.name_of(own)} {_shape(wanted.own[own])} is missing"
        alike = [name for name in free if _is_alike(tensors[name], wanted.own[own])]
        if close := difflib.get_close_matches(expected, alike or free, n=1, cutoff=0.5):
            text += f", the file has {close[0]} {_shape(tensors[close[0]])}"
        yield difflib.SequenceMatcher(None, expected, close[0]).ratio() if close else 0.0, text


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
