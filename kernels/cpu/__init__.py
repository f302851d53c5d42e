"""Kernels in C, compiled on first use by the machine's compiler: states in registers, deterministic, no extra install.

`SINUOUS_CPU_KERNELS=0` forbids them; `SINUOUS_CACHE` names the folder of the compiled libraries.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from sinuous.kernels.cpu import build


@functools.cache
def _problem() -> str | None:
    """Why no kernel can run on this machine, or None; says so once, since the ops get slower without them."""
    if os.environ.get("SINUOUS_CPU_KERNELS") == "0":
        return "SINUOUS_CPU_KERNELS=0 forbids it"
    try:
        from sinuous.kernels.cpu import selective_scan

        reason = selective_scan.self_test()
    except build.BuildError as error:
        reason = str(error)
    if reason is not None:
        warnings.warn(f"the C kernels cannot be used, ops run in plain torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on `device` with `dtype`, or None if it can."""
    if device.type != "cpu":
        return f"C kernels take tensors on the cpu, not on {device}"
    return _problem()
