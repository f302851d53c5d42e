"""pLSTM's layer for grids: its equations, its symmetries, and the names of its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinuous.core.mixers import PLSTMGrid

DIM, HEADS = 24, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: object) -> PLSTMGrid:
    mixer = PLSTMGrid(DIM, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def gate(x: Tensor, weight: Tensor, bias: Tensor, head: int, corner: int) -> Tensor:
    n, width = head * 4 + corner, DIM // (4 * HEADS)
    return bias.flatten()[n] + x[..., n * width : (n + 1) * width] @ weight.reshape(4 * HEADS, width)[n]


def gates_of(m: PLSTMGrid, x: Tensor, head: int, corner: int, smallest: float) -> tuple[list[Tensor], ...]:
    """S (r, d), T (rl, ru, dl, du) and M (l, u) at one cell."""

    def sigmoid(name: str) -> Tensor:
        layer = getattr(m, name)
        return torch.sigmoid(gate(x, layer.weight, layer.bias, head, corner))

    def tanh(name: str) -> Tensor:
        layer = getattr(m, name)
        return torch.tanh(5 * gate(x, layer.eigenvalues_weight, layer.eigenvalues_bias, head, corner))

    if m.propagates:
        tilt = 0.5 * (m.orientation_weight[corner, head] * x).sum(-1) / DIM
        alpha = torch.sigmoid(m.orientation_bias[corner, head] + tilt)
        right, ahead, mark = alpha * sigmoid("source"), alpha * tanh("transition").clamp(min=smallest), sigmoid("mark")
        return [right, 1 - right], [ahead, ahead, 1 - ahead, 1 - ahead], [mark, mark]
    turn, none = tanh("transition_rd"), torch.zeros(x.shape[:-1], dtype=x.dtype)
    turns = (turn, none) if m.left_turns else (none, turn)
    transitions = [tanh("transition_r"), *turns, tanh("transition_d")]
    return [sigmoid("source_r"), sigmoid("source_d")], transitions, [sigmoid("mark_l"), sigmoid("mark_u")]


def written_out(m: PLSTMGrid, x: Tensor, height: int, width: int, smallest: float = 0.0) -> Tensor:
    """The layer cell by cell, corner by corner."""
    cells, per_head = x.unflatten(1, (height, width)), DIM // HEADS
    q, k, v = (
        torch.einsum("hcd,...d->...hc", layer.weight.reshape(HEADS, per_head, DIM), cells) + layer.bias[..., 0]
        for layer in (m.query, m.key, m.value_)
    )
    heads = []
    for h in range(HEADS):
        direct = torch.sigmoid(m.direct.bias.flatten()[h])
        total = direct * (q[..., h, :] * k[..., h, :]).sum(-1, keepdim=True) * v[..., h, :]
        rows: list[list[Tensor]] = [[total[:, i, j] for j in range(width)] for i in range(height)]
        for corner in range(4):
            S, T, M = gates_of(m, cells, h, corner, smallest)
            right: dict[tuple[int, int], Tensor] = {}
            down: dict[tuple[int, int], Tensor] = {}
            zero = cells.new_zeros(x.shape[0], per_head, per_head)
            for a in range(height):
                for b in range(width):
                    i, j = (height - 1 - a if corner % 2 else a), (width - 1 - b if corner >= 2 else b)
                    left, up = right.get((a - 1, b), zero), down.get((a, b - 1), zero)
                    at = (slice(None), i, j)
                    pair = k[at][:, h, :, None] * v[at][:, h, None, :]
                    s, t, mark = ([g[at][:, None, None] for g in group] for group in (S, T, M))
                    read = mark[0] * left + mark[1] * up
                    rows[i][j] = rows[i][j] + torch.einsum("bk,bkv->bv", q[at][:, h], read)
                    right[a, b] = t[0] * left + t[1] * up + s[0] * pair
                    down[a, b] = t[2] * left + t[3] * up + s[1] * pair
        heads.append(torch.stack([torch.stack(row, 1) for row in rows], 1) * per_head**-0.5)
    y = torch.stack(heads, -2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.mhnorm.scale
    return y.flatten(3).flatten(1, 2) @ m.outprojection.weight.T


OPTIONS = [{}, {"stable": False}, {"mode": "D"}, {"mode": "D", "chirality": "R"}]


@pytest.mark.parametrize("sides", [(1, 5), (4, 3), (5, 6)])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_equations(options: dict[str, object], sides: tuple[int, int]) -> None:
    mixer = build(**options)
    if mixer.propagates:
        with torch.no_grad():
            mixer.transition.eigenvalues_bias[::2] = -0.1  # λ of both signs
    x = torch.randn(2, sides[0] * sides[1], DIM, dtype=torch.float64)
    smallest = -1.0 if options.get("stable") is False else 0.0
    torch.testing.assert_close(mixer(x, grid=sides), written_out(mixer, x, *sides, smallest), atol=1e-11, rtol=0)


@pytest.mark.parametrize("mode", ["P", "D"])
def test_without_a_grid_the_tokens_are_one_row(mode: str) -> None:
    mixer, x = build(mode=mode), torch.randn(2, 11, DIM, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mixer(x, grid=(1, 11)), atol=0, rtol=0)


@pytest.mark.parametrize("options", [{}, {"stable": False}, {"mode": "D"}])
def test_packed_sequences_do_not_meet(options: dict[str, object]) -> None:
    mixer, edges = build(**options), [0, 5, 5, 8, 13, 14, 19]
    x = torch.randn(1, 19, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[:, 6], x[:, 18] = float("nan"), 1e200  # one sequence is no number, one overflows on its way
    y, clean = mixer(x, torch.tensor(edges)), [(0, 5), (8, 13), (13, 14)]
    assert y[:, 5:8].isnan().all()
    assert not y[:, 14:].isfinite().all()
    grads = torch.autograd.grad(sum(y[:, a:b].square().sum() for a, b in clean), x)[0]
    for a, b in clean:
        alone = x.detach()[:, a:b].requires_grad_()
        expected = mixer(alone)
        torch.testing.assert_close(y[:, a:b], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(grads[:, a:b], torch.autograd.grad(expected.square().sum(), alone)[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_packed_sequences_script_and_may_all_be_empty() -> None:
    mixer, x, edges = build(), torch.randn(1, 9, DIM, dtype=torch.float64), torch.tensor([0, 4, 6, 9])
    torch.testing.assert_close(torch.jit.script(mixer)(x, edges), mixer(x, edges))
    assert mixer(x[:, :0], torch.tensor([0, 0, 0])).shape == (1, 0, DIM)


@pytest.mark.parametrize("mode", ["P", "D"])
def test_turning_the_image_turns_the_output_if_corners_are_alike(mode: str) -> None:
    mixer = build(mode=mode, gate_weights=False)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if name.startswith(("orientation", "transition", "source", "mark")):
                corners = p.unflatten(0, (-1, 4)) if name.endswith("bias") and p.shape[0] == 4 * HEADS else None
                if name == "orientation_bias":
                    p.copy_(p[:1].expand_as(p))
                elif corners is None:
                    p.zero_()
                else:
                    p.copy_(corners[:, :1].expand_as(corners).flatten(0, 1))
    x = torch.randn(1, 30, DIM, dtype=torch.float64)

    def flip(t: Tensor, axes: tuple[int, ...]) -> Tensor:
        return t.unflatten(1, (5, 6)).flip(axes).flatten(1, 2)

    for axes in ((1,), (2,), (1, 2)):
        torch.testing.assert_close(mixer(flip(x, axes), grid=(5, 6)), flip(mixer(x, grid=(5, 6)), axes))


def test_every_parameter_of_diffusion_gets_a_gradient_on_a_grid() -> None:
    mixer = build(mode="D")
    mixer(torch.randn(1, 12, DIM, dtype=torch.float64), grid=(3, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_has_the_published_names_and_shapes() -> None:
    both = {
        "direct.bias": (3, 1, 1, 1, 1),
        **{f"{n}.weight": (3, 8, 1, 1, 24) for n in ("query", "key", "value_")},
        **{f"{n}.bias": (3, 8, 1) for n in ("query", "key", "value_")},
        "mhnorm.scale": (3, 8),
        "outprojection.weight": (24, 24),
    }

    def gates(*names: str) -> dict[str, tuple[int, ...]]:
        shapes = {"bias": (12, 1, 1, 1), "weight": (1, 12, 1, 1, 1, 2)}
        return {f"{n}.{k}": s for n in names for k, s in shapes.items()}

    def transitions(*names: str) -> dict[str, tuple[int, ...]]:
        shapes = {"eigenvalues_bias": (12, 1), "eigenvalues_weight": (1, 12, 1, 2)}
        return {f"{n}.{k}": s for n in names for k, s in shapes.items()}

    tilt = {"orientation_bias": (4, 3), "orientation_weight": (4, 3, 24)}
    P = tilt | gates("source", "mark") | transitions("transition")
    D = gates("source_r", "source_d", "mark_l", "mark_u")
    D |= transitions("transition_r", "transition_d", "transition_rd")
    for mode, own in (("P", P), ("D", D)):
        actual = {n: tuple(t.shape) for n, t in PLSTMGrid(24, 3, mode=mode).state_dict().items()}
        assert actual == both | own


def test_starts_as_published() -> None:
    mixer = PLSTMGrid(768, 12)
    torch.testing.assert_close(mixer.orientation_bias, torch.linspace(-2, 2, 12).expand(4, 12))
    assert mixer.source.bias.eq(-4).all()
    assert mixer.mark.bias.eq(-4).all()
    assert mixer.direct.bias.eq(-6).all()
    assert mixer.transition.eigenvalues_bias.eq(1).all()
    for weight in (mixer.source.weight, mixer.orientation_weight, mixer.query.weight, mixer.outprojection.weight):
        assert weight.std().item() == pytest.approx((2 / (5 * weight.shape[-1])) ** 0.5, rel=0.15)
    plain = PLSTMGrid(768, 12, gate_weights=False)
    assert not any(t.any() for t in (plain.source.weight, plain.orientation_weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "multiple of 4 num_heads"),
        ({"mode": "L"}, "mode must be 'P' or 'D'"),
        ({"mode": "D", "chirality": "up"}, "chirality must be 'L' or 'R'"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLSTMGrid(24, **options)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="grid must have as many cells"):
        build()(torch.zeros(1, 12, DIM, dtype=torch.float64), grid=(5, 2))
