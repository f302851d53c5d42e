"""Levels of codes, the head of logistics, and the options of SaShiMi that use them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import sinuous
from sinuous.audio import wave_codes
from sinuous.audio.codecs import codec
from sinuous.audio.wave_codes import (
    COMPONENTS,
    FLOOR,
    LARGEST,
    SMALLEST,
    levels_of,
    logistic_logits,
    start_logistics,
)
from sinuous.core.generation import Sampling, generate


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_probabilities_are_those_of_the_logistics_and_sum_to_one() -> None:
    levels = levels_of("mu_law", 16).double()
    parameters = torch.randn(5, 3 * COMPONENTS, dtype=torch.float64)
    level = torch.rand(5, dtype=torch.float64)
    p = logistic_logits(parameters, level, levels).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)
    share, offset, log_scale = parameters.chunk(3, -1)
    logistic = torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(0.0, 1.0),
        [
            torch.distributions.SigmoidTransform().inv,
            torch.distributions.AffineTransform(level[:, None] + offset / 10, log_scale.exp()),
        ],
    )
    border = (levels[3] + levels[4]) / 2, (levels[4] + levels[5]) / 2
    mass = logistic.cdf(border[1]) - logistic.cdf(border[0])
    expected = (1 - FLOOR) * (share.softmax(-1) * mass).sum(-1) + FLOOR / 16
    torch.testing.assert_close(p[:, 4], expected, atol=1e-12, rtol=0)


def test_a_new_head_expects_what_was_last_heard() -> None:
    readout = nn.Linear(8, 3 * COMPONENTS)
    start_logistics(readout)
    levels = levels_of("mu_law", 256)
    codes = torch.tensor([100, 128, 150])
    logits = logistic_logits(readout(torch.zeros(3, 8)), levels[codes], levels)
    expected = (logits.exp() * levels).sum(-1)
    assert (expected - levels[codes]).abs().max() < 0.02
    assert (-logits.exp() * logits).sum(-1).max() < 0.98 * torch.log(torch.tensor(256.0))


def test_extreme_parameters_give_finite_logits_and_gradients() -> None:
    levels = levels_of("mu_law", 256)
    parameters = torch.tensor([-1e4, 0.0, 1e4]).repeat(3, COMPONENTS).requires_grad_()
    logits = logistic_logits(parameters, torch.tensor([-1.0, 0.0, 1.0]), levels)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert logits.min() >= torch.log(torch.tensor(FLOOR / 256)) - 1e-4
    assert parameters.grad is not None
    assert parameters.grad.isfinite().all()


def mixtures(rows: int) -> torch.Tensor:
    """Parameters of mixtures from the narrowest to the widest logistics, near the last sample and far away."""
    share = torch.randn(rows, COMPONENTS)
    offset = torch.randn(rows, COMPONENTS) * torch.logspace(-2, 1, rows)[:, None]
    return torch.cat([share, offset, torch.empty(rows, COMPONENTS).uniform_(SMALLEST - 1, LARGEST + 1)], 1)


def bits_in_double(parameters: torch.Tensor, level: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Bits of all codes by the definition, each mass as the difference of the smaller tails."""
    share, offset, log_scale = parameters.double().chunk(3, -1)
    levels = levels.double()
    borders = nn.functional.pad((levels[1:] + levels[:-1]) / 2, (1, 1), value=torch.inf)
    borders[0] = -torch.inf
    mean = level.double()[:, None] + offset * 0.1
    z = (borders - mean[..., None]) / log_scale.clamp(SMALLEST, LARGEST).exp()[..., None]
    left, right = torch.sigmoid(z).diff(dim=-1), -torch.sigmoid(-z).diff(dim=-1)
    mass = torch.where(z[..., 1:] < 0, left, right)
    p = (1 - FLOOR) * (share.softmax(-1)[..., None] * mass).sum(-2) + FLOOR / len(levels)
    return -p.log2()


