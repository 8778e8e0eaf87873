"""The work of `sparkme.export`: a checkpoint's encoder as weights of the dense network, compared and written."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparkme
from sparkme.data.dataset import normalise, pixels_of, preview_images
from sparkme.data.limits import limit_pixels
from sparkme.data.sources.files import find_images
from sparkme.data.statistics import statistics_of
from sparkme.errors import UserError, user_errors
from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.spark import SparK
from sparkme.networks.create import create_dense
from sparkme.networks.names import library_of
from sparkme.settings.commands import ExportSettings
from sparkme.settings.declare import check, to_config
from sparkme.settings.pretrain import RECIPES, PretrainSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.hierarchy import dense_features, find_hierarchy
from sparkme.state_dict import state_dict_of
from sparkme.training.build import network_of, settings_in
from sparkme.training.checkpoint import load_checkpoint
from sparkme.weights import detectron2
from sparkme.weights.files import TORCH_SUFFIXES, check_suffix, write_state_dict
from sparkme.weights.libraries import origin_of, translate
from sparkme.weights.spark import join_official_state

HUB_FILES = ("config.json", "model.safetensors", "README.md")

# In float64 both networks differ by rounding alone: about 1e-13 for a hundred layers. A wrong layout differs by about 1.
TOLERANCE = 1e-8


def export(args: ExportSettings) -> Path | None:
    """Writes the weights. Returns the file or the hub folder; None if they did not pass the check, which is printed."""
    checkpoint = load_checkpoint(args.checkpoint, mmap=True)
    settings = settings_in(checkpoint, args.checkpoint)
    model_name, library = settings.model, library_of(settings.model)
    target = args.to or library
    output, notes = check_output(args, settings, target)
    network = network_of(checkpoint, args.checkpoint)
    encoder = network.encoder
    if not all(value.isfinite().all() for value in encoder.dense_state_dict().values()):
        raise UserError(f"{args.checkpoint} has weights that are not finite; take an earlier checkpoint")

    with user_errors():
        dense = create_dense(model_name, in_channels=encoder.in_channels)
    _, unexpected = nn.Module.load_state_dict(dense, encoder.dense_state_dict(), strict=False)  # not a method of its own class
    if unexpected:
        raise UserError(f"{library}'s {model_name} has no weights {', '.join(unexpected[:5])}; is it another version?")
    if args.recalibrate_bn:
        recalibrate(dense, args.recalibrate_bn, settings, args.recalibrate_images)
        encoder.load_dense_state_dict(state_dict_of(dense))
    state = encoder.dense_state_dict()
    origin = origin_of(library, state)
    with user_errors():
        translated = translate(state, origin, target)
    size = settings.size
    theirs, missing = dense, []
    if target in ("torchvision", "timm"):
        with user_errors():
            theirs = (
                dense if target == library else create_dense(counterpart(model_name, target), in_channels=encoder.in_channels)
            )
        missing, unexpected = nn.Module.load_state_dict(theirs, translated, strict=False)
        if unexpected:
            raise UserError(f"{target}'s {counterpart(model_name, target)} has no weights {', '.join(unexpected[:5])}")
    if args.verify:
        errors = verify(theirs, encoder, size)
        for stride, error in zip(encoder.strides, errors, strict=True):
            print(f"stride {stride:2d}: dense and sparse features differ by {error:.1e} of their largest value")
        if not all(error <= TOLERANCE for error in errors):  # NaN too
            print(f"error: the dense model does not compute what the sparse encoder does (more than {TOLERANCE:.0e}); "
                  "nothing was written", file=sys.stderr)  # fmt: skip
            return None

    metadata = describe(settings, checkpoint["step"], args, target, encoder.proof)
    if target == "spark":
        translated = official_state(network, translated)
    if args.hub_folder:
        write_hub_folder(args.hub_folder, args, settings, counterpart(model_name, "timm"), translated, metadata)
        return args.hub_folder
    if output.suffix == ".pkl":
        detectron2.write(output, translated)
    else:
        write_state_dict(output, translated, metadata)
    if output.suffix in (*TORCH_SUFFIXES, ".pkl"):
        notes.write_text(json.dumps(metadata, indent=2) + "\n")
    megabytes = output.stat().st_size / 1e6
    verified = "verified" if args.verify else "NOT verified"
    left = f"; left to you, the classifier: {', '.join(missing)}" if missing else ""
    print(f"wrote {output} ({megabytes:.1f} MB, {verified}){left}")
    print(f"load it:\n\n{loading_code(model_name, target, output, encoder.in_channels)}")
    return output


def counterpart(model_name: str, library: str) -> str:
    """The network of the same name in torchvision or timm."""
    plain = model_name.removeprefix("timm:")
    return f"timm:{plain}" if library == "timm" else plain


def check_output(args: ExportSettings, settings: PretrainSettings, target: str) -> tuple[Path, Path]:
    """The files to write: the weights, and beside them what a .pth or .pkl file has no place for.

    Raises:
        UserError: a flag that does not fit, or a file that is there already.
    """
    if args.push_to_hub is not None and not args.hub_folder:
        raise UserError("--push-to-hub sends what --hub-folder DIR writes; name that folder, too")
    if args.hub_folder and args.output:
        raise UserError("--hub-folder writes its own files; leave out --output")
    if args.hub_folder and target != "timm":
        raise UserError("--hub-folder is timm's form of a model; use it with --to timm")
    check(args)
    name = settings.model.replace(":", "-")
    suffix = ".pkl" if target == "detectron2" else ".pth" if target == "spark" else ".safetensors"
    output = args.output or run_folder(args.checkpoint) / f"{name}{suffix}"
    if target == "detectron2" and output.suffix != ".pkl":
        raise UserError(f"--output {output}: detectron2 reads .pkl")
    if output.suffix != ".pkl" or target != "detectron2":
        check_suffix(output)
    notes = output.with_name(output.name + ".json")
    files = [output, notes] if output.suffix in (*TORCH_SUFFIXES, ".pkl") else [output]
    for path in [args.hub_folder / name for name in HUB_FILES] if args.hub_folder else files:
        if path.is_dir():
            raise UserError(f"{path} is a folder; choose another --output")
        if path.exists() and not args.overwrite:
            flag = "--hub-folder" if args.hub_folder else "--output"
            raise UserError(f"{path} exists; choose another {flag}, or pass --overwrite")
    return output, notes


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, wherever it was moved."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


@torch.no_grad()
def verify(dense: nn.Module, encoder: SparseEncoder, size: tuple[int, int]) -> list[float]:
    """Compares a dense model with a sparse encoder, in float64 and eval mode, on images with every patch visible.

    Args:
        dense: the model that got the exported weights; the network that the encoder was made from, or its like in another
            library.
        encoder: the encoder they came from; moved to float64 on the CPU.
        size: height and width of the images.

    Returns:
        Per stage, shallow to deep, the largest difference over the largest value; NaN where a value is not finite.
    """
    for network in (dense, encoder):
        network.double().cpu()
        network.eval()  # which returns what a `train` of the network's own class does
    encoder.set_engine("minkowski")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_channels, *size, generator=generator, dtype=torch.float64)
    patch = encoder.patch
    active = torch.ones(2, 1, size[0] // patch, size[1] // patch, dtype=torch.bool)
    with torch.enable_grad():
        taps = find_hierarchy(copy.deepcopy(dense), len(encoder.strides), in_channels=encoder.in_channels).taps
    if [tap.stride for tap in taps] != [*encoder.strides]:  # chosen by hand
        taps = encoder.hierarchy.taps
    expected = dense_features(dense, taps, images)
    return [_difference(x.dense(), y) for x, y in zip(encoder(images, active), expected, strict=True)]


def _difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def recalibrate(dense: nn.Module, data: Path, settings: PretrainSettings, count: int) -> None:
    """Estimates batch norm's running statistics anew, on whole images: those of pretraining saw visible patches, with their
    borders. Prints how far they moved.

    Raises:
        UserError: no images there.
    """
    limit_pixels(settings.max_pixels)
    paths = find_images(data, flag="--recalibrate-bn")
    norms = {n: m for n, m in dense.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats}
    if not norms:
        print("the network has no batch norm: nothing to recalibrate")
        return
    statistics = statistics_of(settings)
    step = max(1, len(paths) // count)
    chosen, size = paths[::step][:count], settings.size
    before = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}  # type: ignore[union-attr]
    dense.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    seen = 0
    with torch.no_grad():
        for start in tqdm(range(0, len(chosen), 32), desc="recalibrating batch norm", disable=not sys.stderr.isatty()):
            group = chosen[start : start + 32]
            images = preview_images(group, size, len(group), settings.channels, settings.background, pixels_of(settings))
            if len(images) > 1:
                dense(normalise(images, statistics))
                seen += len(images)
    dense.eval()
    if not seen:
        raise UserError(f"--recalibrate-bn {data}: too few of its images can be read")
    shifts, ratios = [], []
    for name, norm in norms.items():
        mean, variance = before[name]
        new_mean, new_variance = norm.running_mean, norm.running_var
        assert new_mean is not None and new_variance is not None
        if norm.num_batches_tracked:
            shifts.append(((new_mean - mean).abs() / (new_variance + norm.eps).sqrt()).mean())
            ratios.append(((variance + norm.eps) / (new_variance + norm.eps)).log().abs().mean())
        else:  # of a layer that whole images do not reach
            norm.running_mean, norm.running_var = mean, variance
    print(
        f"batch norm recalibrated on {seen} whole images: means were off by {torch.stack(shifts).mean():.3f} deviations, "
        f"variances by a factor of {torch.stack(ratios).mean().exp():.3f}, both now 0 and 1 on these images"
    )


def official_state(network: MaskedAutoencoder, encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole network under the official SparK names; the encoder alone where it was trained in another way."""
    state = state_dict_of(network) if isinstance(network, SparK) else {}
    rest = {n: v for n, v in state.items() if not n.startswith("encoder.")}
    return join_official_state(encoder, rest)


