"""What this project changes in MinkowskiEngine's published sources, and why.

Whatever can be mended from outside lives in `compat/` instead, so that this list stays short.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sdist import VERSION, BuildError


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces `old` by `new` in `file`, where `old` has to occur exactly `count` times.

    `only` is "cpu" or "cuda" for an edit that the other kind of build leaves out.
    """

    name: str
    file: str
    old: str
    new: str
    reason: str
    count: int = 1
    only: str | None = None


def _sequence_import(file: str, *others: str) -> Edit:
    return Edit(
        name=f"abstract base classes in {Path(file).name}",
        file=file,
        old=f"from collections import {', '.join(('Sequence', *others))}\n",
        new="from collections.abc import Sequence\n" + (f"from collections import {', '.join(others)}\n" if others else ""),
        reason="collections.Sequence left for collections.abc in Python 3.10",
    )


def _functions_as_classes(file: str, count: int) -> Edit:
    return Edit(
        name=f"autograd functions in {Path(file).name}",
        file=file,
        old="Function()",
        new="Function",
        count=count,
        reason="torch warns about instances of autograd functions and announces that they will be an error",
    )


EDITS: tuple[Edit, ...] = (
    _sequence_import("MinkowskiEngine/MinkowskiCommon.py"),
    _sequence_import("MinkowskiEngine/MinkowskiCoordinateManager.py"),
    _sequence_import("MinkowskiEngine/MinkowskiKernelGenerator.py", "namedtuple"),
    _sequence_import("MinkowskiEngine/MinkowskiTensorField.py"),
    _sequence_import("MinkowskiEngine/utils/quantization.py"),
    _functions_as_classes("MinkowskiEngine/MinkowskiBroadcast.py", 1),
    _functions_as_classes("MinkowskiEngine/MinkowskiConvolution.py", 2),
    _functions_as_classes("MinkowskiEngine/MinkowskiInterpolation.py", 1),
    _functions_as_classes("MinkowskiEngine/MinkowskiNormalization.py", 1),
    _functions_as_classes("MinkowskiEngine/MinkowskiPooling.py", 3),
    _functions_as_classes("MinkowskiEngine/MinkowskiPruning.py", 1),
    _functions_as_classes("MinkowskiEngine/MinkowskiSparseTensor.py", 4),
    _functions_as_classes("MinkowskiEngine/MinkowskiTensorField.py", 4),
    _functions_as_classes("MinkowskiEngine/MinkowskiUnion.py", 1),
    Edit(
        name="threads are the user's choice",
        file="MinkowskiEngine/__init__.py",
        old='if os.cpu_count() > 16 and "OMP_NUM_THREADS" not in os.environ:\n',
        new="if False:\n",
        reason="on more than 16 cores the import warned and held the whole process, torch included, to 16 threads",
    ),
    Edit(
        name="no warning about a CPU-only build",
        file="MinkowskiEngine/__init__.py",
        old="if not is_cuda_available():\n",
        new="if False:\n",
        reason="it came with every import; sparkme says so where it matters, when a GPU is asked for",
    ),
    Edit(
        name="no uninstall during the build",
        file="setup.py",
        old='run_command("pip", "uninstall", "MinkowskiEngine", "-y")\n',
        new="",
        reason="it removes a working MinkowskiEngine from whichever environment the `pip` on PATH belongs to, and fails"
        " where there is none",
    ),
    Edit(
        name="one translation unit for the CPU's sources",
        file="setup.py",
        old="""            "math_functions_cpu.cpp",
            "coordinate_map_manager.cpp",
            "convolution_cpu.cpp",
            "convolution_transpose_cpu.cpp",
            "local_pooling_cpu.cpp",
            "local_pooling_transpose_cpu.cpp",
            "global_pooling_cpu.cpp",
            "broadcast_cpu.cpp",
            "pruning_cpu.cpp",
            "interpolation_cpu.cpp",
            "quantization.cpp",
            "direct_max_pool.cpp",
        ],
        ["pybind/minkowski.cpp"],
""",
        new="""            "sources_cpu.cpp",
        ],
        ["pybind/minkowski.cpp"],
""",
        reason="twelve files read the same headers of torch, and took 25 to 30 s each for it; compat/cpu/sources_cpu.cpp"
        " includes them all",
        only="cpu",
    ),
    Edit(
        name="unique_ptr to shared_ptr in coordinate_map_gpu.cuh",
        file="src/coordinate_map_gpu.cuh",
        old="""      m_map = map_type::create(
          compute_hash_table_size(size, m_hashtable_occupancy),
          m_unused_element, m_unused_key, m_hasher, m_equal, m_map_allocator);
""",
        new="""      auto created = map_type::create(
          compute_hash_table_size(size, m_hashtable_occupancy),
          m_unused_element, m_unused_key, m_hasher, m_equal, m_map_allocator);
      auto deleter = created.get_deleter();
      m_map.reset(created.release(), deleter);
""",
        reason="the conversion inside the assignment makes std::__to_address ambiguous with CUDA 13's headers",
        only="cuda",
    ),
)


def apply_edits(source: Path, edits: Sequence[Edit]) -> None:
    """Applies `edits` to the unpacked sources in `source`.

    Raises:
        BuildError: naming the edit, if its file is missing or holds the expected text not as often as expected.
    """
    for edit in edits:
        path = source / edit.file
        if not path.is_file():
            raise BuildError(f"edit '{edit.name}' for MinkowskiEngine {VERSION}: there is no {edit.file}.")
        text = path.read_text()
        found = text.count(edit.old)
        if found != edit.count:
            raise BuildError(
                f"edit '{edit.name}' for MinkowskiEngine {VERSION} does not fit: {edit.file} holds the text to replace"
                f" {found} times, expected {edit.count}."
            )
        path.write_text(text.replace(edit.old, edit.new))
