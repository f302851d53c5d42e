"""A causal mixer exported with a time axis of any length gives at every length what the module gives."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from sinuous.core import mixers

DIM = 24
CAUSAL = [name for name in mixers.list_mixers() if mixers.mixer_class(name).causal]
OPTIONS = {"sliding_window_attention": [{}, {"window_size": 1}, {"window_size": 7}, {"window_size": 24}]}
LENGTHS = (2, 3, 16, 17, 24, 33, 100)


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in CAUSAL for options in OPTIONS.get(name, [{}])], ids=str
)
def test_an_exported_mixer_runs_at_every_length(name: str, options: dict[str, int]) -> None:
    mixer = mixers.build_mixer(name, DIM, **options).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        program = export(mixer, (torch.randn(2, 24, DIM),), dynamic_shapes=({1: Dim("T", min=2, max=4096)},))
        for length in (*LENGTHS, 700) if name == "sliding_window_attention" else LENGTHS:
            x = torch.randn(2, length, DIM)
            torch.testing.assert_close(program.module()(x), mixer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["softmax_attention", "sliding_window_attention", "rwkv4"])
def test_an_exported_prefill_goes_on_at_every_length(name: str) -> None:
    mixer = mixers.build_mixer(name, DIM, **({"window_size": 7} if name == "sliding_window_attention" else {})).eval()

    class Prefill(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, x: torch.Tensor, state: object) -> object:
            return self.mixer.prefill(x, state)

    with torch.no_grad():
        _, state = mixer.prefill(torch.randn(2, 9, DIM))
        any_length = {1: Dim("T", min=2, max=4096)}
        program = export(
            Prefill(),
            (torch.randn(2, 24, DIM), state),
            dynamic_shapes=(any_length, type(state)(*(None for _ in state))),
        )
        for length in LENGTHS:
            x = torch.randn(2, length, DIM)
            torch.testing.assert_close(program.module()(x, state), mixer.prefill(x, state), atol=1e-5, rtol=1e-4)
