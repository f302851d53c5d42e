"""Kernels in C, compiled on first use by the machine's compiler: states in registers, deterministic, no extra install.

`SINUOUS_CPU_KERNELS=0` forbids them; `SINUOUS_CACHE` names the folder of the compiled libraries.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from sinuous.kernels.cpu import build
from sinuous.kernels.precision import real_dtype

FAMILIES = ("causal_conv1d", "grid_scan", "linear_scan", "longhorn", "selective_scan", "slstm")
INTERPRETERS = ("sample_program",)
"""Sources that no op needs, and which are compiled where they are asked for."""


@functools.cache
def _problem(families: tuple[str, ...], dtype: torch.dtype, instead: str) -> str | None:
    """Why the kernels cannot run in `dtype` on this machine, or None; says what is done `instead`, and slower.

    All families are compiled and tried at once: what failed later would fail inside an op, after the choice of it.
    """
    if os.environ.get("SINUOUS_CPU_KERNELS") == "0":
        return "SINUOUS_CPU_KERNELS=0 forbids it"
    reason = None
    try:
        for family in families:
            module = importlib.import_module(f"{__name__}.{family}")
            reason = reason or module.self_test(dtype)
    except (build.BuildError, OSError, RuntimeError) as error:
        reason = str(error)
    if reason is not None:
        warnings.warn(f"the C kernels cannot be used, {instead}: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on `device` with `dtype`, or None if it can."""
    if device.type != "cpu":
        return f"C kernels take tensors on the cpu, not on {device}"
    return _problem(FAMILIES, real_dtype(dtype), "ops run in plain torch")


def interpreter_unavailable() -> str | None:
    """Why programs of `sample_program` cannot run on this machine, or None if they can."""
    return _problem(INTERPRETERS, torch.float32, "samples are drawn by torch")
