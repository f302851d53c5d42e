"""LightNet: linear attention to keys whose weights are a softmax over time, channel by channel.

    q = silu(q_proj(x)),    k = k_proj(x),    v = v_proj(x)
    o_t = K^{-1/2} Σ_s (softmax(k)_s · q_t) v_s            the softmax over s ≤ t, or over all s
    y = o_proj(norm(o) ⊙ silu(g_proj(x)))

Where all see all there is nothing to scan: two matrix products read a grid of any dimension, whatever the order of its
cells. The places of cells enter through a phase of queries and keys, after the softmax:

    φ(x)_n = [x ⊙ cos(n ⊙ θ), x ⊙ sin(n ⊙ θ)],    φ(x)_n · φ(x')_m = Σ_c x_c x'_c cos((n - m)_c θ_c)

with a part of the channels for each axis of the grid, so that products depend on the distance along each axis.

Source: Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet"
(arXiv 2405.21022): its additive recurrence, and the positions that it calls MD-LRPE.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import checks, norms
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.matrix_mixer import QueryKeyValueMixer
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators


@register_state
class LightNetState(NamedTuple):
    """conv and memory: as in `MatrixState`; log_weight: logarithm of all weights so far, `[B, H, K]`, -inf at first."""

    conv: Tensor
    memory: Tensor
    log_weight: Tensor


def _sizes(dim: int, num_heads: int | None, expand_ratio: int | None) -> tuple[int, int, int]:
    """Choose H, K and V."""
    if num_heads is None and expand_ratio is None:
        raise ValueError("one of num_heads and expand_ratio must be given (got neither)")
    if num_heads is None:
        heads = heads_of(dim, expand_ratio or 1)
        return heads, dim // heads, dim // heads
    values = per_head(dim, num_heads, "dim")
    return num_heads, values if expand_ratio is None else expand_ratio, values


def _gate_projection(dim: int, rank: int, dd: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, rank, bias=False, **dd), nn.Linear(rank, dim, bias=False, **dd))


@register_mixer("lightnet")
class LightNet(QueryKeyValueMixer):
    """LightNet's mixer for sequences. Names of parameters as in fla-org/flash-linear-attention's `LightNetAttention`.

    Args:
        dim: width of the model.
        num_heads: H, with V = dim / H; `None` makes them of `expand_ratio` or the next size that divides.
        expand_ratio: K; `None` is V. Without `num_heads`, the size that K and V are near to.
        use_short_conv: short convolutions, without an activation, behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        gate_low_rank_dim: rank of the layer that gives the gate.
        norm_eps: added under the root of the norm; fla's layer has the default, whatever its own option says.

    Raises:
        ValueError: if `dim` is no multiple of the heads, or neither heads nor their size are given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        expand_ratio: int | None = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_low_rank_dim: int = 128,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads, keys, values = _sizes(dim, num_heads, expand_ratio)
        widths, taps = (heads * keys, heads * keys, dim), conv_size if use_short_conv else None
        super().__init__(dim, (heads, keys, values), dim, widths, taps, conv_bias, dd, conv_silu=False)
        self.num_heads = heads
        self.g_proj = _gate_projection(dim, gate_low_rank_dim, dd)
        self.g_norm = norms.GatedRMSNorm(dim, norm_eps, **dd)
        self.init_weights()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._attend(x, None, None, None, cu_seqlens)[0]

    def _attend(
        self,
        x: Tensor,
        conv: Tensor | None,
        memory: Tensor | None,
        log_weight: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, conv = self._streams(x, conv, cu_seqlens)
        heads = [self.num_heads, -1]
        q, k, v = F.silu(q).unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        o, memory, log_weight, _, _ = operators.additive_decay(
            q, k, v, initial_S=memory, initial_z=log_weight, cu_seqlens=cu_seqlens
        )
        y: Tensor = self.o_proj(self.g_norm(o.flatten(-2), self.g_proj(x)))
        return y, conv, memory, log_weight

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: LightNetState | None = None
    ) -> tuple[Tensor, LightNetState]:
        conv, memory, log_weight = (None, None, None) if state is None else state
        y, conv, memory, log_weight = self._attend(x, conv, memory, log_weight, None)
        return y, LightNetState(conv, memory, log_weight)

    def initial_state(  # type: ignore[override]
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LightNetState:
        memory, conv = (batch_size, *self.memory_shape), (batch_size, *self.conv_shape)
        conv_state, S, z = zero_states(self.o_proj.weight, device, dtype, conv, memory, memory[:-1])
        return LightNetState(conv_state, S, z.fill_(-math.inf))


@register_mixer("lightnet_noncausal")
class LightNetNonCausal(Mixer):
    """LightNet's mixer for grids, in which every cell sees all others.

    The paper's other positions, MD-TPE, are an exponentially weighted sum of the embedding along each axis; they belong
    ahead of the first layer (`sinuous.vision.lightnet.MDTPE`).

    Args:
        dim: width of the model.
        num_heads: H, each with K = V = dim / H; `None` makes them of `expand_ratio` or the next size that divides.
        expand_ratio: K; `None` is V.
        gate_low_rank_dim: rank of the layer that gives the gate.
        rotate: give queries and keys their phase; without it the mixer does not know the order of the tokens.
        theta: channel j of each axis turns by theta^{-2j/K} a cell.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if `dim` is no multiple of the heads, or neither heads nor their size are given.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False
    reads_grid: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        expand_ratio: int | None = 64,
        gate_low_rank_dim: int = 128,
        rotate: bool = True,
        theta: float = 10000.0,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, keys, _ = _sizes(dim, num_heads, expand_ratio)
        self.rotate = rotate
        self.theta = float(theta)
        self.scale = keys**-0.5
        self.q_proj, self.k_proj = (nn.Linear(dim, self.num_heads * keys, bias=False, **dd) for _ in range(2))
        self.v_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.g_proj = _gate_projection(dim, gate_low_rank_dim, dd)
        self.g_norm = norms.GatedRMSNorm(dim, norm_eps, **dd)
        self.o_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, *self.g_proj, self.g_norm, self.o_proj):
            layer.reset_parameters()

    def output_weights(self) -> set[str]:
        return {"o_proj.weight"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        """Mix the cells of a grid, or rows of tokens.

        Args:
            x: `[B, T, dim]`, the cells row by row; packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.
            cu_seqlens: boundaries of packed sequences; each is a row.
            grid: its sides, the last axis fastest, their product T; a single row if absent.

        Raises:
            ValueError: if the grid has another number of cells than there are tokens, or the sequences are packed.
        """
        if grid is not None:
            checks.check_grid(grid, x.shape[1], cu_seqlens)
        heads = [self.num_heads, -1]
        q, k, v = (F.silu(self.q_proj(x)).unflatten(-1, heads), self.k_proj(x).unflatten(-1, heads), self.v_proj(x))
        factor: Tensor | None = None
        if self.rotate:
            phase = positions.phases(q, cu_seqlens, grid, self.theta)
            factor = phase.to(k.dtype).expand(k.shape[0], -1, self.num_heads, -1)
            q, k = (torch.cat([q, q], -1) * phase).to(q.dtype), torch.cat([k, k], -1)
        v = v.unflatten(-1, heads)
        o, _, _, _, _ = operators.additive_decay(q, k, v, factor, cu_seqlens=cu_seqlens, scale=self.scale, causal=False)
        y: Tensor = self.o_proj(self.g_norm(o.flatten(-2), self.g_proj(x)))
        return y
