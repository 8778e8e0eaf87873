"""The changes to MinkowskiEngine's published sources, and their reasons. Changes outside the sources are in `compat/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sdist import VERSION, BuildError


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces `old` by `new` in `file`, where `old` must occur exactly `count` times.

    `only` limits an edit to builds for "cpu" or "cuda".
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
        reason="torch warns that instances of autograd functions will become an error",
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
        name="no limit of threads",
        file="MinkowskiEngine/__init__.py",
        old='if os.cpu_count() > 16 and "OMP_NUM_THREADS" not in os.environ:\n',
        new="if False:\n",
        reason="on more than 16 cores the import warned and limited the whole process, torch included, to 16 threads",
    ),
    Edit(
        name="no warning about a CPU-only build",
        file="MinkowskiEngine/__init__.py",
        old="if not is_cuda_available():\n",
        new="if False:\n",
        reason="it appeared at every import; sparkme reports it if a GPU is requested",
    ),
    Edit(
        name="no uninstall during the build",
        file="setup.py",
        old='run_command("pip", "uninstall", "MinkowskiEngine", "-y")\n',
        new="",
        reason="it removes a working MinkowskiEngine from the environment of the `pip` on PATH, and fails without pip",
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
        reason="twelve files took 25 to 30 s each for the same headers of torch; compat/cpu/sources_cpu.cpp includes them all",
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
        BuildError: the file of an edit is missing, or does not contain the text `count` times.
    """
    for edit in edits:
        path = source / edit.file
        if not path.is_file():
            raise BuildError(f"edit '{edit.name}' for MinkowskiEngine {VERSION}: {edit.file} is missing.")
        text = path.read_text()
        found = text.count(edit.old)
        if found != edit.count:
            raise BuildError(
                f"edit '{edit.name}' for MinkowskiEngine {VERSION} does not fit: {edit.file} contains its text {found} times"
                f" instead of {edit.count}."
            )
        path.write_text(text.replace(edit.old, edit.new))
