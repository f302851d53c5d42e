"""Every registered mixer keeps the contract: a new one is tested by being registered."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinuous.core import mixers
from sinuous.core.mixers.lru import ACTIVATIONS

DIM = 24
CAUSAL = [name for name in mixers.list_mixers() if mixers.mixer_class(name).causal]
EDGES = [0, 5, 5, 12, 13]  # one packed sequence is empty, one has a single step


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, **options: object) -> mixers.Mixer:
    """Build in float64, with no two parameters alike, so that a swapped or unused one shows."""
    mixer = mixers.build_mixer(name, DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def sequence(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def test_both_published_mixers_are_registered() -> None:
    assert {"mamba", "vim_pair"} <= set(mixers.list_mixers())


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_output_has_the_shape_and_dtype_of_the_input(name: str) -> None:
    for batch, length in ((3, 13), (1, 1), (2, 0)):
        y = build(name)(x := sequence(batch, length))
        assert y.shape == x.shape
        assert y.dtype == x.dtype


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_every_parameter_gets_a_gradient(name: str) -> None:
    mixer = build(name)
    mixer(sequence()).square().sum().backward()
    assert [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", [n for n in mixers.list_mixers() if "norm_eps" in mixers.mixer_options(n)])
def test_the_epsilon_of_a_norm_reaches_it(name: str) -> None:
    norm: dict[str, object] = {"qk_norm": True} if "qk_norm" in mixers.mixer_options(name) else {}
    norm = {"output_norm": "rms"} if name == "linear_attention" else {} if name == "delta_net" else norm
    mixer, x = build(name, **norm), sequence()
    other = mixers.build_mixer(name, DIM, dtype=torch.float64, norm_eps=0.5, **norm)
    other.load_state_dict(mixer.state_dict())
    assert not torch.allclose(other(x), mixer(x), rtol=1e-3)


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    mixer, x = build(name), sequence(1)
    packed = mixer(x, cu_seqlens=torch.tensor(EDGES))
    separate = torch.cat([mixer(x[:, a:b]) for a, b in itertools.pairwise(EDGES)], 1)
    torch.testing.assert_close(packed, separate, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_causal_says_what_holds(name: str) -> None:
    mixer, x = build(name), sequence(1).requires_grad_()
    middle = x.shape[1] // 2
    (grad,) = torch.autograd.grad(mixer(x)[:, middle].sum(), x)
    assert grad[:, : middle + 1].abs().amin() > 0
    assert bool(grad[:, middle + 1 :].any()) is not mixer.causal


@pytest.mark.parametrize("prefix", [0, 1, 6, 13])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_and_steps_equal_forward(name: str, prefix: int) -> None:
    mixer, x = build(name), sequence()
    y, state = mixer.prefill(x[:, :prefix], mixer.initial_state(3))
    outputs = [y]
    for x_t in x[:, prefix:].unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_goes_on_from_a_state_and_passes_gradients_through_it(name: str) -> None:
    mixer, x = build(name), sequence().requires_grad_()
    _, state = mixer.prefill(x[:, :6])
    tail, _ = mixer.prefill(x[:, 6:], state)
    whole = mixer(x)[:, 6:]
    torch.testing.assert_close(tail, whole, atol=1e-10, rtol=0)
    expected = torch.autograd.grad(whole.square().sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(tail.square().sum(), x)[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", [n for n in CAUSAL if mixers.mixer_class(n).constant_state])
def test_a_constant_state_does_not_grow(name: str) -> None:
    mixer = build(name)
    shapes = {tuple(t.shape for t in mixer.prefill(sequence(2, length))[1]) for length in (1, 5, 40)}
    assert shapes == {tuple(t.shape for t in mixer.initial_state(2))}
    assert all(shape[0] == 2 for shape in next(iter(shapes)))


@pytest.mark.parametrize("name", CAUSAL)
def test_an_exported_step_can_be_saved_with_its_state(name: str) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = build(name)

        def forward(self, x_t: Tensor, state: object) -> object:
            return self.mixer.step(x_t, state)

    module, x_t = Step().eval(), sequence()[:, 0]
    state = module.mixer.initial_state(3)
    with torch.no_grad():
        program, file = torch.export.export(module, (x_t, state)), io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        y, new = torch.export.load(file).module()(x_t, state)
        expected, expected_state = module(x_t, state)
    torch.testing.assert_close(y, expected)
    assert type(new) is type(expected_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CAUSAL)
def test_initial_state_follows_the_parameters_unless_told(name: str, dtype: torch.dtype) -> None:
    mixer = mixers.build_mixer(name, DIM, dtype=dtype)
    expected = [t.dtype for t in mixer.prefill(sequence(2).to(dtype))[1]]
    assert [t.dtype for t in mixer.initial_state(2)] == expected
    assert [t.dtype for t in mixers.build_mixer(name, DIM).initial_state(2, dtype=dtype)] == expected
    assert {t.device.type for t in mixer.initial_state(2, device=torch.device("meta"))} == {"meta"}


@pytest.mark.parametrize("name", [n for n in mixers.list_mixers() if n not in CAUSAL])
def test_a_mixer_of_both_directions_has_no_state(name: str) -> None:
    mixer = build(name)
    for call in (lambda: mixer.prefill(sequence()), lambda: mixer.initial_state(1)):
        with pytest.raises(NotImplementedError, match="looks at the future"):
            call()


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_init_weights_fills_everything_after_to_empty(name: str) -> None:
    with torch.device("meta"):
        mixer = mixers.build_mixer(name, DIM)
    mixer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            tensor.fill_(math.nan)
    mixer.init_weights()
    assert all(torch.isfinite(t).all() for t in (*mixer.parameters(), *mixer.buffers()))
    assert mixer(torch.randn(1, 5, DIM)).isfinite().all()


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_bf16_in_gives_bf16_out_near_fp32(name: str) -> None:
    mixer, x = mixers.build_mixer(name, DIM), sequence().float()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if not parameter.any():  # as an output projection that starts at zero, which would hide everything
                parameter.copy_(0.1 * torch.randn_like(parameter))
    expected, half = mixer(x), mixer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_rows_of_a_batch_do_not_meet(name: str) -> None:
    mixer, x = build(name), sequence()
    x[1] = math.nan
    torch.testing.assert_close(mixer(x)[::2], mixer(x[::2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_autocast_stays_near_fp32(name: str) -> None:
    mixer, x = build(name).float(), sequence().float()
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixer(x)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", [*mixers.list_mixers(), "two mamba"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_compiles_whole_and_traces_and_scripts(name: str) -> None:
    mixer = mixers.Bidirectional("mamba", DIM).double() if name == "two mamba" else build(name)
    x, absent = sequence(), {"cu_seqlens": None, "grid": None}
    torch.compiler.reset()  # mixers that inherit one forward would together exceed the recompilations it may have
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(mixer, concrete_args=absent)(x), mixer(x))
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_parameters_without_weight_decay_exist(name: str) -> None:
    mixer = build(name)
    assert mixer.no_weight_decay() <= {n for n, _ in mixer.named_parameters()}


WITHOUT_OUTPUT_WEIGHTS = {"min_gru", "min_lstm"}  # a state between the bounds of what goes in, read as it is


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_a_mixer_whose_output_weights_are_zero_says_nothing_of_its_input(name: str) -> None:
    mixer = build(name, **({"proj_out": True} if name in WITHOUT_OUTPUT_WEIGHTS else {}))
    parameters = dict(mixer.named_parameters())
    writes = mixer.output_weights()
    assert writes
    assert writes <= parameters.keys()
    x = sequence().requires_grad_()
    (before,) = torch.autograd.grad(mixer(x).square().sum(), x)
    assert before.any()
    with torch.no_grad():
        for key in writes:
            parameters[key].fill_(-1.0 if name == "slstm" else 0.0)  # whose weight is kept less one
    y = mixer(x)
    torch.testing.assert_close(y, y[:1, :1].expand_as(y), atol=1e-12, rtol=0)
    (after,) = torch.autograd.grad(y.square().sum(), x)
    assert not after.any()


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_default_mixers_name_the_weights_of_their_output(name: str) -> None:
    assert bool(mixers.build_mixer(name, DIM).output_weights()) is (name not in WITHOUT_OUTPUT_WEIGHTS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"activation": kind}) for name in ("lru", "s5") for kind in ACTIVATIONS),
        ("gate_loop", {"swish_gate": False}),
        ("s4", {"final_act": "id"}),
        ("mamba", {"bias": True}),
        ("longhorn", {"bias": True}),
        ("vim_pair", {"bias": True}),
        ("mamba2", {"bias": True}),
        ("hydra", {"bias": True}),
        ("mlstm", {"bias": True}),
    ],
)
def test_output_weights_follow_the_options(name: str, options: dict[str, object]) -> None:
    mixer, x = build(name, **options), sequence()
    if name == "gate_loop":
        assert mixer.output_weights() == set()
        return
    with torch.no_grad():
        for key in mixer.output_weights():
            mixer.get_parameter(key).zero_()
    y = mixer(x)
    torch.testing.assert_close(y, y[:1, :1].expand_as(y), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["mamba", "longhorn", "vim_pair"])
def test_biases_are_added_where_the_published_layers_add_them(name: str) -> None:
    plain, full = build(name, conv_bias=False), build(name, bias=True)
    added = {key for key, _ in full.named_parameters()} - {key for key, _ in plain.named_parameters()}
    convolutions = {"conv1d.bias", "conv1d_b.bias"} if name == "vim_pair" else {"conv1d.bias"}
    assert added == {"in_proj.bias", "out_proj.bias"} | convolutions
    full.load_state_dict(plain.state_dict(), strict=False)
    x = sequence()
    shifted = full(x)
    with torch.no_grad():
        for key in added - {"out_proj.bias"}:
            before = full(x)
            full.get_parameter(key).zero_()
            assert not torch.allclose(full(x), before)
    torch.testing.assert_close(full(x), plain(x) + full.get_parameter("out_proj.bias"), atol=1e-12, rtol=0)
    assert not torch.allclose(full(x), shifted)


def test_mamba2_with_d_for_every_channel_is_that_with_d_for_every_head_where_they_agree() -> None:
    heads, channels = (build("mamba2", D_has_hdim=wide, headdim=8) for wide in (False, True))
    state = heads.state_dict()
    channels.load_state_dict({**state, "D": state["D"].repeat_interleave(8)})
    x = sequence()
    torch.testing.assert_close(channels(x), heads(x), atol=1e-12, rtol=0)
    with torch.no_grad():
        channels.D[0] += 1
    assert not torch.allclose(channels(x), heads(x))


def test_a_twin_names_the_output_weights_of_both() -> None:
    assert mixers.Bidirectional("gla", DIM).output_weights() == {"past.o_proj.weight", "future.o_proj.weight"}


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_reads_grid_says_what_holds(name: str) -> None:
    mixer, x = build(name), sequence(2, 12)
    row, grid, turned = mixer(x), mixer(x, None, (3, 4)), mixer(x, None, (4, 3))
    for other in (row, turned):
        assert torch.allclose(grid, other, atol=1e-10) is not mixer.reads_grid


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("grid", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", [name for name in mixers.list_mixers() if mixers.mixer_class(name).reads_grid])
def test_an_empty_grid_gives_no_tokens(name: str, grid: tuple[int, int], batch: int) -> None:
    x = torch.zeros(batch, 0, DIM, requires_grad=True)
    y = mixers.build_mixer(name, DIM)(x, grid=grid)
    y.sum().backward()
    assert y.shape == x.shape


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_a_shared_option_is_an_option(name: str) -> None:
    option = mixers.mixer_class(name).shared_option
    assert option is None or option in mixers.mixer_options(name)


def test_an_unknown_mixer_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match="no mixer 'mambo'; did you mean 'mamba'"):
        mixers.build_mixer("mambo", DIM)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'mamba' has no option d_stat; it has .*d_state"):
        mixers.build_mixer("mamba", DIM, d_stat=8)


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="'mamba' is taken by"):
        mixers.register_mixer("mamba")(mixers.VimPair)
    assert mixers.mixer_class("mamba") is mixers.Mamba


@pytest.mark.parametrize("name", ["mamba", "vim_pair"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="d_state must be at least 1"):
        mixers.build_mixer(name, DIM, d_state=0)


def test_mamba_has_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(t.shape) for name, t in mixers.Mamba(32, d_state=16).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 32, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "A_log": (64, 16),
        "D": (64,),
        "out_proj.weight": (32, 64),
    }


def test_mamba_starts_as_in_the_paper() -> None:
    mixer = mixers.Mamba(64)
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-3 - 1e-6
    assert dt.max() <= 0.1 + 1e-6
    assert dt.max() / dt.min() > 10
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(mixer.D, torch.ones(128))
    assert mixer.dt_proj.weight.abs().max() <= 4**-0.5


@pytest.mark.parametrize(("option", "low", "high"), [("matched", 1e-3, 0.1), ("reference", math.log(2), math.log(2))])
def test_vim_pair_starts_its_second_direction_as_told(option: str, low: float, high: float) -> None:
    mixer = mixers.VimPair(64, backward_dt_init=option)
    first, second = F.softplus(mixer.dt_proj.bias), F.softplus(mixer.dt_proj_b.bias)
    assert first.min() >= 1e-3 - 1e-6
    assert first.max() <= 0.1 + 1e-6
    assert second.min() >= low - 1e-6
    assert second.max() <= high + 1e-6
    with pytest.raises(ValueError, match="backward_dt_init must be"):
        mixers.VimPair(64, backward_dt_init="fixed")


def twin(name: str) -> str:
    """The parameter of the other direction."""
    if "A_" in name:
        return "A_b_log" if name == "A_log" else "A_log"
    layer, dot, kind = name.partition(".")
    if layer in ("in_proj", "out_proj"):
        return name
    return (layer.removesuffix("_b") if layer.endswith("_b") else layer + "_b") + dot + kind


def test_vim_pair_with_swapped_directions_mirrors_time() -> None:
    mixer, x = build("vim_pair"), sequence()
    expected = mixer(x).flip(1)
    mixer.load_state_dict({twin(name): tensor.clone() for name, tensor in mixer.state_dict().items()})
    torch.testing.assert_close(mixer(x.flip(1)), expected, atol=1e-10, rtol=0)


def test_vim_pair_without_its_second_direction_is_half_a_mamba() -> None:
    pair, mamba, x = build("vim_pair"), build("mamba"), sequence()
    with torch.no_grad():
        pair.D_b.zero_()
        pair.x_proj_b.weight.zero_()
    mamba.load_state_dict({n: t for n, t in pair.state_dict().items() if n in mamba.state_dict()})
    torch.testing.assert_close(pair(x), mamba(x) / 2, atol=1e-12, rtol=0)
    pair.divide_out = False
    torch.testing.assert_close(pair(x), mamba(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_bidirectional_averages_two_mixers(name: str) -> None:
    both, x = mixers.Bidirectional(name, DIM, dtype=torch.float64), sequence()
    expected = (both.past(x) + both.future(x.flip(1)).flip(1)) / 2
    torch.testing.assert_close(both(x), expected, atol=1e-12, rtol=0)
    assert both.no_weight_decay() <= {n for n, _ in both.named_parameters()}
    packed = both(x[:1], cu_seqlens=torch.tensor(EDGES))
    separate = torch.cat([both(x[:1, a:b]) for a, b in itertools.pairwise(EDGES)], 1)
    torch.testing.assert_close(packed, separate, atol=1e-10, rtol=0)


def test_bidirectional_refuses_a_mixer_that_looks_both_ways() -> None:
    with pytest.raises(ValueError, match="already looks both ways"):
        mixers.Bidirectional("vim_pair", DIM)
