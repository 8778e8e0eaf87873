"""The work of `sparkme.export`: writes a checkpoint's encoder as verified weights of the dense network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparkme.data.statistics import statistics_of
from sparkme.errors import UserError, user_errors
from sparkme.networks.create import create_dense
from sparkme.networks.names import library_of
from sparkme.settings.declare import check, to_config
from sparkme.settings.pretrain import RECIPES, PretrainSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.state_dict import state_dict_of
from sparkme.weights.checkpoint import load_checkpoint, run_folder, settings_in
from sparkme.weights.files import write_state_dict
from sparkme.weights.format import Format
from sparkme.weights.formats import FORMATS
from sparkme.weights.hub import HUB_FILES, write_hub_folder
from sparkme.weights.libraries import origin_of, translate
from sparkme.weights.settings import ExportSettings
from sparkme.weights.verify import TOLERANCE, recalibrate, verify


def export(args: ExportSettings, *, network_of: Callable[[dict[str, Any], Path], Any], made_by: str) -> Path | None:
    """Writes the weights, and prints how to load them.

    Args:
        args: the settings.
        network_of: creates the network of a checkpoint, with its weights; see `sparkme.training`.
        made_by: version of this project, for the metadata.

    Returns:
        The file or the hub folder; None if the weights did not pass the check, whose result is printed.
    """
    if (args.checkpoint / "best.safetensors").is_file():
        raise UserError(f"{args.checkpoint} is a run of sparkme.finetune; pass --to onnx, or a checkpoint of sparkme.pretrain")
    checkpoint = load_checkpoint(args.checkpoint, mmap=True)
    settings = settings_in(checkpoint, args.checkpoint)
    model = settings.model
    target = args.to or library_of(model)
    form = FORMATS.get(target, Format("its own"))
    output, beside = check_output(args, settings, form)

    network = network_of(checkpoint, args.checkpoint)
    encoder: SparseEncoder = network.encoder
    dense = dense_network(encoder, args, settings)
    own = encoder.dense_state_dict()
    if (whole := form.whole(dense, settings)) is None:
        with user_errors():
            weights = translate(own, origin_of(library_of(model), own), target)
        theirs, missing = library_network(form, target, weights, dense, model, encoder.in_channels)
        content = form.content(form.state(weights, state_dict_of(network)))
    else:
        weights, theirs, missing, content = own, whole.part, [], whole.content
    if args.verify and not is_verified(theirs, encoder, settings.size):
        return None

    metadata = describe(settings, checkpoint["step"], args, target, encoder.proof)
    metadata |= {"method": RECIPES[settings.recipe].reference, "made_by": made_by, **form.notes(settings)}
    if args.hub_folder:
        write_hub_folder(args.hub_folder, settings, weights, metadata, args.push_to_hub)
        return args.hub_folder
    write_state_dict(output, content, metadata)
    if output.suffix != ".safetensors":  # other files have no metadata
        beside.write_text(json.dumps(metadata, indent=2) + "\n")
    verified = "verified" if args.verify else "NOT verified"
    left = f"; without the classifier: {', '.join(missing)}" if missing else ""
    if encoder.untrained:
        print(f"note: {encoder.untrained} and what follows it are not pretrained: attention has no sparse form")
    for note in whole.notes if whole else ():
        print(f"note: {note}")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB, {verified}){left}")
    print(f"load it:\n\n{form.loading(output, model, encoder.in_channels)}")
    return output


def check_output(args: ExportSettings, settings: PretrainSettings, form: Format) -> tuple[Path, Path]:
    """The files to write: weights, and metadata unless the weights are .safetensors.

    Raises:
        UserError: flags that do not fit together, or an existing file.
    """
    if args.push_to_hub is not None and not args.hub_folder:
        raise UserError("--push-to-hub needs --hub-folder DIR, the folder to upload")
    if args.hub_folder and args.output:
        raise UserError("--hub-folder writes its own files; leave out --output")
    if args.hub_folder and form is not FORMATS["timm"]:
        raise UserError("--hub-folder needs --to timm")
    if args.input_size is not None or args.images:
        raise UserError(f"{'--images' if args.images else '--input-size'} is for --to onnx; leave it out")
    check(args)
    name = settings.model.replace(":", "-")
    output = args.output or run_folder(args.checkpoint) / f"{name}{form.suffixes[0]}"
    if output.suffix not in form.suffixes:
        allowed = " or ".join(suffix for suffix in form.suffixes if suffix != ".pt" or len(form.suffixes) == 1)
        raise UserError(f"--output {output}: the suffix must be {allowed}")
    beside = output.with_name(output.name + ".json")
    files = [output] if output.suffix == ".safetensors" else [output, beside]
    for path in [args.hub_folder / name for name in HUB_FILES] if args.hub_folder else files:
        if path.is_dir():
            raise UserError(f"{path} is a folder; choose another --output")
        if path.exists() and not args.overwrite:
            flag = "--hub-folder" if args.hub_folder else "--output"
            raise UserError(f"{path} exists; choose another {flag}, or pass --overwrite")
    return output, beside


def dense_network(encoder: SparseEncoder, args: ExportSettings, settings: PretrainSettings) -> nn.Module:
    """The ordinary network with the encoder's weights; recalibrates batch norms of both on request.

    Raises:
        UserError: the weights are not finite, or of another version of the network.
    """
    state = encoder.dense_state_dict()
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"{args.checkpoint} has weights that are not finite; use an earlier checkpoint")
    model = settings.model
    with user_errors():
        dense = create_dense(model, in_channels=encoder.in_channels)
    _, unexpected = nn.Module.load_state_dict(dense, state, strict=False)  # not a user's method
    if unexpected:
        raise UserError(f"{library_of(model)}'s {model} has no weights {', '.join(unexpected[:5])}; is it another version?")
    if args.recalibrate_bn:
        recalibrate(dense, args.recalibrate_bn, settings, args.recalibrate_images)
        encoder.load_dense_state_dict(state_dict_of(dense))
    return dense


def library_network(
    form: Format, target: str, weights: dict[str, Tensor], dense: nn.Module, model: str, channels: int
) -> tuple[nn.Module, list[str]]:
    """The network to verify: the library's own with the exported weights, if it is installed here, or `dense`.

    Returns:
        The network, and names of its weights that are not exported.

    Raises:
        UserError: an unknown network, or one that lacks some weights.
    """
    if (name := form.counterpart(model)) is None:
        return dense, []
    with user_errors():
        theirs = dense if name == model else create_dense(name, in_channels=channels)
    missing, unexpected = nn.Module.load_state_dict(theirs, weights, strict=False)
    if unexpected:
        raise UserError(f"{target}'s {name} has no weights {', '.join(unexpected[:5])}")
    return theirs, missing


def is_verified(dense: nn.Module, encoder: SparseEncoder, size: tuple[int, int]) -> bool:
    """Whether both compute the same; prints the differences."""
    errors = verify(dense, encoder, size)
    for stride, error in zip(encoder.strides, errors, strict=True):
        print(f"stride {stride:2d}: dense and sparse features differ by {error:.1e} of their largest value")
    if all(error <= TOLERANCE for error in errors):  # False for NaN
        return True
    problem = f"the dense model and the sparse encoder differ by more than {TOLERANCE:.0e}"
    print(f"error: {problem}; nothing was written", file=sys.stderr)
    return False


def describe(
    settings: PretrainSettings, step: int, args: ExportSettings, target: str, proof: dict[str, Any] | None
) -> dict[str, str]:
    """The metadata: origin of the weights, properties of the images, and the proof of the network's trial."""
    config, kept = (
        to_config(settings),
        ("input_size", "mask_ratio", "epochs", "batch_size", "base_lr", "optimizer", "init", "data", "num_images"),
    )
    notes = {
        "format": "pt",
        "network": settings.model,
        "model": f"{library_of(settings.model)} {settings.model}, encoder without classifier, names of {target}",
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
        "drop_path": str(settings.drop_path),
    }
    if proof is not None:
        notes["proof"] = json.dumps(proof)
    return notes
