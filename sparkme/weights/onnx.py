"""Writes trained networks as ONNX files, which run without torch. A file is in its place once its outputs have been compared.

The files take pixels from 0 to 1, and normalise them. Classifiers and segmenters are exported by torch.export. Detectors are
exported by TorchScript: torch.export does not take those of torchvision, since how much they compute depends on the image.
onnxruntime runs either kind of file on images that were not exported with.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.onnx
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from sparkme.errors import UserError, first_line
from sparkme.files import replaced_when_whole

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-4  # of outputs, relative to the largest; of boxes, relative to the image
OPSET = 18  # of TorchScript's exporter
UNMATCHED = 0.01  # the share of objects that may differ, since rounding decides near ties

Outputs = tuple[Tensor, ...]  # of one batch


class WithNormalisation(nn.Module):
    """A network that takes pixel values from 0 to 1.

    Args:
        network: takes normalised images.
        mean: of each channel, for values from 0 to 1.
        std: likewise, the standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to what the network returns; the first, if that are several."""
        output = self.network((images - self.mean) / self.std)
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        return first


class OneImage(nn.Module):
    """A detector of torchvision that takes one image and returns tensors. Labels are from 0."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.training = detector.training

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(1, C, H, W) to boxes (N, 4), scores (N,), labels (N,) and, of Mask R-CNN, masks (N, 28, 28)."""
        (found,) = self.detector([images[0]])
        objects = found["labels"] > 0  # RetinaNet and FCOS have a score for the background too
        results = found["boxes"][objects], found["scores"][objects], found["labels"][objects] - 1
        return (*results, found["masks"][objects, 0]) if "masks" in found else results


def onnx_of_scores(
    network: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    images: Sequence[Tensor] = (),
) -> float:
    """Writes a classifier or a segmenter: `images` (batch, C, H, W) float32 from 0 to 1 to `logits` (batch, classes), or
    (batch, classes, H, W).

    Args:
        network: takes normalised images; on the CPU, in float32 and eval mode.
        mean: see `WithNormalisation`.
        std: likewise.
        size: height and width of images.
        path: the file.
        metadata: stored in the file, such as the names of classes.
        images: compared with the network on these, (C, H, W), and on random ones.

    Returns:
        The largest relative difference of the outputs.

    Raises:
        UserError: a package is missing, torch cannot export the network, or the file computes something else.
    """
    whole = WithNormalisation(network, mean, std)
    pictures = _pictures(len(mean), size, images)
    return export_onnx(whole, pictures, path, names=("logits",), dynamic=True, metadata=metadata)


def onnx_of_detector(
    detector: nn.Module,
    size: tuple[int, int],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    images: Sequence[Tensor] = (),
) -> float:
    """Writes a detector: `images` (1, C, H, W) float32 from 0 to 1 to `boxes`, `scores`, `labels` and perhaps `masks`.

    Boxes (N, 4) float32 are left, top, right and bottom in pixels; labels (N,) int64 are from 0. Masks (N, 28, 28) float32 are
    the probabilities of pixels within the box, to be enlarged to it; above 0.5 is the object.

    Args:
        detector: of `sparkme.networks.detectors`, on the CPU, in float32 and eval mode.
        size: height and width of images.
        path: the file.
        metadata: see `onnx_of_scores`.
        images: likewise; pass some with objects, as random ones may show none.

    Returns:
        The share of objects that the file finds and the detector does not, or the reverse.

    Raises:
        UserError: as `onnx_of_scores`.
    """
    names = ("boxes", "scores", "labels", "masks") if isinstance(detector, MaskRCNN) else ("boxes", "scores", "labels")
    pictures = _pictures(len(detector.transform.image_mean), size, images)  # type: ignore[union-attr, arg-type]
    return export_onnx(
        OneImage(detector),
        pictures,
        path,
        names=names,
        metadata=metadata,
        compare=share_of_unmatched,
        tolerance=UNMATCHED,
    )


def export_onnx(
    network: nn.Module,
    images: Sequence[Tensor],
    path: Path,
    *,
    names: Sequence[str],
    dynamic: bool = False,
    metadata: Mapping[str, str] | None = None,
    compare: Callable[[list[Outputs], list[Outputs]], float] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Exports a network, and puts the file in its place if its outputs are the network's.

    Args:
        network: takes `images` (B, C, H, W) float32, and returns a tensor or a tuple of them; on the CPU, in eval mode.
        images: each (C, H, W). The file is made with the first two, and compared on the others.
        path: the file.
        names: of the outputs.
        dynamic: exports by torch.export with any number of images a batch; else by TorchScript with one.
        metadata: stored in the file.
        compare: the outputs of the file and of the network for each batch to their difference; `relative_difference` if None.
        tolerance: the largest difference allowed.

    Returns:
        The difference.

    Raises:
        UserError: as `onnx_of_scores`.
        CannotWrite: the file cannot be written.
    """
    if network.training:
        raise ValueError("the network is in training mode; call its eval()")
    require_packages()
    batch = torch.stack([*images[:2]])
    file = _finished(_exported(network, batch, names) if dynamic else _traced(network, batch[:1], names), metadata or {})
    batches = [image[None] for image in images[2:]]
    batches += [torch.stack([*images[2:]])] if dynamic else []
    with torch.no_grad():
        references = [_as_tuple(network(images)) for images in batches]
    difference = (compare or relative_difference)(_run(file, batches), references)
    if not difference <= tolerance:
        raise UserError(f"{path} is not written: it would compute something else than the network, by {difference:.2g}")
    with replaced_when_whole(path) as temporary:
        temporary.write_bytes(file)
    return difference


