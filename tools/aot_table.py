"""What the Triton kernels cost in registers, spills and shared memory, read off compiled code without a GPU.

    python tools/aot_table.py                       writes docs/benchmarks/aot.md
    python tools/aot_table.py --check               compiles and checks only

The launches are those the ops make: `forward` and `backward` are called on meta tensors, which have shapes and no
data, and every kernel launch is recorded and compiled for each target instead of run. A launch fails the check if it
spills, asks for more shared memory than its target has, or reads scratch memory in another layout than it wrote it in,
so that threads would have to wait for each other's stores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sinuous.kernels.triton import (
    causal_conv1d,
    delta_rule,
    gla,
    linear_scan,
    mlstm,
    selective_scan,
    selective_scan_backward,
    ssd,
)

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
"""Target and its limit of shared memory per program in KiB: CUDA C++ programming guide, table of technical
specifications per compute capability; AMD CDNA 3 instruction set reference, section on local data share."""

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
SIZES = ("BT", "BD", "BN", "BW", "BH", "BK", "BV", "KEYS", "ADJOINT", "GRADIENT")
"""Compile-time arguments that the table shows."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
UNMASKED = re.compile(
    r"tt\.(?:load %[^,]+?|store %[^,]+, %[^,]+?)(?: {[^}]*})? : tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>"
)
"""Layout of a matrix loaded or stored without a mask: of a kernel with scratch memory that is the scratch memory, since
its other matrices have ragged edges."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: the kernel, the arguments by name, and compile options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """The launch as the compiler sees it, specialised as the launcher would."""
        signature: dict[str, str] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for parameter in self.kernel.params:
            value, place = self.arguments[parameter.name], (parameter.num,)
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                attributes[place] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32"
                if special and value % 16 == 0:
                    attributes[place] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


@dataclass(frozen=True)
class Cost:
    """Registers of a thread, bytes it spills, bytes of shared memory of a program, and in how many layouts it
    accesses scratch memory."""

    registers: int
    spilled: int
    shared: int
    layouts: int


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect kernel launches instead of making them."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            options = {k: named.pop(k) for k in OPTIONS if k in named}
            arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
            launches.append(Launch(kernel, arguments, options))

        return launch

    with mock.patch.object(JITFunction, "__getitem__", record):
        yield launches


def cost(launch: Launch, target: GPUTarget) -> Cost:
    """Compile for `target` and read what the code needs."""
    if target.backend == "hip" and "PRECISION" in launch.arguments:  # what `matrix_states.arithmetic` says there
        launch = replace(launch, arguments={**launch.arguments, "PRECISION": "ieee"})
    compiled = triton.compile(launch.source(), target=target, options=launch.options)
    shared = int(compiled.metadata.shared)
    layouts = len(set(UNMASKED.findall(compiled.asm["ttgir"])))
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def entry(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            assert found is not None, f"no {key} in the code of {launch.kernel.__name__}"
            return int(found.group(1))

        return Cost(entry("vgpr_count"), entry("private_segment_fixed_size"), shared, layouts)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used is not None, text
    return Cost(int(used.group(1)), int(used.group(2)), shared, layouts)


def scan_launches(
    dtype: torch.dtype, *, batch: int = 1, length: int = 4096, width: int = 768, state: int = 16, packed: bool = False
) -> list[Launch]:
    """The launches of a selective scan with every optional argument, forward and backward."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide, narrow = meta(batch, length, width, dtype=dtype), meta(batch, length, state, dtype=dtype)
    arguments: dict[str, Any] = {
        "u": wide,
        "dt": wide,
        "A": meta(width, state),
        "B": narrow,
        "C": narrow,
        "D": meta(width),
        "z": wide,
        "dt_bias": meta(width),
        "initial_state": meta(3 if packed else batch, width, state),
        "cu_seqlens": meta(4, dtype=torch.int32) if packed else None,
        "dt_softplus": True,
        "reverse": False,
        "chunk_size": 64,
    }
    with recording() as launches:
        y, final, chunk_states = selective_scan.forward(**arguments)
        selective_scan_backward.backward((y, final), chunk_states=chunk_states, **arguments)
    return launches


