"""The interpreter of samples: its draws are those of core's sampling, and each instruction is what torch has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.sampling import Sampling
from sinuous.kernels import cpu
from sinuous.kernels.cpu.sample_program import Assembler, Place, Samples, System
from sinuous.kernels.torch.discretization import conj, dot, times

REASON = cpu.interpreter_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C kernels here: {REASON}")
V = 37


def run(
    assembler: Assembler, logits: Place, current: Tensor, uniforms: Tensor, **options: object
) -> tuple[Samples, Tensor]:
    """Samples of told codes, and the rows' memory."""
    assembler.sample(logits)
    program = assembler.finish()
    memory = torch.zeros(len(uniforms), program.stride)
    positions = torch.zeros(program.counters, dtype=torch.int64)
    return program.run(current, uniforms, memory, positions, **options), memory


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.2},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.0},
    ],
)
def test_the_draw_is_that_of_core_sampling(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    table = 3 * torch.randn(V, V, generator=generator)
    table[:, 5] = -torch.inf
    uniforms = torch.rand(400, 1, dtype=torch.float64, generator=generator)
    uniforms[:V], uniforms[V : 2 * V] = 0, 1 - 2**-53
    codes = torch.arange(400) % V
    assembler = Assembler()
    logits = assembler.place(V)
    assembler.embed(logits, table)
    drawn, _ = run(assembler, logits, codes, uniforms, **options)
    assert torch.equal(drawn.codes[:, 0], Sampling(**options).choose(table[codes], uniforms[:, 0]))
    bits = -table[codes].double().log_softmax(-1).gather(1, drawn.codes) / torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(drawn.bits, bits, rtol=1e-5, atol=1e-6)


def test_codes_that_are_told_are_read_and_not_drawn() -> None:
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    assembler = Assembler()
    logits = assembler.place(V)
    assembler.embed(logits, table)
    told = torch.tensor([[4, 9, -1, 7]])
    drawn, _ = run(assembler, logits, torch.tensor([2]), torch.full((1, 4), 0.5, dtype=torch.float64), codes=told)
    assert drawn.codes[0, [0, 1, 3]].tolist() == [4, 9, 7]
    read = torch.tensor([2, 4, 9, int(drawn.codes[0, 2])])
    nats = F.cross_entropy(table[read].double(), drawn.codes[0], reduction="none")
    torch.testing.assert_close(drawn.bits[0], nats / torch.tensor(2.0, dtype=torch.float64).log(), rtol=0, atol=1e-5)


def test_logits_that_are_no_numbers_are_reported() -> None:
    assembler = Assembler()
    logits = assembler.place(3)
    assembler.embed(logits, torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, torch.nan], [0.0, 0.0, 0.0]]))
    with pytest.raises(FloatingPointError, match="sample 1 "):
        run(assembler, logits, torch.tensor([0]), torch.full((1, 3), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 5, 16, 64, 100])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 21])
