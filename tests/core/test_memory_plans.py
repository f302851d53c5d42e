"""Plans of memory: what they say is what is alive, and what they choose is the least, or fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sinuous.core import checkpointing
from sinuous.core.checkpointing import STRATEGIES, MemoryPlan, peak_memory, plan_memory
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.stack import Stack

VOCAB = 64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def live(model: SequenceModel, plan: MemoryPlan, batch: int, length: int) -> int:
    plan.apply(model)
    ids = torch.randint(VOCAB, (batch, length))

    def step() -> None:
        model.zero_grad()
        model.loss(ids, ids).backward()

    return peak_memory(step)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def call() -> torch.Tensor:
        x = torch.zeros(1000)
        y = x + 1
        del x
        return (y * 2)[:3]

    assert peak_memory(call) == 8000
    x = torch.zeros(1000, requires_grad=True)
    kept = peak_memory(lambda: x.sin().sin().sin().sin().sum().backward())
    assert 16_000 <= kept <= 28_000
    assert peak_memory(lambda: x.view(10, 100)[3:5].t()) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("pattern", "options"),
    [("mamba", {}), (["gla", "softmax_attention"], {"mlp": "swiglu"}), ("rwkv7", {"tie_head": False})],
    ids=str,
)
def test_what_is_planned_is_alive(pattern: Any, options: dict[str, Any], strategy: str) -> None:
    model = SequenceModel(VOCAB, 32, 4, pattern, **options)
    plan = plan_memory(model, 2, 900, strategy=strategy)
    assert 0.75 < plan.total / live(model, plan, 2, 900) < 1.25


def test_the_plan_takes_the_least_memory_of_all_strategies() -> None:
    model = SequenceModel(VOCAB, 32, 16)
    plans = {name: plan_memory(model, 1, 8192, strategy=name) for name in STRATEGIES}
    assert min(plans, key=lambda name: plans[name].total) == "multi_axis"
    assert (plans["none"].layers, plans["layer"].layers, plans["sqrt"].layers, plans["time"].layers) == (1, 1, 4, 16)
    assert (plans["stream"].layers, plans["stream"].steps) == (1, 1024)


def test_a_budget_gives_the_largest_cells_that_fit() -> None:
    model = SequenceModel(VOCAB, 32, 8)
    least = plan_memory(model, 1, 4096)
    areas = []
    for factor in (1.0, 1.3, 2.0, 100.0):
        plan = plan_memory(model, 1, 4096, budget=factor * least.total)
        assert plan.total <= factor * least.total
        areas.append(plan.layers * (plan.steps or 4096))
    assert areas == sorted(areas)
    assert areas[-1] == 8 * 4096
    with pytest.raises(ValueError, match=f"budget must be at least {least.total:,} bytes"):
        plan_memory(model, 1, 4096, budget=least.total - 1)


def test_memory_grows_as_the_power_of_two_thirds() -> None:
    model = SequenceModel(VOCAB, 64, 16)
    totals = {n: plan_memory(model, 1, 2**n) for n in (14, 20)}
    rise = totals[20].total / totals[14].total
    assert 2**6 ** (1 / 2) < rise < 2 ** (6 * 0.7)
    layer = [plan_memory(model, 1, 2**n, strategy="layer").total for n in (14, 20)]
    assert layer[1] / layer[0] > 2**5.9


def test_a_plan_reads_as_a_table() -> None:
    plan = MemoryPlan("multi_axis", 4, 512, {"one cell": 3_000_000, "both ends": 500_000})
    assert plan.total == 3_500_000
    assert str(plan).splitlines()[0] == "multi_axis: 4 blocks by 512 steps"
    assert str(plan).splitlines()[-1].split() == ["total", "3.50", "MB"]


def test_planning_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = SequenceModel(VOCAB, 32, 3, mlp="gelu", drop_rate=0.2)
    before = torch.get_rng_state()
    plan_memory(model, 1, 512)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not model.layers.grad_checkpointing


def test_stacks_alone_and_models_that_look_ahead_are_planned() -> None:
    stack = Stack(32, 4, causal=False)
    plan = plan_memory(stack, 1, 1000, strategy="sqrt")
    plan.apply(stack)
    assert stack.checkpoint_layers == 2
    x = torch.randn(1, 1000, 32, requires_grad=True)
    assert 0.75 < plan.total / peak_memory(lambda: stack(x).sum().backward()) < 1.3


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (lambda: nn.Linear(3, 3), {}, "one stack of blocks"),
        (lambda: Stack(16, 1, causal=False), {}, "looks ahead"),
        (lambda: Stack(16, 1), {"strategy": "most"}, "strategy must be"),
        (lambda: Stack(16, 1), {"budget": -1}, "budget must be a number of bytes"),
        (lambda: Stack(16, 1), {"budget": "64 MB"}, "budget must be a number of bytes"),
    ],
)
def test_wrong_plans_are_refused(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_memory(model(), 1, 512, **options)


def test_what_has_no_blocks_is_told() -> None:
    with pytest.raises(ValueError, match="Linear lacks"):
        checkpointing.set_checkpointing(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="layers=2, steps=None are for models with a stack"):
        checkpointing.set_checkpointing(nn.Linear(3, 3), layers=2)
