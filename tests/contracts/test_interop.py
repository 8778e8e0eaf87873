"""Weights under other libraries' names: there and back bit for bit, and loaded by the libraries themselves."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from commands import SMALL, fails
from random_models import BASIC, CONVNEXT, basic, bottleneck, convnext, grouped
from safetensors.torch import load_file, save_file
from timm.models import convnext as timms_convnext
from timm.models import resnet as timms_resnet
from torch import Tensor, nn

import sparkme
import sparkme.export
from sparkme import pretrain
from sparkme.errors import UserError
from sparkme.training.pretraining import load_initial_weights
from sparkme.weights.libraries import TABLES, Origin, origin_of, translate
from sparkme.weights.prefixes import Wanted, find_weights
from sparkme.weights.pretrained import read_pretrained
from sparkme.weights.spark import join_official_state, split_official_state


def weights(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value + 3 for name, value in model.state_dict().items()
    }


def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(("fc.", "classifier.", "head."))}


MODELS = {
    ("torchvision", "resnet"): grouped,
    ("torchvision", "convnext"): convnext,
    ("timm", "resnet"): lambda: timms_resnet.ResNet(timms_resnet.Bottleneck, (1, 2, 1, 1), base_width=16),
    ("timm", "convnext"): lambda: timms_convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(24, 48, 96, 192)),
    ("timm", "convnextv2"): lambda: timm.create_model("convnextv2_nano"),  # with 1x1 convolutions for linear layers
}


@pytest.mark.parametrize("kind", MODELS, ids="-".join)
def test_every_table_is_read_both_ways(kind: tuple[str, str]) -> None:
    library, family = kind[0], kind[1].removesuffix("v2")
    state = headless(weights(MODELS[kind]()))
    origin = origin_of(library, state)
    assert origin == Origin(library, family)
    for target, table in TABLES[family].items():
        if kind[1] == "convnextv2" and target == "torchvision":  # which has no V2
            with pytest.raises(ValueError, match=r"weight 'stages.0.0.grn.weight|weight 'stages.0.0.grn.gamma'"):
                translate(state, origin, target)
            continue
        there = translate(state, origin, target)
        assert len(there) == sum(name.rpartition(".")[2] not in table.dropped for name in state)
        assert target == library or there.keys() != state.keys() or {target, library} == {"torchvision", "timm"}
        back = translate(there, Origin(target, family), library)
        assert all(torch.equal(value.view_as(state[name]), state[name]) for name, value in back.items())
        assert {name for name in state if name not in back} == {n for n in state if n.endswith(tuple(table.dropped or ("?",)))}


@pytest.mark.parametrize(("family", "network"), [("resnet", bottleneck), ("convnext", convnext)])
def test_timm_loads_torchvisions_weights_and_computes_the_same(family: str, network: Callable[[], nn.Module]) -> None:
    theirs, ours = MODELS["timm", family]().eval(), network().eval()
    state = headless(ours.state_dict())
    missing, unexpected = theirs.load_state_dict(translate(state, origin_of("torchvision", state), "timm"), strict=False)
    assert not unexpected and all(key.startswith(("fc.", "head.")) for key in missing)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = sparkme.sparsify(ours).eval()(images, torch.ones(2, 1, 2, 2, dtype=torch.bool))[-1].dense()
        assert torch.allclose(theirs.forward_features(images), expected, atol=1e-4 * float(expected.abs().max()))


class Detectron2Block(nn.Module):
    """The names of detectron2's BottleneckBlock: convolutions that own their norm."""

    def __init__(self, channels_in: int, width: int, shortcut: bool) -> None:
        super().__init__()
        out = 4 * width
        for name, (a, b, k) in {"conv1": (channels_in, width, 1), "conv2": (width, width, 3), "conv3": (width, out, 1)}.items():
            self.add_module(name, detectron2_conv(a, b, k))
        if shortcut:
            self.shortcut = detectron2_conv(channels_in, out, 1)


