r"""Softmax attention over the whole past or a window of it; recurrences are compared and combined with it.

    q, k, v = q_proj(x), k_proj(x), v_proj(x)            H heads of q, G of k and v; head h reads group h // (H / G)
    y_t = Σ_{s ≤ t} softmax_s( q_t·k_s / √K ) v_s        with a window W: t - W < s ≤ t
    out = o_proj(y)

Rotary positions rotate queries and keys by default.

Source: Vaswani et al. (arXiv 1706.03762), section 3.2; grouped heads: Ainslie et al. (arXiv 2305.13245); window:
Beltagy et al. (arXiv 2004.05150), section 3.1, and Jiang et al. (arXiv 2310.06825), section 2. Names of parameters as
in fla-org/flash-linear-attention and transformers' Llama, Mistral and Qwen3.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.heads import heads_of


@register_state
class AttentionState(NamedTuple):
    """keys (already rotated) and values of all S past steps, oldest first, `[B, S, G, K]`."""

    keys: Tensor
    values: Tensor


@register_state
class WindowState(NamedTuple):
    """keys (already rotated) and values of the last W - 1 steps, oldest first, `[B, W-1, G, K]`, zeros before the first
    one; position: how many steps have been seen, int64 `[B]`."""

    keys: Tensor
    values: Tensor
    position: Tensor


def dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of q `[B, T, H, K]` to k and v `[B, S, G, K]`; `mask`, `[B, 1, T, S]`, is true where it may look."""
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


@torch.fx.wrap
def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Attention of T queries `[B, T, H, K]`, the last of S ≥ T steps, to the past, `[B, S, G, K]`: `[B, T, H, K]`.

    Packed sequences cost a mask of T x S bits."""
    length, past = q.shape[1], k.shape[1]
    if cu_seqlens is None and length == 1:
        return dot_product(q, k, v, None, False)
    if cu_seqlens is None and length == past:
        return dot_product(q, k, v, None, True)
    index = torch.arange(past, device=q.device)
    mask = index <= index[past - length :].unsqueeze(1)
    if cu_seqlens is not None:
        segment = positions.segments(k, cu_seqlens)[0]
        mask = mask & (segment == segment[past - length :].unsqueeze(1))
    return dot_product(q, k, v, mask.unsqueeze(0).unsqueeze(0), False)


def _exporting() -> bool:
    """Whether the program is to serve every length that it is exported for."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    else:
        return torch.compiler.is_exporting()


def _at_most(length: int, window: int) -> bool:
    """Whether there is one block of steps only; in an exported program, whether none of its lengths has more."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return length <= window
    else:
        return statically_known_true(length <= window) if torch.compiler.is_exporting() else length <= window


@torch.fx.wrap
def attend_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, position: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Attention of `[B, T, H, K]` to the last `window` steps, in time and memory linear in T.

    Time is cut into blocks of W queries, which look at the 2W - 1 keys up to their last one.

    Args:
        k, v: `[B, T, G, K]`, or `[B, W-1+T, G, K]` with the steps before the first query where `position` is given.
        position: how many steps there were before the first query, `[B]`.
    """
    length = q.shape[1]
    single = _at_most(length, window)
    if position is None and cu_seqlens is None and single:
        return dot_product(q, k, v, None, True)
    if length == 0:
        return q
    before = window - 1
    if position is None:
        k, v = F.pad(k, [0, 0, 0, 0, before, 0]), F.pad(v, [0, 0, 0, 0, before, 0])
        absent = torch.ones(1, before, device=q.device, dtype=torch.bool)
    else:
        absent = torch.arange(before, device=q.device) < before - position.unsqueeze(1)
    segment = positions.segments(q, cu_seqlens)
    segment = torch.cat([-absent.long(), segment.expand(absent.shape[0], length)], 1)

    block = length if single else window
    width = before + block
    offset = torch.arange(width, device=q.device) - torch.arange(block, device=q.device).unsqueeze(1)
    band = (offset >= 0) & (offset < window)
    # Only the first block can see steps that are not there, so the others share one mask unless sequences are packed.
    # An exported program does not know whether there are others, so there every block has its own.
    exporting = _exporting() and not single
    y, done = q[:, :0], 0
    if not exporting:
        mask = band & (segment[:, :width].unsqueeze(1) == segment[:, before:width].unsqueeze(2))
        y, done = dot_product(q[:, :block], k[:, :width], v[:, :width], mask.unsqueeze(1), False), block
        if length == block:
            return y

    # With a block more than needed, no size of an exported program is 1, which would be a case of its own.
    blocks = (length - done - 1) // block + (2 if exporting else 1)
    missing = done + blocks * block - length
    k, v = F.pad(k[:, done:], [0, 0, 0, 0, 0, missing]), F.pad(v[:, done:], [0, 0, 0, 0, 0, missing])
    rest = F.pad(q[:, done:], [0, 0, 0, 0, 0, missing])
    mask = band.unsqueeze(0)
    if cu_seqlens is not None or exporting:
        segment = F.pad(segment[:, done:], [0, missing], value=-1.0)
        seen = segment.unfold(1, width, block)
        mask = (mask & (seen.unsqueeze(2) == seen[:, :, before:].unsqueeze(3))).expand(q.shape[0], -1, -1, -1)
        mask = mask.flatten(0, 1)
    # unfold puts the steps of a block last: [B, blocks, G, K, width]
    rest, k, v = rest.unfold(1, block, block), k.unfold(1, width, block), v.unfold(1, width, block)
    rest, k, v = [t.flatten(0, 1).permute(0, 3, 1, 2) for t in (rest, k, v)]
    tail = dot_product(rest, k, v, mask.unsqueeze(1), False)
    tail = tail.unflatten(0, [q.shape[0], -1]).flatten(1, 2)
    if exporting:  # a slice would ask whether it is the whole, which depends on the length
        steps: Tensor = tail.index_select(1, torch.arange(length, device=q.device))
        return steps
    return torch.cat([y, tail[:, : length - done]], 1)


