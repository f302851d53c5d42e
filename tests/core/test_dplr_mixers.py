"""RWKV-7 and Kimi delta attention: their equations written out, what is published about them, and their options."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sinuous.core import mixers
from sinuous.core.norms import GatedRMSNorm
from sinuous.core.sequence_model import SequenceModel

DIM = 24
LENGTH = 70  # more than the chunk of the op
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("rwkv7", {"num_heads": 3}),
    ("rwkv7", {"num_heads": 2, "value_dim": 32, "block_index": 2, "num_blocks": 3, "norm_eps": 1e-3}),
    ("rwkv7", {"num_heads": 2, "value_residual": True, "v_low_rank_dim": 5, "decay_low_rank_dim": 4}),
    ("kda", {"num_heads": 3}),
    ("kda", {"num_heads": 2, "num_v_heads": 6, "head_dim": 5, "expand_v": 1.6, "conv_bias": True}),
    ("kda", {"lower_bound": -5.0, "allow_neg_eigval": True, "use_short_conv": False}),
]
EVERY_VARIANT = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{name}-{'-'.join(options)}" for name, options in VARIANTS]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, options: dict[str, Any], dim: int = DIM) -> Any:
    """Build in float64, with no two parameters alike."""
    mixer = mixers.build_mixer(name, dim, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def sequence(batch: int = 2, length: int = LENGTH, dim: int = DIM) -> Tensor:
    return torch.randn(batch, length, dim, dtype=torch.float64)


def extra(mixer: Any, batch: int, length: int) -> dict[str, Tensor]:
    """The values of a first layer, for a mixer that needs them."""
    if getattr(mixer, "v_lora", None) is None:
        return {}
    return {"v_first": torch.randn(batch, length, DIM, dtype=torch.float64)}


def low_rank(lora: Any, x: Tensor, f: Any) -> Tensor:
    return lora.lora["2"](f(lora.lora["0"](x)))


def rwkv7(m: Any, x: Tensor, v_first: Tensor | None = None) -> Tensor:
    """Section 4.1 of arXiv 2503.14456: the transition as a matrix, diag(w) - (κ ⊙ α) κᵀ."""
    batch, length, dim = x.shape
    before = torch.cat([torch.zeros(batch, 1, dim, dtype=x.dtype), x[:, :-1]], 1)
    mix = {n: torch.lerp(x, before, getattr(m, f"x_{n}")) for n in "rwkvag"}
    r, k, v = m.r_proj(mix["r"]), m.k_proj(mix["k"]), m.v_proj(mix["v"])
    if v_first is not None:
        v = torch.lerp(v, v_first, torch.sigmoid(low_rank(m.v_lora, mix["v"], lambda z: z)))
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(m.w_lora, mix["w"], torch.tanh)))
    alpha = torch.sigmoid(low_rank(m.a_lora, mix["a"], lambda z: z))
    gate = low_rank(m.g_lora, mix["g"], torch.sigmoid)
    heads = m.memory_shape[0]
    r, w, alpha, kappa, k, v = (
        t.unflatten(-1, (heads, -1)) for t in (r, w, alpha, k * m.k_k, k * (1 + (alpha - 1) * m.k_a), v)
    )
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    S, outputs = torch.zeros(batch, heads, k.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(length):
        A = torch.diag_embed(w[:, t]) - (kappa * alpha)[:, t, :, :, None] * kappa[:, t, :, None]
        S = A @ S + k[:, t, :, :, None] * v[:, t, :, None]
        o = (r[:, t, :, None] @ S).squeeze(-2)
        o = (o - o.mean(-1, keepdim=True)) / torch.sqrt(o.var(-1, keepdim=True, unbiased=False) + m.g_norm.eps)
        bonus = (r[:, t] * m.r_k * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        outputs.append(o.flatten(1) * m.g_norm.weight + m.g_norm.bias + bonus.flatten(1))
    return m.o_proj(torch.stack(outputs, 1) * gate)


def kda(m: Any, x: Tensor) -> Tensor:
    """Section 3 of arXiv 2510.26692, with the gates of its section 4; the transition as a matrix."""

    def conv(layer: Any, z: Tensor) -> Tensor:
        if layer is not None:
            taps = layer.weight.shape[2]
            z = F.conv1d(F.pad(z.mT, (taps - 1, 0)), layer.weight, layer.bias, groups=z.shape[2]).mT
        return F.silu(z)

    q, k, v = (conv(getattr(m, f"{n}_conv1d"), getattr(m, f"{n}_proj")(x)) for n in "qkv")
    (heads, keys, values), batch = m.memory_shape, x.shape[0]
    q, k = (t.unflatten(-1, (-1, keys)) for t in (q, k))
    q, k = (t / torch.sqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(heads // t.shape[2], 2) for t in (q, k))
    v = v.unflatten(-1, (heads, values))
    z = (m.f_proj[1](m.f_proj[0](x)) + m.dt_bias).unflatten(-1, (heads, keys))
    A = m.A_log.exp()[:, None]
    g = -A * F.softplus(z) if m.lower_bound is None else m.lower_bound * torch.sigmoid(A * z)
    beta = torch.sigmoid(m.b_proj(x)) * m.greatest_beta
    S, outputs = torch.zeros(batch, heads, keys, values, dtype=x.dtype), []
    for t in range(x.shape[1]):
        kkT = k[:, t, :, :, None] * k[:, t, :, None]
        turn = torch.eye(keys, dtype=x.dtype) - beta[:, t, :, None, None] * kkT
        S = turn @ torch.diag_embed(g[:, t].exp()) @ S
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ S).squeeze(-2) * keys**-0.5)
    o = torch.stack(outputs, 1)
    o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + m.o_norm.eps) * m.o_norm.weight
    gate = torch.sigmoid(m.g_proj[1](m.g_proj[0](x)))
    return m.o_proj(o.flatten(-2) * gate)


EQUATIONS = {"rwkv7": rwkv7, "kda": kda}


@EVERY_VARIANT
def test_a_mixer_is_its_equation(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, options), sequence()
    extras = extra(mixer, 2, LENGTH)
    torch.testing.assert_close(mixer(x, **extras), EQUATIONS[name](mixer, x, **extras), atol=1e-9, rtol=1e-9)


@EVERY_VARIANT
def test_options_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, options), sequence(length=9)
    extras = extra(mixer, 2, 9)

    def part(piece: slice) -> dict[str, Tensor]:
        return {key: t[:, piece] for key, t in extras.items()}

    whole = mixer(x, **extras)
    y, state = mixer.prefill(x[:, :4], **part(slice(0, 4)))
    assert [t.shape for t in state] == [t.shape for t in mixer.initial_state(2)]
    steps = [y]
    for t in range(4, 9):
        y_t, state = mixer.step(x[:, t], state, **{key: value[:, t] for key, value in extras.items()})
        steps.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-10, rtol=0)
    edges = [0, 3, 3, 9]
    first = {key: t[:1] for key, t in extras.items()}
    packed = mixer(x[:1], cu_seqlens=torch.tensor(edges), **first)
    separate = [mixer(x[:1, a:b], **{key: t[:, a:b] for key, t in first.items()}) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(packed, torch.cat(separate, 1), atol=1e-10, rtol=0)
    mixer.init_weights()
    assert mixer(x, **extras).isfinite().all()


@EVERY_VARIANT
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_options_script_and_trace(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, options), sequence(length=5)
    extras = extra(mixer, 2, 5)
    expected = mixer(x, **extras)
    traced = torch.fx.symbolic_trace(mixer, concrete_args={"cu_seqlens": None, "grid": None})
    torch.testing.assert_close(traced(x, **extras), expected)
    torch.testing.assert_close(torch.jit.script(mixer)(x, **extras), expected)


# The value residual, and how a model hands the first layer's values on.


def first_and_later(**options: Any) -> tuple[Any, Any]:
    return build("rwkv7", options), build("rwkv7", {"value_residual": True, **options})


def test_layers_share_the_values_of_the_first() -> None:
    (first, later), x = first_and_later(num_heads=3, value_dim=18), sequence(length=6)
    y, state, shared = first.mix_sharing(x)
    before = torch.cat([torch.zeros(2, 1, DIM, dtype=x.dtype), x[:, :-1]], 1)
    torch.testing.assert_close(shared[0], first.v_proj(torch.lerp(x, before, first.x_v)))
    torch.testing.assert_close((y, *state), (first(x), *first.prefill(x)[1]), atol=0, rtol=0)
    hidden = x + y
    actual, _, handed_on = later.mix_sharing(hidden, shared)
    assert handed_on is shared
    torch.testing.assert_close(actual, later(hidden, v_first=shared[0]), atol=0, rtol=0)
    torch.testing.assert_close(actual, rwkv7(later, hidden, shared[0]), atol=1e-9, rtol=1e-9)


def test_a_value_residual_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"value_residual needs v_first; pass the values that the first layer shares"):
        build("rwkv7", {"value_residual": True})(sequence())


def test_a_mixer_that_shares_nothing_says_so() -> None:
    with pytest.raises(NotImplementedError, match="KDA shares nothing"):
        build("kda", {}).mix_sharing(sequence())


VOCAB = 11


def model_of(pattern: Any = "rwkv7", depth: int = 3, **options: Any) -> SequenceModel:
    """Build in float64, with no two parameters alike."""
    model = SequenceModel(VOCAB, DIM, depth, pattern, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids_of(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def written_out(model: Any, ids: Tensor) -> Tensor:
    """Blocks in turn, with RWKV-7's equations and the first values of all."""
    x, v_first = model.embedding(ids), None
    for block in model.layers:
        z, m = block.norm(x), block.mixer
        if isinstance(m, mixers.RWKV7):
            x = x + rwkv7(m, z, v_first)
            if v_first is None:
                before = torch.cat([torch.zeros(z.shape[0], 1, DIM, dtype=z.dtype), z[:, :-1]], 1)
                v_first = m.v_proj(torch.lerp(z, before, m.x_v))
        else:
            x = x + m(z)
        if block.mixes_channels:
            x = x + block.mlp(block.norm2(x))
    return model.norm_f(x) @ model.embedding.weight.mT


