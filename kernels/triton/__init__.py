"""Triton kernels, forward and backward: for GPUs, and for tests on CPU tensors under Triton's interpreter.

This module does not import triton, so that everything else works where it is not installed.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from sinuous.kernels.precision import is_double

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether kernels run in Triton's interpreter. Triton reads the variable when a kernel is decorated: set it first."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on `device` with `dtype`, or None if it can."""
    if dtype not in _DTYPES:
        return f"the Triton kernels take float16, bfloat16, float32, float64, complex64 and complex128, not {dtype}"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return (
            f"the tensors are on {device} and Triton kernels need a GPU "
            "(or TRITON_INTERPRET=1, set before sinuous is imported, to interpret them on CPU tensors)"
        )
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device.type == "cuda" and torch.version.hip is not None and is_double(dtype):
        # In float64 the compiler reads the scratch memory of a backward pass in another layout than it wrote it in, and
        # a barrier on AMD does not wait for stores to memory.
        return "the Triton kernels do not take float64 and complex128 on AMD GPUs"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
    return None