@register_mixer("softmax_attention")
class SoftmaxAttention(Mixer):
    """Causal attention with a cache that grows by a step's keys and values.

    Args:
        dim: width of the model.
        num_heads: H; `None` is the largest divisor of `dim` that leaves heads of 64 channels or more.
        num_kv_heads: G, a divisor of H; `None` is H.
        head_dim: K; `None` is dim / H.
        qkv_bias: biases in the first three projections.
        qk_norm: RMS norms, over a head, of queries and keys.
        rope_theta: base of the rotary positions; `None` for none.
        norm_eps: added under the root of the norms.

    Raises:
        ValueError: if a size is less than 1, H does not divide into G groups or `dim` into heads, or K is odd where
            positions are rotary.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float | None = 10_000.0,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = heads_of(dim, 64) if num_heads is None else num_heads
        groups = heads if num_kv_heads is None else num_kv_heads
        check_sizes(dim=dim, num_heads=heads, num_kv_heads=groups, head_dim=1 if head_dim is None else head_dim)
        if head_dim is None and dim % heads:
            raise ValueError(f"num_heads must divide dim {dim} (got {heads}); choose a divisor or give head_dim")
        if heads % groups:
            raise ValueError(f"num_kv_heads must divide num_heads {heads} (got {groups}); choose a divisor")
        width = dim // heads if head_dim is None else head_dim
        if rope_theta is not None and width % 2:
            raise ValueError(f"head_dim must be even for rotary positions (got {width}); or give rope_theta=None")
        self.num_heads = heads
        self.num_kv_heads = groups
        self.head_dim = width
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(dim, heads * width, bias=qkv_bias, **dd)
        self.k_proj = nn.Linear(dim, groups * width, bias=qkv_bias, **dd)
        self.v_proj = nn.Linear(dim, groups * width, bias=qkv_bias, **dd)
        self.q_norm = norms.HeadRMSNorm(width, norm_eps, **dd) if qk_norm else nn.Identity()
        self.k_norm = norms.HeadRMSNorm(width, norm_eps, **dd) if qk_norm else nn.Identity()
        self.o_proj = nn.Linear(heads * width, dim, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in self.children():
            if isinstance(layer, nn.Linear | norms.RMSNorm):
                layer.reset_parameters()

    def _project(self, x: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_norm(self.q_proj(x).unflatten(-1, [self.num_heads, self.head_dim]))
        k = self.k_norm(self.k_proj(x).unflatten(-1, [self.num_kv_heads, self.head_dim]))
        v = self.v_proj(x).unflatten(-1, [self.num_kv_heads, self.head_dim])
        if self.rope_theta is not None:
            steps = positions.steps(x, start, cu_seqlens)
            q, k = positions.rotate(q, steps, self.rope_theta), positions.rotate(k, steps, self.rope_theta)
        return q, k, v

    def output_weights(self) -> set[str]:
        return {"o_proj.weight"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        q, k, v = self._project(x, None, cu_seqlens)
        y: Tensor = self.o_proj(attend(q, k, v, cu_seqlens).flatten(2))
        return y

    def prefill(self, x: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        past = None if state is None else torch.full((x.shape[0],), state.keys.shape[1], device=x.device)
        q, k, v = self._project(x, past, None)
        if state is not None:
            k, v = torch.cat([state.keys.to(k.dtype), k], 1), torch.cat([state.values.to(v.dtype), v], 1)
        return self.o_proj(attend(q, k, v, None).flatten(2)), AttentionState(k, v)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        empty = self._cache(batch_size, 0, device, dtype)
        return AttentionState(empty, empty.clone())

    def _cache(self, batch_size: int, steps: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        weight = self.k_proj.weight
        return torch.zeros(
            (batch_size, steps, self.num_kv_heads, self.head_dim),
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )


@register_mixer("sliding_window_attention")
class SlidingWindowAttention(SoftmaxAttention):
    """Causal attention to the last W steps, with a cache of W - 1.

    Args:
        dim: width of the model.
        window_size: W, how many steps are seen, the newest one included.
        num_heads, num_kv_heads, head_dim, qkv_bias, qk_norm, rope_theta, norm_eps: as in `SoftmaxAttention`.

    Raises:
        ValueError: as `SoftmaxAttention` does.
    """

    constant_state: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        window_size: int = 512,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float | None = 10_000.0,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(window_size=window_size)
        super().__init__(dim, num_heads, num_kv_heads, head_dim, qkv_bias, qk_norm, rope_theta, norm_eps, device, dtype)
        self.window_size = window_size

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        q, k, v = self._project(x, None, cu_seqlens)
        y: Tensor = self.o_proj(attend_window(q, k, v, self.window_size, None, cu_seqlens).flatten(2))
        return y

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: WindowState | None = None
    ) -> tuple[Tensor, WindowState]:
        state = self.initial_state(x.shape[0], x.device) if state is None else state
        q, k, v = self._project(x, state.position, None)
        k, v = torch.cat([state.keys.to(k.dtype), k], 1), torch.cat([state.values.to(v.dtype), v], 1)
        y = self.o_proj(attend_window(q, k, v, self.window_size, state.position, None).flatten(2))
        return y, WindowState(k[:, x.shape[1] :], v[:, x.shape[1] :], state.position + x.shape[1])

    def initial_state(  # type: ignore[override]
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> WindowState:
        empty = self._cache(batch_size, self.window_size - 1, device, dtype)
        return WindowState(empty, empty.clone(), torch.zeros(batch_size, device=empty.device, dtype=torch.long))
