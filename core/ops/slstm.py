r"""sLSTM: memory cells with an exponential input gate, whose output feeds the gates of the next step.

The classic LSTM and GRU are cells of the same family.

Every cell takes four pre-activations per unit, with recurrent weights that are dense within a head:

    p_g = x_g + R_g y_{t-1} + b_g      g ∈ {i, f, z, o}      R_g ∈ R^{D×D}
    c_t = f_t c_{t-1} + i_t tanh(p_z)      n_t = f_t n_{t-1} + i_t
    y_t = σ(p_o) c_t / n_t      i_t = exp(p_i)      f_t = σ(p_f)

An exponential gate overflows, so the state keeps e^{-m_t} c_t and e^{-m_t} n_t instead, with the running maximum

    m_t = max(p_i, log f_t + m_{t-1})      m_t = p_i where n_{t-1} = 0
    i_t = e^{p_i - m_t}      f_t = min(e^{log f_t + m_{t-1} - m_t}, 1)

in terms of what is kept. A unit with n = 0 is *fresh*: nothing has been written to it, so that its m says nothing. The
rule holds per unit, as in the CUDA kernel of the reference; its torch code looks at the whole batch at once, where one
row that has begun changes the others. A unit that is still fresh after a step (an input gate of -inf) has y = 0.

`lstm`: c_t = σ(p_f) c_{t-1} + σ(p_i) tanh(p_z), y_t = σ(p_o) tanh(c_t).
`gru`: u = σ(p_f), y_t = u y_{t-1} + (1 - u) tanh(p_z + σ(p_i) p_o). f is the update gate and i the reset gate; the
candidate reads z directly and o through the reset gate. With R_z = 0 and x_o = 0 this is `torch.nn.GRU`.

**Gradients.** y does not depend on m, but c, n and m, as inputs and outputs, depend on one another. Nothing is held
constant: every form has the gradient of the equations above; where the maximum ties, it goes to the input gate.

There is no form that is parallel in time, since y_{t-1} stands inside the gates. Chunks only bound the memory of the
backward pass.

Sources: Beck et al., "xLSTM" (arXiv 2405.04517), section 2.2 and appendix A; Pöppel et al., "FlashRNN" (arXiv
2412.07752), for the family of cells with block-diagonal R; github.com/NX-AI/xlstm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.checks import check_choice
from sinuous.core.ops.checks import (
    check_packing,
    check_shape,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import SLSTM
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.chunked import LOWEST
from sinuous.kernels.torch.packing import sequence_count

CHUNK_SIZE = 32
"""Time steps between two states that the forward pass keeps for the backward pass."""

CELLS = ("slstm", "lstm", "gru")

CellState = tuple[Tensor, Tensor, Tensor, Tensor]
"""y, c, n and m, each `[B, H, D]`."""


def _slstm(p: tuple[Tensor, ...], state: State) -> State:
    p_i, p_f, p_z, p_o = p
    _, c, n, m = state
    carried = F.logsigmoid(p_f) + m
    m = torch.where((n == 0) | (p_i >= carried), p_i, carried)
    m = torch.where(m >= LOWEST, m, LOWEST)
    i, f = (p_i - m).exp(), (carried - m).clamp_max(0).exp()
    c, n = f * c + i * p_z.tanh(), f * n + i
    return p_o.sigmoid() * (c / n.masked_fill(n == 0, torch.inf)), c, n, m


def _lstm(p: tuple[Tensor, ...], state: State) -> State:
    p_i, p_f, p_z, p_o = p
    _, c, n, m = state
    c = p_f.sigmoid() * c + p_i.sigmoid() * p_z.tanh()
    return p_o.sigmoid() * c.tanh(), c, n, m


def _gru(p: tuple[Tensor, ...], state: State) -> State:
    p_i, p_f, p_z, p_o = p
    y, c, n, m = state
    update = p_f.sigmoid()
    return update * y + (1 - update) * (p_z + p_i.sigmoid() * p_o).tanh(), c, n, m


_STEPS = {"slstm": _slstm, "lstm": _lstm, "gru": _gru}


def recurrent(args: SLSTM, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, ...]:
    """Run the definition step by step; autograd differentiates it."""
    dtype = working_dtype(args.gates.dtype)
    gates, R, bias = args.gates.to(dtype), args.R.to(dtype), args.bias.to(dtype)
    initial = tuple(gates.new_zeros(_state(args)) if t is None else t.to(dtype) for t in args.initial_state)

    def step(state: State, x_t: Tensor) -> tuple[Tensor, State]:
        p = x_t + torch.einsum("ghde,bhe->bghd", R, state[0]) + bias
        state = _STEPS[args.cell](p.unbind(1), state)
        return state[0], state

    y, final, chunk_states = run_steps(
        step, (gates,), initial, gates[:, :0, 0], args.cu_seqlens, args.reverse, chunk_size
    )
    return y.to(args.gates.dtype), *final, y.detach().clone(), *chunk_states


def _state(args: SLSTM) -> tuple[int, ...]:
    return sequence_count(args.gates, args.cu_seqlens), *args.gates.shape[3:]


def _check(args: SLSTM) -> None:
    gates = args.gates
    if gates.ndim != 5 or gates.shape[2] != 4:
        raise ValueError(
            f"gates must have shape [B, T, 4, H, D], in the order i, f, z, o (got {list(gates.shape)}); time is axis 1"
        )
    heads, width = gates.shape[3:]
    check_shape("R", args.R, (4, heads, width, width), "recurrent weights per gate and head, [4, H, D_out, D_in]")
    check_shape("bias", args.bias, (4, heads, width), "one per gate and unit, [4, H, D]")
    check_packing(args.cu_seqlens, *gates.shape[:2])
    for part, t in zip("ycnm", args.initial_state, strict=True):
        check_shape(f"initial_{part}", t, _state(args), "[sequences, H, D]")
    check_choice("cell", args.cell, CELLS)


def _fake(args: SLSTM) -> tuple[Tensor, ...]:
    y, dtype = args.gates.new_empty(_hidden(args)), working_dtype(args.gates.dtype)
    return y, *(y.new_empty(_state(args), dtype=dtype) for _ in range(4))


def _hidden(args: SLSTM, **_: object) -> tuple[int, ...]:
    batch, length, _gates, heads, width = args.gates.shape
    return batch, length, heads, width


def _chunks(args: SLSTM, chunk_size: int) -> tuple[int, ...]:
    batch, length, heads, width = _hidden(args)
    return batch, -(-length // chunk_size), heads, width


def _multiply_adds(args: SLSTM) -> int:
    batch, length, count, heads, width = args.gates
    adds: int = batch * length * count * heads * width**2
    return adds


FAMILY = Family(
    name="slstm",
    arguments=SLSTM,
    outputs=("y", "final_y", "final_c", "final_n", "final_m"),
    # With y of every step in the precision of the state, the gates of a chunk are one matrix product again.
    saved={"hidden": _hidden, "chunk_y": _chunks, "chunk_c": _chunks, "chunk_n": _chunks, "chunk_m": _chunks},
    integers=("cu_seqlens",),
    forms=("triton", "cpu", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=_multiply_adds,
)
define(FAMILY)


@public
def slstm(
    gates: Tensor,
    R: Tensor,
    bias: Tensor,
    *,
    cell: str = "slstm",
    initial_state: CellState | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, CellState]:
    r"""Recurrent cells with gates that read the last output: `p = gates + R y_{t-1} + bias`, then
    `c_t = σ(p_f) c_{t-1} + exp(p_i) tanh(p_z)`, `n_t = σ(p_f) n_{t-1} + exp(p_i)`, `y_t = σ(p_o) c_t / n_t`, computed
    in a scale e^m that cannot overflow; or the classic LSTM or GRU.

    Args:
        gates: what the input adds to the pre-activations, `[B, T, 4, H, D]` in the order i, f, z, o; packed sequences
            are `[1, ΣT, 4, H, D]` with `cu_seqlens`. In sLSTM and LSTM -inf at i writes nothing and at f forgets all
            that came before.
        R: recurrent weights within each head, `[4, H, D_out, D_in]`.
        bias: `[4, H, D]`.
        cell: `slstm`, `lstm` or `gru`, as the module defines them.
        initial_state: y, c, n and m before the first step, each `[B, H, D]` (one row per sequence when packed); zeros
            if absent. c and n are in units of e^m. A cell hands through what it does not use: n and m in the LSTM, c
            too in the GRU.
        return_state: return `(y, (y, c, n, m))`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch`, `cpu` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, H, D]` in the dtype of gates, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or cell, naming the argument, and for a backend that cannot run.

    Source: xLSTM (arXiv 2405.04517), section 2.2; the family of cells: FlashRNN (arXiv 2412.07752).
    """
    y, final_y, c, n, m, _, _, _, _, _ = operators.slstm(
        gates, R, bias, *(initial_state or (None,) * 4), cu_seqlens, cell, reverse, backend or ""
    )
    return (y, (final_y, c, n, m)) if return_state else y