def detectron2_conv(a: int, b: int, k: int) -> nn.Conv2d:
    conv = nn.Conv2d(a, b, k, bias=False)
    conv.norm = nn.BatchNorm2d(b)
    return conv


def detectron2_resnet50() -> nn.Module:
    net = nn.Module()
    net.stem = nn.Module()
    net.stem.conv1 = detectron2_conv(3, 64, 7)
    channels = 64
    for stage, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 2):
        blocks = []
        for i in range(depth):
            blocks.append(Detectron2Block(channels, width, i == 0))
            channels = 4 * width
        setattr(net, f"res{stage}", nn.Sequential(*blocks))
    return net


def mmpretrain_convnext_tiny() -> nn.Module:
    """The names of mmpretrain's ConvNeXt under `backbone.`: ModuleLists of downsampling layers and stages."""
    dims, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    backbone = nn.Module()
    norms = [nn.LayerNorm(d) for d in dims]
    downs = [nn.Sequential(nn.Conv2d(3, 96, 4), norms[0])]
    downs += [nn.Sequential(nn.LayerNorm(a), nn.Conv2d(a, b, 2)) for a, b in [(96, 192), (192, 384), (384, 768)]]
    backbone.downsample_layers = nn.ModuleList(downs)
    stages = []
    for dim, depth in zip(dims, depths, strict=True):
        blocks = []
        for _ in range(depth):
            block = nn.Module()
            block.depthwise_conv, block.norm = nn.Conv2d(dim, dim, 7, groups=dim), nn.LayerNorm(dim)
            block.pointwise_conv1, block.pointwise_conv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            block.gamma = nn.Parameter(torch.ones(dim))
            blocks.append(block)
        stages.append(nn.Sequential(*blocks))
    backbone.stages = nn.ModuleList(stages)
    net = nn.Module()
    net.backbone = backbone
    return net


def test_other_libraries_networks_load_every_name_and_shape() -> None:
    with torch.device("meta"):  # shapes are enough
        networks = (
            (torchvision.models.resnet50(), "detectron2", detectron2_resnet50()),
            (torchvision.models.convnext_tiny(), "mmpretrain", mmpretrain_convnext_tiny()),
        )
    for model, library, skeleton in networks:
        state = headless(model.state_dict())
        missing, unexpected = skeleton.load_state_dict(
            translate(state, origin_of("torchvision", state), library), strict=False, assign=True
        )
        assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto", "convnextv2_atto"])
def test_networks_of_transformers_compute_the_same(name: str) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="Hugging Face's transformers is not installed, which is no dependency"
    )
    model = timm.create_model(name, num_classes=0).double().eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 0.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.1)
    if name.startswith("resnet"):
        widths, depths, kind = (
            ((64, 128, 256, 512), (2, 2, 2, 2), "basic")
            if name == "resnet18"
            else ((256, 512, 1024, 2048), (3, 4, 6, 3), "bottleneck")
        )
        config = transformers.ResNetConfig(hidden_sizes=[*widths], depths=[*depths], layer_type=kind)
        theirs = transformers.ResNetModel(config).double().eval()
    else:
        kind = "ConvNextV2" if "v2" in name else "ConvNext"
        config = getattr(transformers, f"{kind}Config")(hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2])
        theirs = getattr(transformers, f"{kind}Model")(config).double().eval()
    state = headless(model.state_dict())
    missing, unexpected = theirs.load_state_dict(translate(state, origin_of("timm", state), "transformers"), strict=False)
    assert not unexpected and all(key.startswith("layernorm.") for key in missing)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).last_hidden_state, model.forward_features(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_networks_of_1x1_convolutions_have_the_authors_linear_layers_there_and_back(name: str) -> None:
    state = headless(timm.create_model(name).state_dict())
    theirs = translate(state, origin_of("timm", state), "convnext")
    assert theirs["stages.0.0.pwconv1.weight"].shape == (160, 40)
    found = find_weights(theirs, Wanted(name, "timm", state, 3), "x.pth").state
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_what_no_table_knows_is_refused_with_what_is_possible() -> None:
    deep_stem = headless(timm.create_model("resnet10t").state_dict())
    assert origin_of("timm", deep_stem) == Origin("timm", None)
    with pytest.raises(ValueError, match="this network of timm has no names in detectron2; leave out --to to keep its own"):
        translate(deep_stem, Origin("timm", None), "detectron2")
    with pytest.raises(
        ValueError,
        match=r"a convnext of torchvision has no names in detectron2; leave out --to .*, or use --to timm or conv",
    ):
        translate({}, Origin("torchvision", "convnext"), "detectron2")


@pytest.mark.parametrize(
    "name",
    [BASIC, CONVNEXT, "small_resnet:resnet", "timm:convnext_atto", "timm:convnextv2_atto"],
)
def test_weights_go_through_the_sparse_encoder_unchanged(name: str) -> None:
    from sparkme.networks.create import create_dense

    dense = create_dense(name)
    state = weights(dense)
    encoder = sparkme.sparsify(dense)
    encoder.load_dense_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in encoder.dense_state_dict().items())


