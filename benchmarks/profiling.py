"""Peak memory and idle time for benchmarks.throughput, measured apart from the timed rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of tensors during `work`, above those before it. The result of `work` counts until the end.

    On CUDA it is the allocator's record, else the sum of all allocations and releases by torch. Memory of libraries (oneDNN's
    scratch space, MinkowskiEngine's hash tables on the CPU) is not included.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    del result
    events = [event for event in _events(record) if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def gpu_times(step: Callable[[], Any], steps: int = 8) -> dict[str, float]:
    """The GPU's share of work in a step, while steps follow each other without waiting, as in training.

    Busy time is the union of the profiler's kernels, copies and fills. The time of a step is measured without the profiler,
    which would slow the host down.

    Returns:
        `step_s` and `busy_s`, seconds per step, and `idle_share`, 1 - busy / step.
    """
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - start) / steps
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_gpu = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in _events(record)
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0 and not _is_annotation(event)
    ]
    busy_s = union_length(on_gpu) / 1e9 / steps
    return {"step_s": step_s, "busy_s": busy_s, "idle_share": max(0.0, 1 - busy_s / step_s)}


def union_length(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (start, end) intervals."""
    covered, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            reached = start
        covered += max(0, end - reached)
        reached = max(reached, end)
    return covered


def step_table(step: Callable[[], Any], device: torch.device, rows: int = 40) -> str:
    """torch.profiler's table of one step, the most expensive operators or kernels first."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    step()
    with profile(activities=activities) as record:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=column, row_limit=rows, max_name_column_width=90)


def _events(record: profile) -> list[Any]:
    assert record.profiler is not None and record.profiler.kineto_results is not None
    return record.profiler.kineto_results.events()


def _is_annotation(event: Any) -> bool:
    """Whether a span only annotates kernels, such as that of an optimiser's step."""
    return bool(event.is_user_annotation()) or event.name().startswith(("Optimizer.", "ProfilerStep"))
