"""Learning rates that modules declare for parameters of their own, brought into the groups of an optimizer.

A module, wherever it sits in a model, declares them by a method

    learning_rates() -> dict[str, float]        names of own parameters to learning rates

The rates are absolute, like the `lr` of the attribute `_optim` that state-spaces/s4 sets on parameters (its
`example.py`, `setup_optimizer`): what is declared holds whatever the learning rate of the rest. Where a module and one
inside it declare the same parameter, the outer one is heard. Weight decay is another matter, of timm's
`no_weight_decay`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def declared(model: nn.Module) -> dict[Tensor, float]:
    """The learning rates that `model` and the modules in it declare, by parameter.

    Raises:
        ValueError: if a module names what is no parameter of its, or a rate is negative or no number.
    """
    rates: dict[Tensor, float] = {}
    for place, module in model.named_modules():
        method: Any = getattr(type(module), "learning_rates", None)
        if method is None:
            continue
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, rate in method(module).items():
            of = f"learning_rates of {place or 'the model'} ({type(module).__name__})"
            if name not in parameters:
                listed = ", ".join(parameters) or "none"
                raise ValueError(f"{of} names {name!r}, which is no parameter of it; it has {listed}")
            if not 0 <= rate < float("inf"):
                raise ValueError(f"{of} must give rates of at least 0 (got {rate} for {name}); correct its options")
            rates.setdefault(parameters[name], float(rate))
    return rates


def honour(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters with a rate of their own groups of their own, behind those of all others.

    A group keeps what else its optimizer was told (weight decay, layer decay). Its rate stands in `lr_scale`, as a
    factor of the others' rate: timm's schedules multiply by it, so warm-up, decay and floor shape every group alike.

    Raises:
        ValueError: if the rest has the learning rate 0, of which no other rate is a multiple.
    """
    rates = declared(model)
    special = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter in rates:
                by_rate.setdefault(rates[parameter], []).append(parameter)
        if by_rate and not group["lr"] > 0:
            raise ValueError(
                f"the learning rate must be above 0 (got {float(group['lr'])}): the model has parameters with rates "
                "of their own, which follow its schedule; give optimizer.lr, or set the mixer's own rate to null"
            )
        group["params"] = [parameter for parameter in group["params"] if parameter not in rates]
        options = {name: value for name, value in group.items() if name != "params"}
        for rate, parameters in by_rate.items():
            scale = options.get("lr_scale", 1.0) * rate / float(options["lr"])
            special.append({**options, "params": parameters, "lr": rate, "lr_scale": scale, "initial_lr": group["lr"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in special:
        optimizer.add_param_group(group)
