"""Functions that move values without changing them: channels may be split, joined and shuffled; pixels stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparkme.errors import MixedPixelsError
from sparkme.sparse.features import Hidden
from sparkme.sparse.forms.functions import Functions
from sparkme.sparse.working_map import first_map, is_map

if TYPE_CHECKING:
    from sparkme.sparse.working_map import WorkingMap

FUNCTIONS = Functions()

_REMEDY = "only channels can be moved, pixels stay where they are"


@FUNCTIONS.form_of("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0) -> WorkingMap:
    """Joins channels; tensors with one number per channel are spread over the pixels."""
    like = first_map(tensors)
    at = like.channel(dim) + like.channel_axis
    pieces = []
    for value in tensors:
        piece = like.operand(value)
        if not is_map(value):
            shape = list(like.values.shape)
            shape[at] = piece.shape[at]
            piece = piece.expand(shape)
        pieces.append(piece)
    return like.replace(like.features.apply(lambda *pieces: torch.cat(pieces, at), pieces, {}, Hidden.SUM))


@FUNCTIONS.form_of("stack")
def stack(tensors: Sequence[Any], dim: int = 0) -> WorkingMap:
    """Joins maps along a new channel axis."""
    first = first_map(tensors)
    return cat([unsqueeze(value, dim) for value in tensors], dim % (first.ndim + 1))


@FUNCTIONS.form_of("unsqueeze")
def unsqueeze(x: WorkingMap, dim: int) -> WorkingMap:
    dim = dim % (x.ndim + 1)
    at = x.dims[:dim].count("C") + x.channel_axis
    return x.view_of(x.values.unsqueeze(at), x.dims[:dim] + "C" + x.dims[dim:])


@FUNCTIONS.form_of("squeeze")
def squeeze(x: WorkingMap, dim: int) -> WorkingMap:
    if x.shape[dim] != 1:
        return x
    at = x.channel(dim) + x.channel_axis
    return x.view_of(x.values.squeeze(at), x.dims[: x.axis(dim)] + x.dims[x.axis(dim) + 1 :])


@FUNCTIONS.form_of("narrow")
def narrow(x: WorkingMap, dim: int, start: int, length: int) -> WorkingMap:
    axis = x.channel(dim)
    start = start % x.shape[dim] if start < 0 else start
    span = (start, start + length) if x.dims.count("C") == 1 else None
    return x.view_of(x.values.narrow(axis + x.channel_axis, start, length), span=span)


@FUNCTIONS.form_of("split", "split_with_sizes")
def split(x: WorkingMap, split_size_or_sections: Any = None, dim: int = 0, *, split_size: Any = None) -> tuple[WorkingMap, ...]:
    sizes = split_size if split_size_or_sections is None else split_size_or_sections
    total = x.shape[dim]
    x.channel(dim)
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(x, dim, start, size) for start, size in zip(starts, sizes, strict=True))


@FUNCTIONS.form_of("chunk")
def chunk(x: WorkingMap, chunks: int, dim: int = 0) -> tuple[WorkingMap, ...]:
    return split(x, -(-x.shape[dim] // chunks), dim)


@FUNCTIONS.form_of("tensor_split")
def tensor_split(x: WorkingMap, indices_or_sections: Any, dim: int = 0) -> tuple[WorkingMap, ...]:
    total, parts = x.shape[dim], indices_or_sections
    edges = [total * i // parts for i in range(parts + 1)] if isinstance(parts, int) else [0, *parts, total]
    if isinstance(parts, int):  # the first ones are the larger ones
        size, larger = divmod(total, parts)
        edges = [i * size + min(i, larger) for i in range(parts + 1)]
    return split(x, [b - a for a, b in pairwise(edges)], dim)


@FUNCTIONS.form_of("unbind")
def unbind(x: WorkingMap, dim: int = 0) -> tuple[WorkingMap, ...]:
    return tuple(select(x, dim, i) for i in range(x.shape[x.axis(dim)]))


@FUNCTIONS.form_of("select")
def select(x: WorkingMap, dim: int, index: int) -> WorkingMap:
    dim = x.axis(dim)
    at = x.channel(dim) + x.channel_axis
    return x.view_of(x.values.select(at, index), x.dims[:dim] + x.dims[dim + 1 :])


@FUNCTIONS.form_of("index_select")
def index_select(x: WorkingMap, dim: int, index: Tensor) -> WorkingMap:
    return x.with_values(x.values.index_select(x.channel(dim) + x.channel_axis, index))


@FUNCTIONS.form_of("flip")
def flip(x: WorkingMap, *dims: Any) -> WorkingMap:
    axes = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return x.with_values(x.values.flip([x.channel(d) + x.channel_axis for d in axes]))


@FUNCTIONS.form_of("__getitem__")
def getitem(x: WorkingMap, index: Any) -> WorkingMap:
    """Slices, indices and lists of indices of channels; all of H and W, or one pixel of every square block."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if part is Ellipsis]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        given = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.ndim - given)
    x, parts = _one_of_every_block(x, parts)
    dim, out = 0, x
    for part in parts:
        if part is None:
            out = unsqueeze(out, dim)
        elif isinstance(part, slice):
            start, stop, step = part.indices(out.shape[dim])
            if (start, stop, step) != (0, out.shape[dim], 1):
                if out.dims[dim] != "C":
                    raise NotImplementedError(f"a slice of axis {dim} ({out.dims[dim]}) of a map {out.dims}: {_REMEDY}")
                if step == 1:
                    out = narrow(out, dim, start, max(0, stop - start))
                else:
                    at = out.channel(dim) + out.channel_axis
                    picked = torch.arange(start, stop, step, device=out.device)
                    out = out.view_of(out.values.index_select(at, picked))
        elif isinstance(part, int):
            out = select(out, dim, part)
            continue
        else:
            numbers = torch.empty(()) if is_map(part) else torch.as_tensor(part, device=out.device)
            if numbers.ndim != 1 or numbers.dtype == torch.bool or sum(not isinstance(p, slice | None) for p in parts) != 1:
                raise NotImplementedError(
                    f"a map indexed by {'a map' if is_map(part) else type(part).__name__}: only a slice or a list of channel "
                    "indices has a sparse form; torch.where selects pixel by pixel"
                )
            out = index_select(out, dim, numbers)
        dim += 1
    return out


