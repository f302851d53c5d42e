"""Properties of attention: its definition, heads in groups, rotary positions, and a window with its cache."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinuous.core import mixers
from sinuous.core.mixers import attention, positions

DIM = 24
EDGES = [0, 5, 5, 12, 13]
BOTH = ["softmax_attention", "sliding_window_attention"]
HEADS: dict[str, dict[str, Any]] = {
    "one head": {},
    "heads": {"num_heads": 6},
    "groups": {"num_heads": 6, "num_kv_heads": 2},
    "one group": {"num_heads": 6, "num_kv_heads": 1, "qk_norm": True},
    "wide heads": {"num_heads": 3, "head_dim": 10, "qkv_bias": True},
    "without positions": {"num_heads": 8, "rope_theta": None},
    "short waves": {"num_heads": 4, "rope_theta": 100.0},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, **options: Any) -> Any:
    mixer = mixers.build_mixer(name, DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def sequence(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def definition(mixer: Any, x: Tensor, window: int) -> Tensor:
    """One query and one head at a time; rotary positions as products of complex numbers."""
    heads, groups, width = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim

    def project(layer: Any, norm: Any, count: int, turned: bool) -> Tensor:
        y = layer(x).reshape(*x.shape[:2], count, width)
        if isinstance(norm, torch.nn.Module) and hasattr(norm, "weight"):
            y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        if mixer.rope_theta is None or not turned:
            return y
        pairs = torch.complex(y[..., : width // 2], y[..., width // 2 :])
        for t, j in itertools.product(range(x.shape[1]), range(width // 2)):
            angle = t * mixer.rope_theta ** (-2 * j / width)
            pairs[:, t, :, j] *= complex(math.cos(angle), math.sin(angle))
        return torch.cat([pairs.real, pairs.imag], -1)

    with torch.no_grad():
        q = project(mixer.q_proj, mixer.q_norm, heads, True)
        k = project(mixer.k_proj, mixer.k_norm, groups, True)
        v = project(mixer.v_proj, None, groups, False)
        y = torch.zeros_like(q)
        for t, h in itertools.product(range(x.shape[1]), range(heads)):
            seen, group = slice(max(0, t - window + 1), t + 1), h // (heads // groups)
            weights = torch.softmax((k[:, seen, group] * q[:, t, None, h]).sum(-1) / width**0.5, -1)
            y[:, t, h] = (weights[..., None] * v[:, seen, group]).sum(1)
        return y.flatten(2) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_attention_is_its_definition(options: dict[str, Any]) -> None:
    mixer, x = build("softmax_attention", **options), sequence()
    torch.testing.assert_close(mixer(x), definition(mixer, x, x.shape[1]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [1, 2, 5, 12, 13, 40])
def test_a_window_is_its_definition(window: int, options: dict[str, Any]) -> None:
    mixer, x = build("sliding_window_attention", window_size=window, **options), sequence()
    torch.testing.assert_close(mixer(x), definition(mixer, x, window), atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 31])
def test_a_window_equals_masked_attention_with_its_gradients(length: int) -> None:
    shape = (2, length, 4, 6)
    q, k, v, dy = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(4))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < 4)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    actual = attention.attend_window(q, k, v, 4, None, None)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


WINDOWS = [{"window_size": w, **h} for w in (1, 3, 4, 13) for h in (HEADS["groups"], HEADS["without positions"])]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("cuts", [(0, 1, 13), (2, 3, 9), (6, 6, 12), (1, 11, 13)], ids=str)
def test_a_window_carries_on_from_any_cut(options: dict[str, Any], cuts: tuple[int, ...]) -> None:
    mixer, x = build("sliding_window_attention", **options), sequence().requires_grad_()
    state, outputs = None, []
    for begin, end in itertools.pairwise((0, *cuts)):
        y, state = mixer.prefill(x[:, begin:end], state)
        outputs.append(y)
    for x_t in x[:, cuts[-1] :].unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t[:, None])
    y, expected = torch.cat(outputs, 1), mixer(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert state.position.tolist() == [13, 13, 13]
    assert state.keys.shape == state.values.shape == mixer.initial_state(3).keys.shape
    grads = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(*grads, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_a_window_stays_inside_its_packed_sequence(options: dict[str, Any]) -> None:
    mixer, x = build("sliding_window_attention", **options), sequence(1)
    packed = mixer(x, cu_seqlens=torch.tensor(EDGES, dtype=torch.int32))
    separate = torch.cat([mixer(x[:, a:b]) for a, b in itertools.pairwise(EDGES)], 1)
    torch.testing.assert_close(packed, separate, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_compiles_traces_and_scripts_with_groups_and_packing(name: str) -> None:
    options = {"window_size": 4} if name == "sliding_window_attention" else {}
    mixer, x = build(name, qk_norm=True, **HEADS["groups"], **options), sequence(1)
    cu_seqlens = torch.tensor(EDGES)
    absent = {"cu_seqlens": None, "grid": None}
    for packing in ({}, {"cu_seqlens": cu_seqlens}):
        expected = mixer(x, **packing)
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x, **packing), expected)
        torch.testing.assert_close(torch.jit.script(mixer)(x, **packing), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(mixer, concrete_args=absent)(x), mixer(x))


@pytest.mark.parametrize("name", BOTH)
def test_rows_that_stand_at_different_steps_share_a_batch(name: str) -> None:
    """Rows of a window may; a growing cache has one length, so its rows must agree."""
    options = {"window_size": 4} if name == "sliding_window_attention" else {}
    mixer, x = build(name, **HEADS["groups"], **options), sequence(2)
    lengths = (2, 9) if name == "sliding_window_attention" else (9, 9)
    states = [mixer.prefill(x[i : i + 1, :length])[1] for i, length in enumerate(lengths)]
    together = type(states[0])(*(torch.cat(pair) for pair in zip(*states, strict=True)))
    x_t = torch.stack([x[i, length] for i, length in enumerate(lengths)])
    expected = torch.cat([mixer(x[i : i + 1, : length + 1])[:, -1] for i, length in enumerate(lengths)])
    torch.testing.assert_close(mixer.step(x_t, together)[0], expected, atol=1e-12, rtol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_is_linear_in_length(packed: bool) -> None:
    mixer, sizes = build("sliding_window_attention", window_size=8, num_heads=4), []
    for length in (256, 1024):
        x = sequence(1, length).requires_grad_()
        cu_seqlens = torch.tensor([0, length // 3, length]) if packed else None
        with Largest() as largest:
            mixer(x, cu_seqlens).sum().backward()
        sizes.append(largest.elements)
    assert sizes[1] <= 4.1 * sizes[0]


def test_a_cache_grows_by_a_step_and_keeps_turned_keys() -> None:
    mixer, x = build("softmax_attention", **HEADS["groups"]), sequence()
    _, state = mixer.prefill(x[:, :6])
    assert state.keys.shape == state.values.shape == (3, 6, 2, 4)
    _, after = mixer.step(x[:, 6], state)
    assert after.keys.shape == (3, 7, 2, 4)
    assert torch.equal(after.keys[:, :6], state.keys)
    torch.testing.assert_close(after.keys, mixer.prefill(x[:, :7])[1].keys)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 3, 16, dtype=torch.float64).unbind(0)
    scores = [
        (positions.rotate(q, torch.tensor([[t]]), 1e4) * positions.rotate(k, torch.tensor([[s]]), 1e4)).sum(-1)
        for t, s in ((5, 2), (105, 102), (3, 0))
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-12, rtol=0)
    turned = positions.rotate(q, torch.tensor([[7]]), 1e4)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-12, rtol=0)


def test_angles_of_half_precision_are_not_rounded() -> None:
    x = torch.randn(1, 1, 2, 8)
    far = torch.tensor([[100_001]])
    half = positions.rotate(x.bfloat16(), far, 1e4)
    exact = positions.rotate(x.bfloat16().double(), far, 1e4)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_steps_and_segments_count_packed_and_continued_sequences() -> None:
    x = torch.zeros(1, 13, 1)
    packed = torch.tensor(EDGES)
    assert positions.steps(x, None, packed).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0]]
    assert positions.segments(x, packed).tolist() == [[0] * 5 + [2] * 7 + [3]]
    assert positions.steps(x[:, :3], torch.tensor([4, 0]), None).tolist() == [[4, 5, 6], [0, 1, 2]]
    assert positions.steps(x[:, :2], None, None).tolist() == [[0, 1]]


def test_published_names_and_shapes() -> None:
    mixer = mixers.build_mixer("sliding_window_attention", 32, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True)
    assert {name: tuple(t.shape) for name, t in mixer.state_dict().items()} == {
        "q_proj.weight": (32, 32),
        "q_proj.bias": (32,),
        "k_proj.weight": (16, 32),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 32),
        "v_proj.bias": (16,),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
        "o_proj.weight": (32, 32),
    }


@pytest.mark.parametrize(("dim", "heads"), [(768, 12), (192, 3), (200, 2), (24, 1), (64, 1)])
def test_heads_have_64_channels_or_a_little_more(dim: int, heads: int) -> None:
    assert mixers.build_mixer("softmax_attention", dim).num_heads == heads


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_weights_of_transformers_give_its_outputs(family: str) -> None:
    pytest.importorskip("transformers")
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    others = {"vocab_size": 7, "intermediate_size": 8, "num_hidden_layers": 1, "attn_implementation": "eager"}
    window = {"sliding_window": 5} if family == "mistral" else {}
    config = CONFIG_MAPPING[family](**sizes, **others, **window)
    model = MODEL_MAPPING[type(config)](config).double().eval()
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    steps = torch.arange(13)[None]
    arguments = {"config": config, "inputs_embeds": x, "attention_mask": None, "past_key_values": None}
    make_mask = create_sliding_window_causal_mask if window else create_causal_mask
    theirs = model.layers[0].self_attn
    with torch.no_grad():
        mask = make_mask(**arguments, position_ids=steps)
        turn = model.rotary_emb(x, steps)
        expected = theirs(x, position_embeddings=turn, attention_mask=mask)[0]
    name = "sliding_window_attention" if window else "softmax_attention"
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qk_norm": family == "qwen3"}
    options |= {"norm_eps": config.rms_norm_eps, **({"window_size": 5} if window else {})}
    ours = mixers.build_mixer(name, 32, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    # transformers computes its angles in fp32.
    torch.testing.assert_close(ours(x), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide dim 24 .got 5.; choose a divisor or give head_dim"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads 4 .got 3."),
        ({"num_heads": 8}, "head_dim must be even for rotary positions .got 3."),
        ({"num_heads": 0}, "num_heads must be at least 1 .got 0."),
        ({"head_dim": 0}, "head_dim must be at least 1 .got 0."),
    ],
)
def test_heads_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixers.build_mixer("softmax_attention", DIM, **options)


def test_a_window_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window_size must be at least 1 \(got 0\)"):
        mixers.build_mixer("sliding_window_attention", DIM, window_size=0)
