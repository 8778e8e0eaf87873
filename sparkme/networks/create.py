"""Creates networks: NAME of torchvision, timm:NAME, or a user's own as package.module:factory.

Every convolutional network works that `sparkme.sparsify` accepts; it names the layer that it refuses.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from sparkme.errors import first_line
from sparkme.networks.names import paper_drop_path
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.map import SparseMap
from sparkme.sparse.sparsify import sparsify
from sparkme.state_dict import state_dict_of


def create_dense(name: str, *, in_channels: int = 3, drop_path: float = 0.0, num_classes: int | None = None) -> nn.Module:
    """A dense network with random weights; nothing is downloaded.

    Args:
        name: `resnet50` of torchvision, `timm:resnet50`, or `package.module:factory`, which is imported, also from the
            working directory, and called.
        in_channels: channels of the images.
        drop_path: rate of the deepest block, growing linearly from 0 at the first. torchvision's ResNets lack drop path and get
            it from `add_drop_path`.
        num_classes: classes of its classifier; the network's default if None.

    Raises:
        ValueError: an unknown network, or one that does not support these channels or drop path; says what to change.
    """
    kind, colon, rest = name.rpartition(":")
    if not colon:
        return _torchvision_model(name, in_channels, drop_path, num_classes)
    if kind == "timm":
        return _timm_model(rest, in_channels, drop_path, num_classes)
    return _own_model(kind, rest, in_channels, drop_path, num_classes)


def create_encoder(
    name: str, *, in_channels: int = 3, drop_path: float | None = None, proof: Mapping[str, Any] | None = None
) -> SparseEncoder:
    """A sparse encoder with random weights.

    Args:
        name: see `create_dense`.
        in_channels: channels of the images.
        drop_path: see `create_dense`; the paper's for this network if None.
        proof: see `sparkme.sparsify`.

    Raises:
        ValueError: an unknown network, a rate outside [0, 1), or a network that cannot be sparse.
    """
    rate = paper_drop_path(name) if drop_path is None else drop_path
    if not 0 <= rate < 1:
        raise ValueError(f"drop path {rate} is outside [0, 1)")
    encoder = sparsify(create_dense(name, in_channels=in_channels, drop_path=rate), in_channels=in_channels, proof=proof)
    if ":" not in name:
        add_drop_path(encoder.network, rate)
    return encoder


def add_drop_path(network: nn.Module, rate: float) -> None:
    """Adds drop path with linearly growing rates to a torchvision ResNet.

    As in timm, it applies to the output of a block's last batch norm, where the residual branch ends.
    """
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock | Bottleneck)]
    for i, block in enumerate(blocks):
        probability = rate * i / max(1, len(blocks) - 1)
        if probability > 0:
            norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            norm.register_forward_hook(_DropBranch(probability))


class _DropBranch:
    """A forward hook that drops the branch of a sample at random, in training mode."""

    def __init__(self, probability: float) -> None:
        self.drop = StochasticDepth(probability, "row")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: SparseMap | Tensor) -> SparseMap | Tensor:
        dropped: SparseMap | Tensor = self.drop.train(module.training)(out)
        return dropped


def _torchvision_model(name: str, in_channels: int, drop_path: float, num_classes: int | None) -> nn.Module:
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(f"unknown model {name!r}; {_suggestion(name, known, 'torchvision')}")
    options: dict[str, Any] = {"weights": None} | ({} if num_classes is None else {"num_classes": num_classes})
    if name in ("googlenet", "inception_v3"):  # avoids a warning about the default
        options["init_weights"] = True
    # Residual branches start at zero if supported, as in timm's ResNets, which the official code trains.
    model: nn.Module | None = None
    for extra in ({"stochastic_depth_prob": drop_path}, {"zero_init_residual": True}, {}):
        with suppress(TypeError):  # no such option
            model = torchvision.models.get_model(name, **options, **extra)
            break
    assert model is not None
    if drop_path and not any(isinstance(m, BasicBlock | Bottleneck | StochasticDepth) for m in model.modules()):
        raise ValueError(f"--drop-path {drop_path}: {name} has no drop path; use --drop-path 0")
    return model if in_channels == 3 else with_in_channels(model, in_channels)


def _timm_model(name: str, in_channels: int, drop_path: float, num_classes: int | None) -> nn.Module:
    import timm  # noqa: PLC0415  (half a second, for its networks alone)

    if not timm.is_model(name):
        raise ValueError(f"unknown model 'timm:{name}'; {_suggestion(name, timm.list_models(), 'timm', 'timm:')}")
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    options |= {} if num_classes is None else {"num_classes": num_classes}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, in_chans=in_channels, **options)
    except TypeError as error:
        if not drop_path:
            raise
        raise ValueError(f"--drop-path {drop_path}: timm's {name} has no drop path; use --drop-path 0") from error
    return model


def _own_model(module_name: str, factory_name: str, in_channels: int, drop_path: float, num_classes: int | None) -> nn.Module:
    where = f"--model {module_name}:{factory_name}"
    if not all(part.isidentifier() for part in (*module_name.split("."), factory_name)):
        raise ValueError(f"{where} is no package.module:factory; timm's networks are timm:NAME")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code
        hint = f"; start in the folder of {module_name.partition('.')[0]}.py" if isinstance(error, ModuleNotFoundError) else ""
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ValueError(f"{where} cannot be imported: {kind}{first_line(error)}{hint}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(f"{where}: {module_name} has no function {factory_name!r} that returns a network")
    try:
        takes: Any = inspect.signature(factory).parameters
    except ValueError as error:  # a builtin function
        raise ValueError(f"{where} is not a function that returns a network") from error
    wanted: dict[str, Any] = {"in_channels": in_channels, "drop_path": drop_path}
    wanted |= {} if num_classes is None else {"num_classes": num_classes}
    if drop_path and "drop_path" not in takes:
        raise ValueError(f"--drop-path {drop_path}: {factory_name} takes no drop_path; use --drop-path 0 or add the parameter")
    try:
        model = factory(**{key: value for key, value in wanted.items() if key in takes})
    except (Exception, SystemExit) as error:  # the user's code
        raise ValueError(f"{where} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where} returned a {type(model).__name__}, not a torch.nn.Module")
    for key, value in state_dict_of(model).items():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and (value.dtype, value.device.type) != (torch.float32, "cpu")
        ):
            raise ValueError(
                f"{where} returned weights of {value.dtype} on {value.device} ({key}); make them float32 on the CPU"
            )
    return model if num_classes is None else _with_classes(model, in_channels, num_classes, where)


class Classifier(nn.Module):
    """A network of features, followed by a spatial mean and a linear layer."""

    def __init__(self, network: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        scores: Tensor = self.head(features.mean((2, 3)) if features.ndim == 4 else features)
        return scores


def _with_classes(model: nn.Module, in_channels: int, num_classes: int, where: str) -> nn.Module:
    """Gives a user's network a classifier of `num_classes` classes."""
    out, last = _try_out(model, in_channels)
    if not isinstance(out, Tensor) or out.ndim not in (2, 4):
        kind = f"{out.ndim} axes" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"{where} returns {kind}; fine-tuning needs (B, C) or (B, C, H, W)")
    if out.ndim == 2 and out.shape[1] == num_classes:
        return model
    layer = model.get_submodule(last)
    if out.ndim == 2 and last and type(layer) is nn.Linear and layer.out_features == out.shape[1]:
        parent, _, child = last.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Linear(layer.in_features, num_classes, layer.bias is not None))
        return model
    return Classifier(model, out.shape[1], num_classes)


