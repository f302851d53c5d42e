"""Layers that are called like torch.nn.LSTM: the same shapes, the same sequences, a state that goes on."""

from __future__ import annotations

import inspect
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import sinuous
import sinuous.nn
from sinuous.core.mixers import list_mixers, mixer_class
from sinuous.ops import selective_scan

CAUSAL = [name for name in list_mixers() if mixer_class(name).causal]
CONSTANT = [name for name in CAUSAL if mixer_class(name).constant_state]
FORMS = [
    {},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    {"num_layers": 2, "proj_size": 5, "batch_first": True},
    {"num_layers": 3, "bidirectional": True, "proj_size": 3, "bias": False},
]


def build(mixer: str = "mamba", input_size: int = 7, hidden_size: int = 24, **options: Any) -> sinuous.nn.Recurrent:
    """Build in float64, with no two parameters alike."""
    layer = sinuous.nn.Recurrent(mixer, input_size, hidden_size, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def close(actual: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_have_the_shape_of_an_lstm(form: dict[str, Any]) -> None:
    ours, theirs = build(**form), nn.LSTM(7, 24, **form).double().eval()
    for shape in ((4, 3, 7), (3, 4, 7), (4, 7), (1, 1, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        assert ours(x)[0].shape == theirs(x)[0].shape
    packed = pack_sequence([torch.randn(n, 7, dtype=torch.float64) for n in (5, 4, 4, 1)])
    actual, expected = ours(packed)[0], theirs(packed)[0]
    assert actual.data.shape == expected.data.shape
    assert torch.equal(actual.batch_sizes, expected.batch_sizes)
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours.flatten_parameters()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_layer_of_the_input_s_width_is_the_mixer(name: str) -> None:
    layer, x = build(name, 24, batch_first=True), torch.randn(3, 9, 24, dtype=torch.float64)
    y, state = layer(x)
    expected, final = layer.layers[0].mixer.prefill(x)
    close((y, state), (expected, (final,)))
    close(layer(x, layer.initial_state(3)), (y, state))


def test_the_equation_with_a_residual_and_a_norm() -> None:
    layer, x = build(residual=True, norm="rms", batch_first=True), torch.randn(3, 9, 7, dtype=torch.float64)
    part = layer.layers[0]
    inner = part.input_proj(x)
    close(layer(x)[0], inner + part.mixer(part.norm(inner)))


def test_a_stack_of_two_directions_by_hand() -> None:
    layer = build(num_layers=2, bidirectional=True, proj_size=5, batch_first=True)
    x = torch.randn(3, 9, 7, dtype=torch.float64)
    y = x
    for past, future in zip(layer.layers[::2], layer.layers[1::2], strict=True):
        sides = [part.output_proj(part.mixer(part.input_proj(z))) for part, z in ((past, y), (future, y.flip(1)))]
        y = torch.cat([sides[0], sides[1].flip(1)], -1)
    close(layer(x)[0], y)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_state_goes_on(name: str) -> None:
    layer, x = build(name, num_layers=2), torch.randn(9, 3, 7, dtype=torch.float64)
    whole, final = layer(x)
    head, state = layer(x[:5])
    tail, last = layer(x[5:], state)
    close((torch.cat([head, tail]), last), (whole, final))
    y_t, after = layer.step(x[5], state)
    close(y_t, whole[5])
    close(layer(x[6:], after), (whole[6:], final))


def test_unbatched_input_has_an_unbatched_state() -> None:
    layer, x = build(num_layers=2), torch.randn(9, 7, dtype=torch.float64)
    whole, final = layer(x)
    batched, states = layer(x[:, None])
    close((whole, final), (batched[:, 0], pytree.tree_map(lambda t: t[0], states)))
    _, state = layer(x[:4])
    close(layer(x[4:], state), (whole[4:], final))


@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONSTANT)
def test_packed_sequences_equal_separate_ones(name: str, form: dict[str, Any], sorted_already: bool) -> None:
    layer = build(name, **{**form, "batch_first": False})
    lengths = [6, 4, 4, 1] if sorted_already else [4, 1, 6, 4]
    x = torch.randn(6, 4, 7, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x[length:, row] = math.nan
    separate = [layer(x[:length, row]) for row, length in enumerate(lengths)]
    packed, state = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=sorted_already))
    outputs, actual = pad_packed_sequence(packed)
    assert actual.tolist() == lengths
    for row, length in enumerate(lengths):
        close(outputs[:length, row], separate[row][0])
        close(pytree.tree_map(lambda t, row=row: t[row], state), separate[row][1])
    more, _ = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=sorted_already), state)
    again = layer(x[: lengths[2], 2], separate[2][1])[0]
    close(pad_packed_sequence(more)[0][: lengths[2], 2], again)


