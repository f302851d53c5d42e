"""The launches in the table of tools/aot_table.py: each op's forward and backward with every optional argument."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot_compile import TYPES, Launch, recording

from sinuous.kernels.arguments import (
    DPLR,
    GLA,
    MLSTM,
    SLSTM,
    SSD,
    AdditiveDecay,
    CausalConv1d,
    DeltaRule,
    LinearScan,
    Longhorn,
    LTIConv,
    SelectiveScan,
)
from sinuous.kernels.triton import (
    additive_decay,
    causal_conv1d,
    delta_rule,
    dplr,
    gla,
    linear_scan,
    longhorn,
    lti_conv,
    mlstm,
    selective_scan,
    slstm,
    ssd,
)


def scan_launches(
    dtype: torch.dtype, *, batch: int = 1, length: int = 4096, width: int = 768, state: int = 16, packed: bool = False
) -> list[Launch]:
    """The launches of a selective scan with every optional argument, forward and backward."""
    args = scan_arguments(dtype, batch, length, width, state, packed)
    with recording() as launches:
        y, final, chunk_states = selective_scan.forward(args, chunk_size=64)
        selective_scan.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def longhorn_launches(
    dtype: torch.dtype, *, batch: int = 1, length: int = 4096, width: int = 768, state: int = 16, packed: bool = False
) -> list[Launch]:
    """The launches of Longhorn with every optional argument, forward and backward."""
    scan = scan_arguments(dtype, batch, length, width, state, packed)
    args = Longhorn(scan.u, scan.dt, scan.B, scan.C, scan.D, scan.z, scan.dt_bias, scan.initial_state, scan.cu_seqlens)
    with recording() as launches:
        y, final, chunk_states = longhorn.forward(args, chunk_size=64)
        longhorn.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def scan_arguments(dtype: torch.dtype, batch: int, length: int, width: int, state: int, packed: bool) -> SelectiveScan:
    """Arguments of a selective scan, none left out."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide, narrow = meta(batch, length, width, dtype=dtype), meta(batch, length, state, dtype=dtype)
    initial = meta(3 if packed else batch, width, state)
    bounds = meta(4, dtype=torch.int32) if packed else None
    return SelectiveScan(
        wide, wide, meta(width, state), narrow, narrow, meta(width), wide, meta(width), initial, bounds
    )


def convolution_launches(
    dtype: torch.dtype, *, batch: int = 1, length: int = 4096, width: int = 768, taps: int = 4, packed: bool = False
) -> list[Launch]:
    """The launches of a causal convolution with every optional argument, forward and backward."""
    args = CausalConv1d(
        torch.empty(batch, length, width, dtype=dtype, device="meta"),
        torch.empty(width, taps, device="meta"),
        torch.empty(width, device="meta"),
        torch.empty(3 if packed else batch, taps - 1, width, dtype=dtype, device="meta"),
        torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        silu=True,
    )
    with recording() as launches:
        y, final = causal_conv1d.forward(args)
        causal_conv1d.backward(args, (y, final))
    return launches


def attention_arguments(dtype: torch.dtype, keys: int, values: int, heads: int, groups: int) -> dict[str, torch.Tensor]:
    """Queries, keys and values of a batch of 1 and 4096 steps."""
    shapes = {"q": (groups, keys), "k": (groups, keys), "v": (heads, values)}
    return {name: torch.empty(1, 4096, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def ssd_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, groups: int = 16, packed: bool = False
) -> list[Launch]:
    """The launches of ssd on 16 heads with every optional argument, forward and backward."""
    args = SSD(
        **attention_arguments(dtype, keys, values, 16, groups),
        log_decay=torch.empty(1, 4096, 16, device="meta"),
        initial_state=torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
    )
    with recording() as launches:
        y, final, chunk_states = ssd.forward(args, chunk_size=64)
        ssd.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def linear_scan_launches(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    length: int = 4096,
    width: int = 768,
    constant: bool = False,
    packed: bool = False,
) -> list[Launch]:
    """The launches of a linear scan with every optional argument, forward and backward."""
    x = torch.empty(batch, length, width, dtype=dtype, device="meta")
    state = (3 if packed else batch, width)
    args = LinearScan(
        x,
        x.new_empty(width) if constant else x,
        reset=x.new_empty(batch, length, dtype=torch.bool),
        initial_state=x.new_empty(state, dtype=torch.promote_types(dtype, torch.float32)),
        cu_seqlens=x.new_empty(4, dtype=torch.int32) if packed else None,
    )
    with recording() as launches:
        y, final, chunk_states = linear_scan.forward(args, chunk_size=64)
        linear_scan.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def mlstm_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, activation: str = "exp", packed: bool = False
) -> list[Launch]:
    """The launches of mlstm on 16 heads with every optional argument, forward and backward."""
    sequences = 3 if packed else 1
    args = MLSTM(
        **attention_arguments(dtype, keys, values, 16, 16),
        input_gate=torch.empty(1, 4096, 16, dtype=dtype, device="meta"),
        forget_gate=torch.empty(1, 4096, 16, dtype=dtype, device="meta"),
        initial_C=torch.empty(sequences, 16, keys, values, device="meta"),
        initial_n=torch.empty(sequences, 16, keys, device="meta"),
        initial_m=torch.empty(sequences, 16, device="meta"),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        input_activation=activation,
    )
    with recording() as launches:
        y, C, n, m, *chunk_states = mlstm.forward(args, chunk_size=64)
        mlstm.backward(args, (y, C, n, m), *chunk_states, chunk_size=64)
    return launches


