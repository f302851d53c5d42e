"""Equations of the mixers over `linear_scan`, as the papers have them, with all options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core import mixers
from sinuous.core.mixers.rg_lru import bounded_sqrt

DIM = 24
EDGES = [0, 5, 5, 12, 13]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, **options: Any) -> Any:
    """Build in float64, with no two parameters alike, so that a swapped or unused one shows."""
    mixer = mixers.build_mixer(name, DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if getattr(mixer, "bounds", None) is not None:
            mixer.bounds.uniform_()
    return mixer


def sequence(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight `[D, W]`, the newest step last."""
    taps = weight.shape[1]
    y = sum(F.pad(x, (0, 0, taps - 1 - j, 0))[:, : x.shape[1]] * weight[:, j] for j in range(taps))
    return y if bias is None else y + bias


def steps(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t"""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1)


def hgrn(m: Any, x: Tensor) -> Tensor:
    i, f = x @ m.i_proj.weight.T, x @ m.f_proj.weight.T
    if m.i_conv1d is not None:
        i = convolved(i, m.i_conv1d.weight[:, 0], m.i_conv1d.bias)
        f = convolved(f, m.f_conv1d.weight[:, 0], m.f_conv1d.bias)
    bound = m.lower_bound if m.bounds is None else m.bounds
    gate = bound + (1 - bound) / (1 + torch.exp(-f))
    decay = 2 * gate - 1 if m.allow_neg_eigval else gate
    h = steps(decay, (1 - gate) * i / (1 + torch.exp(-i)))
    normed = h / (h.square().mean(-1, keepdim=True) + m.g_norm.eps).sqrt() * m.g_norm.weight
    g = x @ m.g_proj.weight.T
    return (normed * g / (1 + torch.exp(-g))) @ m.o_proj.weight.T


def min_gru(m: Any, x: Tensor) -> Tensor:
    x = x if m.conv1d is None else convolved(x, m.conv1d.weight[:, 0], m.conv1d.bias)
    candidate, k = (x @ m.to_hidden_and_gate.weight.T).chunk(2, -1)
    z = 1 / (1 + torch.exp(-k))
    h = steps(1 - 2 * z if m.allow_neg_eigval else 1 - z, z * g_of(m, candidate))
    return h @ m.to_out.weight.T if hasattr(m.to_out, "weight") else h


def min_lstm(m: Any, x: Tensor) -> Tensor:
    x = x if m.conv1d is None else convolved(x, m.conv1d.weight[:, 0], m.conv1d.bias)
    candidate, f, i = (x @ m.to_hidden_and_f_i_gate.weight.T).chunk(3, -1)
    f, i = 1 / (1 + torch.exp(-f)), 1 / (1 + torch.exp(-i))
    forget = f / (f + i)
    h = steps(2 * forget - 1 if m.allow_neg_eigval else forget, i / (f + i) * g_of(m, candidate))
    return h @ m.to_out.weight.T if hasattr(m.to_out, "weight") else h


def g_of(m: Any, x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x))) if m.positive_hidden else x


def gate_loop(m: Any, x: Tensor) -> Tensor:
    q, k, v = (x @ m.to_qkv.weight.T).chunk(3, -1)
    both = x @ m.to_a[0].weight.T + m.to_a[0].bias
    alpha, beta = both[..., 0::2], both[..., 1::2]
    if m.transition == "cartesian":
        alpha, beta = (alpha**2 + beta**2).sqrt(), torch.atan2(beta, alpha)
    length = 1 / (1 + torch.exp(-alpha))
    a = torch.complex(length * torch.cos(beta), length * torch.sin(beta))
    y = q * steps(a, (k * v).to(a.dtype)).real
    if hasattr(m.maybe_sub_ln, "weight"):
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + m.maybe_sub_ln.eps).sqrt()
        y = y * m.maybe_sub_ln.weight + m.maybe_sub_ln.bias
    if m.to_gates is not None:
        g = x @ m.to_gates[0].weight.T
        y = y * g / (1 + torch.exp(-g))
    return y @ m.to_out.weight.T if hasattr(m.to_out, "weight") else y


def rg_lru(m: Any, x: Tensor) -> Tensor:
    u = convolved(x @ m.linear_x.weight.T + m.linear_x.bias, m.conv_1d.w.T, m.conv_1d.b)

    def gate(layer: Any) -> Tensor:
        size = layer.w.shape[1]
        blocks = [u[..., h * size : (h + 1) * size] @ layer.w[h] + layer.b[h] for h in range(layer.w.shape[0])]
        return 1 / (1 + torch.exp(-torch.cat(blocks, -1)))

    a = (1 / (1 + torch.exp(m.rg_lru.a_param))) ** (8 * gate(m.rg_lru.a_gate))  # σ(-Λ) = exp(-softplus(Λ))
    a = 2 * a - 1 if m.allow_neg_eigval else a
    size = torch.cat([torch.ones_like(a[:, :1]), (1 - a[:, 1:] ** 2).sqrt()], 1)
    h = steps(a, size * gate(m.rg_lru.input_gate) * u)
    return (h * F.gelu(x @ m.linear_y.weight.T + m.linear_y.bias, approximate="tanh")) @ m.linear_out.weight.T + (
        m.linear_out.bias
    )


def lru(m: Any, x: Tensor) -> Tensor:
    nu, theta = torch.exp(m.nu_log), torch.exp(m.theta_log)
    factor = torch.exp(torch.complex(-nu, theta))
    B = torch.complex(m.B_re, m.B_im) * torch.exp(m.gamma_log)[:, None]
    h = steps(factor.expand(*x.shape[:2], -1), x.to(B.dtype) @ B.T)
    return read(m, (h @ torch.complex(m.C_re, m.C_im).T).real + m.D * x)


def s5(m: Any, x: Tensor) -> Tensor:
    real = m.Lambda_re.clamp(max=-1e-4) if m.clip_eigs else m.Lambda_re
    eigenvalue, step = torch.complex(real, m.Lambda_im), m.step_rescale * torch.exp(m.log_step[:, 0])
    if m.discretization == "zoh":
        factor = torch.exp(eigenvalue * step)
        gain = (factor - 1) / eigenvalue
    else:
        gain = 1 / (1 / step - eigenvalue / 2)
        factor = gain * (1 / step + eigenvalue / 2)
    B, C = torch.complex(m.B[..., 0], m.B[..., 1]), torch.complex(m.C[..., 0], m.C[..., 1])
    h = steps(factor.expand(*x.shape[:2], -1), x.to(B.dtype) @ (gain[:, None] * B).T)
    y = (h @ C.T).real
    return read(m, (2 * y if m.conj_sym else y) + m.D * x)


def read(m: Any, y: Tensor) -> Tensor:
    g = F.gelu(y, approximate="tanh")
    if m.activation in ("none", "gelu"):
        return y if m.activation == "none" else g
    gate = 1 / (1 + torch.exp(-(g @ m.out2.weight.T + m.out2.bias)))
    if m.activation == "full_glu":
        return (g @ m.out1.weight.T + m.out1.bias) * gate
    return (y if m.activation == "half_glu2" else g) * gate


PAPERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    f.__name__: f for f in (hgrn, min_gru, min_lstm, gate_loop, rg_lru, lru, s5)
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("hgrn", {}),
    ("hgrn", {"expand": 1.5, "lower_bound": 0.4}),
    ("hgrn", {"expand": 2, "channel_bounds": True}),
    ("hgrn", {"use_short_conv": True, "conv_size": 3, "conv_bias": True, "allow_neg_eigval": True}),
    ("min_gru", {}),
    ("min_gru", {"expand": 1.5, "allow_neg_eigval": True}),
    ("min_gru", {"proj_out": True, "positive_hidden": False, "use_short_conv": True}),
    ("min_lstm", {}),
    ("min_lstm", {"expand": 0.5, "allow_neg_eigval": True}),
    ("min_lstm", {"proj_out": True, "positive_hidden": False, "use_short_conv": True, "conv_size": 2}),
    ("gate_loop", {}),
    ("gate_loop", {"transition": "cartesian", "expand": 2, "sub_ln": True}),
    ("gate_loop", {"swish_gate": False, "sub_ln": True}),
    ("rg_lru", {}),
    ("rg_lru", {"lru_width": 32, "num_heads": 4, "conv1d_temporal_width": 2}),
    ("rg_lru", {"num_heads": 3, "allow_neg_eigval": True}),
    ("lru", {}),
    ("lru", {"d_state": 7, "r_min": 0.9, "r_max": 0.999, "max_phase": math.pi / 10, "activation": "half_glu1"}),
    ("lru", {"activation": "half_glu2"}),
    ("lru", {"d_state": 40, "activation": "none"}),
    ("s5", {}),
    ("s5", {"d_state": 12, "blocks": 3, "discretization": "bilinear", "activation": "full_glu"}),
    ("s5", {"d_state": 5, "conj_sym": False, "C_init": "complex_normal", "activation": "half_glu2"}),
    ("s5", {"d_state": 8, "clip_eigs": False, "step_rescale": 2.0, "C_init": "lecun_normal", "activation": "gelu"}),
]
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)


@each_variant
def test_a_mixer_is_the_equation_of_its_paper(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, **options), sequence()
    actual, expected = mixer(x), PAPERS[name](mixer, x)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    weights, dy = list(mixer.parameters()), torch.randn_like(x)
    grads = [torch.autograd.grad(y, weights, dy) for y in (actual, expected)]
    for (key, _), a, b in zip(mixer.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@each_variant
def test_every_option_keeps_the_laws(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, **options), sequence()
    expected = mixer(x)
    y, state = mixer.prefill(x[:, :2])
    z, state = mixer.prefill(x[:, 2:7], state)
    outputs = [y, z]
    for x_t in x[:, 7:].unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-11, rtol=0)
    assert [t.shape for t in state] == [t.shape for t in mixer.initial_state(3)]
    packed = mixer(x[:1], cu_seqlens=torch.tensor(EDGES))
    separate = torch.cat([mixer(x[:1, a:b]) for a, b in itertools.pairwise(EDGES)], 1)
    torch.testing.assert_close(packed, separate, atol=1e-11, rtol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[1]], ids=str)
def test_every_option_traces_and_scripts(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, **options), sequence(1)
    absent = {"cu_seqlens": None, "grid": None}
    torch.testing.assert_close(torch.fx.symbolic_trace(mixer, concrete_args=absent)(x), mixer(x))
    cu_seqlens = torch.tensor(EDGES)
    torch.testing.assert_close(torch.jit.script(mixer)(x, cu_seqlens), mixer(x, cu_seqlens))


@pytest.mark.parametrize("name", ["hgrn", "min_gru", "min_lstm", "rg_lru"])
def test_negative_eigenvalues_let_a_channel_count_modulo_two(name: str) -> None:
    """Gates that forget everything: what the state had is gone, or with the option is there with the other sign."""
    signs = {}
    for allow in (False, True):
        mixer: Any = mixers.build_mixer(name, DIM, dtype=torch.float64, allow_neg_eigval=allow)
        x, hidden = torch.ones(1, DIM, dtype=torch.float64), "rg_lru" if name == "rg_lru" else "hidden"
        with torch.no_grad():
            if name == "hgrn":
                mixer.f_proj.weight.fill_(-1)
            elif name == "min_gru":
                mixer.to_hidden_and_gate.weight[DIM:].fill_(1)
            elif name == "min_lstm":
                mixer.to_hidden_and_f_i_gate.weight[DIM : 2 * DIM].fill_(-1)
                mixer.to_hidden_and_f_i_gate.weight[2 * DIM :].fill_(1)
            else:
                mixer.rg_lru.a_gate.b.fill_(100)
                mixer.rg_lru.a_param.fill_(10)
            _, state = mixer.step(x, mixer.initial_state(1))
            before = getattr(state, hidden)
            _, after = mixer.step(x, state)
            _, without = mixer.step(x, state._replace(**{hidden: torch.zeros_like(before)}))
        signs[allow] = (getattr(after, hidden) - getattr(without, hidden)) / before
    assert (signs[True] < -0.99).all()
    assert (signs[False] >= 0).all()
    assert (signs[False] < 0.01).all()


@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_minimal_rnns_equal_their_form_in_logarithms(name: str) -> None:
    """Appendix B: log h = A + logcumsumexp(log b - A) with A the sum of the logarithms of the decays."""
    mixer, x = build(name), sequence()
    if name == "min_gru":
        candidate, k = mixer.to_hidden_and_gate(x).chunk(2, -1)
        log_decay, log_input = -F.softplus(k), -F.softplus(-k)
    else:
        candidate, f, i = mixer.to_hidden_and_f_i_gate(x).chunk(3, -1)
        difference = F.softplus(-f) - F.softplus(-i)
        log_decay, log_input = -F.softplus(difference), -F.softplus(-difference)
    log_g = torch.where(candidate >= 0, (F.relu(candidate) + 0.5).log(), -F.softplus(-candidate))
    total = log_decay.cumsum(1)
    expected = torch.exp(total + (log_input + log_g - total).logcumsumexp(1))
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=1e-12)


def test_min_lstm_with_closed_gates_stays_finite() -> None:
    """f / (f + i) of two gates that are 0 in fp32."""
    mixer = mixers.build_mixer("min_lstm", DIM)
    with torch.no_grad():
        mixer.to_hidden_and_f_i_gate.weight[DIM:].fill_(-10)
    x = torch.ones(1, 4, DIM, requires_grad=True)
    y = mixer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_root_of_rg_lru_has_a_bounded_gradient() -> None:
    x = torch.tensor([0.0, 1e-12, 2.4e-7, 2.6e-7, 1e-4, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    y = bounded_sqrt(x)
    torch.testing.assert_close(y, x.detach().sqrt(), atol=1e-15, rtol=1e-15)
    y.sum().backward()
    expected = 1 / torch.maximum(4 * x.detach(), torch.tensor(1e-6, dtype=torch.float64)).sqrt()
    torch.testing.assert_close(x.grad, expected)
    assert expected.max() == 1000


def test_rg_lru_trains_where_nothing_is_forgotten() -> None:
    """a rounds to 1, so that the gradient of √(1 - a²) would be infinite."""
    mixer = mixers.build_mixer("rg_lru", DIM)
    with torch.no_grad():
        mixer.rg_lru.a_gate.b.fill_(-200.0)
    mixer(torch.randn(2, 9, DIM)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_rg_lru_takes_its_first_input_whole_in_every_document() -> None:
    """The first step of each packed sequence, and of a carried one only where it is the first of all."""
    mixer, x = build("rg_lru"), sequence(1)
    whole = mixer(x, cu_seqlens=torch.tensor(EDGES))
    torch.testing.assert_close(whole[:, 5:12], mixer(x[:, 5:12]), atol=1e-12, rtol=0)
    _, state = mixer.prefill(x[:, :5])
    carried, _ = mixer.prefill(x[:, 5:12], state)
    torch.testing.assert_close(carried, mixer(x)[:, 5:12], atol=1e-12, rtol=0)
    assert (carried[:, 0] - whole[:, 5]).abs().max() > 1e-3
    anew, _ = mixer.prefill(x[:, 5:12], mixer.initial_state(1))
    torch.testing.assert_close(anew, whole[:, 5:12], atol=1e-12, rtol=0)


def test_hgrn_never_forgets_below_its_bound() -> None:
    mixer = build("hgrn", lower_bound=0.75)
    with torch.no_grad():
        mixer.f_proj.weight.zero_()
    zero = torch.zeros(1, DIM, dtype=torch.float64)
    past = mixer.initial_state(1)._replace(hidden=torch.ones(1, DIM, dtype=torch.float64))
    _, after = mixer.step(zero, past)
    torch.testing.assert_close(after.hidden, torch.full_like(zero, 0.875))  # f = σ(0) = 1/2 of the way to 1


def test_bounds_of_channels_start_at_the_bound() -> None:
    for name in ("hgrn", "hgrn2"):
        heads = {"num_heads": 2} if name == "hgrn2" else {}
        mixer = mixers.build_mixer(name, DIM, channel_bounds=True, lower_bound=0.75, **heads)
        assert torch.equal(mixer.state_dict()["bounds"], torch.full((DIM,), 0.75))


def test_s5_with_conjugate_pairs_equals_all_modes() -> None:
    half = build("s5", d_state=12, blocks=2, activation="none")
    full = build("s5", d_state=12, blocks=2, conj_sym=False, activation="none")
    pairs = {
        "Lambda_re": torch.cat([half.Lambda_re] * 2),
        "Lambda_im": torch.cat([half.Lambda_im, -half.Lambda_im]),
        "B": torch.cat([half.B, half.B * torch.tensor([1.0, -1.0])]),
        "C": torch.cat([half.C, half.C * torch.tensor([1.0, -1.0])], 1),
        "D": half.D,
        "log_step": torch.cat([half.log_step] * 2),
    }
    full.load_state_dict(pairs)
    x = sequence()
    torch.testing.assert_close(half(x), full(x), atol=1e-12, rtol=0)


def test_gate_loop_is_a_rotation_where_nothing_decays() -> None:
    """α → ∞ leaves exp(iβ): the weight of the input of s steps ago is cos(sβ)."""
    mixer = build("gate_loop", swish_gate=False)
    with torch.no_grad():
        mixer.to_a[0].weight.zero_()
        mixer.to_a[0].bias.copy_(torch.tensor([50.0, 0.7], dtype=torch.float64).repeat(DIM))
        mixer.to_qkv.weight.copy_(torch.eye(DIM).repeat(3, 1))
    x = torch.ones(1, 6, DIM, dtype=torch.float64)
    expected = torch.cos(0.7 * torch.arange(6, dtype=torch.float64)).cumsum(0)
    torch.testing.assert_close(mixer(x)[0, :, 3], expected, atol=1e-12, rtol=0)
