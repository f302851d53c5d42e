r"""Linear recurrence over a grid: matrix states on the edges between cells, from left and up to right and down.

Cell (x, y) has two edges coming in, l from (x-1, y) and u from (x, y-1), and two going out, r and d:

    C^r_{xy} = T^{rl} C^l + T^{ru} C^u + S^r k vᵀ          C ∈ R^{K×V}, gates at (x, y)
    C^d_{xy} = T^{dl} C^l + T^{du} C^u + S^d k vᵀ
    y_{xy}   = scale · (M^l C^l + M^u C^u + D k vᵀ)ᵀ q

A cell sees its own pair through the direct gate D only. The source S, transition T, mark M and direct gates depend on
the input alone. A grid has four orientations, by the corner in which the walk starts. They share queries, keys, values
and D; each has its own S, T and M; the outputs are summed.

Between two cells there are binom(Δx + Δy, Δx) paths, so that states explode under gates that are each at most 1. Two
rules keep them bounded (`mode`): propagation, where |T^{r·}| + |T^{d·}| ≤ 1 for each edge coming in, and diffusion,
where one of the two turns is closed, which leaves one path between any two edges, and |T| ≤ 1.

With `mode="free"` this is the recurrence of Chimera and of the 2-D state space models in Roesser's form: the edges' two
states are their h1 and h2, T their (A1, A2; A3, A4), S and k their B, M and q their C; their state is per channel, a
head with V = 1.

Sources: pLSTM, Pöppel et al. (arXiv 2506.11997), sections 3 and 4; Chimera, Behrouz et al. (arXiv 2406.04320),
section 3. Beyond the public code: grids of any sides, boundary states in and out, memory linear in the cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import check_choice
from sinuous.core.ops.checks import check_floating, check_shape
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.kernels.arguments import GridScan
from sinuous.kernels.precision import at_least_fp32, working_dtype
from sinuous.kernels.torch.orientations import unwalked, walked

MODES = ("P", "D", "free")

ORIENTATIONS = 4


def recurrent(args: GridScan) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition cell by cell; autograd differentiates it to any order."""
    dtype, orientations = working_dtype(args.q.dtype), args.orientations
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    left, up = (
        args.q.new_zeros(shape, dtype=dtype) if t is None else t.to(dtype)
        for t, shape in zip((args.left, args.up), _states(args), strict=True)
    )
    q, k, values = args.q.to(dtype) * scale, args.k.to(dtype), args.v.to(dtype)
    first, second = walked(left, orientations, None, 1, 3), walked(up, orientations, 1, None, 3)
    rights, downs = list(first.unbind(2)), list(second.unbind(2))
    shared = [walked(t, orientations, 1, 2) for t in (q, k, values)]
    gates = [walked(t.to(dtype), orientations, 1, 2, 4) for t in (args.source, args.transition, args.mark)]
    rows = []
    for x, row in enumerate(zip(*(t.unbind(2) for t in (*shared, *gates)), strict=True)):
        ys = []
        for y, (q_xy, k_xy, v_xy, S, T, M) in enumerate(zip(*(t.unbind(2) for t in row), strict=True)):
            S, T, M = S[..., None, None], T[..., None, None], M[..., None, None]
            C_l, C_u, pair = rights[y], downs[x], k_xy[..., :, None] * v_xy[..., None, :]
            ys.append((q_xy[..., None, :] @ (M[..., 0, :, :] * C_l + M[..., 1, :, :] * C_u)).squeeze(-2))
            rights[y] = T[..., 0, 0, :, :] * C_l + T[..., 0, 1, :, :] * C_u + S[..., 0, :, :] * pair
            downs[x] = T[..., 1, 0, :, :] * C_l + T[..., 1, 1, :, :] * C_u + S[..., 1, :, :] * pair
        rows.append(torch.stack(ys, 2) if ys else shared[2][:, :, x])
    y_all = unwalked(torch.stack(rows, 2) if rows else shared[2], orientations, 1, 2)
    if args.direct is not None:
        y_all = y_all + (args.direct.to(dtype) * (q * k).sum(-1))[..., None] * values
    y_all = y_all.to(args.v.dtype)
    if not args.with_state:
        return y_all, left.new_empty(0), up.new_empty(0)
    right = unwalked(torch.stack(rights, 2) if rights else first, orientations, None, 1, 3)
    down = unwalked(torch.stack(downs, 2) if downs else second, orientations, 1, None, 3)
    return y_all, right, down


