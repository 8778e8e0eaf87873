"""Folders that `timm.create_model('local-dir:DIR')` loads, and the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sparkme.data.statistics import statistics_of
from sparkme.errors import UserError, first_line
from sparkme.settings.pretrain import PretrainSettings

HUB_FILES = ("config.json", "model.safetensors", "README.md")

CARD = """---
library_name: timm
tags: [image-feature-extraction, timm, self-supervised-learning]
---
# {name}, pretrained without labels

Encoder of `{name}` without a classifier, pretrained by {method} with sparkme.

| setting | value |
|---|---|
{rows}

```python
import timm

model = timm.create_model({load!r}, pretrained=True, num_classes=10)  # a new classifier to fine-tune
```

The licence of these weights is for whoever publishes them to choose, with regard to the images they were trained on.
"""


def write_hub_folder(
    folder: Path, settings: PretrainSettings, state: dict[str, Tensor], metadata: dict[str, str], repository: str | None
) -> None:
    """Writes config, weights and model card, and uploads them to a repository, if any. Raises UserError.

    Args:
        folder: the folder to write.
        settings: the run's.
        state: the encoder's weights with timm's names.
        metadata: for the card.
        repository: on the hub, NAME/REPO.
    """
    import timm  # noqa: PLC0415  (half a second, for hub folders alone)
    from timm.models._hub import save_for_hf  # noqa: PLC0415

    plain, channels, statistics = settings.model.removeprefix("timm:"), settings.channels, statistics_of(settings)
    model = timm.create_model(plain, pretrained=False, num_classes=0, in_chans=channels)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise UserError(f"--hub-folder: timm's {plain} without a classifier has no weights {', '.join(unexpected[:5])}")
    if missing:  # norms between the last map and the classifier
        print(f"not pretrained, as timm makes them new: {', '.join(missing[:5])}")
    preprocessing = {
        "input_size": [channels, *settings.size],
        "mean": list(statistics.mean),
        "std": list(statistics.std),
        "interpolation": "bicubic",
        "crop_pct": 0.95,
    }
    try:
        save_for_hf(model, str(folder), data_config=preprocessing, safe_serialization=True)
        if settings.model == f"timm:{plain}":
            file = folder / "config.json"
            kept = {name: metadata[name] for name in ("drop_path", "proof") if name in metadata}
            file.write_text(json.dumps(json.loads(file.read_text()) | {"sparkme": kept}, indent=2) + "\n")
        rows = "\n".join(f"| {key} | {value} |" for key, value in metadata.items() if key not in ("format", "method", "proof"))
        load = f"hf-hub:{repository}" if repository else f"local-dir:{folder}"
        (folder / "README.md").write_text(CARD.format(name=plain, method=metadata["method"], rows=rows, load=load))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    print(f"wrote {folder}; load it:\n\nimport timm\nmodel = timm.create_model('local-dir:{folder}', pretrained=True)")
    if repository:
        print(f"uploaded to {send(folder, repository)}")


def send(folder: Path, repository: str) -> Any:
    """Uploads a folder to the hub. Returns its address. Raises UserError."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (a client for the network)

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return api.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # network, token or name: the folder is complete anyway
        raise UserError(f"--push-to-hub {repository} failed: {first_line(error)}; {folder} is complete") from error
