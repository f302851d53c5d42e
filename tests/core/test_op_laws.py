"""Every op under the laws it declares in core/ops/laws.py, on every backend that can run here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close, cast, draw, error, run, run_with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sinuous.core.ops import dispatch
from sinuous.core.ops.checks import check_device
from sinuous.core.ops.family import FAMILIES
from sinuous.core.ops.laws import LAWS, Laws

CPU = torch.device("cpu")
FORMS = [(name, form) for name, laws in LAWS.items() for form in laws.family.forms if form != "triton"]
VARIANTS = [(name, form, variant) for name, form in FORMS for variant in LAWS[name].variants]
SIZES = (0, 1, 7, 63, 64, 65, 131)

every_form = pytest.mark.parametrize(("name", "form"), FORMS)
every_variant = pytest.mark.parametrize(("name", "form", "variant"), VARIANTS)


def law(name: str, form: str, wanted: str | None = None) -> Laws:
    laws = LAWS[name]
    if wanted is not None and wanted not in laws.holds:
        pytest.skip(f"{name} declares no {wanted} law")
    reason = dispatch.unavailable(name, laws.family.forms, form, CPU, torch.float32)
    if reason is not None:
        pytest.skip(f"{form}: {reason}")
    return laws


def named(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"y": outputs[0], "state": outputs[1]}


def slice_time(laws: Laws, arguments: dict[str, Any], piece: slice) -> dict[str, Any]:
    return {k: v[:, piece] if k in laws.time else v for k, v in arguments.items()}


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
    wanted = run_with_gradients(laws, "recurrent", arguments)
    assert_close(run_with_gradients(laws, form, arguments), wanted, 1e-10)
    assert_close(run_with_gradients(laws, form, cast(arguments, torch.float32)), wanted, 1e-4)


@every_form
def test_bf16_stays_within_its_measured_bounds(name: str, form: str) -> None:
    laws = law(name, form)
    arguments = cast(draw(laws, "full", 2, 131), torch.float32)
    half = arguments | cast({k: v for k, v in arguments.items() if k in laws.time}, torch.bfloat16)
    wanted = run_with_gradients(laws, "recurrent", cast(half, torch.float64))
    found = run_with_gradients(laws, form, half)
    assert found["y"].dtype == torch.bfloat16
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, laws.bf16[0])
    assert_close(found, wanted, laws.bf16[1])


@every_variant
def test_split_equals_whole(name: str, form: str, variant: str) -> None:
    laws = law(name, form, "split")
    arguments = draw(laws, variant, 2, 131)
    whole = named(run(laws, form, arguments))
    for k in (0, 1, 64, 100, 131):
        first, state = run(laws, form, slice_time(laws, arguments, slice(0, k)))
        second, state = run(laws, form, {**slice_time(laws, arguments, slice(k, None)), "initial_state": state})
        assert_close({"y": torch.cat([first, second], 1), "state": state}, whole, 1e-12)


@every_variant
def test_steps_equal_whole(name: str, form: str, variant: str) -> None:
    laws = law(name, form, "step")
    arguments = draw(laws, variant, 2, 19)
    carried, ys = {}, []
    for t in range(19):
        y, state = run(laws, form, slice_time(laws, arguments, slice(t, t + 1)) | carried)
        carried = {"initial_state": state}
        ys.append(y)
    found = {"y": torch.cat(ys, 1), "state": state}
    assert_close(found, named(run(laws, form, arguments)), 1e-12)


@every_variant
def test_reverse_equals_flip_call_flip(name: str, form: str, variant: str) -> None:
    laws = law(name, form, "reverse")
    arguments = draw(laws, variant, 2, 131)
    flipped = {k: v.flip(1) if k in laws.time else v for k, v in arguments.items()}
    wanted = run_with_gradients(laws, form, flipped, seed=2)
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}
    y, state = run(laws, form, {**arguments, **leaves, "reverse": True})
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in (y, state)]
    gradients = torch.autograd.grad((y, state), list(leaves.values()), [cotangents[0].flip(1), cotangents[1]])
    found = {"y": y, "state": state, **dict(zip(leaves, gradients, strict=True))}
    assert_close({k: v.flip(1) if k in (*laws.time, "y") else v for k, v in found.items()}, wanted, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@every_form
def test_packed_equals_separate(name: str, form: str, reverse: bool) -> None:
    laws = law(name, form, "packed")
    lengths = [15, 0, 64, 1, 50, 1]
    bounds = list(itertools.accumulate(lengths, initial=0))
    arguments = draw(laws, "full", 1, bounds[-1], sequences=len(lengths))
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}
    inputs = {**arguments, **leaves, "reverse": reverse}
    packed = run(laws, form, {**inputs, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    parts = [
        run(
            laws,
            "recurrent",
            {**slice_time(laws, inputs, slice(a, b)), "initial_state": leaves["initial_state"][n : n + 1]},
        )
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    separate = (torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts]))
    cotangents = [torch.randn_like(o) for o in packed]
    for found, wanted in [
        (packed, separate),
        (
            torch.autograd.grad(packed, list(leaves.values()), cotangents),
            torch.autograd.grad(separate, list(leaves.values()), cotangents),
        ),
    ]:
        for f, w in zip(found, wanted, strict=True):
            assert error(f, w) <= 1e-10


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99), reverse=st.booleans())
@every_form
def test_packing_of_any_lengths(name: str, form: str, lengths: list[int], seed: int, reverse: bool) -> None:
    laws = law(name, form, "packed")
    bounds = list(itertools.accumulate(lengths, initial=0))
    arguments = draw(laws, "full", 1, bounds[-1], sequences=len(lengths), seed=seed)
    arguments["reverse"] = reverse
    y, state = run(laws, form, {**arguments, "cu_seqlens": torch.tensor(bounds)})
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        initial = arguments["initial_state"][n : n + 1]
        wanted = run(laws, form, {**slice_time(laws, arguments, slice(a, b)), "initial_state": initial})
        assert error(y[:, a:b], wanted[0]) <= 1e-12
        assert error(state[n : n + 1], wanted[1]) <= 1e-12


@every_form
def test_non_contiguous_inputs(name: str, form: str) -> None:
    laws = law(name, form)
    arguments = draw(laws, "full", 2, 21)
    strided = {
        k: v.repeat_interleave(2, -1)[..., ::2] if isinstance(v, Tensor) and v.ndim > 1 else v
        for k, v in arguments.items()
    }
    assert_close(run_with_gradients(laws, form, strided), run_with_gradients(laws, form, arguments), 1e-12)


@every_form
def test_isolation_of_rows(name: str, form: str) -> None:
    laws = law(name, form, "isolation")
    arguments = draw(laws, "full", 3, 70)
    clean = run(laws, form, arguments)
    for k in laws.time:
        poisoned = arguments[k].clone()
        poisoned[1, 3] = float("nan")
        found = run(laws, form, {**arguments, k: poisoned})
        for f, c in zip(found, clean, strict=True):
            assert torch.equal(f[[0, 2]], c[[0, 2]])
        assert found[0][1].isnan().any()


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

    def allocations(length: int) -> _Allocations:
        arguments = cast(draw(laws, "full", 1, length), torch.float32)
        full = dict.fromkeys((n for _, n in family.arguments), None) | {"reverse": False}
        full |= {k: v for k, v in arguments.items() if k in full}
        full |= {"dt_softplus": True} if "dt_softplus" in full else {}
        full |= {"silu": True} if "silu" in full else {}
        mode = _Allocations()
        with mode:
            outputs = module.forward(**full, **family.options)
            count = len(family.outputs)
            saved = dict(zip(family.saved, outputs[count:], strict=True))
            module.backward([torch.ones_like(o) for o in outputs[:count]], **full, **saved, **family.options)
        return mode

    short, long = allocations(512), allocations(2048)
    assert long.total <= 4.2 * short.total
    state_size = 16 if name == "selective_scan" else 8
    assert long.largest < 2048 * 19 * state_size


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, laws in LAWS.items() for v in laws.variants])
@pytest.mark.parametrize("form", ["recurrent", "torch"])
def test_gradcheck(name: str, variant: str, form: str) -> None:
    laws = law(name, form)
    arguments = draw(laws, variant, 2, 4)
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}
    fixed = {k: v for k, v in arguments.items() if k not in leaves}

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return run(laws, form, {**dict(zip(leaves, values, strict=True)), **fixed})

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


def _positional(laws: Laws, arguments: dict[str, Any], form: str) -> tuple[Any, ...]:
    given = {"dt_softplus": True, "reverse": False, "silu": arguments.get("activation") == "silu"} | arguments
    return (*(given.get(n) for _, n in laws.family.arguments), form)


@pytest.mark.parametrize("packed", [False, True])
@every_form
def test_opcheck(name: str, form: str, packed: bool) -> None:
    laws = law(name, form)
    arguments = draw(laws, "full", 1 if packed else 2, 9, sequences=2)
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 4, 9])
    for v in arguments.values():
        if isinstance(v, Tensor) and v.is_floating_point():
            v.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.sinuous, name).default, _positional(laws, arguments, form))


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
    compiled = torch.compile(_Module(laws.call), fullgraph=True, backend="aot_eager")
    for form in ("recurrent", "torch"):
        with dispatch.backend(form):
            found, wanted = compiled(arguments), run(laws, form, arguments)
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", LAWS)
def test_export_with_dynamic_time(name: str) -> None:
    laws = law(name, "torch")
    time = torch.export.Dim("time", min=2)
    arguments = draw(laws, "full", 2, 9)
    shapes = {"arguments": {k: {1: time} if k in laws.time else None for k in arguments}}
    program = torch.export.export(_Module(laws.call), (arguments,), dynamic_shapes=shapes)
    longer = draw(laws, "full", 2, 23)
    for found, wanted in zip(program.module()(longer), _Module(laws.call)(longer), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", LAWS)
def test_autocast_keeps_states_in_full_precision(name: str) -> None:
    laws = law(name, "torch")
    arguments = cast(draw(laws, "full", 2, 9), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = named(run(laws, "torch", arguments))
    assert_close(found, named(run(laws, "torch", arguments)), 1e-6)


@pytest.mark.parametrize(("name", "message"), [(n, m) for n, laws in LAWS.items() for m in laws.refusals])
def test_refusal(name: str, message: str) -> None:
    laws = law(name, "recurrent")
    with pytest.raises(ValueError, match=message):
        laws.call(**laws.refusals[message](draw(laws, "full", 2, 5)))


def test_refusal_of_mixed_devices() -> None:
    with pytest.raises(ValueError, match=r"D is on meta and u on cpu; move it with \.to\('cpu'\)"):
        check_device(u=torch.zeros(1), D=torch.zeros(1, device="meta"))
