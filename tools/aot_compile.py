"""Kernel launches recorded on meta tensors, and what their compiled code costs; tools/aot_table.py makes the table."""

from __future__ import annotations

import re
import subprocess
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
