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
)
from sinuous.core.ops.differentiation import may_be_differentiated
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.flops import matrix_state
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import MLSTM
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.chunked import LARGEST_ROUNDING, LOWEST
from sinuous.kernels.torch.packing import sequence_count

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""

MatrixMemory = tuple[Tensor, Tensor, Tensor]
"""C `[B, H, K, V]`, n `[B, H, K]` and m `[B, H]`."""


def recurrent(args: MLSTM, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, ...]:
    """Run the definition step by step; autograd differentiates it."""
    dtype, stabilised, eps = working_dtype(args.q.dtype), args.input_activation == "exp", args.eps
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k, v = args.q.to(dtype), args.k.to(dtype), args.v.to(dtype)
    starts = zip(args.initial_state, _state(args), strict=True)
    C, n, m = (q.new_zeros(shape) if t is None else t.to(dtype) for t, shape in starts)
    # m in double precision: where it is large, single precision would lose most of a step's decay.
    log_i, log_f, m = args.input_gate.double(), F.logsigmoid(args.forget_gate.double()), m.double()
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
        if args.normalize:
            y = y / (torch.maximum(((q_t * n).sum(-1) * scale).abs(), floor) + epsilon)[..., None]
        return y, (C, n, m)

    y, (C, n, m), chunk_states = run_steps(
        step, (q, k, v, log_i, log_f), (C, n, m), v[:, :0], args.cu_seqlens, args.reverse, chunk_size
    )
    if differentiated:
        C, n = _scaled_by(m.detach() - m, C, n)
    final = (C, n, m.to(dtype)) if args.return_state else tuple(args.q.new_empty(0) for _ in range(3))
    return y.to(args.v.dtype), *final, *chunk_states[:2], chunk_states[2].to(dtype)


def _scaled_by(log_factor: Tensor, C: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply C and n by exp(log_factor)."""
    factor = log_factor.exp().to(C.dtype)
    return factor[..., None, None] * C, factor[..., None] * n


def _state(args: MLSTM) -> tuple[tuple[int, ...], ...]:
    """Shapes of C, n and m."""
    rows, keys = (sequence_count(args.q, args.cu_seqlens), args.v.shape[2]), args.q.shape[3]
    return (*rows, keys, args.v.shape[3]), (*rows, keys), rows


def _check(args: MLSTM) -> None:
    check_attention(args.q, args.k, args.v)
    batch, length, heads, _ = args.v.shape
    check_shape("input_gate", args.input_gate, (batch, length, heads), "one per step and head, [B, T, H]")
    check_shape("forget_gate", args.forget_gate, (batch, length, heads), "one per step and head, [B, T, H]")
    check_packing(args.cu_seqlens, batch, length)
    C, n, m = _state(args)
    check_shape("initial_C", args.initial_C, C, "[sequences, H, K, V]")
    check_shape("initial_n", args.initial_n, n, "[sequences, H, K]")
    check_shape("initial_m", args.initial_m, m, "[sequences, H]")
    check_choice("input_activation", args.input_activation, ("exp", "sigmoid"))
    if args.input_activation == "exp" and not args.normalize:
        raise ValueError(
            "normalize must be True with input_activation='exp' (got False), since only the normaliser takes out the "
            "scale e^m; pass input_activation='sigmoid'"
        )
    if not args.eps >= 0:
        raise ValueError(f"eps must be ≥ 0 (got {args.eps}); pass 1e-6")


def _fake(args: MLSTM) -> tuple[Tensor, ...]:
    y = args.v.new_empty(args.v.shape)
    if not args.return_state:
        return y, *(args.q.new_empty(0) for _ in range(3))
    return y, *(y.new_empty(shape, dtype=working_dtype(args.q.dtype)) for shape in _state(args))


def _chunk_C(args: MLSTM, chunk_size: int) -> tuple[int, ...]:
    batch, length, heads, values = args.v.shape
    return batch, -(-length // chunk_size), heads, args.q.shape[3], values


def _chunk_n(args: MLSTM, chunk_size: int) -> tuple[int, ...]:
    return _chunk_C(args, chunk_size)[:4]


def _chunk_m(args: MLSTM, chunk_size: int) -> tuple[int, ...]:
    return _chunk_C(args, chunk_size)[:3]


FAMILY = Family(
    name="mlstm",
    arguments=MLSTM,
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
    y, C, n, m, _, _, _ = operators.mlstm(
        q, k, v, input_gate, forget_gate, *(initial_state or (None, None, None)), cu_seqlens, scale, eps,
        input_activation, normalize, reverse, return_state, backend or "",
    )  # fmt: skip
    return (y, (C, n, m)) if return_state else y
