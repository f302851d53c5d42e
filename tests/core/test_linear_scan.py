"""linear_scan beyond its declared laws: resets, complex numbers, factors of every size, closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close, cast, draw, gradients, named, run, run_with_gradients
from torch import Tensor

from sinuous.core.ops import dispatch, linear_scan
from sinuous.core.ops.laws import LAWS

SCAN = LAWS["linear_scan"]


@pytest.fixture(scope="module", params=[form for form in SCAN.family.forms if form != "triton"])
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = dispatch.unavailable("linear_scan", SCAN.family.forms, name, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


def loop(x: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence with nothing of the library in it."""
    ys = []
    for x_t, a_t in zip(x.unbind(1), a.unbind(1), strict=True):
        h = a_t * h + x_t
        ys.append(h)
    return torch.stack(ys, 1), h


def doubles(*shape: int, complex_: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128 if complex_ else torch.float64)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("through", ["y", "state", "both"])
def test_gradients_reach_everything_through_each_output(form: str, through: str, complex_: bool) -> None:
    """Public kernels of this scan have left out the gradient of the final state and of the initial one."""
    leaves = {
        "x": doubles(2, 70, 5, complex_=complex_),
        "a": doubles(2, 70, 5, complex_=complex_).sgn() * torch.rand(2, 70, 5, dtype=torch.float64),
        "initial_state": doubles(2, 5, complex_=complex_),
    }
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    outputs = [
        dict(zip(("y", "state"), pair, strict=True))
        for pair in (loop(*leaves.values()), linear_scan(**leaves, return_state=True, backend=form))
    ]
    grads = {k: torch.randn_like(v) for k, v in outputs[0].items() if through in (k, "both")}
    expected, actual = (gradients({k: o[k] for k in grads}, leaves, grads) for o in outputs)
    assert all(v.any() for v in expected.values())
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("variant", ["complex", "complex_constant"])
def test_single_precision_complex(form: str, variant: str) -> None:
    arguments = draw(SCAN, variant, 2, 131)
    expected = run_with_gradients(SCAN, "recurrent", arguments)
    actual = run_with_gradients(SCAN, form, cast(arguments, torch.float32))
    assert actual["state"].dtype == torch.complex64
    assert_close(actual, expected, 1e-5)


def test_lazily_conjugated_and_negated_inputs(form: str) -> None:
    x, a = doubles(2, 2, 9, 4, complex_=True)
    assert x.conj().is_conj()
    actual = linear_scan(x.conj(), a.conj(), backend=form)
    torch.testing.assert_close(actual, linear_scan(x, a, backend=form).conj().resolve_conj())
    imaginary = x.conj().imag
    assert imaginary.is_neg()
    torch.testing.assert_close(linear_scan(imaginary, a.real, backend=form), -linear_scan(x.imag, a.real, backend=form))


def test_factors_of_exactly_zero_one_and_minus_one(form: str) -> None:
    arguments = draw(SCAN, "plain", 2, 131)
    x = arguments["x"]
    one = torch.ones_like(x)
    torch.testing.assert_close(linear_scan(x, one, backend=form), x.cumsum(1))
    assert torch.equal(linear_scan(x, 0 * one, backend=form), x)
    signs = (-1.0) ** torch.arange(131, dtype=x.dtype)[:, None]
    torch.testing.assert_close(linear_scan(x, -one, backend=form), (x * signs).cumsum(1) * signs)
    half = {"x": x, "a": arguments["a"] * (torch.rand_like(x) > 0.5)}
    actual = run_with_gradients(SCAN, form, half)
    assert all(v.isfinite().all() for v in actual.values())
    assert_close(actual, run_with_gradients(SCAN, "recurrent", half), 1e-12)
    zero = half["a"] == 0
    assert actual["a"][:, 1:][zero[:, 1:]].all(), "a factor of 0 has a gradient as any other"


def test_a_reset_lets_nothing_through(form: str) -> None:
    """Neither NaN and infinity before it, nor the factor at it, nor the gradients after it."""
    x, a, weight = doubles(3, 1, 192, 5)
    reset = torch.zeros(1, 192, dtype=torch.bool)
    reset[0, [20, 100]] = True
    x[0, 5], x[0, 7], a[0, 20], a[0, 100], weight[0, 150] = torch.nan, torch.inf, torch.nan, torch.inf, torch.nan
    x.requires_grad_()
    a.requires_grad_()
    y = linear_scan(x, a, reset=reset, backend=form)
    assert y[0, 5:20].isnan().all()
    assert not y[0, 20:].isnan().any()
    assert torch.equal(y[0, [20, 100]], x[0, [20, 100]])
    dx, da = torch.autograd.grad(y, (x, a), weight)
    assert dx[0, 100:151].isnan().all()
    assert not dx[0, :100].isnan().any()
    assert not da[0, 20:100].isnan().any()
    assert not da[0, [20, 100]].any()
    clean = dict(zip("xa", (t.detach()[:, 21:100] for t in (x, a)), strict=True))
    start = x.detach()[:, 20]
    alone = linear_scan(**clean, initial_state=start, backend=form)
    torch.testing.assert_close(y.detach()[:, 21:100], alone)


