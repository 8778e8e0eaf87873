"""The geometry of convolutions and pooling: which input pixels an output pixel reads. Layers make one, engines read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Output pixel (y, x) reads input pixels (y * stride - padding[0] + i * dilation, x * stride - padding[1] + j * dilation),
    i < kernel_size[0], j < kernel_size[1].

    `Window.of` ensures that n * stride input pixels give n outputs, so that outputs lie on the grid of patches. The padding
    below and to the right follows from that.

    Attributes:
        kernel_size: height and width.
        stride: the same down and across.
        padding: pixels before the first one, above and to the left.
        dilation: the same down and across.
        border: values outside the image, in torch's terms: `zeros` (constant), `reflect` or `replicate`.
    """

    kernel_size: Pair
    stride: int = 1
    padding: Pair = (0, 0)
    dilation: int = 1
    border: str = "zeros"

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | tuple[int, int, int, int] | str = 0,
        dilation: int | Pair = 1,
        *,
        ceil_mode: bool = False,
        border: str = "zeros",
    ) -> Window:
        """The window of a layer with torch's arguments.

        Args:
            kernel_size, stride, dilation, ceil_mode: as in torch.nn.Conv2d and torch.nn.MaxPool2d.
            padding: as there, `same` and `valid` included, or (top, bottom, left, right).
            border: see above.

        Raises:
            ValueError: outputs would not lie on the grid of patches; names the padding that fits.
        """
        size, steps, spread = pair(kernel_size), pair(stride), pair(dilation)
        if steps[0] != steps[1] or spread[0] != spread[1]:
            which, value = ("stride", steps) if steps[0] != steps[1] else ("dilation", spread)
            raise ValueError(f"the {which} {value} differs between height and width; patches need one value for both")
        s, d = steps[0], spread[0]
        if padding == "valid":
            padding = 0
        if padding == "same":  # torch puts the odd pixel last
            total = [d * (k - 1) for k in size]
            sides = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        elif isinstance(padding, tuple) and len(padding) == 4:
            sides = padding
        else:
            down, across = pair(padding)  # type: ignore[arg-type]
            sides = (down, down, across, across)
        for k, before, after in zip(size, sides[::2], sides[1::2], strict=True):
            if _outputs(64 * s, k, s, before, after, d, ceil_mode) != 64:
                totals = range(d * (k - 1) + 1)
                fits = [p for p in totals if _outputs(64 * s, k, s, p // 2, p - p // 2, d, ceil_mode) == 64]
                raise ValueError(
                    f"kernel {k}, stride {s}, padding {before if before == after else (before, after)}, dilation {d} cannot be "
                    f"aligned to the grid of patches: it does not turn n * {s} pixels into n; use a total padding of "
                    f"{f'{fits[0]} to {fits[-1]}' if len(fits) > 1 else fits[0]} pixels"
                )
        return Window(size, s, (sides[0], sides[2]), d, border)

    @property
    def key(self) -> tuple[Pair, int, Pair, int, str]:
        """The window as plain values: torch.compile cannot return a Window that it made, for example in a key."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.border

    def offsets(self, axis: int) -> list[int]:
        """Input pixels relative to output pixel * stride, along one axis."""
        return [i * self.dilation - self.padding[axis] for i in range(self.kernel_size[axis])]

    @property
    def volume(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def within_patch(self) -> bool:
        """Whether an output reads pixels of its own patch only: its window is one pixel or tiles the map."""
        return all(0 <= offset < self.stride for axis in (0, 1) for offset in self.offsets(axis))

    @property
    def is_plain(self) -> bool:
        """Whether kernels without a padding argument compute it: an odd side is centred and an even one starts at the output
        pixel, as in MinkowskiEngine and this project's operators."""
        return self.border == "zeros" and all(
            p == (d * (k // 2) if k % 2 else 0) for k, p, d in zip(self.kernel_size, self.padding, (self.dilation,) * 2)
        )

    def enclosing(self) -> tuple[Window, list[int] | None]:
        """A plain window that contains this one, and the indices of this one's offsets in it, in order.

        Indices are y + height * x, as in MinkowskiEngine's kernels. They are None if the windows are equal.
        """
        if self.is_plain:
            return self, None
        if self.border != "zeros":
            raise ValueError(f"a window with border {self.border!r} has no plain form")
        step = self.dilation if all(p % self.dilation == 0 for p in self.padding) else 1
        down, across = ([offset // step for offset in self.offsets(axis)] for axis in (0, 1))
        reach = [max(map(abs, offsets)) for offsets in (down, across)]
        height, width = (2 * r + 1 for r in reach)
        around = Window((height, width), self.stride, (reach[0] * step, reach[1] * step), step)
        return around, [y + reach[0] + height * (x + reach[1]) for x, y in product(across, down)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The offsets (dy, dx), in the order of MinkowskiEngine's kernels."""
        return ((dy, dx) for dx, dy in product(self.offsets(1), self.offsets(0)))


def pair(value: int | tuple[int, ...] | list[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    values = tuple(int(v) for v in value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _outputs(size: int, k: int, s: int, before: int, after: int, d: int, ceil_mode: bool) -> int:
    """How many outputs torch computes from `size` pixels."""
    reach = size + before + after - d * (k - 1) - 1
    if not ceil_mode:
        return reach // s + 1
    count = -(-reach // s) + 1
    return count - 1 if (count - 1) * s >= size + before else count  # the last window starts in the image or before it
