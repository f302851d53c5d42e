"""The stack: what it tells blocks, what it hands from one to the next, and how large they write."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sinuous.core import mixers
from sinuous.core.mixers import contract
from sinuous.core.parts import MLPS, PLACE
from sinuous.core.stack import Stack

DIM = 24
EDGES = [0, 5, 5, 12, 13]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(pattern: Any = "mamba", depth: int = 3, **options: Any) -> Stack:
    """In float64, with no two parameters alike, so that a swapped or unused one shows; ready to be compared."""
    stack = Stack(DIM, depth, pattern, **{"dtype": torch.float64, **options}).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stack


def stream(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def in_turn(stack: Stack, x: Tensor, *rest: Any) -> list[Tensor]:
    """The stream after each block."""
    outputs = []
    for block in stack:
        x = block(x, *rest)
        outputs.append(x)
    return outputs


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_blocks_run_in_turn_and_packed_sequences_stay_apart() -> None:
    stack, x, edges = build(("mamba", "gla"), mlp="swiglu"), stream(1), torch.tensor(EDGES)
    close(stack(x), in_turn(stack, x)[-1])
    close(stack(x, edges), in_turn(stack, x, edges)[-1])
    assert not torch.allclose(stack(x, edges), stack(x))


def test_every_block_is_told_the_grid() -> None:
    stack, x = build("ss2d", causal=False), stream(2, 12)
    close(stack(x, None, (3, 4)), in_turn(stack, x, None, (3, 4))[-1])
    assert not torch.allclose(stack(x, None, (3, 4)), stack(x, None, (4, 3)))


def test_taps_are_the_outputs_of_the_blocks_that_are_asked_for() -> None:
    stack, x = build(depth=4), stream()
    outputs = in_turn(stack, x)
    last, tapped = stack.forward_intermediates(x, taps=(2, 0))
    close(last, outputs[3])
    assert len(tapped) == 2
    close(tapped[0], outputs[0])
    close(tapped[1], outputs[2])
    runs = []
    for block in stack:
        block.register_forward_hook(lambda *_: runs.append(1))
    last, (tap,) = stack.forward_intermediates(x, taps=[1], stop_early=True)
    assert len(runs) == 2
    close(last, outputs[1])
    close(tap, outputs[1])
    assert stack.forward_intermediates(x, taps=(), stop_early=True)[1] == []


def test_taps_reach_blocks_that_share() -> None:
    stack, x = build("rwkv7", depth=3), stream()
    last, tapped = stack.forward_intermediates(x, taps=range(3))
    close(last, stack(x))
    close(tapped[2], last)
    assert tapped[0].shape == x.shape


@pytest.mark.parametrize(
    ("rounding", "ratio", "multiple", "hidden"),
    [
        ("up", 1.1, 8, 32),
        ("down", 1.1, 8, 24),
        ("up", 2, 8, 48),
        ("down", 2, 8, 48),
        ("down", 23 / 24 + 1 / 24, 24, 24),
    ],
)
@pytest.mark.parametrize("mlp", MLPS)
def test_the_width_of_mlps_is_rounded_as_told(
    mlp: str, rounding: str, ratio: float, multiple: int, hidden: int
) -> None:
    stack = Stack(DIM, 1, mlp=mlp, mlp_ratio=ratio, mlp_multiple_of=multiple, mlp_rounding=rounding)
    assert stack[0].mlp.fc2.weight.shape == (DIM, hidden)


def test_an_mlp_that_is_rounded_away_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the MLP no width; give a smaller mlp_multiple_of"):
        Stack(DIM, 1, mlp="gelu", mlp_ratio=1.0, mlp_multiple_of=32, mlp_rounding="down")
    with pytest.raises(ValueError, match="mlp_rounding must be 'up' or 'down'"):
        Stack(DIM, 1, mlp="gelu", mlp_rounding="nearest")


def test_mixers_are_told_their_place_and_so_are_twins() -> None:
    for causal in (True, False):
        stack = build(("rwkv4", "gla"), 4, causal=causal)
        for i in (0, 2):
            mixer = stack[i].mixer
            for side in (mixer,) if causal else (mixer.past, mixer.future):
                assert (side.block_index, side.num_blocks) == (i, 4)


def test_a_slice_is_a_plain_list_and_blocks_can_be_taken_off() -> None:
    stack, x = build(depth=4), stream()
    expected = in_turn(stack, x)[1]
    part = stack[::2]
    assert type(part) is nn.ModuleList
    assert list(part) == [stack[0], stack[2]]
    del stack[2:]
    assert len(stack) == 2
    close(stack(x), expected)
    y, state = stack.prefill(x[:, :6])
    close(torch.cat([y, stack.step(x[:, 6], state)[0][:, None]], 1), expected[:, :7])


def test_a_stack_that_sees_both_sides_carries_no_state() -> None:
    stack = build(causal=False)
    for call in (
        lambda: stack.prefill(stream()),
        lambda: stack.step(stream()[:, 0], (None,) * 3),
        lambda: stack.initial_state(1),
    ):
        with pytest.raises(NotImplementedError, match="looks at the future"):
            call()


def test_an_option_that_the_mixer_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match="'gla' has no option d_state; it has"):
        build("gla", mixer_options={"gla": {"d_state": 8}})


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_places_of_the_pattern_have_options_of_their_own() -> None:
    stack = build(("gla", "gla"), 5, mixer_options=[{"num_heads": 2}, {"num_heads": 3}])
    assert [block.mixer.num_heads for block in stack] == [2, 3, 2, 3, 2]
    with pytest.raises(ValueError, match="mixer_options must have one entry for each of the 2 places"):
        build(("gla", "mamba"), mixer_options=[{}])


def test_small_weights_depend_on_their_inputs_alone() -> None:
    stack = Stack(256, 8, "gla", mlp="gelu", weight_init="small")
    stack.init_weights()
    for weight, inputs in ((stack[7].mlp.fc1.weight, 256), (stack[7].mlp.fc2.weight, 1024)):
        assert weight.std().item() == pytest.approx((2 / (5 * inputs)) ** 0.5, rel=0.05)
    alone = mixers.build_mixer("gla", 256)
    torch.testing.assert_close(stack[7].mixer.o_proj.weight.std(), alone.o_proj.weight.std(), rtol=0.05, atol=0)


@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_scripts_compiles_and_exports(placement: str) -> None:
    stack, x, file = (
        build(("mamba", "hydra"), mlp="gelu", norm_placement=placement, causal=False),
        stream(),
        io.BytesIO(),
    )
    with torch.no_grad():
        expected = stack(x)
        close(torch.jit.script(stack)(x), expected)
        close(torch.compile(stack, fullgraph=True, backend="aot_eager")(x), expected)
        torch.export.save(torch.export.export(stack, (x,)), file)
        file.seek(0)
        close(torch.export.load(file).module()(x), expected)


def test_names_without_weight_decay_exist() -> None:
    stack = build(("mamba", "rwkv7"), causal=False)
    assert "0.mixer.future.A_log" in stack.no_weight_decay()
    assert stack.no_weight_decay() <= {name for name, _ in stack.named_parameters()}


@pytest.mark.parametrize("mlp", ["none", *MLPS])
@pytest.mark.parametrize("causal", [True, False])
def test_what_writes_to_the_stream_is_divided_by_the_root_of_its_summands(causal: bool, mlp: str) -> None:
    """And nothing else is: as `Mixer.output_weights` names it, not by how names end."""
    for name in mixers.list_mixers():
        if causal and not mixers.mixer_class(name).causal:
            continue
        stack = Stack(DIM, 4, name, mlp=mlp, causal=causal)
        torch.manual_seed(1)
        stack.init_weights()
        found = {key: parameter.clone() for key, parameter in stack.named_parameters()}
        torch.manual_seed(1)
        for block in stack:
            block.init_weights()
        own_rule = PLACE & mixers.mixer_options(name)
        for i, block in enumerate(stack):
            writes = set() if own_rule else {f"{i}.mixer.{key}" for key in block.mixer.output_weights()}
            writes |= {f"{i}.mlp.fc2.weight"} if mlp != "none" else set()
            for key, parameter in block.named_parameters(prefix=str(i)):
                size = (8 if mlp != "none" else 4) ** 0.5 if key in writes else 1.0
                torch.testing.assert_close(found[key] * size, parameter, msg=key)


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_the_stream_keeps_its_size_at_the_start(name: str) -> None:
    """Its variance after the last block, over that after the first."""
    stack = Stack(32, 16, name, causal=False).eval()
    stack.init_weights()
    with torch.no_grad():
        _, (first, last) = stack.forward_intermediates(torch.randn(2, 36, 32), None, (6, 6), taps=(0, 15))
    # slstm's norm writes a variance of 1 (its twins' mean one of 1/2), and a state read as it is has no weights.
    # vir_retention_grid adds up all cells, by a formula without a norm.
    bound = {"slstm": 8.0, "min_gru": 3.0, "min_lstm": 3.0, "vir_retention_grid": 2.0}.get(name, 1.5)
    assert last.var() < bound * first.var()


def test_a_mixer_from_elsewhere_is_scaled_by_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shift(contract.Mixer):
        causal = constant_state = True

        def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__()
            self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
            self.mouth = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

        def init_weights(self) -> None:
            nn.init.ones_(self.out_proj.weight)
            nn.init.ones_(self.mouth)

        def output_weights(self) -> set[str]:
            return {"mouth"}

    monkeypatch.setitem(contract._MIXERS, "shift", Shift)
    stack = Stack(DIM, 4, "shift")
    stack.init_weights()
    assert torch.equal(stack[0].mixer.out_proj.weight, torch.ones(DIM, DIM))
    assert torch.equal(stack[0].mixer.mouth, torch.full((DIM,), 0.5))


def test_blocks_take_rates_of_stochastic_depth_one_by_one() -> None:
    def rates(rate: Any, depth: int = 3) -> list[float]:
        return [
            getattr(block.drop_path, "drop_prob", 0.0) for block in build("mamba", depth=depth, drop_path_rate=rate)
        ]

    assert rates(0.4) == pytest.approx([0.0, 0.2, 0.4])
    assert rates([0.3, 0.0, 0.1]) == pytest.approx([0.3, 0.0, 0.1])
    for wrong in ([0.1, 0.2], [0.1, 0.2, 1.5], [0.1, 0.2, "0.3"], "0.1"):
        with pytest.raises(ValueError, match="drop_path_rate must"):
            rates(wrong)
