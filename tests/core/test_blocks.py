"""Residual blocks: where the norms stand, which mixers have an MLP, and norms without a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sinuous.core.blocks import PLACEMENTS
from sinuous.core.sequence_model import SequenceModel

VOCAB, DIM = 13, 24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> SequenceModel:
    """In float64, with no two parameters alike, so that a swapped or unused one shows."""
    model = SequenceModel(**{"vocab_size": VOCAB, "dim": DIM, "depth": 2, "dtype": torch.float64, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements_are_those_of_the_docstring(placement: str) -> None:
    x, block = torch.randn(2, 5, DIM, dtype=torch.float64), build(mlp="gelu", norm_placement=placement).layers[0]
    n, f, n2, g = block.norm, block.mixer, block.norm2, block.mlp
    if placement == "pre":
        y = x + f(n(x))
        y = y + g(n2(y))
    elif placement == "post":
        y = n(x + f(x))
        y = n2(y + g(y))
    else:
        y = x + block.norm_out(f(n(x)))
        y = y + block.norm2_out(g(n2(y)))
    torch.testing.assert_close(block(x), y, atol=1e-12, rtol=0)


def test_an_mlp_can_be_for_some_mixers_only() -> None:
    model = build(depth=5, pattern=("mamba", "gla", "min_gru"), mlp={"gla": "geglu", "min_gru": "gelu"})
    kinds = [type(block.mlp).__name__ for block in model.layers]
    assert kinds == ["Identity", "GluMlp", "Mlp", "Identity", "GluMlp"]
    assert not build(pattern="mamba", mlp={"gla": "geglu"}).layers[0].mixes_channels
    x, block = torch.randn(2, 5, DIM, dtype=torch.float64), model.layers[1]
    y = x + block.mixer(block.norm(x))
    gate, value = block.mlp.fc1(block.norm2(y)).chunk(2, -1)
    torch.testing.assert_close(block(x), y + block.mlp.fc2(F.gelu(gate) * value), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        ({"mambo": "gelu"}, "no mixer 'mambo'; did you mean 'mamba'"),
        ({"mamba": "relu"}, "mlp must be one of 'none', 'gelu', 'geglu', 'swiglu' .got 'relu'"),
    ],
)
def test_an_mlp_for_no_mixer_or_of_another_kind_is_refused(mlp: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(pattern="mamba", mlp=mlp)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_layer_norms_can_do_without_a_bias() -> None:
    model, ids = build(norm="layer_no_bias", mlp="gelu"), torch.randint(VOCAB, (2, 7))
    assert not [name for name in model.state_dict() if "norm" in name and name.endswith("bias")]
    x = torch.randn(3, DIM, dtype=torch.float64) * 2 + 1
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    norm = model.layers[0].norm
    torch.testing.assert_close(norm(x), expected * norm.weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.jit.script(norm)(x), norm(x))
    model.init_weights()
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert model(ids).isfinite().all()
