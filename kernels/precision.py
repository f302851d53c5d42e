"""The rule of precision inside every op: double stays double, all else becomes single; real or complex as it was."""

from __future__ import annotations

import torch
from torch import Tensor


def is_double(dtype: torch.dtype) -> bool:
    """Whether `dtype` is float64 or complex128."""
    return dtype == torch.float64 or dtype == torch.complex128


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 and complex128, float32 for all else: the dtype of real numbers beside `working_dtype`."""
    return torch.float64 if is_double(dtype) else torch.float32


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of states, gates and sums where inputs have `dtype`: `real_dtype`, or for complex inputs the complex dtype
    of that precision."""
    if not dtype.is_complex:
        return real_dtype(dtype)
    return torch.complex128 if is_double(dtype) else torch.complex64


def at_least_fp32(x: Tensor) -> Tensor:
    """Real `x` in fp32, or unchanged where it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