def gla_launches(
    dtype: torch.dtype,
    *,
    keys: int = 64,
    values: int = 64,
    gates: torch.dtype = torch.float32,
    on_values: bool = False,
    packed: bool = False,
) -> list[Launch]:
    """The launches of gla on 16 heads with every optional argument, forward and backward."""
    q, k, v = attention_arguments(dtype, keys, values, 16, 16).values()
    args = GLA(
        q,
        k,
        v,
        log_decay=torch.empty(1, 4096, 16, values if on_values else keys, dtype=gates, device="meta"),
        bonus=None if on_values else torch.empty(16, keys, device="meta"),
        initial_state=torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        on_values=on_values,
    )
    with recording() as launches:
        y, final, chunk_states = gla.forward(args, chunk_size=64)
        gla.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def delta_rule_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, factors: int = 1, packed: bool = False
) -> list[Launch]:
    """The launches of delta_rule on 16 heads with every optional argument, forward and backward."""
    q, k, v = attention_arguments(dtype, keys, values, 16, 16).values()
    args = DeltaRule(
        q,
        k.unsqueeze(2).expand(-1, -1, factors, -1, -1),
        v.unsqueeze(2).expand(-1, -1, factors, -1, -1),
        beta=torch.empty(1, 4096, factors, 16, dtype=dtype, device="meta"),
        log_decay=torch.empty(1, 4096, 16, device="meta"),
        initial_state=torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
    )
    with recording() as launches:
        y, final, chunk_states = delta_rule.forward(args, chunk_size=64)
        delta_rule.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def dplr_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, gates: torch.dtype = torch.float32, packed: bool = False
) -> list[Launch]:
    """The launches of dplr on 16 heads with every optional argument, forward and backward."""
    q, k, v = attention_arguments(dtype, keys, values, 16, 16).values()
    args = DPLR(
        q,
        k,
        v,
        log_decay=torch.empty(1, 4096, 16, keys, dtype=gates, device="meta"),
        a=k,
        b=k,
        initial_state=torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
    )
    with recording() as launches:
        y, final, chunk_states = dplr.forward(args, chunk_size=64)
        dplr.backward(args, (y, final), chunk_states, chunk_size=64)
    return launches


def additive_decay_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, packed: bool = False
) -> list[Launch]:
    """The launches of causal additive_decay on 16 heads with every optional argument, forward and backward."""
    given, sequences = attention_arguments(dtype, keys, values, 16, 16), 3 if packed else 1
    args = AdditiveDecay(
        **given,
        factor=given["k"],
        initial_S=torch.empty(sequences, 16, keys, values, device="meta"),
        initial_z=torch.empty(sequences, 16, keys, device="meta"),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
    )
    with recording() as launches:
        y, S, z, kept_S, kept_z = additive_decay.forward(args, chunk_size=64)
        additive_decay.backward(args, (y, S, z), kept_S, kept_z, chunk_size=64)
    return launches


def slstm_launches(dtype: torch.dtype, *, units: int = 64, cell: str = "slstm", packed: bool = False) -> list[Launch]:
    """The launches of a recurrent cell on 4 heads with every optional argument, forward and backward."""
    state = torch.empty(3 if packed else 8, 4, units, device="meta")
    args = SLSTM(
        gates=torch.empty(1 if packed else 8, 1024, 4, 4, units, dtype=dtype, device="meta"),
        R=torch.empty(4, 4, units, units, device="meta"),
        bias=torch.empty(4, 4, units, device="meta"),
        **{f"initial_{name}": state for name in "ycnm"},
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        cell=cell,
    )
    with recording() as launches:
        outputs = slstm.forward(args, chunk_size=32)
        slstm.backward(args, outputs[:5], *outputs[5:], chunk_size=32)
    return launches


