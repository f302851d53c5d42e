"""DNA-xLSTM: sizes, the authors' weights, directions, parts of a sequence, and options that do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from xlstm_equations import Sizes, both_strands, features, file_of, with_shared_strands

import sinuous
from sinuous.genomics.letters import DNATokenizer

DIM, UP = 32, 32  # the feed-forward: 1.1 · 32, rounded down to a multiple of 8
COMPLEMENT = DNATokenizer().complement
DIRECTIONS = ["causal", "tied", "alternating"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def create(kinds: str = "sm", heads: int = 2, **options: Any) -> nn.Module:
    pattern = [{"s": "slstm", "m": "mlstm"}[kind] for kind in kinds]
    options = {"dim": DIM, "depth": len(kinds), "num_heads": heads, "pattern": pattern, **options}
    model = sinuous.create_model("dna_xlstm_nano", dtype=torch.float64, **options)
    if "checkpoint_path" not in options:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw_ids(batch: int = 2, steps: int = 11) -> Tensor:
    return torch.randint(12, (batch, steps))


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("dna_xlstm_500k", {}, 522_368),
        ("dna_xlstm_1_4m", {}, 1_403_136),
        ("dna_xlstm_2m", {}, 2_101_504),
        ("dna_xlstm_2m_mlstm", {}, 2_097_960),
        ("dna_xlstm_4m_mlstm", {}, 3_771_208),
        ("dna_xlstm_4m_mlstm", {"bias": False}, 3_745_864),
        ("dna_xlstm_1_4m", {"dim": 128}, 349_312),
        ("dna_xlstm_1_4m", {"dim": 128, "depth": 5}, 435_840),
        ("dna_xlstm_1_4m", {"dim": 128, "pattern": "mlstm"}, 440_992),
        ("dna_xlstm_2m", {"strands": "shared", "direction": "tied"}, 2_101_504),
    ],
)
def test_models_have_the_authors_numbers_of_parameters(name: str, options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_nano_model_is_small_enough_to_ship() -> None:
    assert sinuous.model_info("dna_xlstm_nano").params <= 2_000_000


def load(state: dict[str, Tensor], folder: Path, sizes: Sizes, prefix: str = "model.backbone.", **options: Any) -> Any:
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, folder / "loss.ckpt")
    of_file = {"bias": sizes.bias, "rotary": sizes.rotary, "sinusoidal": sizes.sinusoidal}
    return create(sizes.kinds, sizes.heads, checkpoint_path=folder / "loss.ckpt", **{**of_file, **options})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(12, DIM, "ss", heads=4, up=UP),
        Sizes(12, DIM, "mm", heads=1, bias=True, rotary=True, sinusoidal=True),
        Sizes(12, DIM, "ms", heads=2, up=UP, rotary=True),
    ],
    ids=lambda sizes: sizes.kinds,
)
def test_the_authors_weights_give_their_features_and_logits(direction: str, sizes: Sizes, tmp_path: Path) -> None:
    state, ids = file_of(sizes), draw_ids()
    model = load(state, tmp_path, sizes, direction=direction)
    expected = features(state, sizes, ids, direction)
    torch.testing.assert_close(model.forward_features(ids), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids), expected @ state["lm_head.weight"].T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("prefix", ["", "model.backbone.", "model.backbone.backbone."])
def test_the_authors_weights_of_both_strands_give_their_features_and_logits(
    direction: str, prefix: str, tmp_path: Path
) -> None:
    sizes, ids = Sizes(12, DIM, "ss", heads=4, up=UP, published_strands=True), draw_ids()
    state = file_of(sizes)
    model = load(
        with_shared_strands(state, COMPLEMENT),
        *(tmp_path, sizes, prefix),
        direction=direction,
        strands="shared",
        published_strands=True,
    )
    expected = both_strands(state, sizes, ids, COMPLEMENT, direction)
    torch.testing.assert_close(model.forward_features(ids), expected, rtol=0, atol=1e-10)
    u, v = expected[..., :DIM], expected[..., DIM:].flip(-1)
    head = state["lm_head.weight"]
    torch.testing.assert_close(model(ids), u @ head.T + v @ head[COMPLEMENT].T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_packed_published_strands_equal_separate_calls(direction: str) -> None:
    model = create("ss", 4, direction=direction, strands="shared", published_strands=True)
    ids, bounds = draw_ids(1, 9), torch.tensor([0, 4, 4, 9])
    separate = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], 1)
    torch.testing.assert_close(model(ids, bounds), separate, rtol=0, atol=1e-12)


def test_weights_of_the_other_kind_of_model_are_refused_with_the_remedy(tmp_path: Path) -> None:
    sizes = Sizes(12, DIM, "ss", heads=4, up=UP)
    single = file_of(sizes)
    shared = with_shared_strands(single, COMPLEMENT)
    with pytest.raises(ValueError, match=r"model of both strands .*build it with strands='shared'"):
        load(shared, tmp_path, sizes)
    with pytest.raises(ValueError, match=r"model of single strands .*build it with strands='single' or 'conjoined'"):
        load(single, tmp_path, sizes, strands="shared")
    load(single, tmp_path, sizes, strands="conjoined")
    with pytest.raises(ValueError, match="other complements"):
        load(with_shared_strands(single, torch.arange(12)), tmp_path, sizes, strands="shared")
    with pytest.raises(ValueError, match="4 heads and the model's 2"):
        load(single, tmp_path, sizes, num_heads=2)


def test_published_strands_are_not_equivariant_beyond_one_head() -> None:
    def error(heads: int, published: bool) -> Tensor:
        torch.manual_seed(0)
        model, ids = create("ss", heads, strands="shared", published_strands=published), draw_ids()
        turned = model(model.reverse_complement(ids))
        return (turned - model(ids).flip(1)[..., COMPLEMENT]).abs().max()

    assert error(1, True) < 1e-11
    assert error(4, False) < 1e-11
    assert error(4, True) > 0.1


@pytest.mark.parametrize("kinds", ["ss", "mm"])
def test_a_tied_model_turns_with_its_sequence(kinds: str) -> None:
    model, ids = create(kinds, direction="tied"), draw_ids()
    torch.testing.assert_close(model(ids.flip(1)), model(ids).flip(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"rotary": True, "bias": True}, {"sinusoidal": True}], ids=str)
def test_prefill_and_steps_give_what_the_whole_gives(options: dict[str, Any]) -> None:
    model, ids = create(**options), draw_ids()
    first, state = model.prefill(ids[:, :3])
    second, state = model.prefill(ids[:, 3:5], state)
    rest = []
    for t in range(5, ids.shape[1]):
        logits, state = model.step(ids[:, t], state)
        rest.append(logits)
    whole = torch.cat([first, second, torch.stack(rest, 1)], 1)
    torch.testing.assert_close(whole, model(ids), rtol=0, atol=1e-10)
    steps = model.step(ids[:, 0], model.initial_state(len(ids)))[0]
    torch.testing.assert_close(steps, model(ids)[:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"sinusoidal": True}], ids=str)
@pytest.mark.parametrize("state", [(), "state", (None, None, None)], ids=str)
def test_states_of_nothing_are_refused(state: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="state must be"):
        create(**options).step(draw_ids()[:, 0], state)


@pytest.mark.parametrize("direction", ["tied", "alternating"])
def test_models_of_both_directions_have_no_state(direction: str) -> None:
    model, ids = create(direction=direction), draw_ids()
    assert not model.causal
    for call in (lambda: model.prefill(ids), lambda: model.step(ids[:, 0], ()), lambda: model.initial_state(1)):
        with pytest.raises(NotImplementedError, match="looks at the future"):
            call()
    with pytest.raises(ValueError, match="build the model with direction='causal'"):
        _ = model.trunk


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"sinusoidal": True}], ids=str)
def test_packed_sequences_have_the_logits_of_separate_calls(direction: str, options: dict[str, Any]) -> None:
    model = create("sm" if direction == "tied" else "msm", direction=direction, **options)
    ids, bounds = draw_ids(1, 9), torch.tensor([0, 2, 2, 9])
    separate = torch.cat([model(ids[:, :2]), model(ids[:, 2:])], 1)
    torch.testing.assert_close(model(ids, bounds), separate, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"direction": "both"}, "direction must be one of 'causal', 'tied', 'alternating'"),
        ({"strands": "double"}, "strands must be one of 'single', 'conjoined', 'shared'"),
        ({"published_strands": True}, "published_strands=True is for the authors' weights of strands='shared'"),
        ({"kinds": "ss", "rotary": True}, "rotary=True is for mlstm, which the pattern .* lacks"),
        ({"kinds": "ss", "bias": True}, "bias=True is for mlstm"),
        ({"pattern": "hydra"}, "pattern must name causal mixers"),
        ({"pattern": "rwkv7", "direction": "tied"}, "direction='tied' is for mixers that share nothing"),
        ({"dim": 33, "num_heads": 3, "sinusoidal": True}, "sinusoidal=True needs an even dim"),
        ({"vocab_size": 11, "strands": "shared"}, "vocab_size must be the 12 tokens of DNATokenizer or more"),
        ({"class_complement": [0]}, "class_complement is for classes on both strands"),
        ({"join_dim": 8}, "join_dim is for head='position' on both strands"),
        (
            {"strands": "shared", "head": "position", "num_classes": 3, "class_complement": [1, 2, 0]},
            "class_complement must name for each of the 3 classes",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        create(**options)


@pytest.mark.parametrize("pattern", ["mamba", ["gla", "rwkv7"]], ids=str)
@pytest.mark.parametrize("direction", ["causal", "alternating"])
def test_other_causal_mixers_take_the_same_directions(pattern: Any, direction: str) -> None:
    model, ids = create(pattern=pattern, direction=direction, strands="shared"), draw_ids()
    turned = model(model.reverse_complement(ids))
    torch.testing.assert_close(turned, model(ids).flip(1)[..., COMPLEMENT], rtol=0, atol=1e-9)
