"""The Triton kernels compile without a GPU and stay in registers; the whole table is docs/benchmarks/aot.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {tools!r})
import torch, aot_cases, aot_compile
for launch in aot_cases.one_of_each(torch.bfloat16):
    found = aot_compile.cost(launch, aot_compile.TARGETS["sm_90"][0])
    name = launch.kernel.__module__.rpartition(".")[2] + "." + launch.kernel.__name__
    print(name, found.registers, found.spilled, found.shared)
"""


@pytest.mark.slow
def test_default_configurations_compile_for_a_gpu_and_do_not_spill(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton")
    # A process of its own: interpreted kernels cannot be compiled, and Triton's cache must not answer.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT.format(tools=str(ROOT / "tools"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    costs = [(line.split()[0], *(int(n) for n in line.split()[1:])) for line in done.stdout.splitlines()]
    modules = {name.partition(".")[0] for name, *_ in costs}
    assert {
        "channel_states",
        "causal_conv1d",
        "mlstm",
        "ssd",
        "gla_kernels",
        "delta_rule_kernels",
        "slstm_kernels",
        "lti_conv_kernels",
    } <= modules, modules
    for _, registers, spilled, shared in costs:
        assert 0 < registers <= 255
        assert spilled == 0
        assert shared <= 227 * 1024
