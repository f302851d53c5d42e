"""The Triton cells against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import interpreted
import pytest
import torch
from interpreted import MARKS
from parity import assert_close, cast, draw, draw_from, error, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

SLSTM = LAWS["slstm"]
BOUNDS = [0, 0, 5, 32, 32, 34, 35]
"""Empty sequences first and within, boundaries on and off the edge of a chunk, sequences of one and two steps."""
EVERY_CELL = pytest.mark.parametrize("variant", ["full", "lstm", "gru"])

single = partial(interpreted.single, SLSTM)
compare = partial(interpreted.compare, SLSTM)


@pytest.mark.parametrize(
    ("variant", "batch", "length"),
    [
        ("full", 2, 0),
        ("full", 0, 3),
        ("full", 2, 1),
        ("full", 3, 33),
        ("plain", 1, 9),
        ("lstm", 2, 9),
        ("gru", 2, 9),
        ("one_channel", 1, 9),
    ],
)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize(("variant", "units"), [("full", 40), ("lstm", 70), ("gru", 40)])
def test_more_sequences_than_a_block_and_weights_read_in_pieces(variant: str, units: int) -> None:
    arguments = single(variant, 18, 3)
    generator = torch.Generator().manual_seed(0)
    for name in ("gates", "R", "bias"):
        own = [units if n == (19 if variant == "full" else 5) else n for n in arguments[name].shape]
        arguments[name] = torch.randn(own, generator=generator)
    arguments["R"] /= units**0.5
    del arguments["initial_state"]
    compare(arguments)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 33)])
def test_a_ragged_head_is_padded_to_a_whole_tile(batch: int, length: int) -> None:
    compare(cast(draw_from(SLSTM.wide, batch, length), torch.float32))


def test_packed_ragged_heads_backwards() -> None:
    arguments = cast(draw_from(SLSTM.wide, 1, 7, 3), torch.float32)
    compare({**arguments, "cu_seqlens": torch.tensor([0, 2, 2, 7]), "reverse": True})


def test_gpus_see_no_ragged_head_that_is_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import slstm

    seen = set()
    products = slstm.SLSTMCall.products

    def note(call: slstm.SLSTMCall) -> dict[str, Any]:
        seen.add(call.units)
        return products(call)

    monkeypatch.setattr(slstm.SLSTMCall, "products", note)
    compare(cast(draw_from(SLSTM.wide, 1, 2), torch.float32))
    assert seen == {64}


@EVERY_CELL
def test_reverse(variant: str) -> None:
    compare({**single(variant, 2, 7), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@EVERY_CELL
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_kept_is_that_of_the_definition(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    initial = arguments.pop("initial_state")
    states = {f"initial_{part}": t for part, t in zip("ycnm", initial, strict=True)}
    arguments |= {**states, "cu_seqlens": torch.tensor(BOUNDS), "cell": "slstm", "reverse": reverse}
    values = [arguments[name] for name in SLSTM.family.arguments._fields]
    found, wanted = (torch.ops.sinuous.slstm(*values, form)[5:] for form in ("triton", "recurrent"))
    assert len(found) == len(SLSTM.family.saved)
    for f, w in zip(found, wanted, strict=True):
        assert error(f, w) <= 1e-5


def test_fresh_units_and_infinite_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = single("full", 2, 9)
    y, c, n, m = arguments["initial_state"]
    fresh = torch.rand(n.shape, generator=generator) < 0.5
    arguments["initial_state"] = (y, c * ~fresh, n * ~fresh, m)
    closed = torch.rand(2, 9, 2, 2, 19, generator=generator) < 0.3
    arguments["gates"][:, :, :2].masked_fill_(closed, -torch.inf)
    compare(arguments)


def test_a_wide_head_is_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import slstm

    monkeypatch.setattr(slstm, "TILES", {16: slstm.TILES[16]})
    compare(single("full", 2, 5), bound=1e-5)


def test_nothing_leaks_between_sequences() -> None:
    arguments = single("full", 3, 9)
    clean = SLSTM.call(**arguments, backend="triton")
    arguments["gates"][1, 2] = torch.nan
    found = SLSTM.call(**arguments, backend="triton")
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert found[1, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 1, 12)
    arguments["gates"] = arguments["gates"].to(dtype)
    found = run_with_gradients(SLSTM, "triton", arguments)
    wanted = run_with_gradients(SLSTM, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state.1"].dtype == torch.float32
    assert_close(found, {k: v for k, v in wanted.items() if k.startswith(("y", "state"))}, SLSTM.bf16[0])
    assert_close(found, wanted, SLSTM.bf16[1])


@EVERY_CELL
def test_double_precision(variant: str) -> None:
    compare(draw(SLSTM, variant, 1, 9), bound=1e-12)


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("full", 2, 5)
    strided = arguments | {k: arguments[k].repeat_interleave(2, -1)[..., ::2] for k in ("gates", "R", "bias")}
    assert not strided["gates"].is_contiguous()
    assert_close(run_with_gradients(SLSTM, "triton", strided), run_with_gradients(SLSTM, "recurrent", arguments), 1e-4)