def _one_of_every_block(x: WorkingMap, parts: list[Any]) -> tuple[WorkingMap, list[Any]]:
    """For `x[..., i::r, j::r]`: the map with the pixels of r x r blocks as channels, and the index of one of them."""
    axes = [i for i, part in enumerate(parts) if part is not None]
    places = {label: axes[d] for d, label in enumerate(x.dims[: len(axes)]) if label in "HW"}
    steps = {label: parts[i].step for label, i in places.items() if isinstance(parts[i], slice)}
    r = steps.get("H")
    if not r or r < 2 or steps.get("W") != r:
        return x, parts
    parts = list(parts)
    for label in "WH":  # the later one first, since each becomes two
        i, size = places[label], x.shape[x.dims.index(label)]
        start, stop, _ = parts[i].indices(size)
        if start >= r or stop != size:
            return x, parts
        parts[i : i + 1] = [slice(None), start]
    return _blocks(x, r), parts


@FUNCTIONS.form_of("permute")
def permute(x: WorkingMap, *dims: Any) -> WorkingMap:
    order = [x.axis(d) for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)]
    labels = "".join(x.dims[d] for d in order)
    if sorted(order) != list(range(x.ndim)) or labels[0] != "B" or labels.find("H") > labels.find("W"):
        raise MixedPixelsError(f"permute{tuple(order)} of a map {x.dims} moves pixels: {_REMEDY}")
    channels = [x.channel(d) for d in order if x.dims[d] == "C"]
    if channels == sorted(channels):
        return x.same_storage(labels)
    first = x.channel_axis
    axes = [*range(first), *(first + c for c in channels), *range(first + len(channels), x.values.ndim)]
    return x.view_of(x.values.permute(axes), labels)


@FUNCTIONS.form_of("transpose", "swapaxes", "swapdims")
def transpose(x: WorkingMap, dim0: int, dim1: int) -> WorkingMap:
    order = list(range(x.ndim))
    a, b = x.axis(dim0), x.axis(dim1)
    order[a], order[b] = b, a
    return permute(x, order)