@pytest.mark.parametrize(
    ("pattern", "later"),
    [("rwkv7", [None, True, True, True]), (("gla", "rwkv7"), [None, None, None, True])],
)
def test_a_model_hands_the_first_values_to_later_blocks(pattern: Any, later: list[bool | None]) -> None:
    model, ids = model_of(pattern, 4, mlp="gelu", mixer_options={"rwkv7": {"num_heads": 3}}), ids_of()
    assert [getattr(block.mixer, "v_lora", None) is not None or None for block in model.layers] == later
    torch.testing.assert_close(model(ids), written_out(model, ids), atol=1e-9, rtol=1e-9)


def test_a_model_without_the_residual_has_first_layers_only() -> None:
    model, ids = model_of(mixer_options={"rwkv7": {"value_residual": False}}), ids_of()
    assert all(block.mixer.v_lora is None for block in model.layers)
    x = model.embedding(ids)
    for block in model.layers:
        x = x + rwkv7(block.mixer, block.norm(x))
    torch.testing.assert_close(model(ids), model.norm_f(x) @ model.embedding.weight.mT, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_model_hands_them_on_step_by_step(prefix: int) -> None:
    model, ids = model_of(("rwkv7", "gla"), 4), ids_of()
    y, state = model.prefill(ids[:, :prefix], model.initial_state(2))
    outputs = [y]
    for t in range(prefix, ids.shape[1]):
        y_t, state = model.step(ids[:, t], state)
        outputs.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), atol=1e-10, rtol=0)


