"""`python -m sparkme.visualize`: what its pictures show and say, for all kinds of checkpoints, and what it refuses."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import sparkme
from sparkme.data.dataset import centre_crop, denormalise, normalise
from sparkme.data.images import load_image
from sparkme.reporting import panel
from sparkme.reporting.mask_pattern import LEAKED, draw_mask_pattern, share, trace_mask
from sparkme.reporting.visualize import reconstruct
from sparkme.settings.declare import from_config
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training.build import build_network
from sparkme.training.checkpoint import Checkpoints
from sparkme.visualize import create_parser, main
from sparkme.weights.checkpoint import load_checkpoint

CONFIG = {
    "recipe": "spark",
    "model": "small_resnet:resnet",
    "drop_path": 0.0,
    "mask_ratio": 0.5,
    "decoder_width": 32,
    "patch": None,
    "input_size": [64, 96],
    "densify_norm": "auto",
    "norm_pix_loss": True,
    "channels": 3,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "background": "red",
    "seed": 3,
}
FCMAE = {"recipe": "fcmae", "model": "timm:test_convnext2", "decoder_width": 64}


def save(folder: Path, **changes: Any) -> Path:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(0)
    config = CONFIG | changes
    return Checkpoints(folder, 1).save(
        {"model": build_network(from_config(PretrainSettings, config)).state_dict(), "config": config}, 7
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "checkpoints")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> sparkme.SparK:
    saved = load_checkpoint(checkpoint)
    network = build_network(from_config(PretrainSettings, saved["config"]))
    network.load_state_dict(saved["model"])
    return network.eval()


def photographs(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    paths = [folder / f"photograph{i}.png" for i in range(count)]
    for path, values in zip(paths, pixels, strict=True):
        Image.fromarray(values).resize((120, 100), Image.Resampling.BICUBIC).save(path)
    return paths


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


class Page(HTMLParser):
    """What a page holds: its elements, its pictures, its texts."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += f" {data.strip()}"


def test_the_four_pictures_are_what_their_titles_say(model: sparkme.SparK) -> None:
    image = torch.rand(3, 64, 96)
    statistics = panel.Statistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    result = reconstruct(model, image, "x.png", 3, statistics, "true")
    original, masked, painted, error = result.pictures
    active = model.random_active(1, torch.Generator().manual_seed(3))
    visible = oracle.upsample_mask(active, 64, 96)[0].bool().expand(3, -1, -1)
    assert torch.allclose(original, image, atol=1e-6)
    assert torch.equal(masked, torch.where(visible, original, 0.5)) and torch.equal(painted[visible], original[visible])
    assert (painted != original)[~visible].float().mean() > 0.9
    assert (error[visible] == panel.BLANK).all() and not (error[~visible] == panel.BLANK).all()
    images = normalise(image[None], statistics)
    with torch.no_grad():
        assert result.loss == pytest.approx(float(model(images, active)))
        _, expected = model.reconstruct(images, active)
    assert torch.allclose(painted, denormalise(expected, statistics)[0], atol=1e-6)
    assert (result.visible, result.patches) == (3, 6)


def test_the_colours_of_the_error_follow_its_scale() -> None:
    from matplotlib import colormaps

    images = torch.zeros(1, 2, 2, 2)
    painted = torch.tensor([[0.0, 0.1], [0.25, 0.9]]).expand(1, 2, 2, 2).clone()
    painted[0, 1, 1, 0] = 0.0  # the mean over channels is .125
    visible = torch.tensor([[[[True, False], [False, False]]]])
    statistics = panel.Statistics((0.0, 0.0), (1.0, 1.0))
    got = panel.error_pictures(images, painted, visible, statistics)[0].permute(1, 2, 0)
    colour = lambda share: torch.tensor(colormaps["inferno"](share)[:3])  # noqa: E731
    assert torch.allclose(got[0, 0], torch.full((3,), panel.BLANK))
    for place, share_of_scale in (((0, 1), 0.2), ((1, 0), 0.25), ((1, 1), 1.0)):
        assert torch.allclose(got[place], colour(share_of_scale).float(), atol=0.02), place


@pytest.mark.parametrize("engine", ["cuda_ext", "minkowski", "masked-dense"])
def test_predicted_statistics_do_not_look_at_hidden_pixels(model: sparkme.SparK, engine: str) -> None:
    """To the bit; with the true statistics the same change is seen."""
    images, active = torch.randn(2, 3, 64, 96), oracle.random_active(2, (2, 3), 2)
    visible = oracle.upsample_mask(active, 64, 96).bool()
    other = torch.where(visible, images, 5 * torch.randn(2, 3, 64, 96) + 3)
    model.encoder.set_engine(engine)
    try:
        first, second = (model.reconstruct(x, active, statistics="predicted")[1] for x in (images, other))
        assert torch.equal(first, second) and torch.equal(first.masked_select(visible), images.masked_select(visible))
        first, second = (model.reconstruct(x, active)[1] for x in (images, other))
        assert not torch.equal(first, second)
    finally:
        model.encoder.set_engine("auto")