def describe(
    settings: PretrainSettings, step: int, args: ExportSettings, target: str, proof: dict[str, Any] | None
) -> dict[str, str]:
    """Where the weights come from, and the proof of their network, for the file's metadata."""
    kept = (
        "input_size", "mask_ratio", "epochs", "batch_size", "base_lr", "optimizer", "init", "data", "num_images"
    )  # fmt: skip
    recipe, config = RECIPES[settings.recipe], to_config(settings)
    notes = {
        "format": "pt",
        "network": settings.model,
        "model": f"{library_of(settings.model)} {settings.model}, encoder without classifier, names of {target}",
        "method": recipe.reference,
        "recipe": json.dumps({k: config.get(k) for k in kept}),
        "source": f"{args.checkpoint.name}, step {step}",
        "verified": str(args.verify).lower(),
        "batch_norm": "recalibrated on whole images" if args.recalibrate_bn else "as pretrained, on visible patches",
        "channels": str(settings.channels),
        "mean": json.dumps(statistics_of(settings).mean),
        "std": json.dumps(statistics_of(settings).std),
        "background": settings.background,
        "value_range": json.dumps(settings.value_range),
        "upright": json.dumps(settings.upright),
        "input_size": json.dumps(settings.input_size),
        "made_by": f"sparkme {sparkme.__version__}",
        "drop_path": str(settings.drop_path),
    }
    if proof is not None:
        notes["proof"] = json.dumps(proof)
    if target == "detectron2":
        mean, std = ([round(255 * v, 3) for v in values] for values in statistics_of(settings))
        images = "RGB: INPUT.FORMAT RGB" if settings.channels == 3 else f"images of {settings.channels} channels"
        notes["detectron2"] = (
            f"trained on {images}, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, MODEL.RESNETS.STRIDE_IN_1X1 False; "
            "num_batches_tracked is left out"
        )
    return notes


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