@pytest.mark.parametrize("variant", ["full", "constant", "complex"])
@pytest.mark.parametrize("reverse", [False, True])
def test_resets_at_the_starts_of_sequences_equal_packing(form: str, reverse: bool, variant: str) -> None:
    bounds = torch.tensor([0, 15, 79, 80, 131])
    arguments = draw(SCAN, variant, 1, 131, sequences=1) | {"reverse": reverse}
    del arguments["reset"], arguments["initial_state"]
    starts = bounds[1:] - 1 if reverse else bounds[:-1]
    reset = torch.zeros(1, 131, dtype=torch.bool).index_fill_(1, starts, True)
    leaves = {k: arguments[k].clone().requires_grad_() for k in ("x", "a")}
    packed = linear_scan(**{**arguments, **leaves}, cu_seqlens=bounds, backend=form)
    cut = linear_scan(**{**arguments, **leaves}, reset=reset, backend=form)
    torch.testing.assert_close(cut, packed)
    weight = {"y": torch.randn_like(packed)}
    assert_close(gradients({"y": cut}, leaves, weight), gradients({"y": packed}, leaves, weight), 1e-12)


@pytest.mark.parametrize("variant", ["full", "complex_constant"])
def test_reversed_packed_sequences_with_resets(form: str, variant: str) -> None:
    bounds = [0, 0, 15, 79, 80, 131]
    arguments = draw(SCAN, variant, 1, 131, sequences=len(bounds) - 1)
    arguments |= {"cu_seqlens": torch.tensor(bounds), "reverse": True}
    actual = named(run(SCAN, form, arguments))
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        h = arguments["initial_state"][n]
        for t in reversed(range(start, stop)):
            factor = arguments["a"] if arguments["a"].ndim == 1 else arguments["a"][0, t]
            h = arguments["x"][0, t] + (0 if arguments["reset"][0, t] else factor * h)
            torch.testing.assert_close(actual["y"][0, t], h)
        torch.testing.assert_close(actual["state"][n], h)


@pytest.mark.parametrize("complex_", [False, True])
def test_a_constant_equals_the_same_factor_at_each_step(form: str, complex_: bool) -> None:
    arguments = draw(SCAN, "complex_constant" if complex_ else "constant", 2, 131)
    spread = {**arguments, "a": arguments["a"].expand(arguments["x"].shape)}
    actual, expected = (run_with_gradients(SCAN, form, a) for a in (arguments, spread))
    assert_close(actual, {**expected, "a": expected["a"].sum((0, 1))}, 1e-12)


def test_rotation_in_closed_form(form: str) -> None:
    """A constant input to a = r e^{iθ} gives a geometric series, as in LRU and S5."""
    a = torch.polar(torch.tensor([0.5, 0.99, 0.999]), torch.tensor([3.0, 0.1, -1.0])).to(torch.complex128)
    steps = torch.arange(1, 501, dtype=torch.float64)[:, None]
    y = linear_scan(torch.ones(1, 500, 3, dtype=torch.complex128), a, backend=form)
    torch.testing.assert_close(y[0], (1 - a**steps) / (1 - a))


def test_min_gru_equals_its_form_in_logarithms(form: str) -> None:
    """h_t = (1 - z) h_{t-1} + z h̃ is a cumulative logsumexp (arXiv 2410.01201, appendix B.2.1)."""
    k, candidate = doubles(2, 2, 100, 4)
    log_z, log_keep, log_candidate = -F.softplus(-k), -F.softplus(k), F.logsigmoid(candidate)
    sums = log_keep.cumsum(1)
    expected = (sums + (log_z + log_candidate - sums).logcumsumexp(1)).exp()
    z = torch.sigmoid(k)
    torch.testing.assert_close(linear_scan(z * torch.sigmoid(candidate), 1 - z, backend=form), expected)


def test_long_sequences_in_single_precision(form: str) -> None:
    """Factors near 1 remember everything: the error must not grow with the length, forward or backward."""
    length = 2**10 if form == "recurrent" else 2**14
    x, a = torch.rand(1, length, 3), 1 - 1e-4 * torch.rand(1, length, 3)
    arguments = {"x": x, "a": a, "initial_state": torch.rand(1, 3)}
    expected = run_with_gradients(SCAN, "torch", cast(arguments, torch.float64))
    assert_close(run_with_gradients(SCAN, form, arguments), expected, 1e-5)