def test_a_model_of_packed_sequences_hands_them_on() -> None:
    model, ids, edges = model_of(), ids_of(1), [0, 3, 3, 12]
    separate = torch.cat([model(ids[:, a:b]) for a, b in itertools.pairwise(edges)], 1)
    torch.testing.assert_close(model(ids, torch.tensor(edges)), separate, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_recomputed_blocks_reach_the_first_values(causal: bool) -> None:
    model, ids, edges = model_of(causal=causal, mlp="gelu"), ids_of(1), torch.tensor([0, 3, 12])
    model(ids, edges).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.any() for grad in expected.values())
    model.zero_grad()
    model.set_grad_checkpointing()
    model(ids, edges).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-10, rtol=1e-10)


def test_a_model_of_both_directions_shares_in_each() -> None:
    model, ids = model_of(depth=2, causal=False), ids_of()
    x = model.embedding(ids)
    v_first: dict[str, Tensor] = {}
    for block in model.layers:
        z, sides = block.norm(x), []
        for side, turn in (("past", lambda t: t), ("future", lambda t: t.flip(1))):
            m = getattr(block.mixer, side)
            sides.append(turn(rwkv7(m, turn(z), v_first.get(side))))
            v_first.setdefault(side, m.mix_sharing(turn(z))[2][0]) if m.v_lora is None else None
        x = x + (sides[0] + sides[1]) / 2
    torch.testing.assert_close(model(ids), model.norm_f(x) @ model.embedding.weight.mT, atol=1e-9, rtol=1e-9)
    edges = [0, 5, 12]
    separate = torch.cat([model(ids[:1, a:b]) for a, b in itertools.pairwise(edges)], 1)
    torch.testing.assert_close(model(ids[:1], torch.tensor(edges)), separate, atol=1e-10, rtol=0)


