"""The formats of `python -m sparkme.export --to NAME`, each in a file of its own.

To add one, write `sparkme/weights/NAME.py` with a `FORMAT`, and add a line here; that is all. A `Format` says which tables its
names follow (`sparkme.weights.names`). A subclass says what else differs: the content of the file, the library's network that
must take the weights, what the library has to be told, how the file is loaded. The command's choices and help texts follow from
this table, and so does the reading of files under those names (`--init`, `--weights`). The tests go by it, too: test_interop.py
reads every table in both directions, test_export.py writes every format and reads it back where it is a state dict.
"""

from __future__ import annotations

from sparkme.weights import convnext, detectron2, mmpretrain, spark, timm, torchvision, transformers
from sparkme.weights.format import Format

FORMATS: dict[str, Format] = {
    "torchvision": torchvision.FORMAT,
    "timm": timm.FORMAT,
    "convnext": convnext.FORMAT,
    "mmpretrain": mmpretrain.FORMAT,
    "transformers": transformers.FORMAT,
    "detectron2": detectron2.FORMAT,
    "spark": spark.FORMAT,
}