@FUNCTIONS.form_of("movedim", "moveaxis")
def movedim(x: WorkingMap, source: int, destination: int) -> WorkingMap:
    order = [d for d in range(x.ndim) if d != x.axis(source)]
    order.insert(x.axis(destination), x.axis(source))
    return permute(x, order)


@FUNCTIONS.form_of("expand")
def expand(x: WorkingMap, *sizes: Any) -> WorkingMap:
    wanted = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    own = list(x.shape)
    if len(wanted) != len(own) or any(
        w not in (-1, n) and (n != 1 or x.dims[d] != "C") for d, (w, n) in enumerate(zip(wanted, own))
    ):
        raise NotImplementedError(
            f"expand of a map {x.dims} of shape {tuple(own)} to {tuple(wanted)}: only channels can be repeated; unsqueeze "
            "makes a new axis"
        )
    channels = [max(w, n) for w, n, label in zip(wanted, own, x.dims) if label == "C"]
    data, first = x.values, x.channel_axis
    return x.view_of(data.expand(*data.shape[:first], *channels, *data.shape[first + len(channels) :]))


@FUNCTIONS.form_of("expand_as", "view_as", "reshape_as")
def expand_as(x: Any, other: Any) -> Any:
    """A tensor as a map stays what it is: products spread it over the pixels by themselves."""
    if is_map(x):
        return expand(x, other.shape)
    if x.ndim == other.ndim and all(n in (1, m) for n, m in zip(x.shape, other.shape)):
        return x
    raise NotImplementedError(
        f"a tensor of shape {tuple(x.shape)} expanded to a map {other.dims} of shape {tuple(other.shape)} has no sparse form; "
        "remove the expansion, since products broadcast"
    )


@FUNCTIONS.form_of("repeat")
def repeat(x: WorkingMap, *sizes: Any) -> WorkingMap:
    times = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    if len(times) != x.ndim or any(n != 1 and label != "C" for n, label in zip(times, x.dims)):
        raise NotImplementedError(f"repeat{tuple(times)} of a map {x.dims}: only channels can be repeated")
    out = x
    for dim, n in enumerate(times):
        out = cat([out] * n, dim) if n != 1 else out
    return out


@FUNCTIONS.form_of("repeat_interleave")
def repeat_interleave(x: WorkingMap, repeats: int, dim: int) -> WorkingMap:
    return x.with_values(x.values.repeat_interleave(repeats, x.channel(dim) + x.channel_axis))


@FUNCTIONS.form_of("flatten")
def flatten(x: WorkingMap, start_dim: int = 0, end_dim: int = -1) -> WorkingMap:
    start, end = x.axis(start_dim), x.axis(end_dim)
    shape = list(x.shape)
    return view(x, [*shape[:start], torch.Size(shape[start : end + 1]).numel(), *shape[end + 1 :]])


@FUNCTIONS.form_of("unflatten")
def unflatten(x: WorkingMap, dim: int, sizes: Any) -> WorkingMap:
    shape, at = list(x.shape), x.axis(dim)
    return view(x, [*shape[:at], *sizes, *shape[at + 1 :]])


@FUNCTIONS.form_of("channel_shuffle")
def channel_shuffle(x: WorkingMap, groups: int) -> WorkingMap:
    return flatten(transpose(unflatten(x, 1, (groups, -1)), 1, 2), 1, 2)