def convolution_launches(
    dtype: torch.dtype, *, batch: int = 1, length: int = 4096, width: int = 768, taps: int = 4, packed: bool = False
) -> list[Launch]:
    """The launches of a causal convolution with every optional argument, forward and backward."""
    arguments: dict[str, Any] = {
        "x": torch.empty(batch, length, width, dtype=dtype, device="meta"),
        "weight": torch.empty(width, taps, device="meta"),
        "bias": torch.empty(width, device="meta"),
        "initial_state": torch.empty(3 if packed else batch, taps - 1, width, dtype=dtype, device="meta"),
        "cu_seqlens": torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        "silu": True,
        "reverse": False,
    }
    with recording() as launches:
        y, final = causal_conv1d.forward(**arguments)
        causal_conv1d.backward((y, final), **arguments)
    return launches


def attention_arguments(dtype: torch.dtype, keys: int, values: int, heads: int, groups: int) -> dict[str, torch.Tensor]:
    """Queries, keys and values of a batch of 1 and 4096 steps."""
    shapes = {"q": (groups, keys), "k": (groups, keys), "v": (heads, values)}
    return {name: torch.empty(1, 4096, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def ssd_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, groups: int = 16, packed: bool = False
) -> list[Launch]:
    """The launches of ssd on 16 heads with every optional argument, forward and backward."""
    arguments: dict[str, Any] = {
        **attention_arguments(dtype, keys, values, 16, groups),
        "log_decay": torch.empty(1, 4096, 16, device="meta"),
        "initial_state": torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        "cu_seqlens": torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        "scale": None,
        "reverse": False,
        "chunk_size": 64,
    }
    with recording() as launches:
        y, final, chunk_states = ssd.forward(**arguments)
        ssd.backward((y, final), chunk_states=chunk_states, **arguments)
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
    arguments: dict[str, Any] = {
        "x": x,
        "a": x.new_empty(width) if constant else x,
        "reset": x.new_empty(batch, length, dtype=torch.bool),
        "initial_state": x.new_empty(state, dtype=torch.promote_types(dtype, torch.float32)),
        "cu_seqlens": x.new_empty(4, dtype=torch.int32) if packed else None,
        "reverse": False,
        "chunk_size": 64,
    }
    with recording() as launches:
        y, final, chunk_states = linear_scan.forward(**arguments)
        linear_scan.backward((y, final), chunk_states=chunk_states, **arguments)
    return launches


def mlstm_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, activation: str = "exp", packed: bool = False
) -> list[Launch]:
    """The launches of mlstm on 16 heads with every optional argument, forward and backward."""
    sequences = 3 if packed else 1
    arguments: dict[str, Any] = {
        **attention_arguments(dtype, keys, values, 16, 16),
        "input_gate": torch.empty(1, 4096, 16, dtype=dtype, device="meta"),
        "forget_gate": torch.empty(1, 4096, 16, dtype=dtype, device="meta"),
        "initial_C": torch.empty(sequences, 16, keys, values, device="meta"),
        "initial_n": torch.empty(sequences, 16, keys, device="meta"),
        "initial_m": torch.empty(sequences, 16, device="meta"),
        "cu_seqlens": torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        "scale": None,
        "eps": 1e-6,
        "input_activation": activation,
        "normalize": True,
        "reverse": False,
        "chunk_size": 64,
    }
    with recording() as launches:
        y, C, n, m, chunk_C, chunk_n, chunk_m = mlstm.forward(**arguments)
        mlstm.backward((y, C, n, m), chunk_C=chunk_C, chunk_n=chunk_n, chunk_m=chunk_m, **arguments)
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
    arguments: dict[str, Any] = {
        **attention_arguments(dtype, keys, values, 16, 16),
        "log_decay": torch.empty(1, 4096, 16, values if on_values else keys, dtype=gates, device="meta"),
        "bonus": None if on_values else torch.empty(16, keys, device="meta"),
        "initial_state": torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        "cu_seqlens": torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        "scale": None,
        "on_values": on_values,
        "reverse": False,
        "chunk_size": 64,
    }
    with recording() as launches:
        y, final, chunk_states = gla.forward(**arguments)
        gla.backward((y, final), chunk_states=chunk_states, **arguments)
    return launches


