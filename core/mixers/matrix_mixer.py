"""Base classes of mixers with a matrix state: the state, the projections and short convolutions, and the output.

    q, k, v = q_proj(x), k_proj(x), v_proj(x)        each behind a short convolution and silu, if there is one
    o = recurrence(q, k, v)                          per head, with a state of K × V
    y = o_proj(norm(o))

A subclass adds its recurrence and its norm. Names of parameters as in the layers of
fla-org/flash-linear-attention.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.mixers.contract import Mixer, register_state
from sinuous.core.mixers.convolutions import convolve_together, short_convolutions
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.states import zero_states


@register_state
class MatrixState(NamedTuple):
    """conv: the last W-1 inputs of the convolution, `[B, W-1, C]`, W = 1 without one; memory: the matrices,
    `[B, H, K, V]`, fp32 or fp64."""

    conv: Tensor
    memory: Tensor


class MatrixMixer(Mixer):
    """A mixer with a matrix state. A subclass has `_streams`, `_recur` and `_normed`.

    Args:
        dim: width of the model.
        memory_shape: H, K and V of the state.
        value_dim: width of the input of `o_proj`.
        conv_width: channels of the short convolutions together.
        conv_size: taps of the short convolutions; `None` for none.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        memory_shape: tuple[int, int, int],
        value_dim: int,
        conv_width: int,
        conv_size: int | None,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        if conv_size is not None and conv_size < 1:
            raise ValueError(f"conv_size must be at least 1 (got {conv_size}); use_short_conv=False leaves it out")
        self.memory_shape = memory_shape
        self.conv_shape = (0, 0) if conv_size is None else (conv_size - 1, conv_width)
        self.o_proj = nn.Linear(value_dim, dim, bias=False, **dd)

    def init_weights(self) -> None:
        """Start layers by torch's rule, biases at zero and norms at one."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def output_weights(self) -> set[str]:
        return {"o_proj.weight"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, cu_seqlens)[0]

    def _mix(
        self, x: Tensor, conv: Tensor | None, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, conv = self._streams(x, conv, cu_seqlens)
        o, memory = self._recur(x, q, k, v, memory, cu_seqlens)
        return self.o_proj(self._normed(x, o)), conv, memory

    def _streams(
        self, x: Tensor, conv: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute q, k and v for the recurrence, `[B, T, width]`, and the state of the convolutions."""
        raise NotImplementedError

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence: outputs `[B, T, H, V]`, and the state after the last step."""
        raise NotImplementedError

    def _normed(self, x: Tensor, o: Tensor) -> Tensor:
        """Norm and gate outputs `[B, T, H, V]` for `o_proj`, `[B, T, value_dim]`."""
        raise NotImplementedError

    def prefill(self, x: Tensor, state: MatrixState | None = None) -> tuple[Tensor, MatrixState]:
        conv, memory = (None, None) if state is None else state
        y, conv, memory = self._mix(x, conv, memory, None)
        return y, MatrixState(conv, memory)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MatrixState:
        memory = (batch_size, *self.memory_shape)
        return MatrixState(*zero_states(self.o_proj.weight, device, dtype, (batch_size, *self.conv_shape), memory))


class QueryKeyValueMixer(MatrixMixer):
    """A matrix mixer with `q_proj`, `k_proj`, `v_proj`, and `q_conv1d`, `k_conv1d`, `v_conv1d` or None behind them.

    Args:
        widths: widths of q, k and v after their projections.
        conv_bias: biases in the short convolutions.
        conv_silu: silu behind them.
    """

    def __init__(
        self,
        dim: int,
        memory_shape: tuple[int, int, int],
        value_dim: int,
        widths: tuple[int, int, int],
        conv_size: int | None,
        conv_bias: bool,
        dd: dict[str, Any],
        conv_silu: bool = True,
    ) -> None:
        super().__init__(dim, memory_shape, value_dim, sum(widths), conv_size, dd)
        self.conv_silu = conv_silu
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, width, bias=False, **dd) for width in widths)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = short_convolutions(widths, conv_size, conv_bias, dd)

    def _streams(
        self, x: Tensor, conv: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_conv1d is None or self.k_conv1d is None or self.v_conv1d is None:
            return q, k, v, q.new_zeros([q.shape[0], 0, 0])
        else:
            weights = [self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]
            biases = [self.q_conv1d.bias, self.k_conv1d.bias, self.v_conv1d.bias]
            return convolve_together(q, k, v, weights, biases, conv, cu_seqlens, self.conv_silu)


class GroupedMixer(QueryKeyValueMixer):
    """A matrix mixer whose heads of queries may share heads of keys and values.

    Args:
        key_dim: width of the queries of all heads; value_dim: width of the input of `o_proj`.
        num_heads: H.
        num_kv_heads: heads of keys and values, each shared by H / num_kv_heads queries; `None` is H.
        memory_shape: `None` is H, key_dim / H, value_dim / H.

    Raises:
        ValueError: if a width is no multiple of the number of its heads.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        value_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        conv_size: int | None,
        conv_bias: bool,
        dd: dict[str, Any],
        memory_shape: tuple[int, int, int] | None = None,
    ) -> None:
        head_k_dim = per_head(key_dim, num_heads, "the width of the keys")
        head_v_dim = per_head(value_dim, num_heads, "the width of the values")
        groups = 1 if num_kv_heads is None else per_head(num_heads, num_kv_heads, "num_heads")
        widths = (key_dim, key_dim // groups, value_dim // groups)
        memory_shape = (num_heads, head_k_dim, head_v_dim) if memory_shape is None else memory_shape
        super().__init__(dim, memory_shape, value_dim, widths, conv_size, conv_bias, dd)
        self.num_heads = num_heads
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.kv_groups = groups

    def _shared(self, t: Tensor, size: int) -> Tensor:
        """Split keys or values `[B, T, heads · size]` into `[B, T, H, size]`, each head repeated for its queries."""
        heads: Tensor = t.unflatten(-1, [-1, size])
        return heads if self.kv_groups == 1 else heads.repeat_interleave(self.kv_groups, 2)


class SwishGatedMixer(GroupedMixer):
    """A grouped mixer with a norm of each head, gated by `silu(g_proj(x))` unless `use_output_gate` is off."""

    def __init__(
        self,
        dim: int,
        key_dim: int,
        value_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        conv_size: int | None,
        conv_bias: bool,
        use_output_gate: bool,
        norm_eps: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__(dim, key_dim, value_dim, num_heads, num_kv_heads, conv_size, conv_bias, dd)
        size = self.head_v_dim
        self.g_proj = nn.Linear(dim, value_dim, bias=False, **dd) if use_output_gate else None
        self.g_norm_swish_gate = norms.GatedRMSNorm(size, norm_eps, **dd) if use_output_gate else None
        self.g_norm = None if use_output_gate else norms.HeadRMSNorm(size, norm_eps, **dd)

    def _normed(self, x: Tensor, o: Tensor) -> Tensor:
        if self.g_proj is not None and self.g_norm_swish_gate is not None:
            o = self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, [-1, self.head_v_dim]))
        elif self.g_norm is not None:
            o = self.g_norm(o)
        return o.flatten(-2)