@pytest.mark.parametrize("variant", ["full", "constant", "complex", "complex_constant"])
@pytest.mark.parametrize("form", ["cpu"], indirect=True)
def test_same_bits_with_any_number_of_threads(form: str, variant: str) -> None:
    arguments = cast(draw(SCAN, variant, 3, 131), torch.float32)
    arguments = {k: v.repeat(*(1,) * (v.ndim - 1), 20) if v.shape[-1] != 131 else v for k, v in arguments.items()}
    threads = torch.get_num_threads()
    results: list[dict[str, Any]] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_with_gradients(SCAN, form, arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("complex_", [False, True])
def test_every_width(form: str, complex_: bool, width: int) -> None:
    """Whole vectors, several at once, and what is left of one, are computed apart."""
    x, a = doubles(2, 2, 5, width, complex_=complex_)
    arguments = {"x": x, "a": a}
    assert_close(run_with_gradients(SCAN, form, arguments), run_with_gradients(SCAN, "recurrent", arguments), 1e-12)
    arguments = cast({"x": x, "a": a[0, 0] / 4}, torch.float32)
    assert_close(run_with_gradients(SCAN, form, arguments), run_with_gradients(SCAN, "recurrent", arguments), 1e-5)


@given(cuts=st.lists(st.integers(0, 150), max_size=4), seed=st.integers(0, 99), reverse=st.booleans())
@pytest.mark.parametrize("variant", ["full", "complex"])
def test_cut_anywhere(form: str, variant: str, cuts: list[int], seed: int, reverse: bool) -> None:
    arguments = draw(SCAN, variant, 2, 150, seed=seed)
    whole, end = linear_scan(**arguments, reverse=reverse, return_state=True, backend=form)
    edges = sorted({0, 150, *cuts})
    pieces = list(itertools.pairwise(edges))
    state, ys = arguments.pop("initial_state"), []
    for start, stop in reversed(pieces) if reverse else pieces:
        part = {k: v[:, start:stop] for k, v in arguments.items()}
        y, state = linear_scan(**part, initial_state=state, reverse=reverse, return_state=True, backend=form)
        ys.append(y)
    assert_close(named((torch.cat(ys[::-1] if reverse else ys, 1), state)), named((whole, end)), 1e-15)


@given(seed=st.integers(0, 99), factor=st.floats(-3, 3))
def test_linear_in_the_input_and_the_initial_state(form: str, seed: int, factor: float) -> None:
    first, second = (draw(SCAN, "full", 2, 20, seed=s) for s in (seed, seed + 1))
    shared = {k: first[k] for k in ("a", "reset")}
    both = {k: first[k] + factor * second[k] for k in ("x", "initial_state")}
    parts = [named(run(SCAN, form, {**a, **shared})) for a in (first, second)]
    actual = named(run(SCAN, form, {**both, **shared}))
    assert_close(actual, {k: parts[0][k] + factor * parts[1][k] for k in actual}, 1e-12)


@given(seed=st.integers(0, 99))
@pytest.mark.parametrize("variant", ["full", "constant"])
def test_real_equals_complex_without_imaginary_parts(form: str, variant: str, seed: int) -> None:
    arguments = draw(SCAN, variant, 2, 20, seed=seed)
    lifted = {k: v + 0j if v.is_floating_point() else v for k, v in arguments.items()}
    leaves = {k: v.requires_grad_() for k, v in lifted.items() if v.is_complex()}
    real = run_with_gradients(SCAN, form, arguments)
    outputs = named(run(SCAN, form, lifted))
    generator = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(o.shape, generator=generator, dtype=torch.float64) + 0j for k, o in outputs.items()}
    actual = {**{k: o.detach() for k, o in outputs.items()}, **gradients(outputs, leaves, weights)}
    assert all(not v.imag.any() for v in actual.values())
    assert_close({k: v.real for k, v in actual.items()}, real, 1e-12)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("a", (2, 5, 3), torch.complex64, r"x is torch.float32 and a is torch.complex64.*x\.to\(torch\.complex64\)"),
        ("initial_state", (2, 3), torch.complex64, r"x is torch.float32 and initial_state is torch.complex64"),
        ("x", (2, 5, 3), torch.complex128, r"both must be real or both complex; pass a\.to\(torch\.complex128\)"),
        ("x", (2, 5, 3), torch.complex32, r"x must not be complex32.*\.to\(torch\.complex64\)"),
        ("a", (2, 5), torch.float32, r"a must have shape \[2, 5, 3\] \(got \[2, 5\]\)"),
        ("reset", (2, 5, 3), torch.bool, r"reset must have shape \[2, 5\] \(got \[2, 5, 3\]\)"),
    ],
)
def test_refusals_say_what_to_do(name: str, shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    arguments = {"x": torch.zeros(2, 5, 3), "a": torch.zeros(2, 5, 3), name: torch.zeros(shape, dtype=dtype)}
    with pytest.raises(ValueError, match=message):
        linear_scan(**arguments)