def test_predicted_statistics_are_averages_weighted_by_distance(model: sparkme.SparK) -> None:
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    images *= torch.rand(1, 1, 2, 3, dtype=torch.float64).repeat_interleave(32, 2).repeat_interleave(32, 3)
    active = torch.tensor([[[[True, False, False], [False, False, True]]]])
    prediction = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    painted = model.paint(prediction, images, sparkme.Grid(active, 32), statistics="predicted")
    tiles = {(i, j): images[0, :, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32] for i in range(2) for j in range(3)}
    for (i, j), tile in tiles.items():
        got = painted[0, :, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
        if (i, j) in ((0, 0), (1, 2)):
            assert torch.equal(got, tile)
            continue
        weights = {place: 1 / ((i - place[0]) ** 2 + (j - place[1]) ** 2) for place in ((0, 0), (1, 2))}
        total = sum(weights.values())
        mean = sum(w * tiles[place].mean() for place, w in weights.items()) / total
        deviation = sum(w * (tiles[place].var() + 1e-6).sqrt() for place, w in weights.items()) / total
        expected = prediction[0, :, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32] * deviation + mean
        assert oracle.relative_error(got, expected) < 1e-12


def test_statistics_that_cannot_be_are_refused(model: sparkme.SparK) -> None:
    images, active = torch.randn(1, 3, 64, 96), oracle.random_active(1, (2, 3), 2)
    with pytest.raises(ValueError, match="'guessed' must be one of true, predicted"):
        model.reconstruct(images, active, statistics="guessed")
    plain = build_network(from_config(PretrainSettings, CONFIG | FCMAE | {"norm_pix_loss": False})).train()
    with pytest.raises(ValueError, match=r"statistics=.predicted. does not apply: this network predicts mean and deviation"):
        panel.reconstruction_panel(plain, images, active, patch_statistics="predicted")
    assert plain.training


def test_a_panel_says_where_the_statistics_come_from(model: sparkme.SparK) -> None:
    images, active = torch.randn(2, 3, 64, 96), oracle.random_active(2, (2, 3), 2)
    model.train()
    true, predicted = (
        panel.reconstruction_panel(model, images, active, patch_statistics=kind) for kind in ("true", "predicted")
    )
    assert model.training
    model.eval()
    width = 3 * 2 * 96 + 4 * panel.GAP  # twice as large, since 64 is less than the least side
    assert true.shape[::2] == predicted.shape[::2] == (3, width) and 0 <= true.min() < true.max() == 1
    below = 2 * (128 + panel.GAP) + panel.FONT_SIZE + 2 * panel.GAP
    assert not torch.equal(true[:, below:], predicted[:, below:]) and (true[:, below:] < 0.5).any()
    assert (true[:, : panel.FONT_SIZE + panel.GAP] < 0.5).any()  # the titles
    texts = [panel.caption(model, 3, kind) for kind in ("true", "predicted")]
    assert "TRUE mean and deviation" in texts[0] and "as in the paper" in texts[0]
    assert "PREDICTED from the visible patches" in texts[1] and "mean of 5 channels" in panel.caption(model, 5, "true")


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_a_picture_is_written_and_its_losses_printed(
    checkpoint: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = photographs(tmp_path / "photos")
    flags = [str(checkpoint), str(tmp_path / "photos"), "--mask-ratio", "0.4", "0.7", "--num-seeds", "2", "--max-images", "2"]
    output = tmp_path / "new" / f"picture{suffix}"
    assert main([*flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.startswith("photograph")]
    assert [line[:3] for line in lines] == [
        [path.name, ratio, seed] for path in (paths[0], paths[2]) for ratio in ("0.4", "0.7") for seed in ("0", "1")
    ]
    assert all(float(line[3]) > 0 for line in lines) and f"wrote {output}" in printed and "showing 2 of 3 images" in printed
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    if suffix == ".png":
        with Image.open(output) as picture:
            assert picture.width == 4 * 2 * 96 + 5 * panel.GAP and picture.height > 8 * 128
        return
    page = Page(output.read_text())
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 1 + 2 * 4 * 4
    for attributes in pictures[1:]:
        head, data = str(attributes["src"]).split(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert head == "data:image/png;base64" and picture.size == (96, 64)
    for tag, attributes in page.elements:
        assert tag not in ("link", "script", "iframe", "object"), tag
        assert tag == "img" or not {"src", "href", "srcset", "style"} & set(attributes)
    assert not re.search(r"url\(|@import|https?:", output.read_text())
    for expected in (
        "mask ratio 0.7 (2 of 6 patches visible), seed 1",
        "TRUE mean and deviation",
        "decoder_width",
        "small_resnet:resnet",
        *{line[3] for line in lines},
    ):
        assert expected in page.text, expected


def test_names_and_settings_are_escaped(tmp_path: Path) -> None:
    path = save(tmp_path, note="<script>alert(1)</script>")
    image = tmp_path / "<b>&\"'.png"
    Image.new("RGB", (64, 96)).save(image)
    assert main([str(path), str(image), "--output", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert not {"script", "b"} & {tag for tag, _ in page.elements}
    assert image.name in page.text and "<script>alert(1)</script>" in page.text
    assert any(attributes.get("alt") == f"{image.name}, error" for _, attributes in page.elements)


@pytest.mark.parametrize(
    "changes",
    [
        FCMAE,
        FCMAE | {"norm_pix_loss": False, "input_size": [96, 64]},
        {"channels": 1, "mean": [0.5], "std": [0.2]},
        {"channels": 5, "mean": [0.5] * 5, "std": [0.2] * 5},
        {"patch": 64, "input_size": [64, 128]},
    ],
    ids=["fcmae", "fcmae-plain", "grey", "channels", "patch"],
)
def test_all_kinds_of_checkpoints(changes: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, channels = save(tmp_path, **changes), changes.get("channels", 3)
    image = tmp_path / "image.npy"
    np.save(image, np.random.default_rng(0).random((channels, 80, 90), dtype=np.float32))
    size = changes.get("input_size", CONFIG["input_size"])
    assert main([str(path), str(image), "--output", str(tmp_path / "picture.png"), "--size", *(str(2 * n) for n in size)]) == 0
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 4 * 2 * size[1] + 5 * panel.GAP
    assert " nan" not in capsys.readouterr().out
    arguments = (path, image, "--output", tmp_path / "predicted.html", "--statistics", "predicted")
    if changes.get("norm_pix_loss") is False:
        assert "--statistics predicted does not apply to this run" in fails(capsys, *arguments)
        assert not (tmp_path / "predicted.html").exists()
    else:
        assert main([*map(str, arguments)]) == 0 and "PREDICTED" in (tmp_path / "predicted.html").read_text()


def test_transparent_images_lie_on_the_runs_background(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 96), (0, 0, 255, 0)).save(tmp_path / "clear.png")
    assert main([str(checkpoint), str(tmp_path / "clear.png"), "--output", str(tmp_path / "picture.png")]) == 0
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.getpixel((100, 100)) == (255, 0, 0)


def test_the_photographs_are_shown_where_nothing_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the checkpoints, in the folder of the run."""
    pytest.importorskip("skimage")
    assert main([str(checkpoint), "--max-images", "1"]) == 0
    assert (checkpoint.parents[1] / "visualize.png").is_file() and "astronaut.png" in capsys.readouterr().out


def test_masks_are_the_same_for_all_images_and_grow_with_the_ratio(model: sparkme.SparK) -> None:
    masks = {}
    for ratio in (0.4, 0.6, 0.8):
        model.set_task((96, 128), ratio)
        shown = [reconstruct(model, torch.rand(3, 96, 128), "", 1, panel.Statistics(), "true").pictures[1] for _ in range(2)]
        visible = [(picture != 0.5).any(0) for picture in shown]
        assert torch.equal(*visible) and visible[0].float().mean() == pytest.approx(model.keep / 12)
        masks[ratio] = visible[0]
    model.set_task((64, 96), 0.5)
    assert not (masks[0.8] & ~masks[0.6]).any() and not (masks[0.6] & ~masks[0.4]).any()


def test_unreadable_images_are_named_and_passed_over(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = photographs(tmp_path / "photos")
    paths[0].write_bytes(b"broken")
    flags = [str(checkpoint), str(tmp_path / "photos"), "--max-images", "2", "--output"]
    assert main([*flags, str(tmp_path / "a.png")]) == 0
    done = capsys.readouterr()
    assert f"skipped: {paths[0]}: " in done.err and done.err.count("\n") == 1
    assert [line.split()[0] for line in done.out.splitlines() if line.startswith("photo")] == [p.name for p in paths[1:]]
    for path in paths:
        path.write_bytes(b"broken")
    assert main([*flags, str(tmp_path / "b.png")]) == 2
    assert "error: none of 3 images can be read" in capsys.readouterr().err and not (tmp_path / "b.png").exists()


def test_nothing_is_half_written_or_replaced_unasked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, output = photographs(tmp_path / "photos")[0], tmp_path / "picture.png"
    output.write_bytes(b"mine")
    assert "exists; choose another --output, or pass --overwrite" in fails(capsys, checkpoint, image, "--output", output)

    def full(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        assert "cannot write" in fails(capsys, checkpoint, image, "--output", output, "--overwrite")
    assert output.read_bytes() == b"mine" and not list(tmp_path.glob("*.writing"))
    # The old picture lies among the images, and is none of them.
    assert main([str(checkpoint), str(image), "--output", str(image.with_name("old.png"))]) == 0
    capsys.readouterr()
    assert main([str(checkpoint), str(image.parent), "--output", str(image.with_name("old.png")), "--overwrite"]) == 0
    assert "old.png  " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask-ratio", "0.99"], "mask ratio 0.99 leaves none of 6 patches visible"),
        (["--mask-ratio", "0.5", "0.01"], "mask ratio 0.01 hides none of 6 patches"),
        (["--mask-ratio", "nan"], "mask ratio nan is outside [0, 1]"),
        (["--size", "100"], "input size 100x100 is not a multiple of the patch of 32; use 96"),
        (["--size", "32"], "is a single patch"),
        (["--size", "64", "64", "64"], "--size takes a side, or height and width; got 3 numbers"),
        (["--size", "-32"], "--size -32 must be from 1 to"),
        (["--seeds", "-1"], "--seeds -1 must be from 0"),
        (["--seeds", "1", "--num-seeds", "2"], "leave one out"),
        (["--num-seeds", "0"], "--num-seeds 0 must be from 1"),
        (["--max-images", "0"], "--max-images 0 must be at least 1"),
        (["--num-seeds", "300", "--mask-ratio", ".4", ".5"], "are 600 rows, more than 400"),
        (["--layers", "4"], "--layers goes with --mask-pattern"),
        (["--device", "tpu"], "--device tpu is not"),
        (["--output", "picture.gif"], "the suffix must be .png or .html"),
        (["--output", "/proc/none/picture.png"], "cannot be written: "),
        (["no/such.png"], "there is no image or folder no/such.png"),
        (["--mask-pattern"], "--mask-pattern draws no reconstructions; leave out a CHECKPOINT"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(
    flags: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photographs(tmp_path / "photos", 1)[0]
    assert message in fails(
        capsys,
        checkpoint,
        image,
        *([] if flags[0][0] == "-" else flags),
        "--output",
        tmp_path / "picture.png",
        *(flags if flags[0][0] == "-" else []),
    )
    assert not (tmp_path / "picture.png").exists()


def test_checkpoints_that_cannot_be_shown_get_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photographs(tmp_path / "photos", 1)[0]
    assert "name a checkpoint of sparkme.pretrain" in fails(capsys)
    assert "no checkpoint at" in fails(capsys, tmp_path / "none.pt", image)
    assert "cannot be read as a checkpoint" in fails(capsys, image, image)
    saved = load_checkpoint(checkpoint)
    saved["model"]["decoder.proj.bias"].fill_(float("nan"))
    torch.save(saved, tmp_path / "spoiled.pt")
    assert "weights that are not finite" in fails(capsys, tmp_path / "spoiled.pt", image)
    with pytest.raises(SystemExit) as left:
        main(["--no-such-flag"])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_is_grouped() -> None:
    text = create_parser().format_help()
    for group in ("what is shown:", "masks:", "why sparse convolutions:", "machine:", "output:"):
        assert f"\n{group}" in text


@pytest.mark.parametrize("engine", ["cuda_ext", "minkowski", "masked-dense"])
def test_a_mask_grows_in_dense_convolutions_and_stays_in_sparse_ones(engine: str) -> None:
    """Every 3x3 convolution widens what is not zero by one pixel."""
    image = 0.1 + 0.3 * torch.rand(3, 64, 96)
    pattern = trace_mask(image, layers=5, mask_ratio=0.6, patch=16, seed=1, engine=engine)
    assert pattern.shown == [0, 1, 2, 4, 5] and pattern.visible.sum() == 10 * 256
    for depth in range(6):
        grown = torch.nn.functional.max_pool2d(pattern.visible[None].float(), 2 * depth + 1, 1, depth)[0].bool()
        assert torch.equal(pattern.dense[depth], grown), depth
        assert torch.equal(pattern.sparse[depth], pattern.visible), depth
    assert share(pattern.sparse).tolist() == pytest.approx([100 * 10 / 24] * 6)
    assert (share(pattern.dense).diff() > 0).all()


def test_values_last_as_many_layers_as_may_be_asked_for() -> None:
    pattern = trace_mask(torch.rand(3, 32, 32), layers=64, mask_ratio=0.5, patch=8, seed=0)
    assert torch.equal(pattern.sparse[-1], pattern.visible) and pattern.dense[-1].all()


def test_the_figure_shows_what_was_computed() -> None:
    pattern = trace_mask(0.1 + 0.3 * torch.rand(3, 64, 96), layers=4, mask_ratio=0.5, patch=32, seed=0)
    figure = draw_mask_pattern(pattern)
    axes = [a for sub in figure.subfigs for a in sub.axes]
    labels = [a.get_xlabel() for a in axes if a.images]
    assert labels == [f"{share(maps[d]):.0f} %" for maps in (pattern.dense, pattern.sparse) for d in (0, 1, 2, 4)]
    drawn = [np.asarray(a.images[0].get_array()) for a in axes if a.images]
    leaked = [int(np.isclose(picture, to_rgb(LEAKED)).all(-1).sum()) for picture in drawn]
    assert leaked[:4] == [int((pattern.dense[d] & ~pattern.visible).sum()) for d in (0, 1, 2, 4)] and not any(leaked[4:])
    (lines,) = [a for a in axes if a.get_xlabel() == "3x3 convolutions"]
    assert [[*line.get_ydata()] for line in lines.lines] == [share(m).tolist() for m in (pattern.dense, pattern.sparse)]


def test_the_mask_pattern_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    assert main(["--mask-pattern", "--layers", "2", "--size", "96", "--engine", "minkowski"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"sparse not zero, % +(\S+) +\1 +\1\n", printed) and "wrote mask_pattern.png" in printed
    with Image.open("mask_pattern.png") as picture:
        assert picture.width > 900
    assert "exists; choose another --output" in fails(capsys, "--mask-pattern", "--output", "mask_pattern.png")
    for flags, message in (
        (["--layers", "0"], "must be from 1 to 64"),
        (["--output", "a.html"], "the suffix must be .png"),
        (["--seeds", "1", "2"], "draws one mask"),
        (["--size", "90"], "multiple of the patch of 32"),
        (["--mask-ratio", "1"], "leaves none"),
        (["--mask-ratio", "0"], "hides none"),
        (["--statistics", "true"], "leave out --statistics"),
    ):
        assert message in fails(capsys, "--mask-pattern", "--overwrite", *flags)


def test_the_middle_of_an_image_is_cut_out_in_its_shape(tmp_path: Path) -> None:
    """Nothing is stretched, and a very long image does not become a large one on the way."""
    stripes = Image.new("RGB", (300, 100), "white")
    stripes.paste("red", (100, 0, 200, 100))
    stripes.save(tmp_path / "stripes.png")
    image = load_image(tmp_path / "stripes.png", 3)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(centre_crop(image, (64, 64)), red.expand(3, 64, 64))
    whole = centre_crop(image, (32, 96))
    assert torch.equal(whole[:, :, 34:62], red.expand(3, 32, 28)) and (whole[:, :, :30] == 255).all()
    assert centre_crop(torch.rand(5, 2, 100_000), (64, 96)).shape == (5, 64, 96)


def test_images_that_are_named_are_shown_before_those_of_folders(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And they may stand before flags, after them, or both; what is asked for twice is drawn once."""
    photographs(tmp_path / "photos", 9)
    one, two = photographs(tmp_path / "others", 2)
    one, two = one.rename(tmp_path / "one.png"), two.rename(tmp_path / "two.png")
    output = tmp_path / "picture.PNG"
    words = [checkpoint, tmp_path / "photos", one, "--max-images", 3, "--output", output, two, "--seeds", 1, 1]
    assert main([*map(str, words)]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if ".png " in line]
    assert shown == ["one.png", "two.png", "photograph0.png"]
    with Image.open(output) as picture:
        assert picture.format == "PNG"


def test_a_refused_size_leaves_the_model_as_it_was(model: sparkme.SparK) -> None:
    before = model.input_size, model.keep, model.mask_ratio
    with pytest.raises(ValueError, match="not a multiple of the patch of 32; use 96"):
        model.set_task(100, 0.5)
    with pytest.raises(ValueError, match="use 64"):  # not 32, a single patch
        model.set_task(40, 0.5)
    assert (model.input_size, model.keep, model.mask_ratio) == before
