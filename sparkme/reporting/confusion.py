"""A picture of the confusion matrix."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from sparkme.files import replaced_when_whole
from sparkme.training.log import unformatted

MOST_NAMED = 40  # with more classes their names would be illegible


def draw_confusion(confusion: Tensor, classes: list[str], path: Path, counted: str = "images") -> None:
    """Draws a confusion matrix of counts, (true, predicted) int64, as shares of each row, into the PNG file `path`. The title
    names what is `counted`."""
    shares = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).numpy()
    count = len(classes)
    side = min(12.0, 3.5 + 0.4 * count)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    right = int(confusion.diag().sum()) / max(1, int(confusion.sum()))
    title = f"{100 * right:.1f} % of {int(confusion.sum())} {counted} correct"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
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
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    with warnings.catch_warnings():  # the font lacks characters of some names
        warnings.filterwarnings("ignore", message="Glyph")
        with replaced_when_whole(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def _short(name: str) -> str:
    """Shortens a name to 24 characters: its start and its end."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
