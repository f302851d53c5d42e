"""Every op under the laws it declares in core/ops/laws, on every backend that can run here."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import (
    assert_close,
    cast,
    cotangents,
    draw,
    error,
    gradients,
    inexact,
    named,
    path_name,
    run,
    run_with_gradients,
    with_leaves,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_with_path

from sinuous.core.ops import dispatch
from sinuous.core.ops.checks import check_device
from sinuous.core.ops.family import FAMILIES
from sinuous.core.ops.laws import LAWS, Laws
from sinuous.core.ops.operators import Operators, operators

CPU = torch.device("cpu")
FORMS = [(name, form) for name, laws in LAWS.items() for form in laws.family.forms if form != "triton"]
VARIANTS = [(name, form, variant) for name, form in FORMS for variant in LAWS[name].variants]
SIZES = (0, 1, 7, 63, 64, 65, 131)

every_form = pytest.mark.parametrize(("name", "form"), FORMS)
every_variant = pytest.mark.parametrize(("name", "form", "variant"), VARIANTS)


def law(name: str, form: str, law_name: str | None = None, variant: str = "full") -> Laws:
    laws = LAWS[name]
    if law_name is not None and law_name not in laws.holds - laws.fails.get(variant, frozenset()):
        pytest.skip(f"{name} declares no {law_name} law for {variant}")
    reason = dispatch.unavailable(name, laws.family.forms, form, CPU, torch.float32)
    if reason is not None:
        pytest.skip(f"{form}: {reason}")
    return laws


def has_time(laws: Laws, name: str, v: Any) -> bool:
    """Whether axis 1 of an argument is time; a constant of the same name has one axis."""
    return name in laws.time and isinstance(v, Tensor) and v.ndim > 1


def slice_time(laws: Laws, arguments: dict[str, Any], piece: slice) -> dict[str, Any]:
    return {k: v[:, piece] if has_time(laws, k, v) else v for k, v in arguments.items()}


def slice_sequences(state: Any, piece: slice) -> Any:
    return tree_map(lambda t: t[piece], state)


def test_every_family_declares_its_laws() -> None:
    assert set(LAWS) == set(FAMILIES)


@pytest.mark.parametrize("name", LAWS)
def test_every_declared_form_exists(name: str) -> None:
    for form in set(LAWS[name].family.forms) - {"recurrent", "triton"}:
        module = dispatch.kernel(name, form)
        assert callable(module.forward)
        assert callable(module.backward)


@pytest.mark.parametrize(("length", "batch"), [(5, 2), (0, 2), (3, 0)])
@every_variant
def test_forms_agree_in_float64(name: str, form: str, variant: str, length: int, batch: int) -> None:
    laws = law(name, form)
    arguments = draw(laws, variant, batch, length)
    assert_close(run_with_gradients(laws, form, arguments), run_with_gradients(laws, "recurrent", arguments), 1e-10)


@pytest.mark.parametrize("length", SIZES)
@every_form
def test_forms_agree_at_every_size(name: str, form: str, length: int) -> None:
    laws = law(name, form)
    arguments = draw(laws, "full", 2, length)
    expected = run_with_gradients(laws, "recurrent", arguments)
    assert_close(run_with_gradients(laws, form, arguments), expected, 1e-10)
    assert_close(run_with_gradients(laws, form, cast(arguments, torch.float32)), expected, 1e-4)


@every_form
def test_bf16_stays_within_its_measured_bounds(name: str, form: str) -> None:
    laws = law(name, form)
    arguments = cast(draw(laws, "full", 2, 131), torch.float32)
    half = arguments | cast({k: v for k, v in arguments.items() if k in laws.time}, torch.bfloat16)
    expected = run_with_gradients(laws, "recurrent", cast(half, torch.float64))
    actual = run_with_gradients(laws, form, half)
    assert actual["y"].dtype == torch.bfloat16
    assert_close(actual, {k: v for k, v in expected.items() if k.startswith(("y", "state"))}, laws.bf16[0])
    assert_close(actual, expected, laws.bf16[1])


@every_variant
def test_split_equals_whole(name: str, form: str, variant: str) -> None:
    laws = law(name, form, "split", variant)
    arguments = draw(laws, variant, 2, 131)
    whole = named(run(laws, form, arguments))
    for k in (0, 1, 64, 100, 131):
        first, state = run(laws, form, slice_time(laws, arguments, slice(0, k)))
        second, state = run(laws, form, {**slice_time(laws, arguments, slice(k, None)), "initial_state": state})
        assert_close(named((torch.cat([first, second], 1), state)), whole, 1e-12)


@every_variant
def test_steps_equal_whole(name: str, form: str, variant: str) -> None:
    laws = law(name, form, "step", variant)
    arguments = draw(laws, variant, 2, 19)
    carried, ys = {}, []
    for t in range(19):
        y, state = run(laws, form, slice_time(laws, arguments, slice(t, t + 1)) | carried)
        carried = {"initial_state": state}
        ys.append(y)
    assert_close(named((torch.cat(ys, 1), state)), named(run(laws, form, arguments)), 1e-12)


@every_variant
def test_reverse_equals_flip_call_flip(name: str, form: str, variant: str) -> None:
    laws = law(name, form, "reverse", variant)
    arguments = draw(laws, variant, 2, 131)
    flipped = {k: v.flip(1) if has_time(laws, k, v) else v for k, v in arguments.items()}
    expected = run_with_gradients(laws, form, flipped, seed=2)
    inputs, leaves = with_leaves(arguments)
    outputs = named(run(laws, form, {**inputs, "reverse": True}))
    grads = cotangents(outputs, seed=2)
    actual = {**outputs, **gradients(outputs, leaves, grads | {"y": grads["y"].flip(1)})}
    assert_close({k: v.flip(1) if k == "y" or has_time(laws, k, v) else v for k, v in actual.items()}, expected, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@every_form
def test_packed_equals_separate(name: str, form: str, reverse: bool) -> None:
    laws = law(name, form, "packed")
    lengths = [15, 0, 64, 1, 50, 1]
    bounds = list(itertools.accumulate(lengths, initial=0))
    arguments = draw(laws, "full", 1, bounds[-1], sequences=len(lengths))
    inputs, leaves = with_leaves(arguments)
    inputs["reverse"] = reverse
    packed = named(run(laws, form, {**inputs, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}))
    parts = []
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        initial = slice_sequences(inputs["initial_state"], slice(n, n + 1))
        piece = {**slice_time(laws, inputs, slice(a, b)), "initial_state": initial}
        parts.append(named(run(laws, "recurrent", piece)))
    separate = {k: torch.cat([part[k] for part in parts], 1 if k == "y" else 0) for k in packed}
    grads = cotangents(packed, seed=1)
    assert_close(packed, separate, 1e-10)
    assert_close(gradients(packed, leaves, grads), gradients(separate, leaves, grads), 1e-10)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99), reverse=st.booleans())
@every_form
def test_packing_of_any_lengths(name: str, form: str, lengths: list[int], seed: int, reverse: bool) -> None:
    laws = law(name, form, "packed")
    bounds = list(itertools.accumulate(lengths, initial=0))
    arguments = draw(laws, "full", 1, bounds[-1], sequences=len(lengths), seed=seed)
    arguments["reverse"] = reverse
    actual = named(run(laws, form, {**arguments, "cu_seqlens": torch.tensor(bounds)}))
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        initial = slice_sequences(arguments["initial_state"], slice(n, n + 1))
        expected = named(run(laws, form, {**slice_time(laws, arguments, slice(a, b)), "initial_state": initial}))
        for k, v in actual.items():
            assert error(v[:, a:b] if k == "y" else v[n : n + 1], expected[k]) <= 1e-12, k


@every_form
def test_non_contiguous_inputs(name: str, form: str) -> None:
    laws = law(name, form)
    arguments = draw(laws, "full", 2, 21)
    strided = tree_map(
        lambda v: v.repeat_interleave(2, -1)[..., ::2] if isinstance(v, Tensor) and v.ndim > 1 else v, arguments
    )
    assert_close(run_with_gradients(laws, form, strided), run_with_gradients(laws, form, arguments), 1e-12)


@every_form
def test_isolation_of_rows(name: str, form: str) -> None:
    laws = law(name, form, "isolation")
    arguments = draw(laws, "full", 3, 70)
    clean = named(run(laws, form, arguments))
    for k in laws.time:
        if not inexact(arguments[k]):
            continue
        poisoned = arguments[k].clone()
        poisoned[1, 3] = float("nan")
        actual = named(run(laws, form, {**arguments, k: poisoned}))
        for name, f in actual.items():
            assert torch.equal(f[[0, 2]], clean[name][[0, 2]]), name
        assert actual["y"][1].isnan().any()


@every_form
def test_same_bits_twice(name: str, form: str) -> None:
    laws = law(name, form)
    arguments = cast(draw(laws, "full", 2, 131), torch.float32)
    first, second = (run_with_gradients(laws, form, arguments) for _ in range(2))
    for k in first:
        assert torch.equal(first[k], second[k]), k


class _Allocations(TorchDispatchMode):
    """Adds up the sizes of all results of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t._base is None:
                self.total += t.numel()
                self.largest = max(self.largest, t.numel())
        return result


