"""The launches in the table of tools/aot_table.py: each op's forward and backward with every optional argument."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from aot_compile import TYPES, Launch, recording

from sinuous.core.ops.laws import (
    LAWS,
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
from sinuous.core.ops.laws.declaration import Sample

HEADS, WIDTH = 16, 768


def launches(
    name: str, sample: Sample, dtype: torch.dtype, *, batch: int = 1, length: int = 4096, packed: bool = False
) -> list[Launch]:
    """The launches of the op `name` on a sample of its laws, forward and backward, three sequences in a packed one."""
    laws = LAWS[name]
    family, module = laws.family, importlib.import_module(f"sinuous.kernels.triton.{name}")
    sequences = 3 if packed else batch
    arguments = laws.at_size(sample, batch, length, sequences=sequences, dtype=dtype, device="meta")
    if name == "causal_conv1d":  # whose state is of inputs
        arguments["initial_state"] = arguments["initial_state"].to(dtype)
    if packed:
        arguments["cu_seqlens"] = torch.empty(4, dtype=torch.int32, device="meta")
    args = laws.record(arguments)
    visible = len(family.outputs)
    with recording() as launched:
        outputs = module.forward(args, **family.options)
        saved = dict(zip(family.saved, outputs[visible:], strict=True))
        module.backward(args, outputs[:visible], **saved, **family.options)
    return launched


def scan(state: int = 16) -> Sample:
    return selective_scan.sample_of(WIDTH, state, None, full=True)


def implicit(state: int = 16) -> Sample:
    return longhorn.sample_of(WIDTH, state, full=True)


def convolution(taps: int = 4) -> Sample:
    return causal_conv1d.sample_of(WIDTH, taps, full=True, activation="silu")


def per_head(keys: int = 64, values: int = 64, groups: int = HEADS) -> Sample:
    return ssd.sample_of(groups, HEADS, keys, values, "steps")


def per_channel(keys: int = 64, values: int = 64, of: str = "keys") -> Sample:
    return gla.sample_of(HEADS, keys, values, state=True, bonus=of == "keys", of=of)


def added(keys: int = 64, values: int = 64) -> Sample:
    return additive_decay.sample_of(HEADS, keys, values, factor=True)


def deltas(keys: int = 64, values: int = 64, factors: int | None = None) -> Sample:
    return delta_rule.sample_of(HEADS, keys, values, factors=factors, full=True)


def low_rank(keys: int = 64, values: int = 64) -> Sample:
    return dplr.sample_of(HEADS, keys, values, state=True)


def memory(keys: int = 64, values: int = 64, activation: str = "exp") -> Sample:
    return mlstm.sample_of(HEADS, keys, values, input_activation=activation)


def cells(units: int = 64, cell: str = "slstm") -> Sample:
    return slstm.sample_of(4, units, cell=cell)


def systems(modes: int = 32) -> Sample:
    return lti_conv.sample_of(WIDTH, modes, 0, "zoh", full=True)


def reals(constant: bool = False) -> Sample:
    return linear_scan.sample_of(WIDTH, full=True, constant=constant)


SAMPLES: dict[str, Callable[[], Sample]] = {
    "selective_scan": scan,
    "longhorn": implicit,
    "causal_conv1d": convolution,
    "linear_scan": reals,
    "ssd": per_head,
    "mlstm": memory,
    "gla": per_channel,
    "delta_rule": deltas,
    "dplr": low_rank,
    "additive_decay": added,
    "slstm": cells,
    "lti_conv": systems,
}


def one_of_each(dtype: torch.dtype) -> list[Launch]:
    """The launches of every op at one size."""
    return [launch for name, sample in SAMPLES.items() for launch in launches(name, sample(), dtype)]


def cases() -> Iterator[tuple[str, list[Launch]]]:
    """The configurations in the table."""
    for dtype in (torch.float32, torch.bfloat16):
        name = TYPES[dtype]
        many = {"batch": 256, "length": 256}
        for state in (1, 16, 64):
            yield f"selective_scan {name} N={state}", launches("selective_scan", scan(state), dtype)
        yield f"selective_scan {name} N=16 packed", launches("selective_scan", scan(), dtype, packed=True)
        yield f"selective_scan {name} N=16 B=256", launches("selective_scan", scan(), dtype, **many)
        for state in (16, 64):
            yield f"longhorn {name} N={state}", launches("longhorn", implicit(state), dtype)
        yield f"longhorn {name} N=16 packed", launches("longhorn", implicit(), dtype, packed=True)
        yield f"longhorn {name} N=16 B=256", launches("longhorn", implicit(), dtype, **many)
        for taps in (4, 8):
            yield f"causal_conv1d {name} W={taps}", launches("causal_conv1d", convolution(taps), dtype)
        yield f"causal_conv1d {name} W=4 packed", launches("causal_conv1d", convolution(), dtype, packed=True)
        yield f"linear_scan {name}", launches("linear_scan", reals(), dtype)
        yield (
            f"linear_scan {name} packed, constant a",
            launches("linear_scan", reals(constant=True), dtype, packed=True),
        )
        yield f"linear_scan {name} B=256", launches("linear_scan", reals(), dtype, **many)
        for keys, values in ((64, 64), (128, 128), (128, 64)):
            yield f"ssd {name} K={keys} V={values}", launches("ssd", per_head(keys, values), dtype)
        yield f"ssd {name} K=128 V=64 one group", launches("ssd", per_head(128, groups=1), dtype)
        yield f"ssd {name} K=64 V=64 packed", launches("ssd", per_head(), dtype, packed=True)
        for keys, values in ((64, 64), (128, 128), (256, 512)):
            yield f"mlstm {name} K={keys} V={values}", launches("mlstm", memory(keys, values), dtype)
            yield f"gla {name} K={keys} V={values}", launches("gla", per_channel(keys, values), dtype)
        yield f"gla {name} K=64 V=64 packed", launches("gla", per_channel(), dtype, packed=True)
        yield f"gla {name} K=64 V=64 decay of values", launches("gla", per_channel(of="values"), dtype)
        yield f"mlstm {name} K=64 V=64 packed", launches("mlstm", memory(), dtype, packed=True)
        yield f"mlstm {name} K=64 V=64 sigmoid", launches("mlstm", memory(activation="sigmoid"), dtype)
        for keys, values in ((64, 64), (128, 128)):
            yield f"delta_rule {name} K={keys} V={values}", launches("delta_rule", deltas(keys, values), dtype)
            yield f"dplr {name} K={keys} V={values}", launches("dplr", low_rank(keys, values), dtype)
        yield f"delta_rule {name} K=64 V=64 packed, n=2", launches("delta_rule", deltas(factors=2), dtype, packed=True)
        for keys, values in ((64, 64), (128, 128)):
            yield f"additive_decay {name} K={keys} V={values}", launches("additive_decay", added(keys, values), dtype)
        yield f"additive_decay {name} K=64 V=64 packed", launches("additive_decay", added(), dtype, packed=True)
        yield f"dplr {name} K=64 V=64 packed", launches("dplr", low_rank(), dtype, packed=True)
        few = {"batch": 8, "length": 1024}
        for units in (16, 19, 32, 64, 96, 128):
            yield f"slstm {name} D={units}", launches("slstm", cells(units), dtype, **few)
        for units in (32, 64):
            yield f"slstm {name} D={units} packed", launches("slstm", cells(units), dtype, length=1024, packed=True)
        for modes in (8, 32, 64):
            yield f"lti_conv {name} N={2 * modes}", launches("lti_conv", systems(modes), dtype)
        yield f"lti_conv {name} N=64 packed", launches("lti_conv", systems(), dtype, packed=True)
        yield f"lti_conv {name} N=64 B=256", launches("lti_conv", systems(), dtype, **many)
        for cell in ("lstm", "gru"):
            yield f"{cell} {name} D=64", launches("slstm", cells(64, cell), dtype, **few)
    yield "dplr bf16 K=256 V=256", launches("dplr", low_rank(256, 256), torch.bfloat16)
    yield "delta_rule bf16 K=256 V=256", launches("delta_rule", deltas(256, 256), torch.bfloat16)
    complex_ = linear_scan.sample_of(WIDTH, full=True, complex_=True)
    yield "linear_scan complex64", launches("linear_scan", complex_, torch.float32)
    yield "linear_scan complex64 packed", launches("linear_scan", complex_, torch.float32, packed=True)
