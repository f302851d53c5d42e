"""xLSTM's sLSTM layer against its equations, step by step and unit by unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sinuous.core.mixers import SLSTM

DIM, HEADS = 12, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: object) -> SLSTM:
    """Build in float64, with no two parameters alike, so that a swapped or unused one shows."""
    mixer = SLSTM(DIM, **{"num_heads": HEADS, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def sequence(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def by_the_equations(mixer: SLSTM, x: Tensor) -> Tensor:
    """Without a stabiliser, in units of the exponential gate itself."""
    size = DIM // HEADS
    before = x
    if mixer.conv1d is not None:
        conv = mixer.conv1d.conv
        before = F.silu(F.conv1d(F.pad(x.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=DIM).mT)

    def blocks(inputs: Tensor, weight: Tensor) -> Tensor:
        return inputs @ torch.block_diag(*weight).T

    # The published names of the input and forget gate are the other way round.
    layers = ((before, mixer.fgate), (before, mixer.igate), (x, mixer.zgate), (x, mixer.ogate))
    gates = torch.stack([blocks(inputs, layer.weight) for inputs, layer in layers])
    R = mixer.slstm_cell._recurrent_kernel_.unflatten(1, (4, size))
    bias = mixer.slstm_cell._bias_.reshape(4, DIM)
    y = c = n = torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        i, f, z, o = (gates[g, :, t] + blocks(y, R[:, g]) + bias[g] for g in range(4))
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        y = torch.sigmoid(o) * c / n
        outputs.append(y)
    heads = torch.stack(outputs, 1).unflatten(-1, (HEADS, size))
    heads = (heads - heads.mean(-1, keepdim=True)) * torch.rsqrt(heads.var(-1, correction=0, keepdim=True) + 1e-5)
    return heads.flatten(2) * (1 + mixer.group_norm.weight)


@pytest.mark.parametrize("conv_size", [0, 1, 4])
def test_equals_the_equations(conv_size: int) -> None:
    mixer, x = build(conv_size=conv_size), sequence().requires_grad_()
    actual, expected = mixer(x), by_the_equations(mixer, x)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)
    inputs, weight = (x, *mixer.parameters()), torch.randn_like(x)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_heads_do_not_meet_but_the_cells_of_one_do() -> None:
    mixer, x, size = build(), sequence(1).requires_grad_(), DIM // HEADS
    (gradient,) = torch.autograd.grad(mixer(x)[0, -1, size + 1], x)
    seen = gradient[0, 0].abs() > 0
    assert seen.tolist() == [False] * size + [True] * size + [False] * size


def test_without_a_convolution_its_state_is_empty() -> None:
    mixer, x = build(conv_size=0), sequence()
    whole, _ = mixer.prefill(x)
    _, state = mixer.prefill(x[:, :4])
    assert state.conv.shape == (2, 0, 0)
    assert [t.shape for t in state] == [t.shape for t in mixer.initial_state(2)]
    rest, _ = mixer.prefill(x[:, 4:], state)
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-12, rtol=0)


def test_input_gates_far_out_of_range_stay_finite() -> None:
    mixer, x = build(), sequence()
    with torch.no_grad():
        mixer.slstm_cell._bias_[:DIM] = 1e4
    assert mixer(x).isfinite().all()
    with torch.no_grad():
        mixer.slstm_cell._bias_[:DIM] = -1e4
    assert mixer(x).isfinite().all()


def test_has_the_published_names_and_shapes() -> None:
    assert {name: tuple(t.shape) for name, t in SLSTM(32).state_dict().items()} == {
        "conv1d.conv.weight": (32, 1, 4),
        "conv1d.conv.bias": (32,),
        "fgate.weight": (4, 8, 8),
        "igate.weight": (4, 8, 8),
        "zgate.weight": (4, 8, 8),
        "ogate.weight": (4, 8, 8),
        "slstm_cell._recurrent_kernel_": (4, 32, 8),
        "slstm_cell._bias_": (128,),
        "group_norm.weight": (32,),
    }


@pytest.mark.parametrize(("block_index", "exponent"), [(0, 0.3), (2, 0.95), (4, 1.6)])
def test_starts_as_published(block_index: int, exponent: float) -> None:
    mixer = SLSTM(256, num_heads=2, num_blocks=5, block_index=block_index)
    bias = mixer.slstm_cell._bias_.unflatten(0, (4, 2, 128))
    assert not bias[[0, 2, 3]].any()
    torch.testing.assert_close(bias[1, :, [0, -1]], torch.tensor([[5.0, -7.0]] * 2))
    torch.testing.assert_close(bias[1], (5 - 12 * (torch.arange(128) / 127) ** exponent).expand(2, 128))
    assert not mixer.slstm_cell._recurrent_kernel_.any()
    assert not mixer.group_norm.weight.any()
    torch.testing.assert_close(mixer.fgate.weight.std(), torch.tensor((2 / (5 * 256)) ** 0.5), atol=0, rtol=0.03)


def test_a_head_of_one_cell_starts() -> None:
    assert torch.equal(SLSTM(3, num_heads=3).slstm_cell._bias_[3:6], torch.full((3,), 5.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "dim must be a positive multiple of the number of heads"),
        ({"conv_size": -1}, "conv_size must be 0 or more"),
        ({"num_blocks": 2, "block_index": 2}, "block_index must be one of the 2 blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLSTM(DIM, **{"num_heads": HEADS, **options})
