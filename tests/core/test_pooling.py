"""Means over time: packed sequences one by one, and what does not count kept apart."""

from __future__ import annotations

import torch

from sinuous.core.pooling import mean_over_time


def test_the_mean_is_that_of_each_sequence_and_keeps_nan_apart() -> None:
    x, counted = torch.randn(1, 6, 2), torch.tensor([[True, False, True, False, False, True]])
    x[0, 1] = float("nan")
    pooled = mean_over_time(x, counted, torch.tensor([0, 3, 5, 6]))
    torch.testing.assert_close(pooled, torch.stack([(x[0, 0] + x[0, 2]) / 2, torch.zeros(2), x[0, 5]]))
    torch.testing.assert_close(mean_over_time(x, counted)[0], x[0, [0, 2, 5]].mean(0))