@pytest.mark.parametrize("name", ["mu_law", "linear"])
def test_bits_of_all_codes_are_those_of_double_precision(name: str) -> None:
    levels = levels_of(name, 256)
    parameters, codes = mixtures(256), torch.randperm(256)
    bits = logistic_logits(parameters, levels[codes], levels) / -math.log(2)
    expected = bits_in_double(parameters, levels[codes], levels)
    assert expected.max() > 17.5
    torch.testing.assert_close(bits.double(), expected, rtol=0, atol=3e-4)


def test_gradients_are_those_of_the_logits() -> None:
    levels = levels_of("mu_law", 16)
    parameters = torch.randn(2, 3, 3 * COMPONENTS, dtype=torch.float64, requires_grad=True)
    level = torch.rand(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: logistic_logits(p, level, levels), (parameters,))


def test_gradients_of_rare_codes_are_those_of_double_precision() -> None:
    levels = levels_of("mu_law", 256)
    codes, rare = torch.randperm(256), torch.randint(256, (256,))
    gradients = []
    drawn = mixtures(256)
    for dtype in (torch.float32, torch.float64):
        parameters = drawn.to(dtype, copy=True).requires_grad_()
        logits = logistic_logits(parameters, levels[codes].to(dtype), levels)
        logits.gather(1, rare[:, None]).sum().backward()
        assert parameters.grad is not None
        gradients.append(parameters.grad.double())
    scale = gradients[1].square().mean(1, keepdim=True).sqrt() + 1e-6
    assert ((gradients[0] - gradients[1]) / scale).abs().max() < 1e-2


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, results = levels_of("mu_law", 16), []
    codes = torch.randint(16, (3, 5))
    for block in (1, 2**18):
        monkeypatch.setattr(wave_codes, "BLOCK", (block, block))
        parameters = torch.linspace(-6, 1, 3 * 5 * 24).reshape(3, 5, 24).requires_grad_()
        logits = logistic_logits(parameters, levels[codes], levels)
        logits.square().sum().backward()
        results.append((logits.detach(), parameters.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert logistic_logits(torch.zeros(2, 0, 24), torch.zeros(2, 0), levels).shape == (2, 0, 16)


@pytest.mark.parametrize("name", ["mu_law", "linear", "mu_law_s4", "linear_s4"])
def test_levels_rise_and_are_those_of_the_codec(name: str) -> None:
    levels = levels_of(name, 256)
    assert (levels.diff() > 0).all()
    assert torch.equal(levels[7:8], codec(name).decode(torch.tensor([7])))


@pytest.mark.parametrize(("name", "size"), [("mu_law", 100), ("pcm16_bytes", 256), ("mp3", 256)])
def test_codecs_without_a_level_for_each_code_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="codec"):
        sinuous.create_model("test_sashimi", vocab_size=size, codec=name, head="logistic")


@pytest.mark.parametrize(
    "options",
    [{"embedding": "both"}, {"head": "logistic"}, {"embedding": "both", "head": "logistic", "unet": True}],
    ids=str,
)
def test_steps_and_prefill_equal_forward_with_each_option(options: dict[str, Any]) -> None:
    model = sinuous.create_model("test_sashimi", **options).double().eval()
    codes = torch.randint(16, (2, 23))
    with torch.no_grad():
        expected = model(codes)
        logits, state = model.prefill(codes[:, :7], last_only=True)
        parts = [logits]
        for t in range(7, 23):
            logits, state = model.step(codes[:, t], state)
            parts.append(logits.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 6:], atol=1e-9, rtol=0)
    assert len(generate(model, codes[0], Sampling(max_new_tokens=5, seed=0)).tokens[0]) == 5


def test_the_wave_is_a_part_of_the_embedding() -> None:
    model = sinuous.create_model("test_sashimi", embedding="both")
    plain = sinuous.create_model("test_sashimi")
    with torch.no_grad():
        table = model.encoder[0].weight + model.levels.unsqueeze(1) * model.wave
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in ("wave", "levels")})
        plain.encoder[0].weight.copy_(table)
    codes = torch.randint(16, (1, 12))
    torch.testing.assert_close(model(codes), plain(codes))


@pytest.mark.parametrize(
    ("options", "words"), [({"embedding": "wave"}, "embedding must be"), ({"head": "gauss"}, "head must be")]
)
def test_wrong_choices_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sinuous.create_model("test_sashimi", **options)
