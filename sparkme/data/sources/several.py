"""Images of several sources, one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sparkme.data.images import Stored
from sparkme.data.sources.base import ImageSource


class Several(ImageSource):
    """The images of all sources. If one has blocks, each image of a source without blocks is a block of its own."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = sources
        self.description = ", ".join(source.description for source in sources)
        self.problems = [problem for source in sources for problem in source.problems]
        self.notes = [note for source in sources for note in source.notes]
        self._first = [0, *accumulate(map(len, sources))]
        if any(source.blocks is not None for source in sources):
            self.blocks = torch.cat([torch.tensor([0]), *map(self._ends, range(len(sources)))])
            self.window = min(source.window for source in sources if source.blocks is not None)

    def _ends(self, source: int) -> Tensor:
        """Where the blocks of a source end."""
        blocks = self.sources[source].blocks
        return self._first[source] + (torch.arange(len(self.sources[source])) + 1 if blocks is None else blocks[1:])

    def _place(self, number: int) -> tuple[ImageSource, int]:
        source = bisect_right(self._first, number) - 1
        return self.sources[source], number - self._first[source]

    def __len__(self) -> int:
        return self._first[-1]

    def read(self, number: int) -> Stored:
        source, number = self._place(number)
        return source.read(number)

    def name(self, number: int) -> str:
        source, number = self._place(number)
        return source.name(number)
