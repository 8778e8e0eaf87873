"""A setting is declared once, as a field of a frozen dataclass; flags, checks, config.json and comparisons follow from it.

A field's annotation is its type after resolution. The default `None` means that the command's `resolve` fills in a value from
other settings, the data or the machine. Until then it is `None`, whatever the annotation says.

Flags are derived here and not by a library. For the same fields, `--help` takes 0.09 s of a processor, 0.21 s with tyro 1.0.17
and 0.17 s with jsonargparse 4.53. A mistyped flag and a bad value are one line; with tyro each is a box of 7 to 10 lines (its
guess of the intended flag is used here), with jsonargparse 32 lines of usage and then up to 8. Both print the types of
fields, such as {None}|INT, and (default: None) where a value follows from others, and jsonargparse changes `--tf32` to
`--tf32 true`. So neither is used.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from sparkme.errors import UserError

LARGEST = 2**63  # numbers must be smaller, so that float32 and int64 hold them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a command, or a group of them; `setting` and `found` make their fields."""


S = TypeVar("S", bound=Settings)
KEY = "setting"  # in a field's metadata


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting.

    Attributes:
        help: text for --help, without the default.
        group: heading in --help.
        otherwise: text for --help about the value if none is given; not needed if `default` says it.
        metavar, choices, nargs: as in argparse.
        at_least, above, at_most, below: range of a number, or of each of several.
        parse: turns a word of the command line into the value.
        positional: it has no flag.
        extends: the values of repeated flags are joined.
        once: the flag may not be repeated; says what to do instead.
        required: the command line must give it.
        fixed: a resumed run must keep it.
        older: the value meant by checkpoints that lack it.
        saved: config.json keeps it.
        is_found: no flag sets it.
        default, type: the field's.
    """

    help: str
    group: str = ""
    otherwise: str = ""
    metavar: str | tuple[str, ...] | None = None
    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    parse: Callable[[str], Any] | None = None
    nargs: int | str | None = None
    positional: bool = False
    extends: bool = False
    once: str = ""
    required: bool = False
    fixed: bool = False
    older: Any = None
    saved: bool = True
    is_found: bool = False
    default: Any = None
    type: Any = None


def setting(help: str, default: Any = None, **about: Any) -> Any:
    """A field of a command's settings. A default of None means that `resolve` fills it in; `about` is as in `Setting`."""
    return field(default=default, metadata={KEY: Setting(help, **about)})


def found(help: str = "", default: Any = None, **about: Any) -> Any:
    """A field that no flag sets: the command finds its value. Its help follows the value in an error, as in `10 classes`."""
    return setting(help, default, is_found=True, **about)


in_data, in_images, in_network, in_optimisation, in_machine, in_output = (
    partial(setting, group=title) for title in ("data", "images", "network", "optimisation", "machine", "output")
)


def varied(cls: type[Settings], name: str, **changes: Any) -> Any:
    """An inherited field with another default, help or other attribute of `Setting`."""
    default = changes.pop("default", cls.__dataclass_fields__[name].default)
    return field(default=default, metadata={KEY: replace(cls.__dataclass_fields__[name].metadata[KEY], **changes)})


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a command by name, in the order of their declaration."""
    return _settings_of(cls)


@lru_cache
def _settings_of(cls: type) -> dict[str, Setting]:
    types = get_type_hints(cls)
    return {
        f.name: replace(f.metadata[KEY], default=None if f.default is MISSING else f.default, type=types[f.name])
        for f in fields(cls)
    }


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Flags.


def path_argument(text: str) -> Path:
    """A path from the command line. An empty one, such as an unset shell variable, would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8") from None
    return Path(text)


class _Once(argparse.Action):
    """A flag that may not be repeated; argparse would silently keep the last value."""

    remedy = ""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice; {self.remedy}")
        setattr(namespace, self.dest, values)


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type[Settings],
    *,
    groups: tuple[str, ...] = (),
    otherwise: Mapping[str, str] | None = None,
) -> None:
    """Adds a flag for each setting that a user may give.

    Args:
        parser: the command's.
        cls: the command's settings.
        groups: headings in the order of --help; settings without a group come first.
        otherwise: text for --help by name of the setting: its value in the command's recipes.
    """
    places: dict[str, Any] = {"": parser}
    places |= {title: parser.add_argument_group(title) for title in groups}
    for name, about in settings_of(cls).items():
        if not about.is_found:
            text = about.otherwise or (otherwise or {}).get(name) or _default_text(about.default)
            names = name if about.positional else flag_of(name)
            places[about.group].add_argument(names, **_options(about, text))


def _options(about: Setting, otherwise: str) -> dict[str, Any]:
    options: dict[str, Any] = {"help": (f"{about.help} (default: {otherwise})" if otherwise else about.help).replace("%", "%%")}
    if not about.positional or about.nargs:
        options["default"] = about.default
    kind, several = _word_type(about.type)
    if kind is bool:
        return options | {"action": "store_true" if about.default is False else argparse.BooleanOptionalAction}
    options["type"] = about.parse or (path_argument if kind is Path else kind)
    if about.nargs or several:
        options["nargs"] = about.nargs or "+"
    if about.required and not about.positional:
        options["required"] = True
    if about.extends:
        options["action"] = "extend"
    if about.once:
        options["action"] = type("_Once", (_Once,), {"remedy": about.once})
    given = {"metavar": about.metavar, "choices": about.choices}
    return options | {name: value for name, value in given.items() if value is not None}


