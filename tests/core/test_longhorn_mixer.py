"""Longhorn's mixer against its equations step by step, and its parameters against the published ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinuous.core.mixers import Longhorn

DIM = 24


def build(**options: object) -> Longhorn:
    """Build in float64, with no two parameters alike, so that a swapped or unused one shows."""
    mixer = Longhorn(DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def step_by_step(m: Longhorn, u: Tensor) -> Tensor:
    """The online step of the paper's algorithm 1 for one sequence, a row of the state at a time, solved for its
    diagonal, with nothing of the library in it."""
    weights = dict(m.named_parameters())
    taps, rank, N = weights["conv1d.weight"].shape[-1], weights["dt_head.weight"].shape[1], m.d_state
    x, z = (u @ weights["in_proj.weight"].T).chunk(2, -1)
    before = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    S, outputs = x.new_zeros(x.shape[1], N), []
    for t in range(len(x)):
        convolved = (before[t : t + taps] * weights["conv1d.weight"][:, 0].T).sum(0) + weights["conv1d.bias"]
        v = convolved / (1 + torch.exp(-convolved))
        projected = weights["x_proj.weight"] @ v
        dt, k, q = projected[:rank], projected[rank : rank + N], projected[rank + N :]
        beta = 1 / (1 + torch.exp(-weights["dt_head.weight"] @ dt - weights["dt_head.bias"]))
        rows = []
        for d in range(len(v)):
            # I - β k kᵀ / (1 + β |k|²) is the inverse of I + β k kᵀ
            factor = torch.linalg.inv(torch.eye(N, dtype=u.dtype) + beta[d] * torch.outer(k, k)).diagonal()
            rows.append(factor * S[d] + beta[d] * v[d] * k / (1 + beta[d] * (k @ k)))
        S = torch.stack(rows)
        y = S @ q + weights["D"] * v
        outputs.append(weights["out_proj.weight"] @ (y * z[t] / (1 + torch.exp(-z[t]))))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 4}, {"d_conv": 1}])
def test_it_is_the_published_equation(options: dict[str, object]) -> None:
    mixer, u = build(**options), torch.randn(9, DIM, dtype=torch.float64)
    torch.testing.assert_close(mixer(u[None])[0], step_by_step(mixer, u), atol=1e-12, rtol=1e-12)


def test_names_and_shapes_of_parameters_are_the_published_ones() -> None:
    assert {name: tuple(p.shape) for name, p in Longhorn(64, d_state=16).named_parameters()} == {
        "D": (128,),
        "in_proj.weight": (256, 64),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "x_proj.weight": (36, 128),
        "dt_head.weight": (128, 4),
        "dt_head.bias": (128,),
        "out_proj.weight": (64, 128),
    }


def test_it_starts_as_published() -> None:
    mixer = Longhorn(64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(7.0)
    mixer.init_weights()
    assert not mixer.dt_head.bias.any()
    assert (mixer.D == 1).all()
    for layer, fan_in in (
        (mixer.in_proj, 64),
        (mixer.conv1d, 4),
        (mixer.x_proj, 128),
        (mixer.dt_head, 4),
        (mixer.out_proj, 128),
    ):
        largest = layer.weight.abs().max().item()
        assert 0.95 * fan_in**-0.5 < largest <= fan_in**-0.5
    assert mixer.no_weight_decay() == {"D"}


@pytest.mark.parametrize(
    ("options", "message"), [({"d_state": 0}, "d_state must be"), ({"dt_rank": 0}, "dt_rank must")]
)
def test_sizes_below_one_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Longhorn(DIM, **options)
