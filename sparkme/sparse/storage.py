"""Storage of maps, shared by views so that in-place operations reach all of them."""

from __future__ import annotations

from sparkme.sparse.features import Features
from sparkme.sparse.fusion.waiting import Unwritten


class Storage:
    """The storage of a map and its views: an in-place operation on one is visible to the others, or refused.

    Args:
        features: its content, perhaps not computed yet.
        root: the storage that it is a view of.
        span: the root's channels that it shows, (first, last + 1); None for all, in any order.
    """

    def __init__(
        self, features: Features | Unwritten, root: Storage | None = None, span: tuple[int, int] | None = None
    ) -> None:
        self.held = features
        self.root = root
        self.span = span
        self.views = 0
        self.writes: list[tuple[int, tuple[int, int] | None]] = []  # in-place writes: view (0 is the root), channels
        self.number = 0
        self.seen = 0
        if root is not None:
            root.views += 1
            self.number, self.seen = root.views, len(root.writes)

    @property
    def features(self) -> Features:
        if isinstance(self.held, Unwritten):
            self.held = self.held.write()
        return self.held

    @property
    def in_graph(self) -> bool:
        """Whether gradients may reach its content, which this does not compute."""
        return self.held.modes.grad if isinstance(self.held, Unwritten) else self.held.data.requires_grad

    def check(self) -> None:
        """Raises NotImplementedError if torch would show another value here after an in-place operation."""
        root = self if self.root is None else self.root
        for number, span in root.writes[self.seen :]:
            if number != self.number and _overlap(span, self.span):
                raise NotImplementedError(
                    "changing a map in place and then using an earlier view of it (a slice, a chunk, a reshaped map), or the "
                    "reverse, has no sparse form; write x = x + y for x += y there, or inplace=False"
                )

    def read(self) -> Features:
        self.check()
        return self.features

    def write(self, features: Features | Unwritten) -> None:
        self.check()
        root = self if self.root is None else self.root
        if root.views:
            root.writes.append((self.number, self.span))
        self.held = features


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])
