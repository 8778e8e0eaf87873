"""A picture of which classes are taken for which."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from sparkme.files import replaced_when_whole
from sparkme.training.log import unformatted

MOST_NAMED = 40  # classes; of more the names cannot be read


def draw_confusion(confusion: Tensor, classes: list[str], path: Path, counted: str = "images") -> None:
    """Draws shares of each true class (row) by what it was taken for (column).

    Args:
        confusion: (classes, classes) int64, counts.
        classes: their names.
        path: of the .png.
        counted: what the numbers are of, for the title.
    """
    shares = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).numpy()
    count = len(classes)
    side = min(12.0, 3.5 + 0.4 * count)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    right = int(confusion.diag().sum()) / max(1, int(confusion.sum()))
    axes.set(xlabel="taken for", ylabel="is", title=f"{100 * right:.1f} % of {int(confusion.sum())} {counted} right")
    if count <= MOST_NAMED:
        names = [unformatted(_short(name)) for name in classes]
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
    if count <= 15:
        for row in range(count):
            for column in range(count):
                if confusion[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    text = f"{100 * shares[row, column]:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    with warnings.catch_warnings():  # of names in a writing that the font does not have
        warnings.filterwarnings("ignore", message="Glyph")
        with replaced_when_whole(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def _short(name: str) -> str:
    """A name of at most 24 characters: its start and its end."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