def lti_conv_launches(
    dtype: torch.dtype, *, batch: int = 1, length: int = 4096, width: int = 768, modes: int = 32, packed: bool = False
) -> list[Launch]:
    """The launches of diagonal linear systems with every optional argument, forward and backward."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    args = LTIConv(
        meta(batch, length, width, dtype=dtype),
        meta(width),
        *(meta(width, modes, 2) for _ in "ABC"),
        D=meta(width),
        initial_state=meta(3 if packed else batch, width, modes, 2),
        cu_seqlens=meta(4, dtype=torch.int32) if packed else None,
    )
    with recording() as launches:
        lti_conv.backward(args, lti_conv.forward(args))
    return launches


def cases() -> Iterator[tuple[str, list[Launch]]]:
    """The configurations in the table."""
    for dtype in (torch.float32, torch.bfloat16):
        name = TYPES[dtype]
        for state in (1, 16, 64):
            yield f"selective_scan {name} N={state}", scan_launches(dtype, state=state)
        yield f"selective_scan {name} N=16 packed", scan_launches(dtype, packed=True)
        yield f"selective_scan {name} N=16 B=256", scan_launches(dtype, batch=256, length=256)
        for state in (16, 64):
            yield f"longhorn {name} N={state}", longhorn_launches(dtype, state=state)
        yield f"longhorn {name} N=16 packed", longhorn_launches(dtype, packed=True)
        yield f"longhorn {name} N=16 B=256", longhorn_launches(dtype, batch=256, length=256)
        for taps in (4, 8):
            yield f"causal_conv1d {name} W={taps}", convolution_launches(dtype, taps=taps)
        yield f"causal_conv1d {name} W=4 packed", convolution_launches(dtype, packed=True)
        yield f"linear_scan {name}", linear_scan_launches(dtype)
        yield f"linear_scan {name} packed, constant a", linear_scan_launches(dtype, packed=True, constant=True)
        yield f"linear_scan {name} B=256", linear_scan_launches(dtype, batch=256, length=256)
        for keys, values in ((64, 64), (128, 128), (128, 64)):
            yield f"ssd {name} K={keys} V={values}", ssd_launches(dtype, keys=keys, values=values)
        yield f"ssd {name} K=128 V=64 one group", ssd_launches(dtype, keys=128, groups=1)
        yield f"ssd {name} K=64 V=64 packed", ssd_launches(dtype, packed=True)
        for keys, values in ((64, 64), (128, 128), (256, 512)):
            yield f"mlstm {name} K={keys} V={values}", mlstm_launches(dtype, keys=keys, values=values)
            yield f"gla {name} K={keys} V={values}", gla_launches(dtype, keys=keys, values=values)
        yield f"gla {name} K=64 V=64 packed", gla_launches(dtype, packed=True)
        yield f"gla {name} K=64 V=64 decay of values", gla_launches(dtype, on_values=True)
        yield f"mlstm {name} K=64 V=64 packed", mlstm_launches(dtype, packed=True)
        yield f"mlstm {name} K=64 V=64 sigmoid", mlstm_launches(dtype, activation="sigmoid")
        for keys, values in ((64, 64), (128, 128)):
            yield f"delta_rule {name} K={keys} V={values}", delta_rule_launches(dtype, keys=keys, values=values)
            yield f"dplr {name} K={keys} V={values}", dplr_launches(dtype, keys=keys, values=values)
        yield f"delta_rule {name} K=64 V=64 packed, n=2", delta_rule_launches(dtype, factors=2, packed=True)
        for keys, values in ((64, 64), (128, 128)):
            name_of = f"additive_decay {name} K={keys} V={values}"
            yield name_of, additive_decay_launches(dtype, keys=keys, values=values)
        yield f"additive_decay {name} K=64 V=64 packed", additive_decay_launches(dtype, packed=True)
        yield f"dplr {name} K=64 V=64 packed", dplr_launches(dtype, packed=True)
        for units in (16, 19, 32, 64, 96, 128):
            yield f"slstm {name} D={units}", slstm_launches(dtype, units=units)
        for units in (32, 64):
            yield f"slstm {name} D={units} packed", slstm_launches(dtype, units=units, packed=True)
        for modes in (8, 32, 64):
            yield f"lti_conv {name} N={2 * modes}", lti_conv_launches(dtype, modes=modes)
        yield f"lti_conv {name} N=64 packed", lti_conv_launches(dtype, packed=True)
        yield f"lti_conv {name} N=64 B=256", lti_conv_launches(dtype, batch=256, length=256)
        for cell in ("lstm", "gru"):
            yield f"{cell} {name} D=64", slstm_launches(dtype, cell=cell)
    yield "dplr bf16 K=256 V=256", dplr_launches(torch.bfloat16, keys=256, values=256)
    yield "delta_rule bf16 K=256 V=256", delta_rule_launches(torch.bfloat16, keys=256, values=256)
    yield "linear_scan complex64", linear_scan_launches(torch.complex64)
    yield "linear_scan complex64 packed", linear_scan_launches(torch.complex64, packed=True)