def delta_rule_launches(
    dtype: torch.dtype, *, keys: int = 64, values: int = 64, factors: int = 1, packed: bool = False
) -> list[Launch]:
    """The launches of delta_rule on 16 heads with every optional argument, forward and backward."""
    given = attention_arguments(dtype, keys, values, 16, 16)
    arguments: dict[str, Any] = {
        **given,
        **{name: given[name].unsqueeze(2).expand(-1, -1, factors, -1, -1) for name in ("k", "v")},
        "beta": torch.empty(1, 4096, factors, 16, dtype=dtype, device="meta"),
        "log_decay": torch.empty(1, 4096, 16, device="meta"),
        "initial_state": torch.empty(3 if packed else 1, 16, keys, values, device="meta"),
        "cu_seqlens": torch.empty(4, dtype=torch.int32, device="meta") if packed else None,
        "scale": None,
        "reverse": False,
        "chunk_size": 64,
    }
    with recording() as launches:
        y, final, chunk_states = delta_rule.forward(**arguments)
        delta_rule.backward((y, final), chunk_states=chunk_states, **arguments)
    return launches


def cases() -> Iterator[tuple[str, list[Launch]]]:
    """The configurations in the table."""
    for dtype in (torch.float32, torch.bfloat16):
        name = TYPES[dtype]
        for state in (1, 16, 64):
            yield f"selective_scan {name} N={state}", scan_launches(dtype, state=state)
        yield f"selective_scan {name} N=16 packed", scan_launches(dtype, packed=True)
        yield f"selective_scan {name} N=16 B=256", scan_launches(dtype, batch=256, length=256)
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
        yield f"delta_rule {name} K=64 V=64 packed, n=2", delta_rule_launches(dtype, factors=2, packed=True)
    yield "delta_rule bf16 K=256 V=256", delta_rule_launches(torch.bfloat16, keys=256, values=256)
    yield "linear_scan complex64", linear_scan_launches(torch.complex64)
    yield "linear_scan complex64 packed", linear_scan_launches(torch.complex64, packed=True)


def table() -> tuple[list[str], list[str]]:
    """Rows of the Markdown table, and what breaks a limit."""
    rows, broken = [], []
    for case, launches in cases():
        for launch in launches:
            sizes = {
                k: launch.arguments[k]
                for k in ("BT", "BD", "BN", "BW", "BH", "BK", "BV", "KEYS", "ADJOINT", "GRADIENT")
                if k in launch.arguments
            }
            described = ", ".join(f"{k} {v}" for k, v in sizes.items())
            cells = []
            for name, (target, limit) in TARGETS.items():
                found = cost(launch, target)
                cells.append(f"{found.registers} / {found.spilled} / {found.shared / 1024:.1f}")
                what = f"{case}, {launch.kernel.__name__} on {name}"
                if found.spilled:
                    broken.append(f"{what}: spills {found.spilled} bytes")
                if "scratch" in launch.arguments and found.layouts != 1:
                    broken.append(f"{what}: accesses scratch memory in {found.layouts} layouts")
                if found.shared > limit * 1024:
                    broken.append(f"{what}: needs {found.shared} bytes of shared memory of {limit} KiB")
            row = f"| {case} | {launch.kernel.__name__} | {described} | {launch.options['num_warps']} | "
            rows.append(row + " | ".join(cells) + " |")
    # A backward pass may launch what the forward pass did.
    return list(dict.fromkeys(rows)), broken


def main() -> int:
    """Compile every configuration, write the table, and fail where one breaks a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "aot.md")
    options = parser.parse_args()
    rows, broken = table()
    head = " | ".join(TARGETS)
    page = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Registers of a thread / bytes spilled to its stack / KiB of shared memory of a program. On gfx942 the first",
        "figure is vector registers. D = 768 or 16 heads, T = 4096 (256 where B = 256, which takes the serial form);",
        "all optional arguments present. Nothing here was timed.",
        "",
        f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}: `python tools/aot_table.py`.",
        "",
        f"| case | kernel | block | warps | {head} |",
        "|" + "---|" * (4 + len(TARGETS)),
        *rows,
    ]
    if not options.check:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(page) + "\n")
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