@pytest.mark.parametrize("name", LAWS)
def test_torch_form_allocates_linearly(name: str) -> None:
    laws = law(name, "torch", "linear")
    family, module = laws.family, dispatch.kernel(name, "torch")

    def allocations(length: int) -> tuple[_Allocations, int]:
        args = laws.record(cast(draw(laws, "full", 1, length), torch.float32))
        largest = max(v.numel() for v in args if isinstance(v, Tensor))
        with _Allocations() as mode:
            outputs = module.forward(args, **family.options)
            count = len(family.outputs)
            saved = dict(zip(family.saved, outputs[count:], strict=True))
            module.backward(args, [torch.ones_like(o) for o in outputs[:count]], **saved, **family.options)
        return mode, max(2 * largest, length * sum(o.numel() for o in outputs[1:count]))

    (short, _), (long, limit) = allocations(512), allocations(2048)
    assert long.total <= 4.2 * short.total
    assert long.largest < limit


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, laws in LAWS.items() for v in laws.variants])
@pytest.mark.parametrize("form", ["recurrent", "torch"])
def test_gradcheck(name: str, variant: str, form: str) -> None:
    laws = law(name, form)
    arguments = draw(laws, variant, 2, 4)
    _, leaves = with_leaves(arguments)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        by_name = dict(zip(leaves, values, strict=True))
        inputs = tree_map_with_path(lambda path, v: by_name.get(path_name(path), v), arguments)
        return tuple(named(run(laws, form, inputs)).values())

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", LAWS)
def test_a_second_derivative_is_refused_and_not_wrong(name: str) -> None:
    laws = law(name, "recurrent")
    arguments = draw(laws, "plain", 1, 3)
    first = laws.time[0]
    arguments[first].requires_grad_()
    gradient = torch.autograd.grad(laws.call(**arguments).square().sum(), arguments[first], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@every_form
def test_opcheck(name: str, form: str, packed: bool) -> None:
    laws = law(name, form, "packed" if packed else None)
    arguments = draw(laws, "full", 1 if packed else 2, 9, sequences=2)
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 4, 9])
    values = [v.requires_grad_() if inexact(v) else v for v in laws.record(arguments)]
    torch.library.opcheck(getattr(torch.ops.sinuous, name).default, (*values, form))