def test_a_model_that_shares_compiles_whole_and_its_step_exports() -> None:
    class Step(torch.nn.Module):
        def __init__(self, model: SequenceModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, x_t: Tensor, state: Any) -> Any:
            return self.model.step(x_t, state)

    model, ids, file = model_of(depth=2), ids_of(), io.BytesIO()
    state = model.initial_state(2)
    torch.compiler.reset()
    with torch.no_grad():
        expected, step = model(ids), model.step(ids[:, 0], state)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), expected)
        torch.testing.assert_close(torch.export.export(model, (ids,)).module()(ids), expected)
        torch.export.save(torch.export.export(Step(model), (ids[:, 0], state)), file)
        file.seek(0)
        actual = torch.export.load(file).module()(ids[:, 0], state)
    torch.testing.assert_close(actual[0], step[0])
    assert [type(one) for one in actual[1]] == [type(one) for one in step[1]]


# What is published.

SIX = {f"x_{n}": (1, 1, 16) for n in "rwkvag"}
PUBLISHED: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("rwkv7", {"num_heads": 2, "value_dim": 20, "value_residual": True, "gate_low_rank_dim": 5}, {
        **SIX, "k_k": (16,), "k_a": (16,), "r_k": (2, 8), "r_proj.weight": (16, 16), "k_proj.weight": (16, 16),
        "v_proj.weight": (20, 16), "o_proj.weight": (16, 20), "g_norm.weight": (20,), "g_norm.bias": (20,),
        **{f"{n}_lora.lora.0.weight": (rank, 16) for n, rank in (("w", 32), ("v", 32), ("a", 32), ("g", 5))},
        **{f"{n}_lora.lora.2.weight": (out, rank) for n, out, rank in (
            ("w", 16, 32), ("v", 20, 32), ("a", 16, 32), ("g", 20, 5))},
        **{f"{n}_lora.lora.2.bias": (out,) for n, out in (("w", 16), ("v", 20), ("a", 16))}}),
    ("kda", {"num_heads": 2, "num_v_heads": 4, "expand_v": 0.5, "conv_bias": True}, {
        "q_proj.weight": (16, 16), "k_proj.weight": (16, 16), "v_proj.weight": (16, 16), "o_proj.weight": (16, 16),
        **{f"{n}_conv1d.weight": (16, 1, 4) for n in "qkv"}, **{f"{n}_conv1d.bias": (16,) for n in "qkv"},
        "f_proj.0.weight": (4, 16), "f_proj.1.weight": (32, 4), "b_proj.weight": (4, 16), "A_log": (4,),
        "dt_bias": (32,), "g_proj.0.weight": (4, 16), "g_proj.1.weight": (16, 4), "g_proj.1.bias": (16,),
        "o_norm.weight": (4,)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "shapes"), PUBLISHED)