model = timm.create_model({load!r}, pretrained=True, num_classes=10)  # a new classifier, to be fine-tuned
```

The licence of these weights is for whoever publishes them to choose, with regard to the images they were trained on.
"""


def write_hub_folder(
    folder: Path, args: ExportSettings, settings: PretrainSettings, name: str, state: dict[str, Tensor],
    metadata: dict[str, str],
) -> None:  # fmt: skip
    """Writes what `timm.create_model('local-dir:DIR')` loads, with a model card, and sends it where that was asked for.

    Raises:
        UserError: it cannot be written or sent.
    """
    import timm  # noqa: PLC0415  (half a second, for hub folders alone)
    from timm.models._hub import save_for_hf  # noqa: PLC0415

    plain, statistics = name.removeprefix("timm:"), statistics_of(settings)
    channels = settings.channels
    model = timm.create_model(plain, pretrained=False, num_classes=0, in_chans=channels)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise UserError(f"--hub-folder: timm's {plain} without a classifier has no weights {', '.join(unexpected[:5])}")
    if missing:  # norms between the last map and the classifier
        print(f"not pretrained, as timm makes them new: {', '.join(missing[:5])}")
    size = [channels, *settings.size]
    preprocessing = {
        "input_size": size,
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
        load = f"hf-hub:{args.push_to_hub}" if args.push_to_hub else f"local-dir:{folder}"
        card = CARD.format(name=plain, method=metadata["method"], rows=rows, load=load)
        (folder / "README.md").write_text(card)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    code = f"model = timm.create_model('local-dir:{folder}', pretrained=True)"
    print(f"wrote {folder}; load it:\n\nimport timm\n{code}")
    if args.push_to_hub:
        from huggingface_hub import HfApi  # noqa: PLC0415  (a client for the network)

        try:
            api = HfApi()
            api.create_repo(args.push_to_hub, exist_ok=True)
            url = api.upload_folder(repo_id=args.push_to_hub, folder_path=str(folder))
        except Exception as error:  # the network, a token, a name: whatever it is, the folder is there
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"--push-to-hub {args.push_to_hub} failed: {reason}; {folder} is complete") from error
        print(f"sent to {url}")


def loading_code(model: str, target: str, path: Path, channels: int = 3) -> str:
    """How the file is loaded, for people."""
    if target == "detectron2":
        return f'cfg.MODEL.WEIGHTS = "{path}"  # and the settings in {path.name}.json'
    if target == "mmpretrain":
        return f"init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}, prefix='backbone.')"
    if path.suffix == ".safetensors":
        package, read = "safetensors.torch", f"safetensors.torch.load_file({str(path)!r})"
    else:
        package, read = "torch", f"torch.load({str(path)!r})"
    if target == "torchvision":
        library, make = "torchvision", f"torchvision.models.{counterpart(model, target)}()"
        if channels != 3:
            library = "torchvision, sparkme.networks.create"
            make = f"sparkme.networks.create.with_in_channels({make}, {channels})"
    elif target == "timm":
        options = f", in_chans={channels}" if channels != 3 else ""
        library, make = "timm", f"timm.create_model({counterpart(model, target).removeprefix('timm:')!r}{options})"
    else:
        return f"import {package}\nstate = {read}  # for load_state_dict(state, strict=False) of the network"
    return f"import {package}, {library}\nmodel = {make}\nmodel.load_state_dict({read}, strict=False)  # all but the classifier"