@pytest.mark.parametrize("network", [basic, convnext])
def test_official_names_there_and_back(network: Callable[[], nn.Module]) -> None:
    model = sparkme.SparK(sparkme.sparsify(network()), input_size=64, decoder_width=32)
    state = model.encoder.dense_state_dict()
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    official = join_official_state(translate(state, origin_of("torchvision", state), "spark"), rest)
    assert all(key.startswith(("sparse_encoder.sp_cnn.", "dense_decoder.", "densify_", "mask_tokens.")) for key in official)
    encoder, others = split_official_state(official)
    assert all(torch.equal(encoder[key], value) for key, value in state.items())
    assert others.keys() == rest.keys()


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert pretrain.main([*SMALL, "--epochs", "1", "--panel-epochs", "0", "--output", str(folder)]) == 0
    return folder / "checkpoints" / "last.pt"


def export(checkpoint: Path, *words: object) -> int:
    return sparkme.export.main([str(checkpoint), *map(str, words)])


def test_export_to_timm_mmpretrain_detectron2_and_spark(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, "--to", "timm", "--output", tmp_path / "a.safetensors") == 0
    assert capsys.readouterr().out.count("dense and sparse features differ by") == 4
    model = timm.create_model("resnet18")
    assert not model.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=False).unexpected_keys
    assert export(run, "--to", "mmpretrain", "--output", tmp_path / "b.pth", "--no-verify") == 0
    assert all(name.startswith("backbone.") for name in torch.load(tmp_path / "b.pth", weights_only=True))
    assert export(run, "--to", "detectron2", "--output", tmp_path / "c.pkl", "--no-verify") == 0
    content = pickle.loads((tmp_path / "c.pkl").read_bytes())
    assert content["matching_heuristics"] and "res2.0.conv1.norm.running_mean" in content["model"]
    assert "INPUT.FORMAT RGB" in json.loads((tmp_path / "c.pkl.json").read_text())["detectron2"]
    assert export(run, "--to", "spark", "--output", tmp_path / "d.pth", "--no-verify") == 0
    state = torch.load(tmp_path / "d.pth", weights_only=True)
    twin = sparkme.SparK(sparkme.sparsify(torchvision.models.resnet18()), input_size=64, decoder_width=32)
    twin.load_official_state_dict(state)
    saved = torch.load(run, weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in twin.state_dict().items())
    capsys.readouterr()
    assert export(run, "--to", "convnext", "--output", tmp_path / "e.pth") == 2
    assert "a resnet of torchvision has no names in convnext" in capsys.readouterr().err