def _states(args: GridScan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, width, height, heads, keys = args.q.shape
    state = (heads, len(args.orientations), keys, args.v.shape[-1])
    return (batch, height, *state), (batch, width, *state)


def _check(args: GridScan) -> None:
    q, k, v, orientations = args.q, args.k, args.v, args.orientations
    if q.ndim != 5:
        raise ValueError(f"q must have shape [B, X, Y, H, K] (got {list(q.shape)}); axes 1 and 2 are the grid's sides")
    check_shape("k", k, tuple(q.shape), "keys are shaped like queries, [B, X, Y, H, K]")
    if v.ndim != 5 or v.shape[:4] != q.shape[:4]:
        shape = f"[{', '.join(map(str, q.shape[:4]))}, V]"
        raise ValueError(f"v must have shape {shape}, with the batch, grid and heads of q (got {list(v.shape)})")
    if not orientations or any(o not in range(ORIENTATIONS) for o in orientations):
        raise ValueError(f"orientations must be numbers from 0 to 3, at least one of them (got {list(orientations)})")
    cells, count = tuple(q.shape[:4]), len(orientations)
    check_shape("source", args.source, (*cells, count, 2), "right and down, [B, X, Y, H, orientations, 2]")
    check_shape(
        "transition", args.transition, (*cells, count, 2, 2), "(right, down) from (left, up), [B, X, Y, H, O, 2, 2]"
    )
    check_shape("mark", args.mark, (*cells, count, 2), "left and up, [B, X, Y, H, orientations, 2]")
    check_shape("direct", args.direct, cells, "[B, X, Y, H]")
    left, up = _states(args)
    check_shape("left", args.left, left, "one state per row, [B, Y, H, orientations, K, V]")
    check_shape("up", args.up, up, "one state per column, [B, X, H, orientations, K, V]")


def _fake(args: GridScan) -> tuple[Tensor, Tensor, Tensor]:
    shapes = _states(args) if args.with_state else ((0,), (0,))
    right, down = (args.q.new_empty(shape, dtype=working_dtype(args.q.dtype)) for shape in shapes)
    return torch.empty(args.v.shape, dtype=args.v.dtype, device=args.v.device), right, down


def _multiply_adds(args: Any) -> int:
    """8 K V for each orientation: two edges in times two out, their marks, and what a cell adds to either."""
    count: int = 8 * args.source[-2] * math.prod(args.q) * args.v[4]
    return count


FAMILY = Family(
    name="grid_scan",
    arguments=GridScan,
    outputs=("y", "right", "down"),
    saved={},
    integers=(),
    forms=("cpu", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={},
    multiply_adds=_multiply_adds,
    time_axes=2,
)
define(FAMILY)


def bounded(transition: Tensor, mode: str) -> Tensor:
    """Apply the stability rule of a mode to transitions `[…, 2, 2]`; the result is at least fp32 where it changes them.

    `"P"` divides both transitions from an edge by |T^{r·}| + |T^{d·}| where that exceeds 1. `"D"` closes the turn from
    left to down and clamps to [-1, 1]; to close the other turn, swap the sides of the grid. `"free"` changes nothing.

    Raises:
        ValueError: if there is no such mode.

    Source: pLSTM (arXiv 2506.11997), section 3.3.
    """
    check_choice("mode", mode, MODES)
    if mode == "free":
        return transition
    wide = at_least_fp32(transition)
    if mode == "P":
        return wide / wide.abs().sum(-2, keepdim=True).clamp_min(1)
    open_turns = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=wide.dtype, device=wide.device)
    return wide.clamp(-1, 1) * open_turns


@public
def grid_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None = None,
    *,
    mode: str = "P",
    orientations: Sequence[int] | None = None,
    scale: float | None = None,
    left: Tensor | None = None,
    up: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""Linear recurrence over a grid: `C^r = T^{rl} C^l + T^{ru} C^u + S^r k vᵀ`, `C^d` alike, and
    `y = scale · (M^l C^l + M^u C^u + D k vᵀ)ᵀ q`, where C^l is C^r of cell (x-1, y) and C^u is C^d of (x, y-1).

    Args:
        q: queries `[B, X, Y, H, K]`.
        k: keys, shaped like q.
        v: values `[B, X, Y, H, V]`.
        source: S, `[B, X, Y, H, O, 2]`, to the right and down, one for each of O orientations.
        transition: T, `[B, X, Y, H, O, 2, 2]`, the first index (right, down), the second (left, up).
        mark: M, `[B, X, Y, H, O, 2]`, from the left and from up.
        direct: D, `[B, X, Y, H]`; 0 if absent.
        mode: the rule that keeps states bounded, see `bounded`: `"P"`, `"D"`, or `"free"` for none. Transitions that
            obey the rule are left as they are.
        orientations: of 0 (right and down), 1 (x from its end), 2 (y from its end) and 3 (both), as many as the gates
            have; the first O of them if absent. Right and down are directions of the walk.
        scale: factor of the queries; K^-1/2 if absent.
        left: states on the edges into the walk's first column, `[B, Y, H, O, K, V]`; zeros if absent.
        up: states on the edges into the walk's first row, `[B, X, H, O, K, V]`; zeros if absent. Both are indexed by
            the grid's y and x, whatever the walk.
        return_state: return `(y, (right, down))`, the states on the edges out of the last column and row, shaped like
            `left` and `up`, in fp32 (fp64 for fp64 input): `right` is `left` of a grid that goes on along x, `down` is
            `up` of one that goes on along y.
        backend: `recurrent`, `torch` or `cpu`; the fastest that can run if absent.

    Returns:
        y `[B, X, Y, H, V]` in the dtype of v, or `(y, (right, down))`, differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, and for a backend that cannot run.

    Source: pLSTM (arXiv 2506.11997), sections 3 and 4.
    """
    if isinstance(transition, Tensor):  # the rule comes before the op, which has these checks too
        check_floating("transition", transition)
        if tuple(transition.shape[-2:]) != (2, 2):
            shape = list(transition.shape)
            raise ValueError(
                f"transition must have shape [B, X, Y, H, O, 2, 2] (got {shape}): (right, down) from (left, up)"
            )
    if orientations is None:
        orientations = range(source.shape[-2] if source.ndim > 1 else 1)
    y, right, down = operators.grid_scan(
        q, k, v, source, bounded(transition, mode), mark, direct, left, up, list(orientations), scale, return_state,
        backend or "",
    )  # fmt: skip
    return (y, (right, down)) if return_state else y
