r"""Which parts of a picture spoke for a class: Vim's scans read as attention.

With Δ, B and C held, the selective scan is linear in its input, and each channel d has a T×T matrix of its own,

    y_t[d] = Σ_{s≤t} M^d_{ts} u_s[d] + D[d] u_t[d],      M^d_{ts} = Σ_n C_t[n] exp(A[d,n] Σ_{r=s+1..t} Δ_r[d]) Δ_s[d] B_s[n],

and the scan from the other side has Σ_{s≥t}, with r running over t..s-1: Vim's pair of scans looks both ways, as
attention does. Nobody needs the matrix. For any weights g_t[d] on the outputs, the row Σ_t g_t[d] M^d_{ts} is one scan
in the opposite direction,

    λ_s = exp(Δ_{s+1} A) ⊙ λ_{s+1} + g_s C_s,      Σ_t g_t[d] M^d_{ts} = Δ_s[d] λ_s[d] · B_s,

that is, the gradient of the scan with respect to its input: linear in T, at the speed of the kernels.

Source of the matrix: Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models" (arXiv 2403.01590), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.core import ops


def attention_rows(
    weights: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """`Σ_t weights_t[d] M^d_{ts}`: rows of a scan's implicit attention, mixed by `weights`, without the matrix.

    Args:
        weights: `[B, T, D]`; one at a single step and zero elsewhere gives that step's row for every channel.
        u, dt, A, B, C, dt_bias, dt_softplus, reverse: as in `sinuous.ops.selective_scan`.

    Returns:
        `[B, T, D]`, how much each channel of each step s counts. The sum over s of rows times `u` is the scan's output
        without its skip term, mixed by `weights`.
    """
    frozen = [t.detach() for t in (dt, A, B, C)]
    with torch.enable_grad():
        source = u.detach().requires_grad_()
        y = ops.selective_scan(
            source,
            *frozen,
            dt_bias=None if dt_bias is None else dt_bias.detach(),
            dt_softplus=dt_softplus,
            reverse=reverse,
        )
        (rows,) = torch.autograd.grad(y, source, weights)
    return rows