@FUNCTIONS.form_of("pixel_unshuffle")
def pixel_unshuffle(x: WorkingMap, downscale_factor: int) -> WorkingMap:
    b, c, h, w = x.shape
    r = downscale_factor
    blocks = view(x, [b, c, h // r, r, w // r, r])
    return view(permute(blocks, 0, 1, 3, 5, 2, 4), [b, c * r * r, h // r, w // r])


@FUNCTIONS.form_of("view", "reshape")
def view(x: WorkingMap, *shape: Any) -> WorkingMap:
    """Splits and joins channels; splits H and W into blocks of pixels."""
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)
    if not all(isinstance(size, int) for size in sizes):
        raise NotImplementedError(f"view of a map as {shape[0]} has no sparse form, only another shape; x.to(dtype) converts")
    if -1 in sizes:
        known = torch.Size(size for size in sizes if size != -1).numel()
        sizes[sizes.index(-1)] = x.shape.numel() // max(1, known)
    if sizes == list(x.shape):
        return x
    return _regroup(x, _groups(x, sizes))


def _groups(x: WorkingMap, sizes: list[int]) -> list[tuple[str, list[int]]]:
    """Groups of neighbouring axes: the labels of the old axes and the sizes of the new ones."""
    refusal = MixedPixelsError(f"view of a map {x.dims} of shape {tuple(x.shape)} as {tuple(sizes)}: {_REMEDY}")
    old, new = list(zip(x.dims, x.shape)), list(sizes)
    found: list[tuple[str, list[int]]] = []
    while old:
        label, before = old.pop(0)
        if not new:
            raise refusal
        labels, into = label, [new.pop(0)]
        after = into[0]
        while before != after:
            if before < after:
                if not old:
                    raise refusal
                label, size = old.pop(0)
                labels, before = labels + label, before * size
            else:
                if not new:
                    raise refusal
                into.append(new.pop(0))
                after *= into[-1]
        if set(labels) == {"C"} and old:  # channel axes of size one come and go
            while _has_spare(x, new, "".join(label for label, _ in old)):
                into.append(new.pop(0))
            while old and old[0] == ("C", 1) and new and new[0] != 1:
                labels += old.pop(0)[0]
        if labels == "H" and len(into) == 1 and old and old[0] == ("W", 1) and new[:1] != [1]:  # a map one pixel wide
            labels += old.pop(0)[0]
        found.append((labels, into))
    if any(size != 1 for size in new):
        raise refusal
    found[-1][1].extend(new)
    for labels, into in found:
        whole_channels = set(labels) == {"C"}
        block = labels in ("H", "W") and len(into) == 2
        if "HW" in labels and labels != "HW":
            raise NotImplementedError(
                f"view of a map {x.dims} of shape {tuple(x.shape)} as {tuple(sizes)} joins pixels with other axes, as "
                "before a linear layer over the whole map, and so mixes visible and hidden pixels"
            )
        if (labels == "HW" and len(into) == 1) or (labels == "P" and tuple(into) == tuple(x.grid.size(x.stride))):
            continue
        if (len(labels) > 1 and not whole_channels) or not (whole_channels or block or len(into) == 1):
            raise refusal
    return found


def _has_spare(x: WorkingMap, sizes: list[int], labels: str) -> bool:
    """Whether the first new size is a one that belongs to no pixel axis."""
    if not sizes or sizes[0] != 1:
        return False
    if labels == "P":  # it may become H and W
        return len(sizes) > 2 or (len(sizes) == 2 and tuple(sizes) != tuple(x.grid.size(x.stride)))
    return len(sizes) > len(labels)


def _regroup(x: WorkingMap, groups: list[tuple[str, list[int]]]) -> WorkingMap:
    first = x.channel_axis
    channels = [size for labels, into in groups if set(labels) == {"C"} for size in into]
    joined = {"HW": "P", "P": "HW"}
    dims = "".join(
        "C" * len(into) if set(labels) == {"C"} else labels if len(into) == 1 and labels != "HW" else joined.get(labels, labels)
        for labels, into in groups
    )
    data = x.values
    behind = data.shape[first + len(x.channel_shape) :]
    data = data.reshape(*data.shape[:first], *channels, *behind)
    out = x.view_of(data, dims)
    blocks = [into[1] for labels, into in groups if labels in ("H", "W") and len(into) == 2]
    if not blocks:
        return out
    if len(blocks) != 2 or blocks[0] != blocks[1]:
        raise NotImplementedError(
            f"blocks of {' x '.join(map(str, blocks))} pixels{' along one axis' if len(blocks) == 1 else ''}: only square "
            "blocks have a sparse form"
        )
    return _blocks(out, blocks[0])


def _blocks(x: WorkingMap, r: int) -> WorkingMap:
    """(.., H, .., W, ..) as (.., H / r, r, .., W / r, r, ..): the pixels of a block are new axes of channels."""
    p = x.grid.pixels(x.stride)
    if p % r:
        raise NotImplementedError(
            f"blocks of {r} x {r} pixels do not tile a patch of {p} x {p} pixels at this layer; use smaller blocks"
        )
    down, across = (x.dims[: x.dims.index(label)].count("C") for label in "HW")
    return x.replace(x.features.blocks(r, down, across), x.dims.replace("H", "HC").replace("W", "WC"))