def test_names_and_shapes_are_the_published_ones(
    name: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    actual = mixers.build_mixer(name, 16, **options).state_dict()
    assert {key: tuple(t.shape) for key, t in actual.items()} == shapes


@pytest.mark.parametrize(
    ("dim", "ranks"), [(768, (64, 128, 64, 32)), (1024, (64, 160, 64, 64)), (2048, (128, 224, 128, 64))]
)
def test_ranks_follow_the_rule_of_the_authors(dim: int, ranks: tuple[int, ...]) -> None:
    with torch.device("meta"):
        mixer = mixers.RWKV7(dim, value_residual=True)
    loras = (mixer.w_lora, mixer.g_lora, mixer.a_lora, mixer.v_lora)
    assert tuple(lora.lora["0"].out_features for lora in loras if lora is not None) == ranks
    assert mixer.memory_shape == (dim // 64, 64, 64)


@pytest.mark.parametrize("index", [0, 5, 11])
def test_rwkv7_starts_as_published(index: int) -> None:
    mixer = mixers.RWKV7(128, block_index=index, num_blocks=12, value_residual=True)
    left, place, n = 1 - index / 12, index / 11, torch.arange(128) / 127
    torch.testing.assert_close(mixer.x_k[0, 0], 1 - (torch.arange(128) / 128) ** (0.7 * left))
    torch.testing.assert_close(mixer.x_w, mixer.x_a)
    torch.testing.assert_close(mixer.k_k, 0.76 - 0.1 * n)
    assert torch.equal(mixer.k_a, torch.full((128,), 1.02))
    assert torch.equal(mixer.r_k, torch.full((2, 64), -0.04))
    torch.testing.assert_close(mixer.g_norm.weight, torch.full((128,), ((index + 1) / 12) ** 0.7))
    bias = mixer.w_lora.lora["2"].bias
    # The ends of a head lie 2.5 beneath and above what the whole width rises by.
    torch.testing.assert_close(bias[0] + 2.5 - 0.5, torch.tensor(-6.0))
    torch.testing.assert_close(bias[-1] - 2.5 - 0.5, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(bias[64] + 2.5 - 0.5, -6 + 6 * n[64] ** (1 + place**0.3))
    assert not mixer.w_lora.lora["0"].weight.any()
    up = mixer.a_lora.lora["2"].weight
    torch.testing.assert_close(up.mT @ up, 0.01 * torch.eye(32), atol=1e-5, rtol=0)
    assert not mixer.o_proj.weight.any()
    gram = mixer.k_proj.weight @ mixer.k_proj.weight.mT
    torch.testing.assert_close(gram, 0.01 * torch.eye(128), atol=1e-5, rtol=0)
    assert mixer.no_weight_decay() == {*(f"x_{n}" for n in "rwkvag"), "k_k", "k_a", "r_k"}


def test_kda_starts_as_published() -> None:
    mixer = mixers.KDA(256, num_heads=64)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 2
    assert 14 < A.max() <= 16
    assert 1e-3 - 1e-6 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1 + 1e-6
    assert not mixers.KDA(32, lower_bound=-5.0).A_log.any()
    assert mixer.no_weight_decay() == {"A_log", "dt_bias"}
    assert mixers.KDA(2048).memory_shape == (16, 128, 128)


def test_a_sequence_model_tells_rwkv7_its_place() -> None:
    model = SequenceModel(11, 16, 3, "rwkv7")
    weights = [block.mixer.g_norm.weight[0].item() for block in model.layers]
    assert weights == pytest.approx([((i + 1) / 3) ** 0.7 for i in range(3)])
    assert [block.mixer.v_lora is None for block in model.layers] == [True, False, False]


@pytest.mark.parametrize("decay", [-5.0, -0.01])
def test_kda_forgets_no_faster_than_its_bound(decay: float) -> None:
    mixer, x = build("kda", {"lower_bound": decay}), 100 * sequence()
    g = mixer._log_decay(x)
    assert decay <= g.min() < 0.999 * decay
    assert g.max() <= 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rwkv7", {"num_heads": 5}, "dim must be a positive multiple of the number of heads"),
        ("rwkv7", {"num_heads": 3, "value_dim": 25}, "value_dim must be a positive multiple"),
        ("rwkv7", {"block_index": 2, "num_blocks": 2}, r"block_index must be one of the 2 .*got 2"),
        ("kda", {"lower_bound": 0.0}, "lower_bound must be negative"),
        ("kda", {"num_heads": 2, "num_v_heads": 3}, "num_v_heads must be a positive multiple"),
        ("kda", {"head_dim": 1, "expand_v": 0.5}, r"head_v_dim must be at least 1 \(got 0\)"),
        ("kda", {"conv_size": 0}, "conv_size must be at least 1"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixers.build_mixer(name, DIM, **options)


def test_a_gate_of_the_norm_is_silu_or_sigmoid() -> None:
    x, z = sequence().unbind(0)
    plain = F.rms_norm(x, [DIM], None, 1e-5)
    torch.testing.assert_close(GatedRMSNorm(DIM, activation="sigmoid")(x, z), plain * torch.sigmoid(z))
    torch.testing.assert_close(GatedRMSNorm(DIM)(x, z), plain * F.silu(z))
    with pytest.raises(ValueError, match="activation must be 'silu' or 'sigmoid'"):
        GatedRMSNorm(DIM, activation="tanh")
