"""Fair timings and honest peaks: candidates take turns in one process, memory is read in a process of its own."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

SHORTEST_SAMPLE = 0.005
"""Seconds; a shorter call is repeated inside one sample, so that the clock's own cost stays below a percent."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(line: str) -> None:
    """Tell the person who waits how far a measurement is, on stderr."""
    print(line, file=sys.stderr)


def seconds(call: Callable[[], object], device: torch.device, *, clock: str = "wall", inner: int = 1) -> float:
    """Mean duration of `inner` successive calls, the device's work included."""
    now = CLOCKS[clock]
    _synchronize(device)
    start = now()
    for _ in range(inner):
        call()
    _synchronize(device)
    return (now() - start) / inner


def round_robin(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Time the candidates in turn, `repeats` times over.

    A disturbance of the machine then meets all of them alike, which is what makes their ratios worth printing.
    Each candidate is called twice before the first sample; the second call says how often it must run in one sample.
    """
    inner = {}
    for name, call in candidates.items():
        call()
        inner[name] = min(1000, math.ceil(SHORTEST_SAMPLE / max(seconds(call, device), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            samples[name].append(seconds(call, device, clock=clock, inner=inner[name]))
    return samples


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def _status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident() -> float:
    """Bytes of this process that are in memory now.

    Raises:
        OSError: where the system does not say (anything but Linux).
    """
    return _status("VmRSS")


def _restart_peak() -> None:
    """Give freed memory back to the system and let the peak (VmHWM) start again from what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def keep_memory() -> None:
    """Let glibc keep the memory that is freed, so that of calls in a row only the first waits for pages of the system.

    Of another allocator nothing is asked. It holds for the rest of the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_MAX, 0)


def peak_growth(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float] | None:
    """Bytes that each call needs at its peak beyond what was held before the first of them.

    On a GPU this is what torch's allocator handed out, elsewhere the growth of the resident set. None where the
    system does not let a process restart its own peak (anything but Linux). Run it in a fresh process: memory that an
    earlier call freed and the allocator kept would hide a later one's need.
    """
    peaks = {}
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        for name, call in calls.items():
            torch.cuda.reset_peak_memory_stats(device)
            call()
            _synchronize(device)
            peaks[name] = float(torch.cuda.max_memory_allocated(device) - held)
        return peaks
    try:
        _restart_peak()
        before = resident()
        for name, call in calls.items():
            _restart_peak()
            call()
            peaks[name] = max(0.0, _status("VmHWM") - before)
    except OSError:
        return None
    return peaks


def in_fresh_process(function: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """`function(*args)` in a newly started process, or None if it dies or takes longer than `timeout` seconds."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(function, *args)
        try:
            return future.result(timeout)
        except BrokenProcessPool:
            return None
        except concurrent.futures.TimeoutError:
            for process in list(pool._processes.values()):
                process.terminate()
            return None


def machine(device: torch.device) -> str:
    """The processor that the figures belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
