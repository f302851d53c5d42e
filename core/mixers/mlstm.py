"""xLSTM's matrix memory in its two layers.

    mlstm          [x, z] = proj_up(u);   x' = silu(causal_conv1d(x))
                   q, k = q_proj(x'), k_proj(x');   v = v_proj(x)                 block-diagonal, 4 × 4
                   i, f = igate([q, k, v]), fgate([q, k, v])                      before their activations, per head
                   out = proj_down((norm(mlstm(q, k, v, i, f)) + skip ⊙ x') ⊙ silu(z))
                   Bio-xLSTM rotates q and k by their positions, each head after the gates, which see them as they are
                   (DNA), or the whole width ahead of the gates (proteins)
    mlstm_large    q, k, v, i, f of u, the gates held in (-c, c) by c tanh(· / c)
                   out = out_proj(σ(ogate_preact(u)) ⊙ norm(mlstm(q, k, v, i, f)))

Sources: Beck et al., "xLSTM" (arXiv 2405.04517), section 2.4 and figure 11; Beck et al., "xLSTM 7B" (arXiv 2503.13427),
section 3; Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165). Names of parameters as in NX-AI/xlstm's `mLSTMLayer` and
in the `mLSTMLayer` of its `xlstm_large`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_choice, check_positive, check_sizes
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.convolutions import PaddedConvolution
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.projections import HeadwiseLinear, gate_of
from sinuous.core.mixers.states import zero_states
from sinuous.core.norms import MultiHeadLayerNorm
from sinuous.core.ops.operators import operators

CELL_EPS = 1e-6
INPUT_ACTIVATIONS = ("exp", "sigmoid")
ROTARY = ("head", "inner")
FORGET_BIAS = (3.0, 6.0)
"""Of the forget gate at the start: memories of 20 steps in the first head to 400 in the last."""


@register_state
class MLSTMState(NamedTuple):
    """conv: the last W-1 inputs of the convolution, `[B, W-1, E]` (`[B, 0, 0]` without one); C `[B, H, K, V]`,
    n `[B, H, K]`, m `[B, H]`: the memory, its normaliser and the scale of both, fp32 or fp64."""

    conv: Tensor
    C: Tensor
    n: Tensor
    m: Tensor


@register_state
class RotaryMLSTMState(NamedTuple):
    """`MLSTMState` and the position of the next step, int64 `[B]`."""

    conv: Tensor
    C: Tensor
    n: Tensor
    m: Tensor
    position: Tensor


class MLSTMCell(nn.Module):
    """Gates and norm; the recurrence is the mixer's."""

    def __init__(self, width: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.igate = nn.Linear(3 * width, num_heads, **dd)
        self.fgate = nn.Linear(3 * width, num_heads, **dd)
        self.outnorm = MultiHeadLayerNorm(num_heads, width // num_heads, weight_from_one=True, **dd)


class MemoryMixer(Mixer):
    """Base of both layers: the state, and the calls around the recurrence. A subclass has `_mix`."""

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(self, conv_shape: tuple[int, int], memory_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv_shape = conv_shape
        self.memory_shape = memory_shape

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, None, None, cu_seqlens, None, False)[0]

    def _mix(
        self,
        x: Tensor,
        conv: Tensor | None,
        C: Tensor | None,
        n: Tensor | None,
        m: Tensor | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def prefill(self, x: Tensor, state: MLSTMState | None = None) -> tuple[Tensor, MLSTMState]:
        conv, C, n, m = (None, None, None, None) if state is None else state
        y, conv, C, n, m = self._mix(x, conv, C, n, m, None, None, True)
        return y, MLSTMState(conv, C, n, m)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MLSTMState:
        heads, keys, _ = self.memory_shape
        shapes = ((batch_size, *self.memory_shape), (batch_size, heads, keys), (batch_size, heads))
        like = next(self.parameters())
        return MLSTMState(*zero_states(like, device, dtype, (batch_size, *self.conv_shape), *shapes))


@register_mixer("mlstm")
class MLSTM(MemoryMixer):
    """The layer of xLSTM's mLSTM block, between its norm and its residual.

    Args:
        dim: width of the model.
        num_heads: H.
        proj_factor: E / dim, E rounded up to a multiple of `round_up_to`.
        conv_size: taps of the convolution.
        qkv_block_size: width of the blocks of q_proj, k_proj and v_proj.
        input_activation: activation of the input gate, `exp` or `sigmoid`.
        bias: in the projections.
        num_blocks: blocks of the model; the last projection starts with a deviation of 2 / (num_blocks · √dim).
        rotary: rotate pairs of neighbouring channels of q and k by their positions: `"head"`, in each head and after
            the gates, or `"inner"`, over the whole width E and ahead of the gates; `None` for neither.
        rotary_theta: base θ of the rotary positions.
        forget_bias: of the forget gate at the start, from the first head to the last: a head keeps what it reads for
            about e^bias steps, whatever the input, until it has learned otherwise.

    Positions count from 0 in each sequence, packed ones too, unless `position_ids` are given; a state goes on from the
    last position.

    Raises:
        ValueError: if a width is no multiple of what it must be, a choice is unknown, or what is to be rotated in pairs
            has an odd width.
    """

    __constants__: ClassVar[list[str]] = ["rotates_heads", "rotates_inner", "reads_positions"]

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        proj_factor: float = 2.0,
        round_up_to: int = 64,
        conv_size: int = 4,
        qkv_block_size: int = 4,
        input_activation: str = "exp",
        bias: bool = False,
        num_blocks: int = 1,
        rotary: str | None = None,
        rotary_theta: float = 5e5,
        forget_bias: Sequence[float] = FORGET_BIAS,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("input_activation", input_activation, INPUT_ACTIVATIONS)
        check_sizes(conv_size=conv_size)
        if len(forget_bias) != 2:
            raise ValueError(
                f"forget_bias must be two numbers, for the first and the last head (got {list(forget_bias)}); "
                f"give {FORGET_BIAS}"
            )
        check_positive(rotary_theta=rotary_theta)
        if rotary is not None:
            check_choice("rotary", rotary, ROTARY)
        inner = math.ceil(proj_factor * dim / round_up_to) * round_up_to
        size = per_head(inner, num_heads, "the inner width")
        if rotary is not None and (size if rotary == "head" else inner) % 2:
            raise ValueError(
                f"rotary={rotary!r} rotates pairs and needs an even width (got {size} channels in a head); "
                "give other num_heads or rotary=None"
            )
        blocks = inner // qkv_block_size
        super().__init__((conv_size - 1, inner), (num_heads, size, size))
        self.dim, self.num_blocks = dim, num_blocks
        self.inner = inner
        self.rotates_heads, self.rotates_inner = rotary == "head", rotary == "inner"
        self.reads_positions = rotary is not None
        self.rotary_theta = rotary_theta
        self.forget_bias = (float(forget_bias[0]), float(forget_bias[1]))
        self.input_activation = input_activation
        self.eps = CELL_EPS
        self.proj_up = nn.Linear(dim, 2 * inner, bias=bias, **dd)
        self.q_proj, self.k_proj, self.v_proj = (HeadwiseLinear(inner, blocks, bias, **dd) for _ in range(3))
        self.conv1d = PaddedConvolution(inner, conv_size, **dd)
        self.mlstm_cell = MLSTMCell(inner, num_heads, **dd)
        self.learnable_skip = nn.Parameter(torch.empty(inner, **dd))
        self.proj_down = nn.Linear(inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        deviation = math.sqrt(2 / (5 * self.dim))
        for layer in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=deviation)
        nn.init.normal_(self.proj_down.weight, std=2 / (self.num_blocks * math.sqrt(self.dim)))
        for biased in (self.proj_up, self.q_proj, self.k_proj, self.v_proj, self.proj_down):
            if biased.bias is not None:
                nn.init.zeros_(biased.bias)
        self.conv1d.conv.reset_parameters()
        self.mlstm_cell.outnorm.reset_parameters()
        nn.init.ones_(self.learnable_skip)
        nn.init.zeros_(self.mlstm_cell.igate.weight)
        nn.init.normal_(self.mlstm_cell.igate.bias, std=0.1)
        init_forget_gate(self.mlstm_cell.fgate, self.forget_bias)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return self._mix(x, None, None, None, None, cu_seqlens, position_ids, False)[0]

    def prefill(  # type: ignore[override]
        self,
        x: Tensor,
        state: MLSTMState | RotaryMLSTMState | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, MLSTMState | RotaryMLSTMState]:
        if not self.reads_positions:
            return super()._go_on(x, state)
        conv, C, n, m, position = (None,) * 5 if state is None else cast("RotaryMLSTMState", state)
        if position_ids is None:
            position_ids = positions.steps(x, position, None).expand(x.shape[0], -1)
        if position is None:
            position = position_ids.new_zeros(x.shape[0])
        y, conv, C, n, m = self._mix(x, conv, C, n, m, None, position_ids, True)
        last = torch.cat([position.unsqueeze(1) - 1, position_ids], 1)[:, -1]
        return y, RotaryMLSTMState(conv, C, n, m, last + 1)

    def initial_state(  # type: ignore[override]
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MLSTMState | RotaryMLSTMState:
        state = super().initial_state(batch_size, device, dtype)
        if not self.reads_positions:
            return state
        return RotaryMLSTMState(*state, torch.zeros(batch_size, device=state.C.device, dtype=torch.long))

    def output_weights(self) -> set[str]:
        return {"proj_down.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"learnable_skip"}

    def _mix(
        self,
        x: Tensor,
        conv: Tensor | None,
        C: Tensor | None,
        n: Tensor | None,
        m: Tensor | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        igate, fgate, weights = self.mlstm_cell.igate, self.mlstm_cell.fgate, self.conv1d.conv
        u, z = self.proj_up(x).split([self.inner, self.inner], -1)
        convolved, conv = operators.causal_conv1d(
            u, weights.weight.squeeze(1), weights.bias, initial_state=conv, cu_seqlens=cu_seqlens, silu=True
        )
        q, k, v = self.q_proj(convolved), self.k_proj(convolved), self.v_proj(u)
        heads = [self.memory_shape[0], self.memory_shape[1]]
        if self.reads_positions and position_ids is None:
            position_ids = positions.steps(x, None, cu_seqlens)
        if self.rotates_inner and position_ids is not None:
            q = positions.rotate(q.unsqueeze(2), position_ids, self.rotary_theta, True).squeeze(2)
            k = positions.rotate(k.unsqueeze(2), position_ids, self.rotary_theta, True).squeeze(2)
        qkv = torch.cat([q, k, v], -1)
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        if self.rotates_heads and position_ids is not None:
            q = positions.rotate(q, position_ids, self.rotary_theta, True)
            k = positions.rotate(k, position_ids, self.rotary_theta, True)
        h, C, n, m, _, _, _ = operators.mlstm(
            q, k, v, gate_of(qkv, igate.weight, igate.bias), gate_of(qkv, fgate.weight, fgate.bias),
            initial_C=C, initial_n=n, initial_m=m, cu_seqlens=cu_seqlens,
            eps=self.eps, input_activation=self.input_activation, return_state=return_state,
        )  # fmt: skip
        y = (self.mlstm_cell.outnorm(h) + self.learnable_skip * convolved) * F.silu(z)
        return self.proj_down(y), conv, C, n, m


@register_mixer("mlstm_large")
class MLSTMLarge(MemoryMixer):
    """The layer of xLSTM 7B: no convolution, no widening, dense projections, capped gates, a sigmoid at the output.

    Args:
        dim: width of the model.
        num_heads: H; 8 in the 7B model.
        qk_dim_factor: width of q and k over `dim`; v_dim_factor: that of v.
        gate_soft_cap: c; `None` leaves the gates as they are.
        input_activation: activation of the input gate, `exp` or `sigmoid`.
        norm_eps: added to the variance in the norm.
        bias: in the projections and the norm; the gates always have one.
        num_blocks: blocks of the model; the last projection starts with a deviation of 2 / (num_blocks · √dim).
        input_gate_bias: bias of the input gate at the start; -10 in the 7B model, which begins by writing little.

    Raises:
        ValueError: if a width is no multiple of the heads, or the activation is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        gate_soft_cap: float | None = 15.0,
        input_activation: str = "exp",
        norm_eps: float = 1e-6,
        bias: bool = False,
        num_blocks: int = 1,
        input_gate_bias: float = -10.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("input_activation", input_activation, INPUT_ACTIVATIONS)
        keys, values = int(dim * qk_dim_factor), int(dim * v_dim_factor)
        head_k_dim = per_head(keys, num_heads, "the width of the keys")
        head_v_dim = per_head(values, num_heads, "the width of the values")
        super().__init__((0, 0), (num_heads, head_k_dim, head_v_dim))
        self.dim, self.num_blocks, self.input_gate_bias = dim, num_blocks, input_gate_bias
        self.gate_soft_cap = gate_soft_cap
        self.input_activation = input_activation
        self.eps = CELL_EPS
        self.q, self.k = (nn.Linear(dim, keys, bias=bias, **dd) for _ in range(2))
        self.v, self.ogate_preact = (nn.Linear(dim, values, bias=bias, **dd) for _ in range(2))
        self.igate_preact, self.fgate_preact = (nn.Linear(dim, num_heads, **dd) for _ in range(2))
        self.multihead_norm = MultiHeadLayerNorm(num_heads, head_v_dim, norm_eps, bias, **dd)
        self.out_proj = nn.Linear(values, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.q, self.k, self.v, self.ogate_preact):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (5 * self.dim)))
        nn.init.normal_(self.out_proj.weight, std=2 / (self.num_blocks * math.sqrt(self.dim)))
        for biased in (self.q, self.k, self.v, self.ogate_preact, self.out_proj):
            if biased.bias is not None:
                nn.init.zeros_(biased.bias)
        self.multihead_norm.reset_parameters()
        nn.init.zeros_(self.igate_preact.weight)
        nn.init.constant_(self.igate_preact.bias, self.input_gate_bias)
        init_forget_gate(self.fgate_preact)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def _mix(
        self,
        x: Tensor,
        conv: Tensor | None,
        C: Tensor | None,
        n: Tensor | None,
        m: Tensor | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        keys, values = [-1, self.memory_shape[1]], [-1, self.memory_shape[2]]
        h, C, n, m, _, _, _ = operators.mlstm(
            self.q(x).unflatten(-1, keys), self.k(x).unflatten(-1, keys), self.v(x).unflatten(-1, values),
            soft_cap(gate_of(x, self.igate_preact.weight, self.igate_preact.bias), self.gate_soft_cap),
            soft_cap(gate_of(x, self.fgate_preact.weight, self.fgate_preact.bias), self.gate_soft_cap),
            initial_C=C, initial_n=n, initial_m=m, cu_seqlens=cu_seqlens,
            eps=self.eps, input_activation=self.input_activation, return_state=return_state,
        )  # fmt: skip
        y = self.multihead_norm(h) * torch.sigmoid(self.ogate_preact(x))
        return self.out_proj(y), x.new_zeros([x.shape[0], 0, 0]), C, n, m


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Bound x to (-c, c): `c tanh(x / c)`."""
    return x if cap is None else cap * torch.tanh(x / cap)


def init_forget_gate(layer: nn.Linear, bias: tuple[float, float] = FORGET_BIAS) -> None:
    """Start with a memory of about e^bias steps, whatever the input, from the first head to the last."""
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(*bias, layer.out_features))
