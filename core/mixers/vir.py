r"""ViR's retention: linear attention with constant decays, along a row of tokens or over a grid.

    q, k, v = qkv(x)                                                    H heads of d channels each
    o_n = d^{-1/2} Σ_{m ≤ n} γ^{n-m} (q_n · k_m) v_m                    vir_retention
    o_n = d^{-1/2} Σ_m γ^{|Δrow| + |Δcolumn|} (q_n · k_m) v_m           vir_retention_grid, over all cells m
    y = out_proj(o)
    γ = 1 - exp(linspace(log 1/32, log 1/512, H))                       one for each head, not learnt and not stored

There is no softmax, no gate, no norm and no rotation, unlike RetNet's retention. The row's form has three ways to
compute it, which the paper calls parallel (all pairs at once), chunkwise and recurrent.

Over a grid the distance is that of a walk along the rows and then along the columns, so that decays factorise and four
walks, one from each corner, take time linear in the cells. A walk goes first along x, then along y, and never turns
back, which leaves one path between two cells. Pairs in one row or column lie between two of the walks: walks from
opposite corners take those along x, the other two those along y.

Source: Hatamizadeh et al., "ViR: Towards Efficient Vision Retention Backbones" (arXiv 2310.19731), section 3; names of
parameters as in the code that its authors posted (anom63931/ViR). The grid's form is ours: the paper's second version
announces one in two dimensions, of which there is no code.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sinuous.core import checks
from sinuous.core.checks import check_choice
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators
from sinuous.kernels.precision import real_dtype

MODES = ("parallel", "chunkwise", "recurrent")

SMALLEST = 384
"""Width of the smallest published model. Narrower ones start larger: weights of 0.02 would make q, k and v, of whose
product nothing restores the size, too small to learn from."""

BACKENDS = {"chunkwise": "torch", "recurrent": "recurrent"}
"""How `ssd` computes a mode."""


@register_state
class ViRState(NamedTuple):
    """memory: Σ_m γ^{n-m} k_m v_mᵀ, `[B, H, d, d]`, fp32 or fp64."""

    memory: Tensor


@torch.fx.wrap
def vir_log_decay(x: Tensor, heads: int) -> Tensor:
    """Logarithms of γ, `[H]`, in at least fp32 and on the device of x."""
    rates = torch.linspace(-math.log(32), -math.log(512), heads, device=x.device, dtype=real_dtype(x.dtype))
    return torch.log1p(-torch.exp(rates))


class _QKVMixer(Mixer):
    """Projections of both mixers: `qkv`, `out_proj`, and H heads."""

    def __init__(self, dim: int, num_heads: int | None, dd: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads = heads_of(dim, 64) if num_heads is None else num_heads
        self.head_dim = per_head(dim, self.num_heads, "dim")
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start weights N(0, 0.02²), cut at ±2, as the authors' code does, or by torch's rule in narrower models than
        theirs, and biases at zero."""
        for layer in (self.qkv, self.out_proj):
            layer.reset_parameters()
            if layer.in_features >= SMALLEST:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q, k and v, `[B, T, H, d]`."""
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).unbind(2)
        return q, k, v


@register_mixer("vir_retention")
class ViRRetention(_QKVMixer):
    """ViR's retention along a row of tokens.

    Args:
        dim: width of the model.
        num_heads: H, a divisor of `dim`; `None` is the largest one that leaves heads of 64 channels or more.
        mode: how `forward` computes it: `"parallel"`, with a table of all pairs, `"chunkwise"`, in time linear in T, or
            `"recurrent"`, token by token. The results are the same; `None` is the quickest in linear time.
        softmax: weights are the softmax over m of what the equation has ahead of v, as in the parallel mode of the
            authors' posted code. Tokens behind n, whose scores are 0, then have the weight exp(0) and are seen: that is
            not causal, and there is no state.

    Raises:
        ValueError: if H does not divide `dim`, `mode` is unknown, or `softmax` goes with another mode than parallel.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        mode: str | None = None,
        softmax: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode is not None:
            check_choice("mode", mode, MODES)
        if softmax and mode not in (None, "parallel"):
            raise ValueError(f"mode must be 'parallel' with softmax=True, which needs all pairs (got {mode!r})")
        super().__init__(dim, num_heads, {"device": device, "dtype": dtype})
        self.softmax = softmax
        self.mode = mode
        self.parallel = softmax or mode == "parallel"
        self.backend = BACKENDS.get(mode or "", "")

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        if self.parallel:
            q, k, v = self._heads(x)
            y: Tensor = self.out_proj(_all_pairs(q, k, v, cu_seqlens, self.softmax).flatten(2))
            return y
        return self._retain(x, None, cu_seqlens)[0]

    def _retain(self, x: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self._heads(x)
        decay = vir_log_decay(x, self.num_heads)
        o, memory, _ = operators.ssd(q, k, v, decay, initial_state=memory, cu_seqlens=cu_seqlens, backend=self.backend)
        return self.out_proj(o.flatten(2)), memory

    def prefill(self, x: Tensor, state: ViRState | None = None) -> tuple[Tensor, ViRState]:
        self._check_causal()
        (memory,) = (None,) if state is None else state
        y, memory = self._retain(x, memory, None)
        return y, ViRState(memory)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ViRState:
        self._check_causal()
        memory = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return ViRState(zero_states(self.out_proj.weight, device, dtype, (0,), memory)[1])

    def _check_causal(self) -> None:
        if self.softmax:
            raise ValueError("softmax must be False for a state, as with it every token sees all others (got True)")


@torch.fx.wrap
def _all_pairs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, softmax: bool) -> Tensor:
    """Retention `[B, T, H, d]` by a table of all pairs of tokens."""
    heads, width = q.shape[2], q.shape[3]
    steps = torch.arange(q.shape[1], device=q.device)
    ahead = steps.unsqueeze(1) - steps
    log_decay = vir_log_decay(q, heads).view(-1, 1, 1)
    mask = torch.exp(log_decay * ahead.clamp(min=0)).tril().to(q.dtype)
    scores = (q * width**-0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1) * mask
    if cu_seqlens is not None:
        segment = positions.segments(q, cu_seqlens)
        apart = (segment.unsqueeze(1) != segment.unsqueeze(2)).unsqueeze(1)
        scores = scores.masked_fill(apart, -math.inf if softmax else 0.0)
    if softmax:
        scores = scores.softmax(-1)
    y: Tensor = (scores.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)
    return y


