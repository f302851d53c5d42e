"""Positions of steps in their sequences, and rotations by them.

The functions are leaves for FX, which cannot build tensors from the shape of a traced value; `torch.fx.wrap` patches
this module's own namespace, so callers write `positions.steps(x)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinuous.kernels.precision import real_dtype


@torch.fx.wrap
def steps(x: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Count the steps before each one in its sequence, int64 `[B, T]`, or `[1, T]` where all rows agree.

    Args:
        x: `[B, T, …]`, for its length and device.
        start: steps before the first one, `[B]`; 0 if absent.
        cu_seqlens: boundaries of packed sequences; the count begins anew in each.
    """
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        return (index - bounds[segments(x, cu_seqlens)[0]]).unsqueeze(0)
    if start is not None:
        return start.unsqueeze(1) + index
    return index.unsqueeze(0)


@torch.fx.wrap
def segments(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Number of the packed sequence that each step belongs to, int64 `[1, T]`; zeros without packing."""
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return torch.zeros_like(index).unsqueeze(0)
    return torch.bucketize(index, cu_seqlens[1:].long(), right=True).unsqueeze(0)


@torch.fx.wrap
def rotate(x: Tensor, steps: Tensor, theta: float, interleaved: bool = False) -> Tensor:
    r"""Rotate pairs of channels by an angle proportional to the step: rotary positions.

        (x_a, x_b)  ←  (x_a cos φ - x_b sin φ,  x_b cos φ + x_a sin φ),    φ = step · θ^{-2j/K}

    Pair j is made of channels j and j + K/2, as in GPT-NeoX and Llama, or, `interleaved`, of neighbours, 2j and 2j + 1,
    as in the paper. Angles are fp32, or fp64 where x is; those of neighbours are counted in fp64 and taken modulo 2π,
    so that they are exact along a chromosome.

    Args:
        x: `[B, T, H, K]`, K even.
        steps: int64 `[B, T]` or `[1, T]`.
        theta: θ, 10,000 in the paper.
        interleaved: pair neighbours.

    Source: Su et al. (arXiv 2104.09864), section 3.2.2.
    """
    dtype = real_dtype(x.dtype)
    half = x.shape[3] // 2
    if interleaved:
        exponents = -torch.arange(half, device=x.device, dtype=torch.float64) / half
        angle = torch.remainder(steps.double().unsqueeze(-1) * torch.pow(theta, exponents), 2 * math.pi)
        angle = angle.to(dtype).unsqueeze(2)
        a, b = x.to(dtype).unflatten(-1, [half, 2]).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
    frequency = torch.pow(theta, -torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (steps.to(dtype).unsqueeze(-1) * frequency).unsqueeze(2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@torch.fx.wrap
def phases(x: Tensor, cu_seqlens: Tensor | None, grid: list[int] | None, theta: float) -> Tensor:
    r"""Cosines and sines of the phase of each cell of a grid, `[1, T, 1, 2K]`, fp32, or fp64 where x is.

        φ_{s·e + j} = n_s · θ^{-2j/K},    j = 0 … e - 1,    e = ⌈K/m⌉        for a cell at n_1 … n_m of m axes

    Axis s owns the channels from s·e on, of which there are K in all.

    Args:
        x: `[B, T, H, K]`, for its shape, device and dtype.
        cu_seqlens: boundaries of packed sequences, each a row; it goes without a grid.
        grid: its sides, their product T; a single row of two axes if absent.
        theta: θ.

    Source: Qin et al., LRPE (arXiv 2307.09270), in several dimensions as in LightNet (arXiv 2405.21022).
    """
    dtype = real_dtype(x.dtype)
    sides = [1, x.shape[1]] if grid is None else grid
    channels = x.shape[3]
    per_axis = (channels + len(sides) - 1) // len(sides)
    frequency = torch.pow(theta, -2 * torch.arange(per_axis, device=x.device, dtype=dtype) / channels)
    rest = steps(x, None, cu_seqlens)[0]
    cells = x.shape[1]
    phases: list[Tensor] = []
    for axis, side in enumerate(sides):
        cells = cells // max(side, 1)
        place = torch.div(rest, max(cells, 1), rounding_mode="floor")
        rest = rest - place * cells
        width = max(0, min(per_axis, channels - axis * per_axis))
        phases.append(place.to(dtype).unsqueeze(1) * frequency[:width])
    phase = torch.cat(phases, 1)
    return torch.cat([phase.cos(), phase.sin()], 1).unsqueeze(0).unsqueeze(2)
