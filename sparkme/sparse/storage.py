"""Where maps keep what they hold, so that operations in place reach all who have it."""

from __future__ import annotations

from sparkme.sparse.features import Features
from sparkme.sparse.fusion.waiting import Unwritten


class Storage:
    """What a map and its views share, so that an operation in place on one is seen by the others, or refused.

    Args:
        features: what it holds; perhaps still to be written.
        root: the storage that it is a view of.
        span: the channels of the root that it shows, (first, one after the last); None for all, in whatever order.
    """

    def __init__(
        self, features: Features | Unwritten, root: Storage | None = None, span: tuple[int, int] | None = None
    ) -> None:
        self.held = features
        self.root = root
        self.span = span
        self.views = 0
        self.writes: list[tuple[int, tuple[int, int] | None]] = []  # in place: by which view (0 is the root), to which channels
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
        """Whether gradients may come to what it holds; without writing it."""
        return self.held.modes.grad if isinstance(self.held, Unwritten) else self.held.data.requires_grad

    def check(self) -> None:
        """Raises NotImplementedError where what is here is not what the network would find."""
        root = self if self.root is None else self.root
        for number, span in root.writes[self.seen :]:
            if number != self.number and _overlap(span, self.span):
                raise NotImplementedError(
                    "a map and a view of it (a slice, a chunk, a reshaped one), of which one was changed in place before the "
                    "other was used, have no sparse form; write x = x + y for x += y there, or inplace=False"
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