def test_pointwise_instructions_and_matrices_are_those_of_torch(width: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(width)
    table = 4 * torch.randn(rows, width, generator=generator)
    weight = torch.randn(2 * width, width, generator=generator) / width
    bias = torch.randn(2 * width, generator=generator)
    scale = torch.randn(3, width, generator=generator)
    assembler = Assembler()
    x, both = assembler.place(width), assembler.slots(2, width)
    results = {name: assembler.place(width) for name in ("gelu", "relu", "layer", "scalar", "glu", "gate")}
    assembler.embed(x, table)
    assembler.linear(both, x, weight, bias)
    assembler.gelu(results["gelu"], x)
    assembler.relu(results["relu"], x)
    assembler.layer_norm(results["layer"], x, scale[0], scale[1], 1e-5)
    assembler.scalar_norm(results["scalar"], x, torch.tensor([0.3]), torch.tensor([1.7]))
    assembler.copy(results["glu"], x)
    assembler.glu(results["glu"], both, add=True)
    assembler.gate(results["gate"], both)
    logits = assembler.place(rows)
    _, memory = run(assembler, logits, torch.arange(rows), torch.zeros(rows, 1, dtype=torch.float64))
    halves = F.linear(table, weight, bias)
    a, b = halves.chunk(2, 1)
    deviation, mean = torch.std_mean(table, 1, correction=0, keepdim=True)
    expected = {
        "gelu": F.gelu(table),
        "relu": F.relu(table),
        "layer": F.layer_norm(table, (width,), scale[0], scale[1], 1e-5),
        "scalar": 1.7 / deviation * (table - mean + 0.3),
        "glu": table + F.glu(halves),
        "gate": a.tanh() * b.sigmoid(),
    }
    for name, place in results.items():
        if name == "scalar" and width == 1:
            continue  # which divides by the deviation of one number
        got = memory[:, place.begin : place.begin + place.padded]
        torch.testing.assert_close(got[:, :width], expected[name], rtol=2e-6, atol=5e-6, msg=name)
        assert not got[:, width:].any(), name


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_systems_run_their_recurrence(rank: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    width, modes = 19, 3
    system = System(
        random(width, modes, 2), random(width, modes, 2), random(width, modes, 2),
        random(rank, width, modes, 2), random(rank, width, modes, 2), random(width),
    )  # fmt: skip
    start, table = random(rows, width, modes, 2), random(V, width)
    assembler = Assembler()
    x, y, logits = assembler.place(width), assembler.place(width), assembler.place(V)
    assembler.embed(x, table)
    states = assembler.systems(y, x, system)
    assembler.sample(logits)
    program, told = assembler.finish(), torch.randint(V, (rows, 6), generator=generator)
    memory = torch.zeros(rows, program.stride)
    states.write(memory, start)
    uniforms = torch.zeros(rows, 6, dtype=torch.float64)
    program.run(told[:, 0], uniforms, memory, torch.zeros(0, dtype=torch.int64), codes=told.roll(-1, 1))
    hidden = start
    for t in range(6):
        u = table[told[:, t]]
        low = sum(
            (p * dot(q, hidden)[..., None, None] for p, q in zip(system.p, system.q, strict=True)),
            torch.zeros_like(hidden),
        )
        hidden = times(system.factor.expand_as(hidden), hidden) - low + system.b * u[..., None, None]
        output = dot(conj(system.readout), hidden) + system.skip * u
    torch.testing.assert_close(states.read(memory).double(), hidden, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(memory[:, y.begin : y.begin + width].double(), output, rtol=1e-6, atol=1e-5)


def test_logistics_have_the_mass_between_borders_half_way_between_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(V, 9, generator=generator)
    parameters[:, 6:] -= 2
    levels = torch.rand(V, generator=generator).sort().values
    assembler = Assembler()
    x, logits = assembler.place(9), assembler.place(V)
    assembler.embed(x, parameters)
    assembler.logistic(logits, x, levels, 1e-3, (-2.5, 2.0))
    _, memory = run(assembler, logits, torch.arange(V), torch.zeros(V, 1, dtype=torch.float64))
    share, offset, scale = parameters.double().chunk(3, 1)
    borders = (levels[1:] + levels[:-1]).double() / 2
    z = (borders[:, None] - levels[:, None, None] - offset[:, None]) / scale.clamp(-2.5, 2.0).exp()[:, None]
    below = F.pad(F.pad((z.sigmoid() * share.softmax(1)[:, None]).sum(2), (1, 0)), (0, 1), value=1)
    expected = torch.log(0.999 * below.diff(dim=1) + 1e-3 / V)
    got = memory[:, logits.begin : logits.begin + V].double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(V, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_rank_that_the_interpreter_lacks_is_refused() -> None:
    assembler = Assembler()
    x, one = assembler.place(1), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="rank"):
        assembler.systems(x, x, System(one, one, one, one.expand(3, 1, 1, 2), one.expand(3, 1, 1, 2), one[0, 0, :1]))
