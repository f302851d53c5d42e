"""Arguments of every op, one record per family: the operator's schema, its definition and all backends read them here.

Fields stand in the operator's order, with its defaults. Their shapes and meanings are those of the public function of
the same name in `sinuous.core.ops`; where a field has another name or kind than the public argument, a comment says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AdditiveDecay(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    factor: Tensor | None = None
    initial_S: Tensor | None = None  # the parts of the public initial_state
    initial_z: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    causal: bool = True
    reverse: bool = False


class CausalConv1d(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    silu: bool = False  # activation="silu"
    reverse: bool = False


class DAGScan(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    edges: Tensor
    line_edges: Tensor
    source: Tensor
    transition: Tensor
    mark: Tensor
    direct: Tensor | None = None
    scale: float | None = None


class DeltaRule(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    reverse: bool = False


class DPLR(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    a: Tensor
    b: Tensor
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    reverse: bool = False


class GLA(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    bonus: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    on_values: bool = False  # decay_of="values"
    reverse: bool = False


class GridScan(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    source: Tensor
    transition: Tensor  # bounded by the public mode
    mark: Tensor
    direct: Tensor | None = None
    left: Tensor | None = None
    up: Tensor | None = None
    orientations: Sequence[int] = (0,)
    scale: float | None = None
    with_state: bool = False  # return_state


class LinearScan(NamedTuple):
    x: Tensor
    a: Tensor
    reset: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False


class Longhorn(NamedTuple):
    x: Tensor
    dt: Tensor
    k: Tensor
    q: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False


class LTIConv(NamedTuple):
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    P: Tensor | None = None
    D: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    discretization: str = "zoh"
    reverse: bool = False


class MLSTM(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    input_gate: Tensor
    forget_gate: Tensor
    initial_C: Tensor | None = None  # the parts of the public initial_state
    initial_n: Tensor | None = None
    initial_m: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    eps: float = 1e-6
    input_activation: str = "exp"
    normalize: bool = True
    reverse: bool = False
    return_state: bool = True

    @property
    def initial_state(self) -> tuple[Tensor | None, ...]:
        return self.initial_C, self.initial_n, self.initial_m


class SelectiveScan(NamedTuple):
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dt_softplus: bool = True
    reverse: bool = False


class ChannelStates(NamedTuple):
    """The arguments of `SelectiveScan` or `Longhorn`, for what they share; without A the step is Longhorn's."""

    u: Tensor
    dt: Tensor
    A: Tensor | None
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    reverse: bool

    @classmethod
    def of(cls, args: SelectiveScan | Longhorn) -> ChannelStates:
        if isinstance(args, SelectiveScan):
            return cls._make(args)
        return cls(
            args.x, args.dt, None, args.k, args.q, args.D, args.z, args.dt_bias,
            args.initial_state, args.cu_seqlens, False, args.reverse,
        )  # fmt: skip


class SLSTM(NamedTuple):
    gates: Tensor
    R: Tensor
    bias: Tensor
    initial_y: Tensor | None = None  # the parts of the public initial_state
    initial_c: Tensor | None = None
    initial_n: Tensor | None = None
    initial_m: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cell: str = "slstm"
    reverse: bool = False

    @property
    def initial_state(self) -> tuple[Tensor | None, ...]:
        return self.initial_y, self.initial_c, self.initial_n, self.initial_m


class SSD(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    reverse: bool = False
