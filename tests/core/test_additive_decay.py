"""Properties of additive_decay: the softmax that it is, extreme keys, empty states, merging, all-to-all reading."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keys_over_time import KEYS, joined
from parity import assert_close, cast, cotangents, draw, error, gradients, named, run, run_with_gradients, with_leaves
from torch import Tensor

from sinuous.core.ops import additive_decay, gla
from sinuous.core.ops.additive_decay import merge
from sinuous.core.ops.laws import LAWS

OP = LAWS["additive_decay"]
INF = float("inf")

every_key = pytest.mark.parametrize("keys", KEYS)
every_form = pytest.mark.parametrize("form", ["recurrent", "torch"])


def arguments(keys: str, variant: str = "full", length: int = 150) -> dict[str, Any]:
    """The keys as single precision has them, so that both precisions are given the same."""
    inputs = draw(OP, variant, 2, length)
    return {**inputs, "k": KEYS[keys](inputs["k"]).float().double()}


def softmax_attention(a: dict[str, Any]) -> Tensor:
    """Equations of the docstring without a state, by softmax over the steps up to each t, or over all."""
    q, k, v = a["q"], a["k"], a["v"]
    ys = []
    for t in range(1, q.shape[1] + 1):
        seen = t if a["causal"] else q.shape[1]
        share = torch.softmax(k[:, :seen], 1).nan_to_num(0)
        share = share * a["factor"][:, :seen] if "factor" in a else share
        memory = torch.einsum("bshk,bshv->bhkv", share, v[:, :seen])
        ys.append(torch.einsum("bhk,bhkv->bhv", q[:, t - 1], memory) * q.shape[-1] ** -0.5)
    return torch.stack(ys, 1)


@pytest.mark.parametrize("variant", ["full", "not_causal", "plain", "fresh_not_causal"])
@every_key
@every_form
def test_it_is_a_softmax_over_time(form: str, keys: str, variant: str) -> None:
    inputs = arguments(keys, variant, 80)
    inputs.pop("initial_state", None)
    assert error(additive_decay(**inputs, backend=form), softmax_attention(inputs)) <= 1e-11


@pytest.mark.parametrize("variant", ["full", "not_causal"])
@every_key
def test_every_key_is_as_exact_in_single_precision(keys: str, variant: str) -> None:
    inputs = arguments(keys, variant)
    expected = joined(run_with_gradients(OP, "recurrent", inputs))
    assert_close(joined(run_with_gradients(OP, "torch", inputs)), expected, 1e-11)
    # Near 1e4 the z that single precision carries from chunk to chunk is a multiple of 1e-3.
    bound = 1e-3 if keys == "extreme and close" and variant == "full" else 5e-6
    assert_close(joined(run_with_gradients(OP, "torch", cast(inputs, torch.float32))), expected, bound)


@every_form
def test_a_constant_of_a_channel_changes_nothing(form: str) -> None:
    inputs = draw(OP, "causal", 2, 90)
    y, (S, z) = run(OP, form, inputs)
    shift = torch.tensor([3.0, -7.0, 100.0, 0.0, -200.0], dtype=torch.float64)
    S0, z0 = inputs["initial_state"]
    shifted = {**inputs, "k": inputs["k"] + shift, "initial_state": (S0, z0 + shift)}
    y_shifted, (S_shifted, z_shifted) = run(OP, form, shifted)
    assert error(y_shifted, y) <= 1e-12
    assert error(S_shifted, S) <= 1e-12
    assert error(z_shifted, z + shift) <= 1e-12


@pytest.mark.parametrize("variant", ["causal", "not_causal"])
@every_form
def test_a_state_without_weight_counts_for_nothing(form: str, variant: str) -> None:
    inputs = draw(OP, variant, 2, 70)
    S0, z0 = inputs["initial_state"]
    empty = {**inputs, "initial_state": (1e3 * S0, torch.full_like(z0, -INF))}
    fresh = {n: t for n, t in inputs.items() if n != "initial_state"}
    assert_close(named(run(OP, form, empty)), named(run(OP, form, fresh)), 0.0)
    gradient = run_with_gradients(OP, form, empty)
    assert not gradient["initial_state.0"].any()
    assert gradient["k"].isfinite().all()


@every_form
def test_steps_without_weight_leave_the_state_as_it_is(form: str) -> None:
    inputs = draw(OP, "causal", 2, 70)
    inputs["k"] = torch.full_like(inputs["k"], -INF)
    y, state = run(OP, form, inputs)
    assert error(state[0], inputs["initial_state"][0]) <= 1e-14
    assert torch.equal(state[1], inputs["initial_state"][1])
    expected = torch.einsum("bthk,bhkv->bthv", inputs["q"], state[0]) * 5**-0.5
    assert error(y, expected) <= 1e-13


@every_form
def test_the_first_step_reads_its_own_value(form: str) -> None:
    inputs = draw(OP, "plain", 2, 40)
    y = additive_decay(**inputs, backend=form)
    assert error(y[:, 0], inputs["q"][:, 0].sum(-1, keepdim=True) * inputs["v"][:, 0] / 2) <= 1e-14


@every_form
def test_it_is_gla_with_the_decay_that_new_keys_leave(form: str) -> None:
    inputs = draw(OP, "plain", 2, 100)
    z = torch.logcumsumexp(inputs["k"], 1)
    before = torch.cat([z[:, :1], z[:, :-1]], 1)
    expected = gla(inputs["q"], (inputs["k"] - z).exp(), inputs["v"], before - z, backend="recurrent")
    assert error(additive_decay(**inputs, backend=form), expected) <= 1e-13


@given(cuts=st.lists(st.integers(0, 60), max_size=4), order=st.randoms(use_true_random=False), causal=st.booleans())
def test_states_of_parts_merge_to_that_of_the_whole(cuts: list[int], order: Any, causal: bool) -> None:
    inputs = {**draw(OP, "full", 2, 60), "causal": causal}
    inputs.pop("initial_state")
    whole = run(OP, "torch", inputs)[1]
    edges = sorted({0, 60, *cuts})
    parts = []
    for a, b in [*itertools.pairwise(edges), (7, 7)]:
        piece = {n: t[:, a:b] if n in OP.time else t for n, t in inputs.items()}
        parts.append(run(OP, "torch", piece)[1])
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    assert_close(named(merged), named(whole), 1e-12)


def test_merging_is_associative_and_has_a_neutral_element() -> None:
    torch.manual_seed(0)
    a, b, c = (
        (torch.randn(2, 3, 5, 4, dtype=torch.float64), 300 * torch.randn(2, 3, 5, dtype=torch.float64))
        for _ in range(3)
    )
    assert_close(named(merge(merge(a, b), c)), named(merge(a, merge(b, c))), 1e-13)
    assert_close(named(merge(a, b)), named(merge(b, a)), 1e-14)
    nothing = (torch.zeros_like(a[0]), torch.full_like(a[1], -INF))
    for actual in (merge(a, nothing), merge(nothing, a)):
        assert_close(named(actual), named(a), 0.0)
    assert torch.equal(merge(nothing, nothing)[1], nothing[1])


def test_gradients_pass_through_a_merge() -> None:
    drawn = draw(OP, "full", 2, 50)
    drawn.pop("initial_state")
    inputs, leaves = with_leaves(drawn)

    def state(piece: slice) -> Any:
        return run(OP, "torch", {n: t[:, piece] if n in OP.time else t for n, t in inputs.items()})[1]

    whole, merged = named(state(slice(None))), named(merge(state(slice(30)), state(slice(30, None))))
    leaves.pop("q")
    given_ = cotangents(whole, seed=3)
    assert_close(gradients(merged, leaves, given_), gradients(whole, leaves, given_), 1e-11)


@pytest.mark.parametrize("length", [0, 1, 7, 64, 131])
def test_all_to_all_at_every_size(length: int) -> None:
    inputs = draw(OP, "not_causal", 2, length)
    expected = run_with_gradients(OP, "recurrent", inputs)
    assert_close(run_with_gradients(OP, "torch", inputs), expected, 1e-12)
    assert_close(run_with_gradients(OP, "torch", cast(inputs, torch.float32)), expected, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@every_form
def test_packed_all_to_all(form: str, reverse: bool) -> None:
    bounds = [0, 15, 15, 79, 80]
    drawn = {**draw(OP, "not_causal", 1, 80, sequences=4), "reverse": reverse}
    inputs, leaves = with_leaves(drawn)
    packed = named(run(OP, form, {**inputs, "cu_seqlens": torch.tensor(bounds)}))
    parts = []
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        piece = {name: t[:, a:b] if name in OP.time else t for name, t in inputs.items()}
        piece["initial_state"] = tuple(t[n : n + 1] for t in inputs["initial_state"])
        parts.append(named(run(OP, "recurrent", piece)))
    separate = {name: torch.cat([part[name] for part in parts], 1 if name == "y" else 0) for name in packed}
    cotangent = cotangents(packed, seed=1)
    assert_close(packed, separate, 1e-12)
    assert_close(gradients(packed, leaves, cotangent), gradients(separate, leaves, cotangent), 1e-12)


@every_form
def test_all_to_all_does_not_know_the_order_of_the_keys(form: str) -> None:
    inputs = draw(OP, "fresh_not_causal", 2, 70)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    shuffled = {**inputs, "k": inputs["k"][:, order], "v": inputs["v"][:, order]}
    assert_close(named(run(OP, form, shuffled)), named(run(OP, form, inputs)), 1e-13)


def test_the_last_causal_step_reads_what_all_to_all_does() -> None:
    inputs = draw(OP, "full", 2, 90)
    y, state = run(OP, "torch", inputs)
    y_all, state_all = run(OP, "torch", {**inputs, "causal": False})
    assert error(y_all[:, -1], y[:, -1]) <= 1e-13
    assert_close(named(state_all), named(state), 1e-13)
