"""Reads the settings of a saved run of any command, and finds those that are not the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sparkme.settings import finetune, pretrain
from sparkme.settings.declare import Difference, Settings, filled, from_config, settings_of, to_config
from sparkme.settings.finetune import FinetuneSettings
from sparkme.settings.pretrain import PretrainSettings
from sparkme.settings.shared import MOST_WORKERS, Machine
from sparkme.settings.tasks import settings_of_task

# Settings that name the data and the network, and settings that others follow from, as the warm-up from the epochs.
NAMED = ("data", "model", "recipe", "task", "channels", "probe_data", "from_scratch")
LEADING = ("epochs", "samples_per_epoch", "batch_size", "accumulate", "shots")


def class_of(config: Mapping[str, Any]) -> type[PretrainSettings] | type[FinetuneSettings]:
    """The class of a config's settings. A config that names no command is of pretraining."""
    return settings_of_task(config.get("task")) if config.get("command") == "finetune" else PretrainSettings


def read_settings(config: Mapping[str, Any]) -> PretrainSettings | FinetuneSettings:
    """The settings in config.json or a checkpoint. Raises TypeError for a value of the wrong type."""
    cls: type[Any] = class_of(config)
    settings: PretrainSettings | FinetuneSettings = from_config(cls, config)
    return settings


def not_default(config: Mapping[str, Any], *, exactly: bool = False) -> list[Difference]:
    """The settings of a run that are not the defaults of its command and recipe, as far as those can be known.

    Args:
        config: a run's, perhaps damaged.
        exactly: also report values that follow from the machine, such as the precision: another machine would choose others.
    """
    defaults = _defaults(config)
    found = []
    for name, about in settings_of(class_of(config)).items():
        value, default = config.get(name), defaults.get(name)
        default = about.older if default is None else default
        if value is None or about.is_found or not about.saved or name == "output" or _same(value, default):
            continue
        if (name == "value_range" and isinstance(value, dict)) or (name == "probe_epochs" and not config.get("probe_data")):
            continue  # found in the data; without data to probe
        if (exactly and name != "workers") or not _is_of_the_machine(config, name, value):
            found.append(Difference(name, value, default))
    return found


def _same(value: Any, default: Any) -> bool:
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _is_of_the_machine(config: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether the value may be a default that followed from the machine or the data."""
    if name == "precision":
        return value in ("float32", "bf16")
    if name == "workers":
        return isinstance(value, int) and 1 <= value <= MOST_WORKERS
    return name == "model" and config.get("command") == "finetune" and not config.get("from_scratch")


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each setting of the run if the command line leaves it out."""
    given = {name: config[name] for name in NAMED + LEADING if config.get(name) is not None}
    named = {name: value for name, value in given.items() if name in NAMED}
    plain, recipe = _plain(config)
    base = following = to_config(plain)
    with suppress(Exception):  # settings of a damaged run can fail anywhere
        base = following = to_config(_resolved(config, named))
        following = to_config(_resolved(config, given))
    kept = {name: getattr(plain, name, None) for name in NAMED} | {"recipe": recipe}
    return following | {name: base.get(name) for name in LEADING} | kept


def _plain(config: Mapping[str, Any]) -> tuple[Settings, str]:
    """The declared defaults with those of the run's recipe, and the recipe that `auto` would choose."""
    images, model = config.get("num_train_images", config.get("num_train", config.get("num_images"))), str(config.get("model"))
    is_known = isinstance(images, int)
    cls = class_of(config)
    if issubclass(cls, FinetuneSettings):
        recipe = "small" if is_known and images < cls.small_set else "paper"
        is_small = config.get("recipe", recipe) == "small"
        defaults = cls.small if is_small else cls.paper_recipe(model, _norm_of(model)).defaults
        return filled(cls(task=config.get("task") or finetune.TASKS[0]), defaults), recipe
    recipe = "small" if is_known and images < pretrain.SMALL_SET else "spark"
    named = str(config.get("recipe", recipe))
    return filled(PretrainSettings(), pretrain.RECIPES[named].defaults if named in pretrain.RECIPES else {}), recipe


def _resolved(config: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """The resolved settings for the same data if only these are given."""
    cls = class_of(config)
    if not issubclass(cls, FinetuneSettings):
        return pretrain.resolve(from_config(PretrainSettings, given), int(config.get("num_images") or 0), Machine())
    found = {name: config.get(name) for name, about in settings_of(cls).items() if about.is_found}
    found["num_train_images"] = config.get("num_train_images", config.get("num_train"))
    asked = from_config(cls, {**found, "processes": None, "ema_warmup": None, **given})
    return finetune.resolve(asked, asked.choose_recipe(_norm_of(asked.model)), Machine())


def _norm_of(model: str) -> str:
    """The kind of a network's norms, guessed from its name: building the network takes long."""
    return "ln" if "convnext" in model else "bn"
