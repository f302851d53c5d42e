"""Learning rates that modules declare: which groups come out, how schedules shape them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

import sinuous
from sinuous.apps import learning_rates

LR, OWN, WEIGHT_DECAY = 4e-3, 1e-3, 0.05
SYSTEM = ("A_real", "A_imag", "B", "P", "inv_dt")


class Declaring(nn.Module):
    """One matrix with a rate of its own, one without, a bias."""

    def __init__(self, rates: dict[str, float] | None = None) -> None:
        super().__init__()
        self.own, self.rest = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
        self.rates = {"own": OWN} if rates is None else rates

    def learning_rates(self) -> dict[str, float]:
        return self.rates


def language_model() -> nn.Module:
    return sinuous.create_model("bytes_5m", dim=16, depth=3, pattern=["s4", "mamba2", "s4d"])


def vision_model() -> nn.Module:
    return sinuous.create_model("test_vim", mixer="s4d", num_classes=3)


def grouped(model: nn.Module, opt: str = "adamw", **options: Any) -> torch.optim.Optimizer:
    optimizer = create_optimizer_v2(model, opt, **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})
    learning_rates.honour(model, optimizer)
    return optimizer


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    of = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: of[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("make", [language_model, vision_model])
def test_the_systems_of_s4_have_their_rate_in_every_backbone(make: Any) -> None:
    model = make()
    optimizer = grouped(model)
    special = {name for name, _ in model.named_parameters() if "kernel" in name and name.endswith(SYSTEM)}
    assert special
    assert rates(model, optimizer) == {n: OWN if n in special else LR for n, _ in model.named_parameters()}
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (LR, 0.0),
        (LR, WEIGHT_DECAY),
        (OWN, 0.0),
    ]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_model_that_declares_nothing_has_the_groups_of_timm() -> None:
    model = sinuous.create_model("test_vim")
    for options in ({}, {"layer_decay": 0.7}):
        wanted = create_optimizer_v2(model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY, **options).param_groups
        found = grouped(model, **options).param_groups
        assert [{**g, "params": [id(p) for p in g["params"]]} for g in found] == [
            {**g, "params": [id(p) for p in g["params"]]} for g in wanted
        ]


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw"])
@pytest.mark.parametrize("sched", ["cosine", "step", "multistep"])
def test_schedules_shape_all_groups_alike(opt: str, sched: str) -> None:
    optimizer = grouped(Declaring(), opt)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched,
        num_epochs=4,
        updates_per_epoch=10,
        step_on_epochs=False,
        warmup_epochs=1,
        warmup_prefix=True,
        warmup_lr=1e-6,
        min_lr=1e-5,
        decay_epochs=2,
        decay_milestones=[2],
    )
    height = 0.0
    for update in range(41):
        schedule.step_update(update)
        *others, own = (group["lr"] for group in optimizer.param_groups)
        assert set(others) == {others[0]}
        assert own == pytest.approx(others[0] * OWN / LR, rel=1e-12)
        height = max(height, own)
    assert height == pytest.approx(OWN, rel=1e-12)
    assert others[0] < 0.7 * LR


def test_layer_decay_scales_declared_rates_as_all_others() -> None:
    model = vision_model()
    plain = create_optimizer_v2(model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=0.5)
    optimizer = grouped(model, layer_decay=0.5)
    for each in (plain, optimizer):
        create_scheduler_v2(each, "cosine", num_epochs=2, updates_per_epoch=2, step_on_epochs=False)[0].step_update(0)
    before = rates(model, plain)
    wanted = {name: rate * OWN / LR if name.endswith(SYSTEM) else rate for name, rate in before.items()}
    assert rates(model, optimizer) == pytest.approx(wanted, rel=1e-12)
    assert len(set(wanted.values())) > 4


def test_the_update_is_that_of_an_optimizer_with_this_rate() -> None:
    model = Declaring()
    optimizer = grouped(model, "momentum")
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    moved = {name: 1 - float(parameter.detach().flatten()[0]) for name, parameter in model.named_parameters()}
    decayed = 1 + WEIGHT_DECAY
    assert moved == pytest.approx({"own": OWN * decayed, "rest": LR * decayed, "bias": LR}, rel=1e-4)


def test_the_group_of_the_others_comes_first() -> None:
    model = Declaring({"bias": OWN})
    assert [group["lr"] for group in grouped(model).param_groups] == [LR, OWN]


def test_the_outer_module_is_heard_and_a_shared_parameter_found() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied = nn.Linear(2, 2, bias=False)
            self.inner, self.other = Declaring(), Declaring()
            self.other.own = self.tied.weight

        def learning_rates(self) -> dict[str, float]:
            return {"inner.own": 0.5}

    model = Outer()
    found = rates(model, grouped(model))
    assert (found["inner.own"], found["tied.weight"]) == (0.5, OWN)


def test_frozen_parameters_stay_out() -> None:
    model = Declaring({"own": OWN, "rest": 2 * OWN})
    model.own.requires_grad_(False)
    found: list[Tensor] = [p for group in grouped(model).param_groups for p in group["params"]]
    assert {id(p) for p in found} == {id(model.rest), id(model.bias)}


@pytest.mark.parametrize(
    ("declared", "lr", "message"),
    [
        ({"own": OWN, "onw": OWN}, LR, r"learning_rates of the model \(Declaring\) names 'onw', .*it has own, rest, b"),
        ({"own": -1.0}, LR, r"must give rates of at least 0 \(got -1.0 for own\)"),
        ({"own": float("nan")}, LR, r"must give rates of at least 0 \(got nan for own\)"),
        ({"own": OWN}, 0.0, r"the learning rate must be above 0 \(got 0.0\)"),
    ],
)
def test_refusals(declared: dict[str, float], lr: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped(Declaring(declared), lr=lr)
