"""Prot-xLSTM: sizes, the authors' weights and configurations, and positions that begin anew with each protein."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from xlstm_equations import Sizes, State, convolved, file_of, linear, norm

import sinuous
from sinuous import ops
from sinuous.core.generation import Sampling, generate
from sinuous.genomics.letters import ProteinTokenizer
from sinuous.genomics.prot_xlstm import ProtXLSTM, config_options
from sinuous.genomics.spans import cut

SMALL = Sizes(vocab=38, dim=32, kinds="mm", heads=2)


def small(**options: Any) -> ProtXLSTM:
    model = ProtXLSTM(**{"dim": 32, "depth": 2, "num_heads": 2, "dtype": torch.float64, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def proteins() -> tuple[Tensor, Tensor]:
    """Two rows of proteins, each behind its `<cls>`, and their positions; the first row begins inside of one."""
    ids = torch.randint(4, 24, (2, 30))
    ids[0, [7, 8, 20]] = ids[1, [0, 19]] = 0
    first = [*range(7), 0, *range(12), *range(10)]
    return ids, torch.tensor([first, [*range(19), *range(11)]])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "parameters"), [("prot_xlstm_26m", 25_918_080), ("prot_xlstm_102m", 102_167_680)])
def test_models_have_the_authors_numbers_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_nano_model_is_small_enough_to_ship_and_reads_proteins() -> None:
    model = sinuous.create_model("prot_xlstm_nano")
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert isinstance(model.tokenizer, ProteinTokenizer)
    assert model(model.tokenizer.encode("MKTAYIAKQR")[None]).shape == (1, 10, 38)
    assert small(vocab_size=30).tokenizer is None


@pytest.mark.parametrize(("name", "first", "last"), [("prot_xlstm_nano", 8.0, 8.0), ("prot_xlstm_26m", 3.0, 6.0)])
def test_memories_of_the_small_model_outlast_a_protein_at_the_start(name: str, first: float, last: float) -> None:
    model = sinuous.create_model(name, depth=1)
    (bias,) = (p for n, p in model.named_parameters() if n.endswith("fgate.bias"))
    assert torch.equal(bias, torch.linspace(first, last, len(bias)))


def test_positions_begin_anew_with_each_protein_and_end_with_the_last_one_published() -> None:
    model = small(max_position_embeddings=9)
    ids, places = proteins()
    expected = model(ids, position_ids=places.clamp(max=8))
    close(model(ids), expected)
    close(model(ids, position_ids=places), expected)
    assert (model(ids, position_ids=places.clamp(max=7)) - expected).abs().max() > 1e-6
    packed, bounds = ids.flatten()[None], torch.tensor([0, 30, 60])
    close(model(packed, bounds)[0], expected.flatten(0, 1))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 7, 8, 30])
def test_prefill_and_steps_equal_forward(prefix: int, told: bool) -> None:
    model = small(max_position_embeddings=15)
    ids, _ = proteins()
    places = torch.randint(0, 40, ids.shape) if told else None
    y, state = model.prefill(ids[:, :prefix], position_ids=None if places is None else places[:, :prefix])
    outputs = [y]
    for t in range(prefix, ids.shape[1]):
        y_t, state = model.step(ids[:, t], state, None if places is None else places[:, t])
        outputs.append(y_t[:, None])
    close(torch.cat(outputs, 1), model(ids, position_ids=places))


def test_generation_counts_as_reading_does() -> None:
    model, ids = small(), [0, 4, 5, 0, 6]
    tokens = generate(model, [ids], Sampling(max_new_tokens=5)).tokens[0].tolist()
    for n, token in enumerate(tokens):
        assert int(model(torch.tensor([ids + tokens[:n]]))[0, -1].argmax()) == token


def test_a_protein_with_spans_cut_out_has_positions_of_its_own() -> None:
    model, tokenizer = small(), ProteinTokenizer()
    ids, places = cut(tokenizer.encode("MKTAYIAKQR"), [(2, 4)], tokenizer)
    assert (model(ids[None], position_ids=places[None]) - model(ids[None])).abs().max() > 1e-6


@pytest.mark.parametrize("head", ["sequence", "position"])
def test_heads_for_classes(head: str) -> None:
    model, (ids, places) = small(head=head, num_classes=3), proteins()
    y = model(ids)
    assert y.shape == ((2, 3) if head == "sequence" else (2, 30, 3))
    close(model.forward_head(model.forward_features(ids, position_ids=places), ids), y)
    bounds = torch.tensor([0, 30, 60])
    packed = model(ids.flatten()[None], bounds)
    close(packed if head == "sequence" else packed[0], y if head == "sequence" else y.flatten(0, 1))


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Neighbouring channels of `[B, T, E]` turned by their places `[B, T]`."""
    rate = 5e5 ** -(torch.arange(0, x.shape[2], 2, dtype=torch.float64) / x.shape[2])
    angle = places[..., None] * rate
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def logits(state: State, sizes: Sizes, ids: Tensor, places: Tensor) -> Tensor:
    """The authors' model by its equations."""
    x = state["token_embedding.weight"][ids]
    for i in range(len(sizes.kinds)):
        p = {name.split(f".{i}.", 1)[1]: t for name, t in state.items() if f"blocks.{i}." in name}
        layer = {name.removeprefix("xlstm."): t for name, t in p.items()}
        u, z = linear(layer, "proj_up", norm(x, p["xlstm_norm.weight"])).chunk(2, -1)
        c = convolved(layer, u)
        q, k = turned(linear(layer, "q_proj", c), places), turned(linear(layer, "k_proj", c), places)
        v = linear(layer, "v_proj", u)
        gates = [linear(layer, f"mlstm_cell.{name}gate", torch.cat([q, k, v], -1)) for name in "if"]
        heads = [t.unflatten(-1, (sizes.heads, -1)) for t in (q, k, v)]
        h = ops.mlstm(*heads, *gates, backend="recurrent").flatten(-2)
        y = norm(h, layer["mlstm_cell.outnorm.weight"], sizes.heads) + layer["learnable_skip"] * c
        x = x + linear(layer, "proj_down", y * F.silu(z))
    return norm(x, state["xlstm_block_stack.post_blocks_norm.weight"]) @ state["lm_head.weight"].T


