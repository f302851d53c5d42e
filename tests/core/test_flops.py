"""Every op is counted by torch's FlopCounterMode, forward and backward, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sinuous
from sinuous.core.ops.laws import LAWS, Laws

MULTIPLY_ADDS = {
    "selective_scan": lambda a: 9 * a["u"].numel() * a["A"].shape[1] + a["u"].numel(),
    "ssd": lambda a: 3 * a["v"].numel() * a["q"].shape[-1],
    "causal_conv1d": lambda a: a["x"].numel() * a["weight"].shape[1],
}


def sample(laws: Laws, variant: str) -> dict[str, object]:
    arguments = laws.variants[variant](lambda *shape: torch.randn(*shape, dtype=torch.float64), 2, 5, 2)
    learned = {k for k, v in arguments.items() if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())}
    return {k: v.detach().requires_grad_() if k in learned else v for k, v in arguments.items()}


@pytest.mark.parametrize("laws", LAWS.values(), ids=list(LAWS))
def test_an_op_is_counted_in_both_directions(laws: Laws) -> None:
    for variant in laws.variants:
        arguments = sample(laws, variant)
        with FlopCounterMode(display=False) as counter:
            y = laws.call(**arguments)
            forward = counter.get_total_flops()
            (y if isinstance(y, Tensor) else y[0]).abs().sum().backward()
        assert forward > 0
        assert counter.get_total_flops() == 3 * forward
        if (multiply_adds := MULTIPLY_ADDS.get(laws.family.name)) is not None:
            assert forward == 2 * multiply_adds(arguments)


def test_the_count_is_the_same_on_every_backend_and_by_keywords() -> None:
    arguments, totals = sample(LAWS["selective_scan"], "full"), set()
    for backend in ("recurrent", "torch", None):
        with FlopCounterMode(display=False) as counter:
            sinuous.ops.selective_scan(**arguments, backend=backend)
        totals.add(counter.get_total_flops())
    q = torch.randn(1, 4, 2, 3)
    with FlopCounterMode(display=False) as counter:
        torch.ops.sinuous.ssd(
            q=q, k=q, v=q, log_decay=None, initial_state=None, cu_seqlens=None, scale=None, reverse=False, backend=""
        )
    assert len(totals) == 1
    assert counter.get_total_flops() == 2 * 3 * q.numel() * 3