def test_a_hub_folder_is_loaded_by_timm(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hub"
    assert export(run, "--to", "timm", "--hub-folder", folder) == 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert "SparK (Tian et al." in (folder / "README.md").read_text()
    sent: list[tuple[str, str]] = []

    class Api:
        def create_repo(self, repo_id: str, exist_ok: bool) -> None:
            if repo_id == "nobody/nothing":
                raise OSError("no token\nand more")

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            sent.append((repo_id, folder_path))
            return "url"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    again = ["--to", "timm", "--hub-folder", folder, "--no-verify", "--overwrite", "--push-to-hub"]
    assert export(run, *again, "me/mine") == 0
    assert sent == [("me/mine", str(folder))]
    capsys.readouterr()
    assert export(run, *again, "nobody/nothing") == 2
    error = capsys.readouterr().err
    assert "--push-to-hub nobody/nothing failed: no token;" in error and error.count("\n") == 1
    assert export(run, "--to", "timm", "--hub-folder", folder) == 2
    assert export(run, "--push-to-hub", "me/mine") == 2


def test_a_hub_folder_of_a_network_with_a_norm_in_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--model", "timm:convnextv2_atto", "--epochs", "1", "--panel-epochs", "0", "--drop-path", "0"]
    assert pretrain.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip().endswith("-m sparkme.export " + str(tmp_path / "run" / "checkpoints" / "last.pt"))
    last, folder = tmp_path / "run" / "checkpoints" / "last.pt", tmp_path / "hub"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    assert export(last, "--to", "timm", "--hub-folder", folder) == 2
    assert (folder / "README.md").read_text() == "mine" and "README.md exists" in capsys.readouterr().err
    assert export(last, "--to", "timm", "--hub-folder", folder, "--overwrite") == 0
    assert "not pretrained, as timm makes them new: head.norm.weight" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    twin = timm.create_model("convnextv2_atto")
    sparse = sparkme.sparsify(twin)
    sparse.load_dense_state_dict(model.state_dict())
    saved = {n.removeprefix("encoder."): v for n, v in torch.load(last, weights_only=True)["model"].items() if "encoder." in n}
    assert all(torch.equal(value, saved[name]) for name, value in sparse.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    state = {f"{prefix}{n}": v for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "wrapped.pth")
    fresh = sparkme.SparK(sparkme.sparsify(torchvision.models.resnet18()), input_size=64, decoder_width=32)
    load_initial_weights(fresh, tmp_path / "wrapped.pth", "resnet18")
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in fresh.encoder.dense_state_dict().items())


def test_batch_norm_is_recalibrated_on_whole_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pictures import make_images

    from sparkme.data.dataset import normalise, preview_images

    make_images(tmp_path / "images", 6)
    paths = sorted((tmp_path / "images").rglob("*.*"))
    output = tmp_path / "new.pth"
    assert export(run, "--output", output, "--recalibrate-bn", tmp_path / "images") == 0
    assert "batch norm recalibrated on 6 whole images: means moved by" in capsys.readouterr().out
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(output, weights_only=True), strict=False)
    images = normalise(preview_images(paths, (64, 64), len(paths)))
    out = model.conv1(images)
    assert torch.allclose(model.bn1.running_mean, out.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.bn1.running_var, out.var((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("kind", ["torchvision", "mmpretrain", "official", "encoder", "checkpoint", "folder"])
def test_init_takes_weights_of_every_kind_and_reports(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    model = sparkme.SparK(sparkme.sparsify(torchvision.models.resnet18()), input_size=64, decoder_width=32)
    expected = model.encoder.dense_state_dict()
    if kind == "torchvision":
        torch.save(expected | {"fc.weight": torch.zeros(2, 512)}, path)
    elif kind == "mmpretrain":
        torch.save({"state_dict": translate(expected, Origin("torchvision", "resnet"), "mmpretrain")}, path)
    elif kind == "folder":
        save_file({name: value.clone() for name, value in expected.items()}, tmp_path / "model.safetensors")
        path = tmp_path
    elif kind == "checkpoint":
        path = run
        saved = torch.load(run, weights_only=True)["model"]
        model.load_state_dict(saved)
        expected = model.encoder.dense_state_dict()
    else:
        rest = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
        torch.save(join_official_state(expected, rest if kind == "official" else {}), path)
    fresh = sparkme.SparK(sparkme.sparsify(torchvision.models.resnet18()), input_size=64, decoder_width=32)
    report = load_initial_weights(fresh, path, "resnet18")
    assert all(torch.equal(value, expected[name]) for name, value in fresh.encoder.dense_state_dict().items())
    assert ("random: " in report) == (kind not in ("official", "checkpoint"))
    assert ("not used: fc.weight" in report) == (kind == "torchvision")
    if kind == "official":
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_a_wrapped_official_file_brings_its_decoder(tmp_path: Path) -> None:
    model = sparkme.SparK(sparkme.sparsify(torchvision.models.resnet18()), input_size=64, decoder_width=32)
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    official = join_official_state(model.encoder.dense_state_dict(), rest)
    extra = {"imn_m": torch.zeros(1, 3, 1, 1), "dense_decoder.more": torch.zeros(3)}
    torch.save({"module": {f"module.{n}": v for n, v in (official | extra).items()}, "epoch": 1}, tmp_path / "official.pth")
    fresh = sparkme.SparK(sparkme.sparsify(torchvision.models.resnet18()), input_size=64, decoder_width=32)
    report = load_initial_weights(fresh, tmp_path / "official.pth", "resnet18")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert "names of the official SparK code" in report and f"{len(rest)} of the decoder" in report
    assert "2 not used: module.module.imn_m, module.module.dense_decoder.more" in report and "random" not in report


def test_the_commands_pass_on_how_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torchvision.models.resnet18().state_dict()
    grey = state | {"conv1.weight": state["conv1.weight"].sum(1, keepdim=True)}
    path = tmp_path / "checkpoints" / "last.pt"  # as other programs call theirs
    path.parent.mkdir()
    torch.save({"student": state, "teacher": {f"backbone.{n}": v for n, v in grey.items()}}, path)
    words = [*SMALL, "--epochs", "1", "--panel-epochs", "0", "--init", path]
    assert "pass --adapt-stem" in fails(capsys, *words, "--weights-key", "teacher", "--output", tmp_path / "run")
    words += ["--weights-key", "teacher", "--adapt-stem", "sum", "--output", tmp_path / "run"]
    assert pretrain.main([*map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert (
        "under 'teacher.backbone', names of torchvision: 120 tensors loaded; conv1.weight adapted from 1 to 3 channels" in shown
    )
    assert "4 not used: teacher.backbone.fc.weight, teacher.backbone.fc.bias, student.fc.weight, student.fc.bias;" in shown
    assert "other weights in the file, for --weights-key: student;" in shown
    found = read_pretrained(path, "resnet18")
    assert torch.equal(found.dense(3)[0].conv1.weight, state["conv1.weight"])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"last.pt is damaged: the archive cannot be read"):
        read_pretrained(path, "resnet18")


def test_init_refuses_weights_of_another_network(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--output", tmp_path / "run", "--init"]
    torch.save(convnext().state_dict(), tmp_path / "other.pth")
    assert "does not fit resnet18: 0 of its 120 tensors match" in fails(capsys, *words, tmp_path / "other.pth")
    state = torchvision.models.resnet18().state_dict() | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    torch.save(state, tmp_path / "shape.pth")
    message = fails(capsys, *words, tmp_path / "shape.pth")
    assert "conv1.weight is for 1 channels, but resnet18 here has 3; pass --adapt-stem" in message
    assert "no file" in fails(capsys, *words, tmp_path / "none.pth")
    assert "does not fit resnet34" in fails(capsys, *words[:-1], "--model", "resnet34", "--init", run)
    assert "need --init, the weights to read" in fails(capsys, *words[:-1], "--weights-key", "teacher")
