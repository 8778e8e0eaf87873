"""Tests networks by name: whether they can be pretrained, whether they are correct, and what sparsity saves.

    python -m benchmarks.networks --json benchmarks/results/networks.json     # all of them: about 40 minutes on two cores
    python -m benchmarks.networks resnet18 timm:resnetv2_50 --json /dev/null  # some
    python -m benchmarks.networks --write                                     # from the JSON: docs/networks.md, networks.txt

It tests every convolutional classification network of torchvision, and at least one of each convolutional family (file of
models) of timm. A network is `supported` if `sparkme.sparsify` accepts it and the following holds. Weights, norms and layer
scales are random. Errors are relative to the largest value, and at most 1e-10 in float64. Above 300 million parameters the
dtype is float32, with at most 1e-4; a ReLU may flip there, so engines may differ by 1e-2 and gradients by 0.1.

- With all patches visible, the features equal those of the dense network, at every stride, in eval mode.
- With half of the patches hidden, the three engines compute the same features and gradients of all parameters in eval mode;
  in training mode to 1e-6, since batch norms over the few pixels of a small image amplify rounding.
- NaN in hidden pixels does not change any engine's features.
- The weights come back under the dense network's names, bit for bit.

The maps are compared with timm's `feature_info` if a network has it: `equal`, `later` (ours lies behind timm's at the same
stride, such as behind the last convolution of an EfficientNet), or `earlier` (timm's lies inside a block). GFLOP are 2 x MAC of
the encoder's convolutions and linear layers, forward, at 224 pixels, with 20 of 49 patches of 32 pixels visible (the same share
of larger patches); `sparse` is the submanifold count of benchmarks/flops.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import sparkme
from benchmarks.flops import count_encoder, provenance, total
from benchmarks.plot import read_page
from benchmarks.plot import write as write_page
from sparkme.errors import UserError, first_line, run_command
from sparkme.networks.create import create_dense
from sparkme.sparse.grid import Grid
from sparkme.sparse.hierarchy import dense_features

RESULTS = Path(__file__).parent / "results" / "networks.json"
PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
PACKAGED = Path(__file__).parents[1] / "sparkme" / "networks" / "networks.txt"
LIMITS = {
    torch.float64: {"dense": 1e-10, "engines": 1e-10, "gradients": 1e-10, "training": 1e-6},
    torch.float32: {"dense": 1e-4, "engines": 1e-2, "gradients": 0.1, "training": 0.1},
}
LARGE = 300e6  # parameters
ENGINES = ("cuda_ext", "minkowski", "masked-dense")

# Reasons of refusals, and the part of the message that identifies each.
REASONS = {
    "strided layers without padding": "cannot be aligned to a grid of patches",
    "a fixed image size": "cannot be run as model(images)",
    "a layer without a sparse form, which mixes pixels or images, such as attention": "has no sparse form",
}

# torchvision's files of networks that are not convolutional.
TRANSFORMERS = ("vision_transformer", "swin_transformer", "maxvit")

# One or more networks of each convolutional family of timm, and at the end some that mix convolution with attention.
TIMM = """
convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny convnext_tiny_hnf convnext_large_mlp convnextv2_atto
convnextv2_tiny convnextv2_base convmixer_768_32 cs3darknet_s cs3darknet_focus_s cs3sedarknet_l cspdarknet53 cspresnet50
cspresnext50 darknet53 darknetaa53 sedarknet21 cspnext_tiny densenet121 densenetblur121d densenet264d dla34 dla60_res2net
dpn48b dpn68 efficientnet_b0 efficientnet_b0_gn efficientnet_cc_b0_4e efficientnet_el efficientnet_lite0 efficientnet_blur_b0
efficientnetv2_rw_t fbnetc_100 mixnet_s mnasnet_100 mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_100
mobilenetv4_conv_small semnasnet_100 spnasnet_100 tf_efficientnet_b0 tf_efficientnetv2_s tf_mixnet_s tinynet_a fasternet_t0
fastvit_t8 focalnet_tiny_srf ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small mambaout_femto convformer_s18 poolformer_s12
poolformerv2_s12 fbnetv3_b lcnet_050 mobilenetv3_small_100 mobilenetv3_large_100 tf_mobilenetv3_small_100 nasnetalarge
dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 nf_resnet26 pnasnet5large rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_005
repghostnet_050 repvit_m0_9 res2net50_26w_4s res2next50 resnest14d resnest26d bat_resnext26ts eca_resnext26ts
gcresnet33ts gcresnext26ts gernet_s mobileone_s0 regnetz_b16 regnetz_b16_evos repvgg_a0 resnet32ts resnet50_clip
seresnet33ts test_byobnet ecaresnet50t resnet18 resnet18d resnet26t resnet50 resnet50d resnet50_gn resnetaa50 resnetblur50
resnetrs50 resnext50_32x4d seresnet50 test_resnet wide_resnet50_2 resnetv2_50 resnetv2_50x1_bit resnetv2_50d_evos
resnetv2_50d_gn rexnet_100 selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d skresnet18 skresnext50_32x4d starnet_s1
tresnet_m vgg11 vgg11_bn ese_vovnet19b_dw vovnet39a eca_vovnet39b legacy_xception xception41 xception41p
caformer_s18 coatnet_0_rw_224 edgenext_xx_small efficientformer_l1 efficientvit_b0 mobilenetv4_hybrid_medium
mobilenetv5_base mobilevit_xxs nextvit_small swiftformer_xs
""".split()  # noqa: SIM905  (a list of 120 strings reads worse)
MIXED = TIMM[TIMM.index("caformer_s18") :]


def names() -> list[str]:
    """The names of all tested networks, as for --model."""
    models = torchvision.models
    ours = [
        n for n in models.list_models(models) if models.get_model_builder(n).__module__.rpartition(".")[2] not in TRANSFORMERS
    ]
    return ours + [f"timm:{name}" for name in TIMM]


def family(name: str) -> str:
    """The library and the file of models that defines a network, such as `timm resnetv2`."""
    if name.startswith("timm:"):
        return "timm " + timm.model_entrypoint(name[5:]).__module__.rpartition(".")[2]
    return "torchvision " + torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


def is_mixed(name: str) -> bool:
    """Whether the network mixes convolution with attention."""
    return name.removeprefix("timm:") in MIXED


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks",
        description="Test networks by name: can they be pretrained, are they correct, and what does sparsity save?",
        epilog="The docstring of benchmarks/networks.py lists the checks and the fields of the JSON file.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks, as for sparkme.pretrain --model (default: all)")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results file, updated after each network")
    parser.add_argument("--missing", action="store_true", help="test only networks that are not in the JSON file yet")
    parser.add_argument(
        "--write", action="store_true", help="write the JSON file's table to docs/networks.md and its names to networks.txt"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(words)
    return run_command(lambda: write(args.json) if args.write else run(args, words))


def run(args: argparse.Namespace, words: list[str]) -> int:
    record: dict[str, Any] = {"networks": {}}
    if args.json.is_file() and (args.missing or args.names):
        record = json.loads(args.json.read_text())
    wanted = [n for n in args.names or names() if not (args.missing and n in record["networks"])]
    record |= {"command": shlex.join(["python", "-m", "benchmarks.networks", *words]), **_provenance()}
    for i, name in enumerate(wanted):
        result = examine(name)
        record["networks"][name] = result
        print(f"[{i + 1}/{len(wanted)}] {describe(name, result)}", flush=True)
        try:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {first_line(error)}") from None
        gc.collect()
    good = sum(result["supported"] for result in record["networks"].values())
    print(f"{good} of {len(record['networks'])} supported")
    return 0


def _provenance() -> dict[str, Any]:
    found = provenance()
    found["versions"]["timm"] = metadata.version("timm")
    return found


def describe(name: str, result: dict[str, Any]) -> str:
    if not result["supported"]:
        return f"- {name}: {result['reason']}"
    worst = max(error for kind, error in result["errors"].items() if kind != "training")
    return (
        f"+ {name}: {worst:.0e}, {result['gflop_sparse']:.2f} of {result['gflop_dense']:.2f} GFLOP, {result['seconds']:.0f} s"
    )


def examine(name: str) -> dict[str, Any]:
    """Tests one network; the result is that of the module's docstring."""
    started = time.monotonic()
    result: dict[str, Any] = {"family": family(name), "supported": False}
    try:
        result |= _examine(name)
        result["supported"] = True
    except Exception as error:  # any failure of a network is a result
        kind = "" if isinstance(error, ValueError | ArithmeticError) else f"{type(error).__name__}: "
        result["reason"] = kind + first_line(error)
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _examine(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_dense(name)
    size = sum(p.numel() for p in model.parameters())
    randomise(model)
    model = model.double() if size <= LARGE else model.float()
    dtype = next(model.parameters()).dtype
    encoder = sparkme.sparsify(model)
    state = encoder.dense_state_dict()
    theirs = model.state_dict()
    if not all(torch.equal(value, theirs[key]) for key, value in state.items()):
        raise ArithmeticError("the exported weights differ from the network's")

    patch = encoder.patch
    images = torch.randn(2, encoder.in_channels, 2 * patch, 3 * patch, dtype=dtype)
    whole = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    some = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0]], dtype=torch.bool).view(2, 1, 2, 3)
    errors: dict[str, float] = {}
    with torch.no_grad():
        expected = dense_features(model, encoder.hierarchy.taps, images)
        maps = encoder.eval().set_engine("cuda_ext")(images, whole)
        errors["dense"] = max(relative(x.dense(), y) for x, y in zip(maps, expected, strict=True))
        del maps, expected
        hidden = some.repeat_interleave(patch, 2).repeat_interleave(patch, 3).logical_not()
        spoiled = images.masked_fill(hidden, float("nan"))
        for engine in ENGINES:
            encoder.set_engine(engine)
            for x, y in zip(encoder(images, some), encoder(spoiled, some), strict=True):
                if not torch.equal(x.rows, y.rows):
                    raise ArithmeticError(f"engine {engine}: hidden pixels change the map at stride {x.stride}")
    feature_info = compare_feature_info(model, encoder)
    del model, theirs
    del state
    buffers = {key: value.clone() for key, value in encoder.named_buffers()}
    for training in (False, True):
        first: tuple[list[Tensor], list[Tensor]] | None = None
        factors: list[Tensor] = []  # shared by all engines, since the cosine of a large number amplifies rounding
        for engine in ENGINES:
            encoder.train(training).set_engine(engine).zero_grad()
            torch.manual_seed(1)
            maps = encoder(images, some)
            factors = factors or [x.rows.detach().cos() for x in maps]
            torch.stack([(x.rows * factor).mean() for x, factor in zip(maps, factors, strict=True)]).sum().backward()
            rows, gradients = [x.rows.detach() for x in maps], [p.grad for p in encoder.parameters() if p.grad is not None]
            del maps
            for key, value in encoder.named_buffers():
                value.copy_(buffers[key])
            if first is None:
                first = rows, [g.clone() for g in gradients]
                continue
            scale = max(float(g.abs().max()) for g in first[1])
            of_maps = max(relative(x, y) for x, y in zip(rows, first[0], strict=True))
            of_gradients = max(float((x - y).abs().max()) / scale for x, y in zip(gradients, first[1], strict=True))
            for kind, error in (
                (("training", max(of_maps, of_gradients)),)
                if training
                else (
                    ("engines", of_maps),
                    ("gradients", of_gradients),
                )
            ):
                errors[kind] = max(error, errors.get(kind, 0.0))
    encoder.zero_grad()
    bad = [f"{kind} {error:.1e}" for kind, error in errors.items() if not error <= LIMITS[dtype][kind]]
    if bad:
        raise ArithmeticError(f"differs by {', '.join(bad)} of the largest value")
    return {
        "strides": encoder.strides,
        "channels": encoder.channels,
        "feature_info": feature_info,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "errors": {kind: float(f"{error:.2e}") for kind, error in errors.items()},
        **count(encoder),
    }


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Randomises norms, layer scales and similar parameters, since their initial values would hide an error."""
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if key.endswith("running_var"):
            value.uniform_(0.8, 1.25)
        elif key.endswith(("running_mean", "bias", "beta")):
            value.normal_(std=0.1)
        elif value.ndim <= 1 or 0 < value.numel() == max(value.shape):  # gains, which may start at zero
            value.uniform_(0.8, 1.2)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def compare_feature_info(model: nn.Module, encoder: Any) -> str | dict[str, str] | None:
    """Compares our maps with timm's `feature_info`, see the module's docstring; None if there is none."""
    if not hasattr(model, "feature_info"):
        return None
    info: Any = model.feature_info
    declared = {entry["reduction"]: entry for entry in (info if isinstance(info, list) else info.info)}
    order: dict[str, int] = {}
    clock = iter(range(10**9))
    handles = [
        m.register_forward_hook(lambda _m, _a, _o, n=n: order.__setitem__(n, next(clock)))
        for n, m in model.named_modules()
        if n
    ]
    before: dict[int, int] = {}
    for tap in encoder.hierarchy.taps:
        hook = lambda *_, s=tap.stride: before.__setitem__(s, next(clock))  # noqa: E731
        module = model.get_submodule(tap.module)
        handles.append(module.register_forward_pre_hook(hook) if tap.at_input else module.register_forward_hook(hook))
    like = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.randn(2, encoder.in_channels, 128, 192, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for stride, channels in zip(encoder.strides, encoder.channels, strict=True):
        entry = declared.get(stride)
        if entry is None:
            found[str(stride)] = "not declared"
        elif entry["num_chs"] == channels:
            found[str(stride)] = "equal"
        else:
            side = "later" if order.get(entry["module"], -1) < before[stride] else "earlier"
            found[str(stride)] = f"{side}: {channels} channels, timm's {entry['num_chs']}"
    return "equal" if set(found.values()) == {"equal"} else found


def count(encoder: Any) -> dict[str, float]:
    """GFLOP of the encoder, dense and sparse, per image."""
    patch = encoder.patch
    side = max(1, 224 // patch)
    active = torch.zeros(1, 1, side, side, dtype=torch.bool)
    keep = round(0.4 * side * side)
    active.view(-1)[:keep] = True
    images = torch.zeros(1, encoder.in_channels, side * patch, side * patch)
    encoder.float().eval().set_engine("masked-dense")
    with torch.no_grad():
        macs = total(count_encoder(encoder, images, Grid(active, patch)))
    return {"gflop_dense": round(2e-9 * macs.dense, 3), "gflop_sparse": round(2e-9 * macs.submanifold, 3)}


def write(path: Path) -> int:
    """Writes the names of supported networks, and the table of families in docs/networks.md."""
    if not path.is_file():
        raise UserError(f"--json {path} does not exist; run python -m benchmarks.networks first")
    networks: dict[str, Any] = json.loads(path.read_text())["networks"]
    comments = [line for line in PACKAGED.read_text().splitlines() if line.startswith("#")]
    PACKAGED.write_text("\n".join([*comments, *(name for name, result in networks.items() if result["supported"])]) + "\n")
    begin, end = "<!-- networks:begin -->", "<!-- networks:end -->"
    write_page(PAGE, read_page(PAGE, begin, end), f"{begin}\n{markdown(networks)}\n{end}")
    print(f"wrote {PACKAGED.name}")
    return 0


def markdown(networks: dict[str, Any]) -> str:
    """A table of families: tested and supported networks, largest error, size and GFLOP of the first; and the refusals."""
    groups: dict[str, list[str]] = {}
    for name, result in networks.items():
        groups.setdefault(result["family"] + (" (with attention)" if is_mixed(name) else ""), []).append(name)
    lines = [
        "| family | tested | supported | largest error | example | parameters | GFLOP dense | GFLOP sparse |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    refused = []
    for group, members in groups.items():
        good = [name for name in members if networks[name]["supported"]]
        refused += [name for name in members if name not in good]
        row = f"| {group} | {len(members)} | {len(good)} |"
        if good:
            first = networks[good[0]]
            exact = [networks[name]["errors"] for name in good if networks[name]["dtype"] == "float64"]
            worst = max(error for errors in exact for kind, error in errors.items() if kind != "training")
            row += f" {worst:.0e} | `{good[0]}` | {first['parameters'] / 1e6:.1f} M | {first['gflop_dense']:.2f} |"
            row += f" {first['gflop_sparse']:.2f} |"
        else:
            row += " | | | | |"
        lines.append(row)
    lines += ["", "Networks are refused for one of these reasons. The message names the layer and a remedy:", ""]
    for reason, phrase in REASONS.items():
        names = [f"`{name}`" for name in refused if phrase in networks[name]["reason"]]
        lines += [f"- {reason}: {', '.join(names)}"] if names else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