def require_packages() -> None:
    """Raises UserError if a package that ONNX files need is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX files need the package {error.name}: pip install 'sparkme[onnx]'") from error


def relative_difference(outputs: list[Outputs], references: list[Outputs]) -> float:
    """The largest difference of any output in any batch, relative to its largest value; infinite if shapes differ."""
    return max(
        float((output - reference).abs().max() / reference.abs().max().clamp_min(1e-12))
        if output.shape == reference.shape
        else float("inf")
        for batch, wanted in zip(outputs, references, strict=True)
        for output, reference in zip(batch, wanted, strict=True)
    )


def share_of_unmatched(outputs: list[Outputs], references: list[Outputs]) -> float:
    """The share of all objects on either side that the other side has not. Their order is free: equal scores have none."""
    pairs = [(a, b) for batch, wanted in zip(outputs, references, strict=True) for a, b in ((batch, wanted), (wanted, batch))]
    num_objects = sum(len(a[0]) for a, _ in pairs)
    return sum(_num_unmatched(a, b) for a, b in pairs) / max(1, num_objects)


def _num_unmatched(objects: Outputs, others: Outputs) -> int:
    """How many objects have no counterpart of the same class and score, at the same place, with the same mask."""
    (boxes, scores, labels, *masks), (boxes2, scores2, labels2, *masks2) = objects, others
    if not len(labels) or not len(labels2):
        return len(labels)
    scale = boxes.abs().max().clamp_min(1)
    same = (boxes[:, None] - boxes2).abs().amax(2) <= TOLERANCE * scale
    same &= ((scores[:, None] - scores2).abs() <= TOLERANCE) & (labels[:, None] == labels2)
    for mask, mask2 in zip(masks, masks2, strict=True):
        same &= torch.stack([(one - mask2).abs().amax((1, 2)) for one in mask]) <= 10 * TOLERANCE
    return int((~same.any(1)).sum())


def _exported(network: nn.Module, batch: Tensor, names: Sequence[str]) -> bytes:
    def export() -> bytes:
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            network,
            (batch,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=[*names],
            verbose=False,
        )
        assert program is not None
        made: bytes = program.model_proto.SerializeToString()
        return made

    return _explained(network, export)


def _traced(network: nn.Module, batch: Tensor, names: Sequence[str]) -> bytes:
    def export() -> bytes:
        file = io.BytesIO()
        torch.onnx.export(
            network,
            (batch,),
            file,  # type: ignore[arg-type]  # as its documentation allows here
            dynamo=False,
            input_names=["images"],
            output_names=[*names],
            opset_version=OPSET,
        )
        return file.getvalue()

    return _explained(network, export)


def _explained(network: nn.Module, export: Callable[[], bytes]) -> bytes:
    """Exports without warnings, which are about torch's own code; what torch cannot do becomes a `UserError`."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return export()
    except Exception as error:  # of many kinds, of torch's and of the user's code
        inner = next((module for name, module in network.named_children()), network)
        raise UserError(
            f"torch cannot export this network ({type(inner).__name__}) to ONNX: {first_line(error.__cause__ or error)}"
        ) from error


def _finished(file: bytes, metadata: Mapping[str, str]) -> bytes:
    """A file with metadata, and with region proposals in the order that torch has them.

    onnxruntime's sigmoid returns 0 for probabilities below 1e-7, and would choose by chance among such proposals.
    """
    import onnx

    model = onnx.load_from_string(file)
    onnx.helper.set_model_props(model, dict(metadata))
    nodes = [*model.graph.node]
    del model.graph.node[:]
    for node in nodes:
        is_of_proposals = node.op_type == "Sigmoid" and "/rpn/" in node.name
        model.graph.node.extend(_sigmoid(node.input[0], node.output[0]) if is_of_proposals else [node])
    made: bytes = model.SerializeToString()
    return made


def _sigmoid(x: str, y: str) -> list[onnx.NodeProto]:
    """1 / (1 + exp(-x)) as nodes, between the names of its input and output."""
    from onnx.helper import make_node, make_tensor

    one = make_tensor(f"{y}/one", 1, [], [1.0])  # float32
    return [
        make_node("Constant", [], [f"{y}/one"], value=one),
        make_node("Neg", [x], [f"{y}/negative"]),
        make_node("Exp", [f"{y}/negative"], [f"{y}/exponential"]),
        make_node("Add", [f"{y}/exponential", f"{y}/one"], [f"{y}/sum"]),
        make_node("Reciprocal", [f"{y}/sum"], [y]),
    ]


def _run(file: bytes, batches: list[Tensor]) -> list[Outputs]:
    """The outputs of a file for each batch, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [tuple(torch.from_numpy(value) for value in session.run(None, {"images": batch.numpy()})) for batch in batches]


def _as_tuple(output: Tensor | Outputs) -> Outputs:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _pictures(channels: int, size: tuple[int, int], images: Sequence[Tensor]) -> list[Tensor]:
    """Some images for the exporter, and images to compare: smooth and noisy random ones, and those given."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(5, channels, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    noise = torch.rand(smooth.shape, generator=generator)
    return [*(0.8 * smooth + 0.2 * noise), *images]