def find_classifier(model: nn.Module, in_channels: int) -> str:
    """The path of the last called layer with weights."""
    return _try_out(model, in_channels)[1]


@torch.no_grad()
def _try_out(model: nn.Module, in_channels: int) -> tuple[Any, str]:
    """A network's output for an image, in eval mode, and the path of the last called layer with weights."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    was_training = model.training
    try:
        model.eval()  # a user's class may not return self
        out = model(torch.zeros(1, in_channels, 128, 128, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return out, called[-1] if called else ""


def with_in_channels(model: nn.Module, in_channels: int) -> nn.Module:
    """Replaces the first called convolution by one with random weights for another number of channels.

    Raises:
        ValueError: that convolution is grouped, or not a plain nn.Conv2d.
    """
    found: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    handles = [
        m.register_forward_pre_hook(lambda m, args: found.append(names[id(m)]))
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            model(torch.zeros(1, 3, 64, 64))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    name = found[0]
    old = model.get_submodule(name)
    if type(old) is not nn.Conv2d or old.groups != 1:
        raise ValueError(f"--channels {in_channels}: layer {name!r} ({type(old).__name__}) supports RGB images only")
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def _suggestion(name: str, known: list[str], library: str, prefix: str = "") -> str:
    close = [prefix + match for match in difflib.get_close_matches(name, known, 3, 0.6)]
    elsewhere = "" if prefix else "; timm's are `timm:NAME`, your own is `package.module:factory`"
    if close:
        return f"did you mean {' or '.join(close)}?{elsewhere}"
    return f"{library} has no similar name; --list-models prints those that are known to work{elsewhere}"
