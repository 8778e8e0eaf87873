"""The formats of `python -m sparkme.export --to NAME`, each in a file of its own.

To add one, write `sparkme/weights/NAME.py` with a `FORMAT`, and add a line here. A `Format` has the tables of its names
(`sparkme.weights.names`). A subclass changes the content of the file, the library's network that loads the weights, notes for
the library, or the lines that load the file; its `whole` is for files that hold a network. This table also gives the command's
choices and help texts, the names for reading files (`--init`, `--weights`), and the tests: test_interop.py uses every table in
both directions, test_export.py writes every format and reads every state dict back.
"""

from __future__ import annotations

from sparkme.weights import convnext, detectron2, mmpretrain, spark, timm, torchvision, transformers, ultralytics
from sparkme.weights.format import Format

FORMATS: dict[str, Format] = {
    "torchvision": torchvision.FORMAT,
    "timm": timm.FORMAT,
    "convnext": convnext.FORMAT,
    "mmpretrain": mmpretrain.FORMAT,
    "transformers": transformers.FORMAT,
    "detectron2": detectron2.FORMAT,
    "ultralytics": ultralytics.FORMAT,
    "spark": spark.FORMAT,
}
