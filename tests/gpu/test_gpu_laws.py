"""The Triton kernels on a GPU against the definition in float64, at sizes an interpreter cannot reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_close, cast, draw, draw_from, named, run, run_with_gradients

from sinuous.core.ops.laws import LAWS
from sinuous.kernels.triton import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 keeps kernels off the device"),
]

NAMES = [name for name, laws in LAWS.items() if "triton" in laws.family.forms]
every_name = pytest.mark.parametrize("name", NAMES)


def wide(name: str, batch: int, length: int, sequences: int | None = None) -> dict[str, Any]:
    return draw_from(LAWS[name].wide, batch, length, sequences)


def compare(name: str, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    laws = LAWS[name]
    arguments = cast(cast(arguments, "cuda"), torch.float32)
    arguments |= cast({k: arguments[k] for k in laws.time if k in arguments}, dtype)
    wanted = run_with_gradients(laws, "recurrent", cast(arguments, torch.float64))
    found = run_with_gradients(laws, "triton", arguments)
    outputs, gradients = (1e-4, 1e-4) if dtype == torch.float32 else laws.bf16
    assert_close(found, {k: v for k, v in wanted.items() if k.startswith(("y", "state"))}, outputs)
    assert_close(found, wanted, gradients)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 131])
@pytest.mark.parametrize(("name", "variant"), [(n, v) for n in NAMES for v in LAWS[n].variants])
def test_every_variant_at_small_sizes(name: str, variant: str, length: int) -> None:
    compare(name, draw(LAWS[name], variant, 2, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_name
def test_a_long_sequence_in_a_small_batch(name: str, dtype: torch.dtype) -> None:
    compare(name, wide(name, 1, 4096), dtype)


@every_name
def test_a_batch_large_enough_for_the_serial_form(name: str) -> None:
    compare(name, wide(name, 1024, 130))


@pytest.mark.parametrize("reverse", [False, True])
@every_name
def test_packed(name: str, reverse: bool) -> None:
    bounds = [0, 0, 1, 64, 700, 700, 1031, 2048]
    arguments = wide(name, 1, bounds[-1], sequences=len(bounds) - 1)
    compare(name, {**arguments, "cu_seqlens": torch.tensor(bounds), "reverse": reverse})


@every_name
def test_same_bits_twice(name: str) -> None:
    arguments = cast(cast(wide(name, 2, 4096), "cuda"), torch.float32)
    first, second = (run_with_gradients(LAWS[name], "triton", arguments) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@every_name
def test_chosen_without_being_asked_for(name: str) -> None:
    arguments = cast(cast(wide(name, 2, 70), "cuda"), torch.float32)
    asked = named(run(LAWS[name], "triton", arguments))
    unasked = named(LAWS[name].call(**arguments, return_state=True))
    assert all(torch.equal(asked[k], unasked[k]) for k in asked)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_name
def test_tensors_on_a_device_that_is_not_the_current_one(name: str) -> None:
    arguments = cast(wide(name, 2, 70), torch.float32)
    first, second = (run_with_gradients(LAWS[name], "triton", cast(arguments, d)) for d in ("cuda:0", "cuda:1"))
    assert all(torch.equal(first[k].cpu(), second[k].cpu()) for k in first)