def _default_text(default: Any) -> str:
    """The default as --help shows it; "" if there is none."""
    if default is None or default is False or default == ():
        return ""
    return "on" if default is True else as_text(default)


def _word_type(annotation: Any) -> tuple[Any, bool]:
    """The type of one word of the command line, and whether the flag takes several words."""
    kind = next(kind for kind in _kinds(annotation) if kind is not NoneType)
    if get_origin(kind) in (tuple, list):
        return get_args(kind)[0], True
    return kind, False


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def command_words(cls: type[Settings], values: Mapping[str, Any]) -> list[str]:
    """A command line that gives these settings, positional ones first."""
    first, words = list[str](), list[str]()
    for name, value in values.items():
        texts = [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
        if settings_of(cls)[name].positional:
            first += texts
        elif isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(f"no_{name}"))
        else:
            words += [flag_of(name), *texts]
    return first + words


def from_flags(cls: type[S], given: argparse.Namespace) -> S:
    """The settings given on a command line, not resolved yet."""
    values = {name: getattr(given, name) for name, about in settings_of(cls).items() if not about.is_found}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def from_keywords(cls: type[S], values: Mapping[str, Any]) -> S:
    """The settings given as keywords, not resolved yet.

    Raises:
        TypeError: an unknown name, a missing setting, or a value of the wrong type.
        UserError: a value that the flag would not take.
    """
    known = {name: about for name, about in settings_of(cls).items() if not about.is_found}
    for name in values.keys() - known.keys():
        near = difflib.get_close_matches(name, known, 1)
        raise TypeError(f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for name, about in known.items():
        if values.get(name) is None and about.required:
            raise TypeError(f"the setting {name!r} is missing")
    return cls(**{name: _from_python(name, value, known[name]) for name, value in values.items() if value is not None})


def _from_python(name: str, value: Any, about: Setting) -> Any:
    """A keyword's value as the flag would give it: one value may stand for a list of one, and a string for a path."""
    value = tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value
    kind, takes_several = _word_type(about.type)
    value = (value,) if takes_several and not isinstance(value, tuple) else value
    for item in value if isinstance(value, tuple) else (value,):
        if about.choices and item not in about.choices:
            raise UserError(f"{name} {item!r} is unknown; choose one of {', '.join(about.choices)}")
        if isinstance(item, str) and (about.parse or kind is Path):
            try:
                (about.parse or path_argument)(item)
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{name} {error}") from None
    return _typed(name, value, about.type)


# Checks.


def check(settings: Settings) -> None:
    """Checks every number against its setting's range.

    Raises:
        UserError: a number is not finite or out of range.
    """
    for name, about in settings_of(type(settings)).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(name, about, number, value)


def _check_number(name: str, about: Setting, number: float, value: Any) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"{flag_of(name)} {as_text(value)} is not a finite number")
    if abs(number) >= LARGEST:
        raise UserError(f"{flag_of(name)} has a number that is too large; use one below 2^63")
    low, high = about.at_least if about.above is None else about.above, about.at_most if about.below is None else about.below
    is_low = low is not None and (number < low or (number == low and about.above is not None))
    is_high = high is not None and (number > high or (number == high and about.below is not None))
    if not is_low and not is_high:
        return
    if low is not None and high is not None and high < 10:
        ends = "(" if about.above is not None else "[", ")" if about.below is not None else "]"
        raise UserError(f"{flag_of(name)} {as_text(value)} is outside {ends[0]}{low}, {high}{ends[1]}")
    if is_low:
        raise UserError(f"{flag_of(name)} {as_text(value)} must be {'above' if about.above is not None else 'at least'} {low}")
    raise UserError(f"{flag_of(name)} {as_text(value)} must be {'below' if about.below is not None else 'at most'} {high}")


# What follows from others.


def filled(settings: S, defaults: Mapping[str, Any]) -> S:
    """The settings with these values in place of None."""
    return replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})


# config.json and checkpoints.


def to_config(settings: Settings) -> dict[str, Any]:
    """Plain values by name, as config.json and checkpoints keep them."""
    return {name: _plain(getattr(settings, name)) for name, about in settings_of(type(settings)).items() if about.saved}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_config(cls: type[S], config: Mapping[str, Any]) -> S:
    """The settings in config.json or a checkpoint. A name that an older version lacks gets its `older` value; unknown names are
    left out.

    Raises:
        TypeError: a value has the wrong type.
    """
    values = {}
    for name, about in settings_of(cls).items():
        if name in config:
            values[name] = _typed(name, config[name], about.type)
        elif about.older is not None:
            values[name] = about.older
    return cls(**values)


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """A plain value as the type that the setting declares."""
    kinds = _kinds(annotation)
    if value is None or Any in kinds:
        return value
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_typed(name, item, get_args(kind)[0]) for item in value)
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
        is_number = kind in (int, float) and isinstance(value, int | kind) and not isinstance(value, bool)
        if is_number or (kind not in (int, float) and isinstance(value, get_origin(kind) or kind)):
            return value
    raise TypeError(f"{name} is {str(value)[:60]!r}, which has the wrong type")


class Difference(NamedTuple):
    """A setting whose value is not the `other` one: its earlier value or its default."""

    name: str
    value: Any
    other: Any


def differences(settings: Settings, saved: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ from a saved config, among the names that it has or that have an `older` value."""
    now = to_config(settings)
    older = {name: about.older for name, about in settings_of(type(settings)).items() if about.older is not None}
    before = older | dict(saved)
    return [Difference(name, now.get(name), value) for name, value in before.items() if now.get(name) != value]
