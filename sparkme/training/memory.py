"""How the CPU's memory allocator treats what training frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3), malloc.h


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next step instead of handing it back to the system.

    A step allocates and frees the same large tensors again and again. Handed back, every page has to be mapped and
    cleared anew: a sixth of a ResNet-50 step on the CPU, measured. Returns False where the C library cannot do it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_MAX, 0))