def test_gradients_reach_everything_through_packed_sequences_and_states() -> None:
    layer = build(num_layers=2, bidirectional=True, norm="layer")
    rows = [torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for n in (5, 3)]
    y, state = layer(pack_sequence(rows))
    (y.data.square().sum() + sum(t.square().sum() for t in pytree.tree_leaves(state))).backward()
    assert all(row.grad is not None and row.grad.abs().sum(-1).amin() > 0 for row in rows)
    assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_between_layers_in_training() -> None:
    x = torch.randn(9, 3, 7, dtype=torch.float64)
    layer = build(num_layers=2, dropout=0.5)
    close(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    with pytest.warns(UserWarning, match="acts between layers, of which there is one"):
        build(dropout=0.5)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mixer_has_a_class(name: str) -> None:
    label = mixer_class(name).__name__
    cls = getattr(sinuous.nn, label)
    assert cls is getattr(sinuous.nn, label)
    assert label in dir(sinuous.nn)
    assert issubclass(cls, sinuous.nn.Recurrent)
    layer = cls(7, 24, 2, batch_first=True)
    assert [type(part.mixer) for part in layer.layers] == [mixer_class(name)] * 2
    assert layer(torch.randn(2, 5, 7))[0].shape == (2, 5, 24)
    copy = pickle.loads(pickle.dumps(layer))
    assert type(copy) is cls
    assert copy.state_dict().keys() == layer.state_dict().keys()


def test_a_class_says_what_options_it_has() -> None:
    parameters = inspect.signature(sinuous.nn.Mamba).parameters
    assert list(parameters)[:3] == ["input_size", "hidden_size", "num_layers"]
    assert parameters["d_state"].default == 16
    assert sinuous.nn.Mamba(7, 24, d_state=3).layers[0].mixer.d_state == 3
    assert "Recurrent('mamba'" in (sinuous.nn.Mamba.__doc__ or "")
    with pytest.raises(AttributeError, match=r"no layer 'Mambo'; it has Recurrent, .*Mamba"):
        _ = sinuous.nn.Mambo


def test_init_weights_and_weight_decay() -> None:
    layer = build(num_layers=2, proj_size=5, norm="layer")
    names = {n for n, _ in layer.named_parameters()}
    assert "layers.1.mixer.A_log" in layer.no_weight_decay() <= names
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mamba", 0, 4), {}, r"input_size must be at least 1 \(got 0\)"),
        (("mamba", 4, 4, 0), {}, "num_layers must be at least 1"),
        (("mamba", 4, 4), {"proj_size": -1}, "proj_size must be at least 1, or 0"),
        (("mamba", 4, 4), {"dropout": 1.5}, "dropout must lie between 0 and 1"),
        (("mamba", 4, 4), {"norm": "batch"}, "norm must be None or one of 'rms', 'layer'"),
        (("vim_pair", 4, 4), {}, "'vim_pair' looks at the future .* choose one of .*mamba"),
        (("mambo", 4, 4), {}, "no mixer 'mambo'; did you mean 'mamba'"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinuous.nn.Recurrent(*arguments, **options)


def test_bad_calls_are_refused() -> None:
    layer, both = build(), build(bidirectional=True)
    with pytest.raises(ValueError, match=r"x must be \[T, B, input_size\] .* input_size 7 \(got \[2, 3, 6\]\)"):
        layer(torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match=r"one part for each of the 2 mixers \(got 1\)"):
        both(torch.zeros(2, 3, 7).double(), layer.initial_state(3))
    with pytest.raises(NotImplementedError, match="reads from the end and cannot step"):
        both.step(torch.zeros(3, 7), both.initial_state(3))
    rows = pack_sequence([torch.zeros(3, 7).double(), torch.zeros(2, 7).double()])
    with pytest.raises(ValueError, match=r"grow with the sequence .* one tensor for sequences of 2 lengths"):
        build("softmax_attention")(rows)
    with pytest.raises(TypeError, match="'mamba' has no option head"):
        sinuous.nn.Recurrent("mamba", 4, 4, heads=2)


def test_nn_and_ops_can_be_imported_and_the_package_stays_free_of_torch() -> None:
    def scan() -> Tensor:
        u, B = torch.ones(1, 3, 2), torch.ones(1, 3, 4)
        return selective_scan(u, u, -torch.ones(2, 4), B, B)

    assert scan().shape == (1, 3, 2)
    assert sinuous.ops.selective_scan is selective_scan
    assert set(sinuous.ops.__all__) == set(sinuous.core.ops.__all__)
    assert all(hasattr(sinuous.ops, name) for name in sinuous.core.ops.__all__)
    code = (
        "import sys, sinuous; assert 'torch' not in sys.modules; "
        "sinuous.ops.selective_scan; sinuous.nn.Mamba; import sinuous.nn, sinuous.ops; from sinuous.nn import Recurrent"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
