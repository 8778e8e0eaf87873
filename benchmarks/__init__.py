"""Counts and measurements of what sparkme computes; their results are in results/."""

import os

# Before torch is imported: its profiler would announce every start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