@register_mixer("vir_retention_grid")
class ViRRetentionGrid(_QKVMixer):
    """Retention over the cells of a grid, each of which sees all others; without a grid the tokens are one row.

    Args:
        dim: width of the model.
        num_heads: H, a divisor of `dim`; `None` is the largest one that leaves heads of 64 channels or more.

    Raises:
        ValueError: if H does not divide `dim`.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False
    reads_grid: ClassVar[bool] = True

    def __init__(
        self, dim: int, num_heads: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, num_heads, {"device": device, "dtype": dtype})

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        """Mix the cells of a grid, or rows of tokens.

        Args:
            x: `[B, T, dim]`, the cells row by row; packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.
            cu_seqlens: boundaries of packed sequences; each is a row.
            grid: (height, width), height · width = T; a single row if absent.

        Raises:
            ValueError: if the grid has another number of cells than there are tokens, or the sequences are packed.
        """
        q, k, v = self._heads(x)
        decay = vir_log_decay(x, self.num_heads)
        if grid is None:
            o = _both_ways(q, k, v, decay, cu_seqlens)
        else:
            checks.check_grid(grid, x.shape[1], cu_seqlens, axes=2)
            sides = [grid[0], grid[1]]
            o = _four_ways(q.unflatten(1, sides), k.unflatten(1, sides), v.unflatten(1, sides), decay).flatten(1, 2)
        y: Tensor = self.out_proj(o.flatten(2))
        return y


def _both_ways(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Scan rows `[B, T, H, d]` from either end; both see a token itself, which counts once."""
    past = operators.ssd(q, k, v, log_decay, cu_seqlens=cu_seqlens)[0]
    future = operators.ssd(q, k, v, log_decay, cu_seqlens=cu_seqlens, reverse=True)[0]
    itself = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5 * v
    y: Tensor = past + future - itself
    return y


def _four_ways(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Scan a grid `[B, X, Y, H, d]` from its corners.

    Walks 0 and 3 take the cells ahead along x and, from there, along y; walks 1 and 2 the cells ahead along y, at the
    same x or reached along x first.
    """
    decay = log_decay.exp()
    zero, one = torch.zeros_like(decay), torch.ones_like(decay)
    along_x, along_both = torch.stack([decay, zero], -1), torch.stack([decay, decay], -1)
    source = torch.stack([along_x, along_both, along_both, along_x], 1)
    from_both, from_y = torch.stack([one, one], -1), torch.stack([zero, one], -1)
    mark = torch.stack([from_both, from_y, from_y, from_both], 1)
    turn = torch.stack([along_x, along_both], 1).unsqueeze(1)
    batch, width, height, heads = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    return operators.grid_scan(
        q, k, v,
        source.expand(batch, width, height, heads, 4, 2),
        turn.expand(batch, width, height, heads, 4, 2, 2),
        mark.expand(batch, width, height, heads, 4, 2),
        direct=one.expand(batch, width, height, heads),
        orientations=[0, 1, 2, 3],
    )[0]  # fmt: skip