class _Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, arguments: dict[str, Any]) -> Any:
        return self.call(**arguments, return_state=True)


@pytest.mark.parametrize("name", LAWS)
def test_compile_fullgraph_follows_the_chosen_backend(name: str) -> None:
    laws = law(name, "torch")
    arguments = draw(laws, "full", 2, 9)
    torch.compiler.reset()  # the families share one module's code, which is compiled a few times only
    compiled = torch.compile(_Module(laws.call), fullgraph=True, backend="aot_eager")
    for form in ("recurrent", "torch"):
        with dispatch.backend(form):
            actual, expected = named(compiled(arguments)), named(run(laws, form, arguments))
        assert all(torch.equal(actual[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", LAWS)
def test_export_with_dynamic_time(name: str) -> None:
    laws = law(name, "torch")
    time = torch.export.Dim("time", min=2)
    arguments = draw(laws, "full", 2, 9)
    shapes = {k: {1: time} if has_time(laws, k, v) else tree_map(lambda _: None, v) for k, v in arguments.items()}
    program = torch.export.export(_Module(laws.call), (arguments,), dynamic_shapes={"arguments": shapes})
    longer = draw(laws, "full", 2, 23)
    actual, expected = named(program.module()(longer)), named(_Module(laws.call)(longer))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", LAWS)
def test_autocast_keeps_states_in_full_precision(name: str) -> None:
    laws = law(name, "torch")
    arguments = cast(draw(laws, "full", 2, 9), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = named(run(laws, "torch", arguments))
    assert_close(actual, named(run(laws, "torch", arguments)), 1e-6)


@pytest.mark.parametrize(("name", "message"), [(n, m) for n, laws in LAWS.items() for m in laws.refusals])
def test_refusal(name: str, message: str) -> None:
    laws = law(name, "recurrent")
    with pytest.raises(ValueError, match=message):
        laws.call(**laws.refusals[message](draw(laws, "full", 2, 5)))


def test_refusal_of_mixed_devices() -> None:
    with pytest.raises(ValueError, match=r"D is on meta and u on cpu; move it with \.to\('cpu'\)"):
        check_device("D", torch.zeros(1, device="meta"), "u", torch.zeros(1))


@pytest.mark.parametrize("name", LAWS)
def test_an_operator_takes_keywords_and_lets_defaults_be_left_out(name: str) -> None:
    args = LAWS[name].record(draw(LAWS[name], "plain", 2, 3))
    args[0].requires_grad_()
    operator, defaults = getattr(operators, name), args._field_defaults
    required = [getattr(args, field) for field in args._fields if field not in defaults]
    named = {field: getattr(args, field) for field, default in defaults.items() if getattr(args, field) is not default}
    family = LAWS[name].family
    # Not the operator with all its arguments, of which the dispatcher drops those that equal their defaults.
    ys = [operator(*required, **named)[0], family.recurrent(args, **family.options)[0]]
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(*(torch.autograd.grad(y.real.sum(), args[0])[0] for y in ys))


def test_operators_are_typed_with_their_numbers_of_outputs() -> None:
    hints = {name: typing.get_args(hint)[1] for name, hint in typing.get_type_hints(Operators).items()}
    assert set(hints) == {*LAWS, "take_orders", "sum_orders"}
    for name, outputs in hints.items():
        returns = getattr(torch.ops.sinuous, name).default._schema.returns
        assert len(typing.get_args(outputs) or (outputs,)) == len(returns), name
