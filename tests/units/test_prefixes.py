"""Weights that other codes wrapped: taken where one prefix explains all names, else refused; no code of a file runs."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import MinkowskiEngine as ME
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from sparkme.errors import UserError
from sparkme.networks.names import library_of
from sparkme.weights.files import read_tensors
from sparkme.weights.libraries import origin_of, translate
from sparkme.weights.prefixes import Choice, Found, Wanted, adapted_stem, find_weights
from sparkme.weights.pretrained import read_pretrained

State = dict[str, Any]
WHOLE = {
    n: torch.randn(v.shape) if v.is_floating_point() else v + 3 for n, v in torchvision.models.resnet18().state_dict().items()
}
ENCODER = {name: value for name, value in WHOLE.items() if not name.startswith("fc.")}
OTHER = {name: value + 1 for name, value in ENCODER.items()}


def under(prefix: str, state: State = ENCODER) -> State:
    return {prefix + name: value for name, value in state.items()}


def wanted(name: str = "resnet18", *, channels: int = 3, headless: bool = True) -> Wanted:
    """What the encoder wants or, with its head, the network that is to be fine-tuned."""
    from sparkme.networks.create import create_dense

    own = create_dense(name, in_channels=channels).state_dict()
    head = [n for n in own if n.startswith(("fc.", "classifier.", "head."))]
    body = {n: v for n, v in own.items() if n not in head}
    return Wanted(name, library_of(name), body if headless else own, channels, () if headless else head, headless)


def find(path: Path, content: Any, choice: Choice = Choice(), want: Wanted | None = None) -> Found:  # noqa: B008
    torch.save(content, path / "file.pth")
    return find_weights(read_tensors(path / "file.pth"), want or wanted(), "file.pth", choice)


def equal(found: Found, expected: dict[str, Tensor]) -> bool:
    return found.state.keys() == expected.keys() and all(torch.equal(v, expected[n]) for n, v in found.state.items())


BOX = torch.randn(8, 8)
HEAD = {"projection_head.layers.0.weight": BOX}
WRAPPED: dict[str, tuple[Any, str, int]] = {  # the file's content, the prefix, how many are left over
    "bare": (WHOLE, "", 2),
    "lightning_with_head": ({"epoch": 3, "state_dict": {**under("backbone."), **HEAD}}, "state_dict.backbone.", 1),
    "lightning_model": ({"state_dict": under("model.", WHOLE)}, "state_dict.model.", 2),
    "lightning_model_backbone": (
        {"state_dict": {**under("model.backbone."), "model.head.weight": BOX}},
        "state_dict.model.backbone.",
        1,
    ),
    "contrastive": ({"model": {**under("module.encoder."), "module.head.0.weight": BOX}}, "model.module.encoder.", 1),
    "momentum": (
        {"state_dict": {**under("module.encoder_k.", OTHER), **under("module.encoder_q."), "module.queue": BOX}},
        "state_dict.module.encoder_q.",
        1,
    ),
    "teacher_student": (
        {"teacher": under("backbone.", OTHER), "student": under("module.backbone.")},
        "student.module.backbone.",
        0,
    ),
    "online_target": ({**under("target_encoder.net.", OTHER), **under("online_encoder.net.")}, "online_encoder.net.", 0),
    "lightly": ({"state_dict": {**under("backbone_momentum.", OTHER), **under("backbone.")}}, "state_dict.backbone.", 0),
    "namespace": ({"state_dict": WHOLE, "args": argparse.Namespace(lr=0.1, model="resnet18"), "epoch": 5}, "state_dict.", 2),
    "numpy_number": ({"model": WHOLE, "best_acc": np.float64(71.2), "step": np.int32(7)}, "model.", 2),
    "ema_only": ({"state_dict_ema": WHOLE}, "state_dict_ema.", 2),
    "ema_beside": ({"model_ema": OTHER, "model": ENCODER, "optimizer": {"state": {0: {"exp_avg": BOX}}}}, "model.", 1),
    "compiled_then_wrapped": (under("_orig_mod.module.", WHOLE), "module.", 2),
    "wrapped_then_compiled": (under("module._orig_mod.", WHOLE), "module.", 2),
    "sharded": ({n.replace("layer4.0.", "layer4._orig_mod.0._fsdp_wrapped_module."): v for n, v in WHOLE.items()}, "", 2),
    "unet": ({**under("encoder."), "decoder.blocks.0.conv1.0.weight": BOX}, "encoder.", 1),
    "detector": ({**under("backbone.body."), "rpn.head.conv.0.0.weight": BOX}, "backbone.body.", 1),
    "nested": ({"model": {"encoder": ENCODER, "decoder": {"0": {"weight": torch.zeros(3)}}}}, "model.encoder.", 1),
    "tree": ({"net": {"conv1": {"weight": ENCODER["conv1.weight"]}, **dict([*ENCODER.items()][1:])}}, "net.", 0),
    "list": ({"models": [ENCODER, OTHER]}, "models.0.", 0),
    "profiled": ({**ENCODER, "total_ops": torch.zeros(()), "layer1.0.conv1.total_ops": torch.zeros(())}, "", 2),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_one_prefix_explains_all_names_and_shapes(kind: str, tmp_path: Path) -> None:
    content, prefix, left = WRAPPED[kind]
    found = find(tmp_path, content)
    assert equal(found, ENCODER) and found.prefix == prefix and len(found.left) == left
    note = found.note()
    assert "120 tensors loaded" in note and (not prefix or f"under {prefix.rstrip('.')!r}" in note)
    assert not left or f"{left} not used: {found.left[0]}" in note
    finetuned = find(tmp_path, content, want=wanted(headless=False))
    assert equal(finetuned, ENCODER) and finetuned.prefix == prefix


@pytest.mark.parametrize(
    ("kind", "key", "prefix"),
    [
        ("momentum", "encoder_k", "state_dict.module.encoder_k."),
        ("teacher_student", "teacher", "teacher.backbone."),
        ("ema_beside", "model_ema", "model_ema."),
        ("online_target", "target_encoder.net", "target_encoder.net."),
        ("list", "models.1", "models.1."),
    ],
)
def test_a_flag_chooses_where_several_fit(kind: str, key: str, prefix: str, tmp_path: Path) -> None:
    content, default, _ = WRAPPED[kind]
    found = find(tmp_path, content, Choice(key))
    assert equal(found, OTHER) and found.prefix == prefix and found.others == [default]
    assert f"for --weights-key: {default.rstrip('.')}" in found.note()


def test_a_key_that_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no names that contain --weights-key 'ema'; they start with teacher, student"):
        find(tmp_path, WRAPPED["teacher_student"][0], Choice("ema"))


def test_files_of_other_precision_and_versions(tmp_path: Path) -> None:
    half = {n: v.half() if v.is_floating_point() else v for n, v in ENCODER.items() if not n.endswith("num_batches_tracked")}
    found = find(tmp_path, under("module.", half))
    assert len(found.state) == 100 and found.prefix == "module."
    network, missing, _ = read_pretrained(tmp_path / "file.pth", "resnet18").dense(3)
    assert torch.equal(network.conv1.weight, half["conv1.weight"].float()) and missing == ["fc.weight", "fc.bias"]
    ordered = torchvision.models.resnet18().state_dict()
    assert hasattr(ordered, "_metadata") and len(find(tmp_path, {"state_dict": ordered}).state) == 120
    arrays = {name: value.numpy() for name, value in ENCODER.items()}
    assert equal(find(tmp_path, {"model": arrays}), ENCODER)
    save_file(under("backbone."), tmp_path / "file.safetensors")
    assert equal(find_weights(read_tensors(tmp_path / "file.safetensors"), wanted(), "file"), ENCODER)
    (tmp_path / "file.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert equal(find_weights(read_tensors(tmp_path / "pytorch_model.bin"), wanted(), "file"), ENCODER)
    torch.save({"model": WHOLE}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(find_weights(read_tensors(tmp_path / "old.pth"), wanted(), "old"), ENCODER)
    integers = {**ENCODER, "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}
    with pytest.raises(UserError, match="does not fit resnet18"):
        find(tmp_path, integers)


@pytest.mark.parametrize(
    ("name", "source", "library", "prefix"),
    [
        ("resnet50", "resnet50", "detectron2", "model.backbone.bottom_up."),
        ("resnet18", "resnet18", "mmpretrain", ""),
        ("convnext_tiny", "convnext_tiny", "mmpretrain", "module."),
        ("convnext_tiny", "convnext_tiny", "timm", "student.backbone."),
        ("timm:convnextv2_atto", "timm:convnextv2_atto", "convnext", "encoder."),
        ("timm:convnext_tiny", "convnext_tiny", "convnext", "state_dict_ema."),
    ],
)
def test_a_prefix_and_another_librarys_names(name: str, source: str, library: str, prefix: str, tmp_path: Path) -> None:
    own = wanted(source).own
    expected = {n: torch.randn(v.shape) if v.is_floating_point() else v for n, v in own.items()}
    origin = origin_of(library_of(source), expected)
    found = find(tmp_path, under(prefix, translate(expected, origin, library)), want=wanted(name))
    ours = translate(expected, origin, library_of(name))
    assert all(torch.equal(value, ours[n].view(value.shape)) for n, value in found.state.items())
    assert ours.keys() - found.state.keys() == {
        n for n in ours if n.endswith("num_batches_tracked") and library == "detectron2"
    }


def test_what_a_network_itself_calls_its_encoder_may_be_missing_in_the_file(tmp_path: Path) -> None:
    want = Wanted("own:net", "own", under("trunk.body."), 3)
    assert equal(find(tmp_path, WHOLE, want=want), under("trunk.body."))
    assert equal(find(tmp_path, under("trunk.body."), want=want), under("trunk.body."))
    small = wanted("mobilenet_v3_small")
    assert find(tmp_path, small.own, want=small).prefix == ""
    of_features = {name.removeprefix("features."): value for name, value in small.own.items()}
    assert equal(find(tmp_path, under("backbone.", of_features), want=small), small.own)


def test_weights_of_another_network_are_refused_with_the_names_of_both(tmp_path: Path) -> None:
    renamed = {name.replace("conv1", "first").replace("layer", "stage"): value for name, value in ENCODER.items()}
    with pytest.raises(UserError) as caught:
        find(tmp_path, {"net": renamed})
    message = str(caught.value)
    assert "does not fit resnet18: 5 of its 120 tensors match" in message and "\n" not in message
    assert re.search(r"net.layer1.(\S+) \(64,\) is missing, the file has net.stage1.\1 \(64,\)", message)
    with pytest.raises(UserError, match=r"conv1.weight .* is missing.* the file has stem.0.w \(64, 3, 3, 3\), head.w \(5,\)"):
        find(tmp_path, {"stem.0.w": torch.zeros(64, 3, 3, 3), "head.w": torch.zeros(5)})
    wide = {**ENCODER, "layer1.0.conv1.weight": torch.zeros(64, 64, 5, 5)}
    with pytest.raises(UserError, match=r"module.layer1.0.conv1.weight is \(64, 64, 5, 5\), not \(64, 64, 3, 3\)"):
        find(tmp_path, under("module.", wide))


@pytest.mark.parametrize(("file", "model"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_a_deeper_networks_weights_are_not_cut(file: str, model: str, tmp_path: Path) -> None:
    for headless in (True, False):
        with pytest.raises(UserError, match=f"file.pth (has more than|does not fit) {model}"):
            find(tmp_path, under("model.", wanted(file).own), want=wanted(model, headless=headless))


def test_one_series_of_blocks_may_be_the_longer_one(tmp_path: Path) -> None:
    own = wanted("convnext_tiny").own
    longer = own | {n.replace(".5.8.", ".5.9."): v for n, v in own.items() if ".5.8." in n}
    with pytest.raises(UserError, match=r"has more than convnext_tiny: features.5.9.* is it of a larger network\?"):
        find(tmp_path, longer, want=wanted("convnext_tiny"))


def test_parts_of_layers_that_the_network_lacks_are_said(tmp_path: Path) -> None:
    found = find(tmp_path, {**WHOLE, "layer1.0.se.fc1.weight": BOX, "layer1.0.conv1.total_ops": torch.zeros(())})
    assert found.inside == 1 and "(1 of them inside loaded layers: is it another kind of network?)" in found.note()


def test_a_few_layers_are_not_a_network(tmp_path: Path) -> None:
    stem = {name: value for name, value in WHOLE.items() if name.startswith(("conv1", "bn1"))}
    with pytest.raises(UserError, match=r"6 of its 120 tensors match, .*layer1.0.conv1.weight \(64, 64, 3, 3\) is missing"):
        find(tmp_path, stem, want=wanted(headless=False))


def test_a_neck_behind_a_numbered_backbone_is_left_over(tmp_path: Path) -> None:
    own = {f"model.{i}.conv.weight": torch.randn(8, 8 if i else 3, 3, 3) for i in range(10)}
    neck = {f"model.{i}.conv.weight": torch.randn(4, 4, 1, 1) for i in range(10, 23)}
    found = find(tmp_path, own | neck, want=Wanted("own:yolo", "own", own, 3))
    assert equal(found, own) and len(found.left) == 13


# --- other numbers of channels ----------------------------------------------------------------------------------------------


def test_a_stem_of_other_channels_is_refused_or_adapted_as_the_flag_says(tmp_path: Path) -> None:
    grey = {**WHOLE, "conv1.weight": WHOLE["conv1.weight"][:, :1]}
    with pytest.raises(UserError, match=r"conv1.weight is for 1 channels, but resnet18 here has 3; pass --adapt-stem"):
        find(tmp_path, {"model": grey})
    found = find(tmp_path, {"model": grey}, Choice(adapt_stem="repeat"))
    torch.testing.assert_close(found.state["conv1.weight"], grey["conv1.weight"].expand(-1, 3, -1, -1) / 3)
    assert "conv1.weight adapted from 1 to 3 channels by --adapt-stem repeat" in found.note()
    assert "--adapt-stem sum had nothing to do" in find(tmp_path, ENCODER, Choice(adapt_stem="sum")).note()
    both = {"a": grey, "b": ENCODER}  # what fits is taken before what would have to be changed
    assert find(tmp_path, both).prefix == "b."
    five = find(tmp_path, ENCODER, Choice(adapt_stem="mean"), wanted(channels=5))
    torch.testing.assert_close(five.state["conv1.weight"], ENCODER["conv1.weight"].mean(1, keepdim=True).expand(-1, 5, -1, -1))


@pytest.mark.parametrize(("given", "channels"), [(3, 1), (1, 3), (3, 4), (4, 3)])
def test_equal_channels_give_what_they_gave_before(given: int, channels: int) -> None:
    weight = torch.randn(8, given, 3, 3)
    image = torch.randn(1, 1, 9, 9)
    before = nn.functional.conv2d(image.expand(-1, given, -1, -1), weight)
    after = nn.functional.conv2d(image.expand(-1, channels, -1, -1), adapted_stem(weight, channels, "sum"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    repeated = adapted_stem(weight.half(), channels, "repeat")
    assert repeated.shape == (8, channels, 3, 3) and repeated.dtype == torch.float32
    torch.testing.assert_close(repeated[:, -1] * channels / given, weight[:, (channels - 1) % given].half().float())
    torch.testing.assert_close(adapted_stem(weight, channels, "mean")[:, 0], weight.mean(1))


# --- what is read without running code ---------------------------------------------------------------------------------------


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_by_name(zipped: bool, tmp_path: Path) -> None:
    for content in (
        {"state_dict": WHOLE, "args": Evil(tmp_path / "made")},
        {"state_dict": WHOLE, "args": argparse.Namespace(x=Evil(tmp_path / "made"))},
        {"state_dict": WHOLE, "args": collections.defaultdict(list, x=Evil(tmp_path / "made"))},
    ):
        torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"more than tensors and plain values \(\w+.mkdir\), which could run code"):
            read_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_plain_data_beside_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("EasyDict", (dict,), {"__module__": "easydict"})
    tree = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})()
    tree._content = {"lr": 1}
    monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "easydict", SimpleNamespace(EasyDict=config))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", SimpleNamespace(DictConfig=type(tree)))
    beside = {
        "path": pathlib.Path("a/b"),
        "counts": collections.defaultdict(list, {"x": [1]}),
        "config": config(width=3),
        "tree": tree,
        "deque": collections.deque([1], 5),
        "space": SimpleNamespace(x=1),
        "size": torch.Size([3]),
        "array": np.arange(6.0).reshape(2, 3),
        "flag": np.bool_(True),
        "words": np.array(["a", "b"]),
        "complex": 1j,
        "set": {1},
        "options": argparse.Namespace(deep=argparse.Namespace(lr=1)),
        "type": int,
        "rng": np.random.default_rng(0).bit_generator.state,
    }
    torch.save({"state_dict": WHOLE, **beside}, tmp_path / "file.pth")
    for name in ("easydict", "omegaconf", "omegaconf.dictconfig"):
        monkeypatch.delitem(sys.modules, name)
    found = find_weights(read_tensors(tmp_path / "file.pth"), wanted(), "file.pth")
    assert equal(found, ENCODER)
    weights = read_tensors(tmp_path / "file.pth")
    assert weights["array"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pickled_networks_and_programs_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"model": torchvision.models.resnet18()}, tmp_path / "module.pth")
    with pytest.raises(
        UserError,
        match=r"\(torchvision.models.resnet.ResNet\).* only, in the code that made it: torch.save\(network.state_dict",
    ):
        read_tensors(tmp_path / "module.pth")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(UserError, match=r"TorchScript archive.*torch.jit.load\(FILE\).state_dict\(\)"):
        read_tensors(tmp_path / "program.pt")
    for content in (b"", b"hello", pickle.dumps({"model": np.zeros(3)}, protocol=4)):
        (tmp_path / "other.pkl").write_bytes(content)
        with pytest.raises(UserError, match=r"other.pkl cannot be read as weights: it is .*not in one of torch's formats$"):
            read_tensors(tmp_path / "other.pkl")
    torch.save({"epoch": 3, "name": "x"}, tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "nothing.pth")


def test_containers_that_hold_themselves_end(tmp_path: Path) -> None:
    content: State = {"state_dict": ENCODER}
    content["self"] = content
    many: list[Any] = []
    for _ in range(60):
        many = [many, many]
    assert equal(find(tmp_path, {**content, "many": many}), ENCODER)


# --- the authors' ConvNeXt V2 ------------------------------------------------------------------------------------------------


def minkowski_file(dense: nn.Module) -> State:
    """The file that the authors' pretraining would have of timm's ConvNeXt V2, by an own way through NumPy's axes."""
    out: State = {"mask_token": torch.zeros(1, 8, 1, 1), "decoder.0.dwconv.weight": torch.zeros(8, 1, 7, 7)}
    for name, value in dense.state_dict().items():
        parts = name.split(".")
        if parts[0] == "head":
            continue
        if parts[0] == "stem":
            out[f"encoder.downsample_layers.0.{parts[1]}.{parts[2]}"] = value
            continue
        stage, rest = parts[1], ".".join(parts[2:])
        if parts[2] == "downsample" and parts[3] == "0":
            out[f"encoder.downsample_layers.{stage}.0.ln.{parts[4]}"] = value
        elif rest == "downsample.1.weight":
            c_out, c_in, height, width = value.shape
            kernel = torch.empty(height * width, c_in, c_out)
            for y in range(height):
                for x in range(width):
                    kernel[x * height + y] = value[:, :, y, x].T
            out[f"encoder.downsample_layers.{stage}.1.kernel"] = kernel
        elif rest == "downsample.1.bias":
            out[f"encoder.downsample_layers.{stage}.1.bias"] = value[None]
        else:
            block = f"encoder.stages.{stage}.{parts[3]}"
            rest = ".".join(parts[4:])
            if rest == "conv_dw.weight":
                out[f"{block}.dwconv.kernel"] = torch.stack([value[:, 0, k % 7, k // 7] for k in range(49)])
            elif rest == "conv_dw.bias":
                out[f"{block}.dwconv.bias"] = value[None]
            elif parts[4] == "norm":
                out[f"{block}.norm.ln.{parts[5]}"] = value
            elif parts[5] == "grn":
                out[f"{block}.grn.{'gamma' if parts[6] == 'weight' else 'beta'}"] = value[None]
            else:
                out[f"{block}.pwconv{parts[5][2:]}.linear.{parts[6]}"] = value.flatten(1) if parts[6] == "weight" else value
    return out


@pytest.mark.parametrize("name", ["timm:convnextv2_atto", "timm:convnextv2_nano"])
def test_minkowski_checkpoints_of_convnext_v2_give_the_same_network(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = timm.create_model(name.removeprefix("timm:")).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(0, 0.1)
    found = find(tmp_path, {"model": minkowski_file(dense), "args": argparse.Namespace(lr=1)}, want=wanted(name))
    assert found.prefix == "model.encoder." and "names of minkowski" in found.note() and len(found.left) == 2
    twin = timm.create_model(name.removeprefix("timm:")).eval()
    missing = twin.load_state_dict(found.state, strict=False).missing_keys
    assert all(key.startswith("head.") for key in missing)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(twin.forward_features(images), dense.forward_features(images))


@pytest.mark.parametrize(("size", "stride"), [(7, 1), (2, 2)])
def test_kernels_are_as_minkowskiengine_applies_them(size: int, stride: int) -> None:
    from sparkme.weights.minkowski import CONVNEXT

    torch.manual_seed(0)
    depthwise = size == 7
    kind = ME.MinkowskiChannelwiseConvolution if depthwise else ME.MinkowskiConvolution
    sizes = (4,) if depthwise else (4, 6)
    layer = kind(*sizes, kernel_size=size, stride=stride, bias=True, dimension=2)
    nn.init.normal_(layer.kernel)
    nn.init.normal_(layer.bias)
    prefix = "stages.0.0.dwconv." if depthwise else "downsample_layers.1.1."
    theirs = {prefix + name: value.detach() for name, value in layer.named_parameters()}
    ours = {name.rpartition(".")[2]: value for name, value in CONVNEXT.to_hub(theirs).items()}
    images = torch.randn(2, 4, 8, 12)
    sites = torch.ones(2, 8, 12).nonzero().int().contiguous()
    out = layer(ME.SparseTensor(images.permute(0, 2, 3, 1).reshape(-1, 4).contiguous(), sites))
    expected = nn.functional.conv2d(
        images, ours["weight"], ours["bias"], stride, size // 2 if depthwise else 0, 1, 4 if depthwise else 1
    )
    shape = torch.Size(expected.shape)
    got = out.dense(shape=torch.Size([2, shape[1], 8 // stride, 12 // stride]), min_coordinate=torch.IntTensor([0, 0]))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
