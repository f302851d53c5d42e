r"""mLSTM: a matrix memory with an exponential or a sigmoid input gate, a normaliser, and a stabiliser in the state.

    f_t = σ(f̃_t)      i_t = exp(ĩ_t) or σ(ĩ_t)
    C_t = f_t C_{t-1} + i_t k_t v_tᵀ      n_t = f_t n_{t-1} + i_t k_t      C ∈ R^{K×V}, n ∈ R^K
    y_t = scale · C_tᵀ q_t / max(|scale · n_tᵀ q_t|, 1)

An exponential gate overflows, so the state keeps e^{-m_t} C_t and e^{-m_t} n_t instead, with the running maximum

    m_t = max(log f_t + m_{t-1}, ĩ_t)
    y_t = scale · C_tᵀ q_t / (max(|scale · n_tᵀ q_t|, e^{-m_t}) + ε)

in terms of what is kept. m_0 takes part in the maximum, so that every form has the same m and, through ε, the same y.
With a sigmoid gate nothing overflows: m plays no part and is returned as it came.

**Gradients.** Every form has the gradient of the equations above. But for ε, y does not depend on m: it scales
numerator and denominator alike. So inside a sequence m is a constant but where it scales ε, in ε e^m beside the true
denominator: that has a relative effect of ε / (denominator + ε). At the two ends of a sequence C, n and m are inputs
and outputs, and the gradient is that of their values: a loss may use a state in any way, and a sequence cut in two has
the gradients of the whole.

Sources: Beck et al., "xLSTM" (arXiv 2405.04517), section 2.3 and appendix A; Beck et al., "Tiled Flash Linear
Attention" (arXiv 2503.14376), where the sigmoid input gate is section 4. Beyond the reference kernels
(github.com/NX-AI/mlstm_kernels): the true gradient of the denominator, of the forget gate through the final state, and
of the initial state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.checks import check_choice
from sinuous.core.ops.checks import (
    check_attention,
    check_packing,
    check_shape,
    sequence_count,
)
from sinuous.core.ops.differentiation import may_be_differentiated
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.flops import matrix_state
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import MLSTM
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.chunked import LARGEST_ROUNDING, LOWEST

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""

MatrixMemory = tuple[Tensor, Tensor, Tensor]
"""C `[B, H, K, V]`, n `[B, H, K]` and m `[B, H]`."""


def _zeros(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> MatrixMemory:
    sequences, heads, dtype = sequence_count(q, cu_seqlens), v.shape[2], working_dtype(q.dtype)
    C, n, m = (sequences, heads, q.shape[3], v.shape[3]), (sequences, heads, q.shape[3]), (sequences, heads)
    return q.new_zeros(C, dtype=dtype), q.new_zeros(n, dtype=dtype), q.new_zeros(m, dtype=dtype)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_C: Tensor | None,
    initial_n: Tensor | None,
    initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    eps: float,
    input_activation: str,
    normalize: bool,
    reverse: bool,
    return_state: bool,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, ...]:
    """Run the definition step by step; autograd differentiates it."""
    dtype, stabilised = working_dtype(q.dtype), input_activation == "exp"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = zip((initial_C, initial_n, initial_m), _zeros(q, v, cu_seqlens), strict=True)
    C, n, m = (zero if t is None else t.to(dtype) for t, zero in starts)
    # m in double precision: where it is large, single precision would lose most of a step's decay.
    log_i, log_f, m = input_gate.double(), F.logsigmoid(forget_gate.double()), m.double()
    log_i = log_i if stabilised else F.logsigmoid(log_i)
    differentiated = stabilised and may_be_differentiated(C, n, m, log_i, log_f)
    m = m.clamp_min(LOWEST) if stabilised else m
    if differentiated:
        C, n = _scaled_by(m - m.detach(), C, n)

    def rounded(m: Tensor) -> Tensor:
        """The m that C and n are in units of, a constant: as it is returned."""
        return m.detach().to(dtype).double()

    def step(state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, log_i: Tensor, log_f: Tensor) -> tuple[Tensor, State]:
        C, n, m = state
        floor = log_f.new_zeros(())
        epsilon: Tensor | float = eps
        if stabilised:
            before, m = rounded(m), torch.maximum(log_f + m, log_i).clamp_min(LOWEST)
            held = rounded(m)
            log_f, log_i = ((x - held).clamp_max(LARGEST_ROUNDING) for x in (log_f + before, log_i))
            floor, epsilon = -held, eps * (m - m.detach()).exp().to(dtype) if differentiated else eps
        f, i, floor = (x.exp().to(dtype) for x in (log_f, log_i, floor))
        C = f[..., None, None] * C + i[..., None, None] * k_t[..., :, None] * v_t[..., None, :]
        n = f[..., None] * n + i[..., None] * k_t
        y = (q_t[..., None, :] @ C).squeeze(-2) * scale
        if normalize:
            y = y / (torch.maximum(((q_t * n).sum(-1) * scale).abs(), floor) + epsilon)[..., None]
        return y, (C, n, m)

    inputs = (q.to(dtype), k.to(dtype), v.to(dtype), log_i, log_f)
    y, (C, n, m), chunk_states = run_steps(step, inputs, (C, n, m), inputs[2][:, :0], cu_seqlens, reverse, chunk_size)
    if differentiated:
        C, n = _scaled_by(m.detach() - m, C, n)
    final = (C, n, m.to(dtype)) if return_state else tuple(q.new_empty(0) for _ in range(3))
    return y.to(v.dtype), *final, *chunk_states[:2], chunk_states[2].to(dtype)


def _scaled_by(log_factor: Tensor, C: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply C and n by exp(log_factor)."""
    factor = log_factor.exp().to(C.dtype)
    return factor[..., None, None] * C, factor[..., None] * n


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_C: Tensor | None,
    initial_n: Tensor | None,
    initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    eps: float,
    input_activation: str,
    normalize: bool,
    reverse: bool,
    return_state: bool,
) -> None:
    check_attention(q, k, v)
    batch, length, heads, values = v.shape
    check_shape("input_gate", input_gate, (batch, length, heads), "one per step and head, [B, T, H]")
    check_shape("forget_gate", forget_gate, (batch, length, heads), "one per step and head, [B, T, H]")
    check_packing(cu_seqlens, batch, length)
    rows = (sequence_count(q, cu_seqlens), heads)
    check_shape("initial_C", initial_C, (*rows, q.shape[3], values), "[sequences, H, K, V]")
    check_shape("initial_n", initial_n, (*rows, q.shape[3]), "[sequences, H, K]")
    check_shape("initial_m", initial_m, rows, "[sequences, H]")
    check_choice("input_activation", input_activation, ("exp", "sigmoid"))
    if input_activation == "exp" and not normalize:
        raise ValueError(
            "normalize must be True with input_activation='exp' (got False), since only the normaliser takes out the "
            "scale e^m; pass input_activation='sigmoid'"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be ≥ 0 (got {eps}); pass 1e-6")


def _fake(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, return_state: bool, **_: object) -> tuple[Tensor, ...]:
    state = _zeros(q, v, cu_seqlens) if return_state else (q.new_empty(0),) * 3
    return (torch.empty_like(v), *(torch.empty_like(t) for t in state))


def _chunk_C(q: Tensor, v: Tensor, chunk_size: int, **_: object) -> tuple[int, ...]:
    return (q.shape[0], -(-q.shape[1] // chunk_size), v.shape[2], q.shape[3], v.shape[3])


def _chunk_n(q: Tensor, v: Tensor, chunk_size: int, **_: object) -> tuple[int, ...]:
    return _chunk_C(q, v, chunk_size)[:4]


def _chunk_m(q: Tensor, v: Tensor, chunk_size: int, **_: object) -> tuple[int, ...]:
    return _chunk_C(q, v, chunk_size)[:3]


FAMILY = Family(
    name="mlstm",
    arguments=MLSTM,
    by_name=True,
    outputs=("y", "C", "n", "m"),
    saved={"chunk_C": _chunk_C, "chunk_n": _chunk_n, "chunk_m": _chunk_m},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=matrix_state(3),
)
define(FAMILY)


@public
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    input_activation: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: MatrixMemory | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MatrixMemory]:
    r"""Matrix memory with input and forget gate: `C_t = f_t C_{t-1} + i_t k_t v_tᵀ`, `n_t = f_t n_{t-1} + i_t k_t`,
    `y_t = scale · C_tᵀ q_t / max(|scale · n_tᵀ q_t|, 1)`, computed in a scale e^m that cannot overflow.

    Args:
        q: queries `[B, T, H, K]`; packed sequences are `[1, ΣT, H, K]` with `cu_seqlens`.
        k: keys, shaped like q.
        v: values `[B, T, H, V]`.
        input_gate: before its activation, `[B, T, H]`; -inf writes nothing.
        forget_gate: before its activation, a sigmoid, `[B, T, H]`; -inf forgets all that came before.
        input_activation: `exp`, or `sigmoid`, which needs no stabiliser m.
        normalize: divide by the normaliser; may be False with the sigmoid, and y is then the numerator.
        eps: added to the denominator in the scale of the state, where 1 is e^-m.
        scale: factor of the queries; K^-1/2 if absent.
        initial_state: C `[B, H, K, V]`, n `[B, H, K]` and m `[B, H]` before the first step (one row per sequence when
            packed); zeros if absent. C and n are in units of e^m.
        return_state: return `(y, (C, n, m))`, the state after the last step in fp32 (fp64 for fp64 input). With the
            sigmoid m is the initial one.
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, H, V]` in the dtype of v, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, and for a backend that cannot run.

    Source: xLSTM (arXiv 2405.04517), section 2.3; the sigmoid input gate: TFLA (arXiv 2503.14376), section 4.
    """
    y, C, n, m, _, _, _ = torch.ops.sinuous.mlstm(
        q, k, v, input_gate, forget_gate, *(initial_state or (None, None, None)), cu_seqlens, scale, eps,
        input_activation, normalize, reverse, return_state, backend or "",
    )  # fmt: skip
    return (y, (C, n, m)) if return_state else y
