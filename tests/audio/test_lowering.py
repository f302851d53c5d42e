"""The engine in C: the model's own logits, draws and states, whatever the model's options, rows and place in a pool."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sinuous.audio import sashimi, wavenet
from sinuous.audio.lowering import NotLowered, Program, lower
from sinuous.audio.wave_codes import logistic_logits
from sinuous.core.ragged import select_rows
from sinuous.core.sampling import Sampling
from sinuous.kernels import cpu

REASON = cpu.interpreter_unavailable()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=f"no C kernels here: {REASON}")
NETS: dict[str, dict[str, Any]] = {
    "snet": {},
    "deep": {"depth": 3, "pool": (4, 2)},
    "unet": {"unet": True, "depth": 2},
    "published": {"norm": "scalar"},
    "published unet": {"norm": "scalar", "unet": True, "mixer_options": {"n_ssm": None}},
    "s4d": {"mixer": "s4d"},
    "dss": {"mixer": "s4d", "mixer_options": {"disc": "dss", "l_max": 32, "dt_transform": "exp"}},
    "bilinear": {"mixer": "s4d", "mixer_options": {"disc": "bilinear", "rate": 2.0}},
    "gelu and linear": {"mixer_options": {"final_act": "id"}},
    "two readouts": {"mixer_options": {"channels": 2, "n_ssm": 2}},
    "rank 2": {"mixer_options": {"init": "legt", "rank": 2, "d_state": 8}},
    "no feed-forward": {"ff": 0, "pool": ()},
    "wave and logistics": {"embedding": "both", "head": "logistic", "norm": "scalar"},
    "equal widths": {"expand": 1, "pool": (1, 3)},
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return sashimi.test_sashimi(**NETS[name]).eval()


def wide(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return wavenet.test_wavenet(**options).eval()


def uniforms(rows: int, steps: int) -> Tensor:
    return torch.rand(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


@torch.inference_mode()
def by_torch(
    model: Any, current: Tensor, numbers: Tensor, sampling: Sampling, state: Any
) -> tuple[Tensor, Tensor, Any]:
    """Codes, bits and state as `Program.run` gives them."""
    codes, bits = [], []
    for t in range(numbers.shape[1]):
        logits, state = model.step(current, state)
        current = sampling.choose(logits, numbers[:, t])
        nats = -logits.double().log_softmax(-1).gather(1, current[:, None])[:, 0]
        codes.append(current)
        bits.append(nats / math.log(2))
    return torch.stack(codes, 1), torch.stack(bits, 1), state


def check_engines(model: Any, rows: int, prefix: int, steps: int = 23, **options: Any) -> None:
    vocabulary = model.vocab_size
    start = torch.randint(vocabulary, (rows, prefix), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        state = model.prefill(start)[1] if prefix else model.initial_state(rows)
    current, numbers = torch.arange(rows) % vocabulary, uniforms(rows, steps)
    sampling = Sampling(**{"temperature": 1.0, **options})
    program = lower(model)
    drawn = program.run(current, numbers, temperature=sampling.temperature, top_p=sampling.top_p, state=state)
    codes, bits, after = by_torch(model, current, numbers, sampling, state)
    assert torch.equal(drawn.codes, codes)
    torch.testing.assert_close(drawn.bits, bits, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.state, after, rtol=0, atol=1e-5)
    # torch goes on from here
    goes_on = by_torch(model, codes[:, -1], numbers, sampling, drawn.state)
    torch.testing.assert_close(
        goes_on[1], by_torch(model, codes[:, -1], numbers, sampling, after)[1], rtol=0, atol=1e-4
    )


@needs_compiler
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("name", NETS)
def test_sashimi_is_the_same_model_in_both_engines(name: str, prefix: int) -> None:
    check_engines(net(name), 3, prefix)


@needs_compiler
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"kernel_size": 3}, {"kernel_size": 1}])
def test_wavenet_is_the_same_model_in_both_engines(options: dict[str, Any], prefix: int) -> None:
    check_engines(wide(**options), 3, prefix)


@needs_compiler
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.2, "top_p": 0.8}])
def test_engines_agree_at_any_temperature(options: dict[str, float]) -> None:
    check_engines(net("snet"), 5, 2, **options)
    check_engines(wide(), 5, 2, **options)


@needs_compiler
@pytest.mark.parametrize("rows", [2, 4, 8, 15])
def test_a_row_is_to_the_bit_what_it_is_alone(rows: int) -> None:
    for model in (net("deep"), wide()):
        program, current, numbers = lower(model), torch.arange(rows), uniforms(rows, 40)
        together = program.run(current, numbers)
        for row in (0, rows - 1):
            alone = program.run(current[row : row + 1], numbers[row : row + 1])
            assert torch.equal(alone.codes[0], together.codes[row])
            assert torch.equal(alone.bits[0], together.bits[row])
            torch.testing.assert_close(alone.state, select_rows(together.state, [row]), rtol=0, atol=0)


@needs_compiler
def test_a_call_goes_on_where_another_stopped() -> None:
    for model in (net("deep"), wide(), net("unet")):
        program, current, numbers = lower(model), torch.arange(2), uniforms(2, 50)
        whole = program.run(current, numbers)
        first = program.run(current, numbers[:, :13])
        second = program.run(first.codes[:, -1], numbers[:, 13:], state=first.state)
        assert torch.equal(torch.cat([first.codes, second.codes], 1), whole.codes)
        torch.testing.assert_close(torch.cat([first.bits, second.bits], 1), whole.bits, rtol=0, atol=1e-5)
        none = program.run(current, numbers[:, :0])
        assert none.codes.shape == (2, 0)
        torch.testing.assert_close(none.state, model.initial_state(2))


@needs_compiler
def test_told_codes_have_the_bits_of_forward() -> None:
    for model in (net("snet"), wide()):
        told = torch.randint(16, (2, 33), generator=torch.Generator().manual_seed(0))
        drawn = lower(model).run(told[:, 0], uniforms(2, 32), codes=told[:, 1:])
        with torch.inference_mode():
            nats = -model(told[:, :-1]).double().log_softmax(-1).gather(2, told[:, 1:, None])[..., 0]
        assert torch.equal(drawn.codes, told[:, 1:])
        torch.testing.assert_close(drawn.bits, nats / math.log(2), rtol=0, atol=1e-5)


@needs_compiler
def test_bits_of_rare_codes_are_those_of_double_precision() -> None:
    torch.manual_seed(0)
    model: Any = sashimi.test_sashimi(vocab_size=256, head="logistic").eval()
    head, levels = model.decoder[0].output_transform, model.levels
    nn.init.zeros_(head.weight)
    told = torch.randint(256, (64, 65))
    for widest in (-9.0, -5.0, 0.0, 2.0):  # every mixture has a logistic of the least scale, and rare codes
        with torch.no_grad():
            head.bias.normal_()
            head.bias[16:] = torch.linspace(-9.0, widest, 8)
        drawn = lower(model).run(told[:, 0], uniforms(64, 64), codes=told[:, 1:])
        logits = logistic_logits(head.bias.detach().double().expand(64, 64, -1), levels[told[:, :-1]].double(), levels)
        bits = -logits.gather(2, told[:, 1:, None])[..., 0] / math.log(2)
        torch.testing.assert_close(drawn.bits, bits, rtol=0, atol=3e-4)


@needs_compiler
def test_weights_and_states_of_other_dtypes_come_back_in_theirs() -> None:
    model = net("snet").double()
    drawn = lower(model).run(torch.tensor([1]), uniforms(1, 5))
    assert {leaf.dtype for leaf in pytree.tree_leaves(drawn.state)} == {torch.float64}
    check_engines(model, 2, 3)


@needs_compiler
def test_what_has_no_program_is_refused_in_a_sentence() -> None:
    for model, reason in (
        (sashimi.test_sashimi(mixer="mamba", mixer_options={}), "mixers s4 and s4d, and this model has Mamba"),
        (sashimi.test_sashimi(causal=False, mixer="s4_bidirectional"), "looks at the future"),
        (nn.Linear(2, 2), "SaShiMi and WaveNet, and this is a Linear"),
        (sashimi.test_sashimi(device="meta"), "the model is on meta"),
    ):
        with pytest.raises(NotLowered, match=reason):
            lower(model)


@needs_compiler
def test_codes_of_another_vocabulary_are_refused() -> None:
    program = lower(net("snet"))
    with pytest.raises(ValueError, match="current must lie between 0 and 15"):
        program.run(torch.tensor([16]), uniforms(1, 2))
    with pytest.raises(ValueError, match="codes must lie between -1 and 15"):
        program.run(torch.tensor([1]), uniforms(1, 2), codes=torch.tensor([[-1, 99]]))


@needs_compiler
def test_weights_that_are_no_numbers_are_reported() -> None:
    model = net("snet")
    nn.init.constant_(model.get_submodule("decoder")[0].output_transform.bias, torch.nan)  # type: ignore[index]
    with pytest.raises(FloatingPointError, match="sample 0 "):
        lower(model).run(torch.tensor([1]), uniforms(1, 2))


def test_without_a_compiler_there_is_one_warning_and_a_sentence(tmp_path: Path) -> None:
    code = """
from sinuous.audio import sashimi
from sinuous.audio.lowering import NotLowered, lower
for _ in range(2):
    try:
        lower(sashimi.test_sashimi())
    except NotLowered as error:
        print(error)
"""
    environment = {**os.environ, "PATH": str(tmp_path), "SINUOUS_CACHE": str(tmp_path / "cache"), "CC": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("engine 'c' cannot run here: no C compiler was found") == 2
    assert done.stderr.count("samples are drawn by torch: no C compiler was found") == 1


@needs_compiler
@pytest.mark.slow
def test_ten_minutes_of_sound_need_no_more_memory_than_one_second() -> None:
    program = lower(net("snet"))

    def resident() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def second(program: Program, current: Tensor, state: Any, number: int) -> tuple[Tensor, Any]:
        numbers = torch.rand(1, 8000, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        drawn = program.run(current, numbers, state=state)
        assert drawn.bits.isfinite().all()
        return drawn.codes[:, -1], drawn.state

    current, state, before = torch.tensor([8]), None, 0
    for number in range(600):
        current, state = second(program, current, state, number)
        if number == 10:
            before = resident()
    assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves(state))
    assert resident() - before < 2**22
