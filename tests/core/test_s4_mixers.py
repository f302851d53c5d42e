"""S4 and S4D: the equations with dense matrices, names and starts of the parameters, options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core import hippo, mixers
from sinuous.core.mixers.s4_steps import S4Steps
from sinuous.core.modes import stepping
from sinuous.core.sequence_model import SequenceModel

NAMES = ("s4", "s4d", "s4_bidirectional", "s4d_bidirectional")
H, STATE = 6, 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, dim: int = H, **options: Any) -> mixers.S4:
    mixer = mixers.build_mixer(name, dim, **{"d_state": STATE, "dtype": torch.float64, **options})
    assert isinstance(mixer, mixers.S4)
    return mixer


def sequence(length: int = 40, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, H, dtype=torch.float64)


def dense(mixer: mixers.S4, h: int, rule: str) -> tuple[Tensor, Tensor]:
    """Ā and B̄ of channel h over its state and the conjugate, complex `[N, N]` and `[N]`, from the parameters."""
    k = mixer.layer.kernel
    s = h % k.A_real.shape[0]
    half = -torch.exp(k.A_real[s]) - 1j * k.A_imag[s]
    A = torch.diag(torch.cat([half, half.conj()]))
    B = torch.view_as_complex(k.B[0, s])
    B = torch.cat([B, B.conj()])
    if k.P is not None:
        P = torch.view_as_complex(k.P[:, s].contiguous())
        P = torch.cat([P, P.conj()], 1)
        A = A - P.T @ P.conj()
    raw = k.inv_dt[h, 0]
    dt = mixer.rate * (torch.exp(raw) if k.dt_transform == "exp" else F.softplus(raw))
    eye = torch.eye(len(B), dtype=A.dtype)
    if rule == "zoh":
        step = torch.linalg.matrix_exp(dt * A)
        return step, torch.linalg.solve(A, (step - eye) @ B)
    left = eye - dt / 2 * A
    return torch.linalg.solve(left, eye + dt / 2 * A), torch.linalg.solve(left, dt * B)


def responses(mixer: mixers.S4, length: int, rule: str) -> Tensor:
    """`C Ā^l B̄` of all readouts, `[readouts, H, length]`."""
    C = torch.view_as_complex(mixer.layer.kernel.C)
    actual = torch.zeros(C.shape[0], H, length, dtype=torch.float64)
    for h in range(H):
        step, x = dense(mixer, h, rule)
        for t in range(length):
            for r in range(C.shape[0]):
                actual[r, h, t] = (torch.cat([C[r, h], C[r, h].conj()]) @ x).real
            x = step @ x
    return actual


def by_hand(mixer: mixers.S4, x: Tensor, rule: str) -> Tensor:
    length, channels = x.shape[1], mixer.channels
    K = responses(mixer, length, rule)
    ys = []
    for c in range(channels):
        y = mixer.layer.D[c] * x
        for t in range(length):
            for s in range(length):
                if s <= t:
                    y[:, t] = y[:, t] + K[c, :, t - s] * x[:, s]
                elif not mixer.causal:
                    y[:, t] = y[:, t] + K[channels + c, :, s - t - 1] * x[:, s]
        ys.append(y)
    linear = mixer.output_linear[0]
    a, b = F.linear(F.gelu(torch.cat(ys, -1)), linear.weight, linear.bias).chunk(2, -1)
    return a * torch.sigmoid(b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_ssm": 1},
        {"n_ssm": 2, "init": "legt"},
        {"n_ssm": 2, "init": "hippo", "channels": 2},
        {"rank": 3, "dt_transform": "softplus"},
        {"rate": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_the_equation(name: str, options: dict[str, Any]) -> None:
    diagonal = name.startswith("s4d")
    if diagonal:
        options = {k: v for k, v in options.items() if k != "rank"}
        options = {k: "diag-legs" if v == "legt" else "diag" if v == "hippo" else v for k, v in options.items()}
    mixer, x = build(name, **options), sequence(20)
    with torch.no_grad():
        actual, expected = mixer(x), by_hand(mixer, x, "zoh" if diagonal else "bilinear")
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_a_diagonal_system_by_the_trapezoidal_rule() -> None:
    mixer, x = build("s4d", disc="bilinear"), sequence(20)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), by_hand(mixer, x, "bilinear"), atol=1e-10, rtol=0)


def test_dss_divides_each_mode_by_its_sum() -> None:
    """The response sums over l_max steps to Re Σ C B / Λ, whatever Δ is: K = C Λ^-1 softmax(ΔΛ l), with the softmax
    over the steps (arXiv 2203.14343, proposition 1)."""
    mixer = build("s4d", disc="dss", l_max=50, dt_min=0.05)
    mixer.layer.D.data.zero_()
    dt, A, B, C, _ = mixer.layer.kernel()
    impulse = torch.zeros(1, 50, H, dtype=torch.float64)
    impulse[:, 0] = 1
    C = mixer._normalised(C, dt, A)[0]
    y = torch.ops.sinuous.lti_conv(impulse, dt, A, B, C)[0]
    C_0, B = torch.view_as_complex(mixer.layer.kernel.C[0]), torch.view_as_complex(B)
    expected = (C_0 * B / torch.view_as_complex(A)).real.sum(-1)
    torch.testing.assert_close(y.sum(1)[0], expected, atol=1e-5, rtol=0)


def test_published_names_and_shapes() -> None:
    mixer = mixers.build_mixer("s4_bidirectional", 12, d_state=64, n_ssm=2, channels=3, rank=2)
    assert {n: tuple(t.shape) for n, t in mixer.state_dict().items()} == {
        "layer.D": (3, 12),
        "layer.kernel.C": (6, 12, 32, 2),
        "layer.kernel.inv_dt": (12, 1),
        "layer.kernel.B": (1, 2, 32, 2),
        "layer.kernel.A_real": (2, 32),
        "layer.kernel.A_imag": (2, 32),
        "layer.kernel.P": (2, 2, 32, 2),
        "output_linear.0.weight": (24, 36),
        "output_linear.0.bias": (24,),
    }
    assert "layer.kernel.P" not in mixers.build_mixer("s4d", 12).state_dict()


@pytest.mark.parametrize("options", [{}, {"n_ssm": 2, "init": "legt", "dt_transform": "softplus"}], ids=str)
def test_the_authors_readout_is_taken_back(options: dict[str, Any]) -> None:
    """Once it has been run, the authors' S4 holds `C (1 - Ā^L)` and says L in `l_kernel`; 0 is before that."""
    mixer, x, steps = build("s4", **options), sequence(), 30
    published = {k: v.clone() for k, v in mixer.state_dict().items()}
    C = torch.view_as_complex(mixer.layer.kernel.C.detach())
    with torch.no_grad():
        for h in range(H):
            step, _ = dense(mixer, h, "bilinear")
            cut = torch.eye(STATE, dtype=step.dtype) - torch.linalg.matrix_power(step, steps)
            row = torch.cat([C[0, h], C[0, h].conj()]) @ cut
            published["layer.kernel.C"][0, h] = torch.view_as_real(row[: STATE // 2])
    assert (published["layer.kernel.C"] - mixer.layer.kernel.C).abs().max() > 0.1
    other = build("s4", **options)
    other.load_state_dict({**published, "layer.kernel.l_kernel": torch.tensor(steps)})
    torch.testing.assert_close(other(x), mixer(x), atol=1e-9, rtol=0)
    other.load_state_dict({**mixer.state_dict(), "layer.kernel.l_kernel": torch.tensor(0)})
    torch.testing.assert_close(other(x), mixer(x))


@pytest.mark.parametrize(("name", "init"), [("s4", "legs"), ("s4d", "diag-lin"), ("s4_bidirectional", "legs")])
def test_starts(name: str, init: str) -> None:
    mixer = mixers.build_mixer(name, 2000, d_state=16)
    k, start = mixer.layer.kernel, hippo.start(init, 16)
    torch.testing.assert_close(torch.exp(k.A_real), -start.A.real.expand(2000, 8).float())
    torch.testing.assert_close(k.A_imag, -start.A.imag.expand(2000, 8).float())
    torch.testing.assert_close(torch.view_as_complex(k.B), start.B.expand(1, 2000, 8).to(torch.complex64))
    if k.P is not None:
        torch.testing.assert_close(torch.view_as_complex(k.P), start.P.expand(1, 2000, 8).to(torch.complex64))
    assert math.log(0.001) <= k.inv_dt.min() < math.log(0.0011)
    assert math.log(0.09) < k.inv_dt.max() <= math.log(0.1) + 1e-6
    assert k.inv_dt.mean().item() == pytest.approx(math.log(0.01), abs=0.15)
    assert torch.view_as_complex(k.C).abs().square().mean().item() == pytest.approx(1, rel=0.05)
    assert mixer.layer.D.std().item() == pytest.approx(1, rel=0.1)


def test_both_transforms_start_with_the_same_steps() -> None:
    softplus = build("s4", dim=2000, dt_transform="softplus").layer.kernel()[0]
    assert 0.001 <= softplus.min() < 0.0011
    assert 0.09 < softplus.max() <= 0.1 + 1e-9
    assert softplus.log().mean().item() == pytest.approx(math.log(0.01), abs=0.15)


@pytest.mark.parametrize("init", ["legs", "legt", "fout", "hippo"])
def test_steps_equal_the_convolution(init: str) -> None:
    mixer, x = build("s4", d_state=64, init=init), sequence(256)
    state, ys = mixer.initial_state(2), []
    with torch.no_grad():
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            ys.append(y_t)
        torch.testing.assert_close(torch.stack(ys, 1), mixer(x), atol=1e-9, rtol=0)


def test_a_rate_of_two_reads_every_other_sample_of_a_held_signal() -> None:
    mixer, x = build("s4d"), sequence(30)
    fine = mixer(x.repeat_interleave(2, 1))[:, 1::2]
    mixer.rate = 2.0
    torch.testing.assert_close(mixer(x), fine, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_trainers_are_told_what_the_system_wants(name: str) -> None:
    mixer = build(name)
    expected = {f"layer.kernel.{n}" for n in ("A_real", "A_imag", "B", "inv_dt")}
    expected |= set() if "s4d" in name else {"layer.kernel.P"}
    assert mixer.no_weight_decay() == expected
    assert mixer.learning_rates() == dict.fromkeys(expected, 0.001)
    hints = {n: p._optim for n, p in mixer.named_parameters() if hasattr(p, "_optim")}
    assert hints == {n: {"lr": 0.001, "weight_decay": 0.0} for n in expected}
    assert build(name, lr=None).learning_rates() == {}


def test_dropout_acts_in_training_only() -> None:
    mixer, x = build("s4", dropout=0.5), sequence()
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    torch.testing.assert_close(mixer(x), mixer(x))


def test_an_output_without_a_gate() -> None:
    mixer, x = build("s4d", final_act="id"), sequence()
    inside: list[Tensor] = []
    mixer.output_linear[0].register_forward_hook(lambda module, args, y: inside.append(y))
    assert torch.equal(mixer(x), inside[0])
    assert mixer.output_linear[0].weight.shape == (H, H)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("s4", {"n_ssm": 4}, r"n_ssm must divide dim = 6 \(got 4\)"),
        ("s4", {"d_state": 7}, "size must be even"),
        ("s4", {"disc": "zoh"}, r"disc must be 'bilinear' \(got 'zoh'\)"),
        ("s4d", {"disc": "dss"}, "pass its number of steps as l_max"),
        ("s4d", {"rank": 1}, "a diagonal system has no rank"),
        ("s4", {"init": "diag-lin"}, "init='diag-lin' has no low rank; use mixer 's4d'"),
        ("s4", {"init": "legt", "rank": 1}, "rank must be at least 2"),
        ("s4", {"dt_transform": "log"}, "dt_transform must be 'exp' or 'softplus'"),
        ("s4", {"dt_min": 0.2}, "dt_min and dt_max must be 0 < dt_min ≤ dt_max"),
        ("s4", {"final_act": "relu"}, "final_act must be 'glu' or 'id'"),
        ("s4", {"channels": 0}, "channels must be at least 1"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", ["s4", "s4d"])
@pytest.mark.parametrize(
    "options", [{}, {"n_ssm": 1, "channels": 2}, {"channels": 2}, {"dt_transform": "softplus", "rate": 2.0}]
)
def test_systems_discretised_once_make_the_same_steps(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, **options), sequence(20)
    steps = mixer.for_steps()
    y, state = steps.prefill(x[:, :7])
    found = [y]
    for t in range(7, x.shape[1]):
        y_t, state = steps.step(x[:, t], state)
        found.append(y_t[:, None])
    wanted, after = mixer.prefill(x)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.hidden, after.hidden, rtol=0, atol=1e-12)


def test_a_twin_for_steps_leaves_the_model_as_it_is() -> None:
    model = SequenceModel(13, 8, 2, pattern=("s4", "mamba"), dtype=torch.float64).train()
    kinds = [type(module) for module in model.modules()]
    twin = stepping(model)
    ids = torch.randint(13, (2, 9))
    state, wanted = twin.initial_state(2), model.eval().prefill(ids)[0]
    model.train()
    for t in range(ids.shape[1]):
        logits, state = twin.step(ids[:, t], state)
        torch.testing.assert_close(logits, wanted[:, t], rtol=0, atol=1e-12)
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert isinstance(twin.layers[0].mixer, S4Steps)
