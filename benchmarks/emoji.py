"""Images for the benchmarks: nine groups of emoji, downloaded by npm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.packages import npm_package

EMOJI = "emoji-datasource-google@16.0.0"


def emoji(folder: Path, instead: str = "--data LABELLED") -> tuple[Path, dict[str, list[Path]]]:
    """The colour emoji of EMOJI: a folder for each group, and the other skin colours of each picture.

    Args:
        folder: where they are, or are downloaded to.
        instead: the flag that makes them unnecessary, for errors.

    Raises:
        UserError: they cannot be downloaded.
    """
    package = npm_package(EMOJI, folder, instead, _wanted)
    pictures, groups = package / "img" / "google" / "64", folder / "groups"
    extra: dict[str, list[Path]] = {}
    for entry in json.loads((package / "emoji.json").read_text()):
        picture = pictures / entry["image"]
        if entry["category"] == "Component" or not picture.is_file():  # five patches of skin
            continue
        target = groups / entry["category"].replace(" ", "-") / entry["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(picture, target)
        variants = [pictures / variant["image"] for variant in entry.get("skin_variations", {}).values()]
        extra[entry["image"]] = [path for path in variants if path.is_file()]
    return groups, extra


def _wanted(path: str) -> bool:
    return path == "package/emoji.json" or path.startswith("package/img/google/64/")