def create(file: Path, **options: Any) -> torch.nn.Module:
    sizes = {"dim": SMALL.dim, "depth": 2, "num_heads": SMALL.heads, "dtype": torch.float64}
    return sinuous.create_model("prot_xlstm_26m", checkpoint_path=file, **{**sizes, **options})


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "model.backbone.", ""])
def test_the_authors_weights_give_their_logits(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state, (ids, places) = file_of(SMALL), proteins()
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "pytorch_model.bin")
    model = create(tmp_path / "pytorch_model.bin")
    close(model(ids), logits(state, SMALL, ids, places))
    other = torch.randint(0, 2048, ids.shape)
    close(model(ids, position_ids=other), logits(state, SMALL, ids, other))


def test_weights_that_do_not_fit_are_refused_with_the_remedy(tmp_path: Path) -> None:
    file, state = tmp_path / "pytorch_model.bin", file_of(SMALL)
    torch.save(state, file)
    with pytest.raises(ValueError, match="build the model with num_heads=2"):
        create(file, num_heads=4)
    with pytest.raises(ValueError, match=r"layers\.2"):
        create(file, depth=3)
    torch.save({**state, "backbone.position_embedding.weight": torch.zeros(2048, 16)}, file)
    with pytest.raises(ValueError, match=r"learned positions \(position_embedding\), and a ProtXLSTM has rotary ones"):
        create(file)


CONFIG: dict[str, Any] = {
    "mlstm_block": {"mlstm": {"num_heads": 2, "proj_factor": 2.0}},
    "num_blocks": 2,
    "embedding_dim": 32,
    "vocab_size": 38,
    "position_embeddings": "rot_1d",
    "max_position_embeddings": 2048,
    "rope_base_frequency": 500_000,
    "bias": False,
}


def test_the_authors_configurations_say_how_to_build_a_model(tmp_path: Path) -> None:
    options = {"dim": 32, "depth": 2, "num_heads": 2, "vocab_size": 38, "rotary_theta": 5e5}
    options["max_position_embeddings"] = 2048
    old = {**CONFIG, "slstm_block": None, "slstm_at": []}
    (tmp_path / "config.json").write_text(json.dumps(old))
    for config in (CONFIG, old, {"model_type": "xlstm", "model": CONFIG}, tmp_path / "config.json"):
        assert config_options(config) == options
    assert ProtXLSTM(**config_options(CONFIG)).dim == 32
    without_theta = {key: value for key, value in CONFIG.items() if key != "rope_base_frequency"}
    assert config_options(without_theta)["rotary_theta"] == 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embeddings": "abs_2d"}, "position_embeddings 'abs_2d' and a ProtXLSTM 'rot_1d'"),
        ({"bias": True}, "bias True"),
        ({"mlstm_block": None}, "not Prot-xLSTM's .*config.json that lies beside"),
    ],
)
def test_configurations_of_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_options({**CONFIG, **change})


@pytest.mark.parametrize("places", [[[0, 1]], torch.zeros(2, 30), torch.zeros(1, 30, dtype=torch.long)])
def test_positions_that_do_not_fit_are_refused(places: Any) -> None:
    model, (ids, _) = small(), proteins()
    with pytest.raises(ValueError, match="position_ids must be int64"):
        model(ids, position_ids=places)
    for wrong in (torch.zeros(3, dtype=torch.long), [1, 2], "MKV"):
        with pytest.raises(ValueError, match="must be"):
            model(wrong)


def test_embeddings_count_from_the_start_of_each_sequence() -> None:
    model, ids = small(), torch.randint(4, 24, (1, 30))
    bounds = [0, 11, 30]
    x = model.embedding(ids).detach()
    separate = torch.cat([model(ids[:, a:b]) for a, b in itertools.pairwise(bounds)], 1)
    close(model(x, torch.tensor(bounds)), separate)
