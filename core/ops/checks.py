"""Checks of tensors that several ops take. Each error names the argument, what it must be, what it is, and the remedy.

Every function raises ValueError.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""dtypes of tensors that have gradients, where they are not complex."""


def check_floating(name: str, t: Tensor) -> None:
    """Refuse a tensor that is not real floating point of 16 bits or more."""
    if t.dtype not in REAL:
        raise ValueError(f"{name} must be real floating point (got {t.dtype}); convert it with .float()")


def check_device(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    """Refuse a tensor that is not where the first one is."""
    if t.device != first.device:
        place = str(first.device)
        raise ValueError(f"{name} is on {t.device} and {first_name} on {place}; move it with .to({place!r})")


def check_shape(name: str, t: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor of another shape; `meaning` says in words what its axes are."""
    if t is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} (got {list(t.shape)}): {meaning}")


def check_packing(cu_seqlens: Tensor | None, batch: int, length: int) -> None:
    """Refuse boundaries that do not cut one row of `length` steps; on a GPU their values are not looked at."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            "cu_seqlens must be int32 or int64 of shape [sequences + 1] "
            f"(got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)})"
        )
    if batch != 1:
        raise ValueError(f"packed input has batch size 1 (got {batch}); concatenate the sequences along time")
    if cu_seqlens.device.type != "cpu":
        return  # a look at the values would wait for the device
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the packed length {length} (got {bounds})")


def check_log_decay(log_decay: Tensor | None) -> None:
    """Refuse logarithms of decays above 0; -inf passes. On a GPU values are not looked at, which would wait for it."""
    if log_decay is None or log_decay.device.type != "cpu" or log_decay.numel() == 0:
        return
    largest = log_decay.max().item()
    if largest > 0:
        raise ValueError(f"log_decay must be ≤ 0 (got max {largest:.3g}); pass logsigmoid(x) or -softplus(x)")


def check_attention(q: Tensor, k: Tensor, v: Tensor, *, grouped: bool = False) -> None:
    """Refuse queries and keys that are not `[B, T, H, K]`, and values that are not `[B, T, H, V]`.

    With `grouped`, values may have a multiple of the heads of q.
    """
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B, T, H, K] (got {list(q.shape)}); time is axis 1, heads are axis 2")
    check_shape("k", k, tuple(q.shape), "keys are shaped like queries, [B, T, H, K]")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        shape = f"[{q.shape[0]}, {q.shape[1]}, H, V]"
        raise ValueError(f"v must have shape {shape}, with the batch and time of q (got {list(v.shape)})")
    if v.shape[2] != q.shape[2] and not (grouped and q.shape[2] > 0 and v.shape[2] % q.shape[2] == 0):
        remedy = "a multiple of them" if grouped else "as many; repeat the queries and keys of a group"
        raise ValueError(f"v has {v.shape[2]} heads and q has {q.shape[2]}; v needs {remedy}")
