"""The language model: one law for every mixer, the published sizes, and the authors' checkpoints."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import sinuous
from sinuous.core import mixers
from sinuous.core.blocks import PLACEMENTS
from sinuous.core.checkpoints import save_safetensors
from sinuous.core.language.models import checkpoint_filter_fn
from sinuous.core.parts import MLPS, NORMS
from sinuous.core.sequence_model import SequenceModel

VOCAB, DIM = 13, 24
CAUSAL = [name for name in mixers.list_mixers() if mixers.mixer_class(name).causal]
EDGES = [0, 5, 5, 12, 13]  # one packed sequence is empty, one has a single step

# Totals that the authors state, and totals that follow from the layout of the released files.
PUBLISHED = {"mamba_130m": 129_135_360}
DERIVED = {
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1_3b": 1_343_757_312,
    "mamba2_2_7b": 2_702_599_680,
    "xlstm_7b": 6_865_424_896,
    "xlstm_14m": 13_642_672,
}


def build(pattern: Any = "mamba", depth: int = 3, **options: Any) -> SequenceModel:
    """In float64, with no two parameters alike, so that a swapped or unused one shows; ready to be compared."""
    model = SequenceModel(VOCAB, DIM, depth, pattern, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def prefill_then_steps(model: SequenceModel, x: Tensor, prefix: int) -> Tensor:
    y, state = model.prefill(x[:, :prefix], model.initial_state(x.shape[0]))
    outputs = [y]
    for x_t in x[:, prefix:].unbind(1):
        y_t, state = model.step(x_t, state)
        outputs.append(y_t[:, None])
    return torch.cat(outputs, 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def near(ours: Tensor, theirs: Tensor) -> None:
    """transformers computes parts of its models in fp32 whatever it is given, so that fp32 is compared."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 6, 13])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_and_steps_equal_forward(name: str, prefix: int) -> None:
    model, x = build(name, 2), tokens()
    close(prefill_then_steps(model, x, prefix), model(x))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mlp", ["none", *MLPS])
@pytest.mark.parametrize("norm", NORMS)
def test_every_block_keeps_the_law_and_uses_its_parameters(norm: str, mlp: str, placement: str) -> None:
    model, x = build(norm=norm, mlp=mlp, norm_placement=placement, mlp_bias=True, tie_head=False), tokens()
    y = model(x)
    close(prefill_then_steps(model, x, 6), y)
    y.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_pattern_is_taken_in_turn_with_the_options_of_each_name() -> None:
    options = {"mamba": {"d_state": 4}}
    model = SequenceModel(VOCAB, DIM, 5, ["mamba", "vim_pair"], options, causal=False)
    kinds = [type(block.mixer).__name__ for block in model.layers]
    assert kinds == ["Bidirectional", "VimPair", "Bidirectional", "VimPair", "Bidirectional"]
    assert model.layers[0].mixer.past.d_state == 4
    assert model.layers[1].mixer.A_log.shape[1] == 16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_says_what_holds(name: str, causal: bool) -> None:
    model = build(name, 2, causal=causal)
    x = torch.randn(1, 9, DIM, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[:, 4].sum(), x)
    assert grad[:, :5].abs().sum(-1).amin() > 0
    assert bool(grad[:, 5:].any()) is not causal


def test_a_model_of_both_directions_has_no_state() -> None:
    model = build(causal=False)
    for call in (
        lambda: model.prefill(tokens()),
        lambda: model.initial_state(1),
        lambda: model.step(tokens()[:, 0], ()),
    ):
        with pytest.raises(NotImplementedError, match="looks at the future"):
            call()


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    model, x = build(name, 2), tokens(1)
    separate = torch.cat([model(x[:, a:b]) for a, b in itertools.pairwise(EDGES)], 1)
    close(model(x, cu_seqlens=torch.tensor(EDGES)), separate)


def test_embeddings_may_be_given_instead_of_ids() -> None:
    model, x = build(), tokens()
    embedded = model.embedding(x)
    close(model(embedded), model(x))
    close(model.prefill(embedded)[0], model(x))
    close(model.step(embedded[:, 0], model.initial_state(3))[0], model(x)[:, 0])


def test_prefill_can_spare_the_logits_that_are_not_asked_for() -> None:
    model, x = build(), tokens()
    last, state = model.prefill(x, last_only=True)
    whole, same = model.prefill(x)
    assert last.shape == (3, 1, VOCAB)
    close(last, whole[:, -1:])
    for a, b in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(same), strict=True):
        close(a, b)


def test_forward_is_features_and_head() -> None:
    model, x = build(logit_cap=1.0), tokens()
    features = model.forward_features(x)
    assert features.shape == (3, 13, DIM)
    raw = features @ model.embedding.weight.T
    close(model(x), torch.tanh(raw))
    assert raw.abs().max() > 1


def test_the_vocabulary_is_padded_and_the_head_tied_or_free() -> None:
    tied = SequenceModel(VOCAB, DIM, 1, pad_vocab_multiple=8)
    free = SequenceModel(VOCAB, DIM, 1, pad_vocab_multiple=8, tie_head=False)
    assert tied.padded_vocab_size == 16
    assert tied(tokens()).shape == (3, 13, 16)
    assert [n for n, _ in tied.named_parameters() if n.startswith("head")] == []
    assert free.head is not None
    assert free.head.weight.shape == (16, DIM)
    assert SequenceModel(VOCAB, DIM, 1).padded_vocab_size == VOCAB


def test_the_stream_is_fp32_in_a_model_of_half_precision() -> None:
    for placement in PLACEMENTS:
        streams: list[torch.dtype] = []
        for fp32 in (True, False):
            model = SequenceModel(
                VOCAB, DIM, 2, mlp="swiglu", norm_placement=placement, residual_in_fp32=fp32, dtype=torch.bfloat16
            )
            model.layers[1].register_forward_hook(lambda _m, _i, out, seen=streams: seen.append(out.dtype))
            logits, x = model(ids := tokens()), None
            assert logits.dtype == torch.bfloat16
            x, state = model.prefill(ids)
            step, _ = model.step(ids[:, 0], state)
            assert x.dtype == step.dtype == torch.bfloat16
        assert streams == [torch.float32, torch.bfloat16]


def test_bf16_and_autocast_stay_near_fp32() -> None:
    model, x = SequenceModel(VOCAB, DIM, 3, mlp="swiglu").eval(), tokens()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    for found in (cast, model.to(torch.bfloat16)(x)):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x, edges = build(mlp="gelu"), tokens(1), torch.tensor(EDGES)
    model(x, edges).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    runs = []
    model.layers[0].mixer.register_forward_hook(lambda *_: runs.append(1))
    model(x, edges).square().sum().backward()
    assert len(runs) == 2
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name])


def test_drop_rates_act_in_training_only() -> None:
    model, x = build(drop_rate=0.5, drop_path_rate=0.5, mlp="gelu"), tokens()
    torch.testing.assert_close(model(x), model(x), atol=0, rtol=0)
    model.train()
    assert not torch.equal(model(x), model(x))


def test_what_writes_to_the_stream_starts_smaller() -> None:
    torch.manual_seed(0)
    shallow = SequenceModel(VOCAB, 64, 1, mlp="gelu")
    deep = SequenceModel(VOCAB, 64, 8, mlp="gelu")
    for name in ("mixer.out_proj.weight", "mlp.fc2.weight"):
        spread = [m.get_parameter(f"layers.0.{name}").std() for m in (shallow, deep)]
        torch.testing.assert_close(spread[0] / spread[1], torch.tensor(8**0.5), rtol=0.05, atol=0)
    assert abs(deep.embedding.weight.std() - 0.02) < 2e-3


@pytest.mark.parametrize("mlp", ["geglu", "swiglu"])
def test_weights_can_start_as_in_xlstm(mlp: str) -> None:
    torch.manual_seed(0)
    model = SequenceModel(512, 64, 3, ["mlstm", "mamba"], mlp=mlp, tie_head=False, weight_init="xlstm")
    small, last = (2 / (5 * 64)) ** 0.5, 2 / (3 * 64**0.5)
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2 and "mixer" not in name}
    assert len(spread) == 2 + 3 * {"geglu": 2, "swiglu": 3}[mlp]
    for name, found in spread.items():
        assert found == pytest.approx(last if "fc2" in name else small, rel=0.05)
    plain = SequenceModel(512, 64, 3, ["mlstm", "mamba"], mlp=mlp, tie_head=False)
    spreads = [m.layers[1].mixer.out_proj.weight.std().item() for m in (model, plain)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.05)


def test_mixers_with_a_rule_for_the_depth_are_told_it() -> None:
    torch.manual_seed(0)
    model = SequenceModel(VOCAB, 64, 8, ["mlstm_large", "mamba"], mlp="gelu")
    assert [block.mixer.num_blocks for block in model.layers[::2]] == [8] * 4
    assert abs(model.layers[0].mixer.out_proj.weight.std() - 2 / (8 * 64**0.5)) < 2e-3


def test_init_weights_fills_everything_after_to_empty() -> None:
    for name in CAUSAL:
        with torch.device("meta"):
            model = SequenceModel(VOCAB, DIM, 1, name, mlp="swiglu", mlp_bias=True, norm="layer", tie_head=False)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(math.nan)
        model.init_weights()
        assert model(tokens()).isfinite().all()
        assert all(p.isfinite().all() for p in model.parameters())


def test_optimizers_find_their_groups() -> None:
    model = build(mlp="gelu", tie_head=False)
    names = {n for n, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    assert "layers.2.mixer.A_log" in model.no_weight_decay()
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == [0.125, 0.25, 0.5, 1.0]  # the embedding, then the blocks, the last of them with the norm and head


def test_compiles_whole() -> None:
    model, x = build(mlp="swiglu"), tokens()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_an_exported_step_can_be_saved() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def forward(self, x_t: Tensor, state: Any) -> Any:
            return self.model.step(x_t, state)

    module, x_t, file = Step().eval(), tokens()[:, 0], io.BytesIO()
    state = module.model.initial_state(3)
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (x_t, state)), file)
        file.seek(0)
        y, after = torch.export.load(file).module()(x_t, state)
        close(y, module(x_t, state)[0])
    assert type(after[0]) is type(state[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size must be at least 1 \(got 0\)"),
        ({"depth": 0}, r"depth must be at least 1 \(got 0\)"),
        ({"mlp": "relu"}, "mlp must be one of 'none', 'gelu', 'geglu', 'swiglu' .got 'relu'"),
        ({"norm": "batch"}, "norm must be one of 'rms', 'layer'"),
        ({"weight_init": "zero"}, "weight_init must be one of 'gpt2', 'xlstm', 'small' .got 'zero'"),
        ({"norm_placement": "none"}, "norm_placement must be one of"),
        ({"pattern": []}, "pattern must name at least one mixer"),
        ({"pattern": ["mamba", "mambo"]}, "no mixer 'mambo'; did you mean 'mamba'"),
        ({"pattern": "vim_pair"}, "'vim_pair' looks at the future and the model is causal; .* or causal=False"),
        ({"mixer_options": {"mamba9": {}}}, "options for mamba9, which the pattern .'mamba'. lacks"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceModel(**{"vocab_size": VOCAB, "dim": DIM, "depth": 2, **options})


def test_inputs_of_another_shape_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"ids must be \[B, T\] \(got \[4\]\)"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"embeddings must be \[B, T, dim\] with dim 24 \(got \[2, 3, 5\]\)"):
        model(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"ids must be \[B\] \(got \[2, 3\]\)"):
        model.step(torch.zeros(2, 3, dtype=torch.long), model.initial_state(2))


@pytest.mark.parametrize(("name", "params"), [*PUBLISHED.items(), *DERIVED.items()])
def test_published_models_have_their_number_of_parameters(name: str, params: int) -> None:
    info = sinuous.model_info(name)
    assert info.params == params
    assert info.domain == "language"
    assert info.weights == ()
    with pytest.raises(ValueError, match="no weights for"):
        sinuous.create_model(name, pretrained=True)


# Checkpoints. transformers is an independent implementation of the same models.


def as_the_authors_name_them(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """state-spaces/mamba's names, from transformers'."""
    return {name.replace("embeddings", "embedding"): tensor for name, tensor in state.items()}


def of_transformers(family: str) -> Any:
    """A small model of another implementation, with no two parameters alike."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "tie_word_embeddings": True}
    more = {
        "Mamba": {"state_size": 8, "time_step_rank": 2},
        "Mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
        "xLSTM": {"num_blocks": 3, "embedding_dim": 32, "num_heads": 2, "tie_word_embeddings": False},
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **more[family]})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


SMALL = {"vocab_size": 13, "pad_vocab_multiple": 8, "dim": 32, "depth": 3}
MAMBA = {**SMALL, "mixer_options": {"mamba": {"d_state": 8}}}
MAMBA2 = {**SMALL, "mixer_options": {"mamba2": {"headdim": 8, "ngroups": 2}}}
XLSTM = {**SMALL, "mixer_options": {"mlstm_large": {"num_heads": 2}}}


@pytest.mark.parametrize("layout", ["transformers", "authors", "model."])
@pytest.mark.parametrize(
    ("family", "name", "options"),
    [("Mamba", "mamba_130m", MAMBA), ("Mamba2", "mamba2_130m", MAMBA2), ("xLSTM", "xlstm_7b", XLSTM)],
)
def test_checkpoints_give_their_logits(tmp_path: Path, family: str, name: str, options: Any, layout: str) -> None:
    theirs, x, file = of_transformers(family), tokens(), tmp_path / "pytorch_model.bin"
    state = theirs.state_dict()
    if layout != "transformers":
        state = as_the_authors_name_them(state)
    if layout == "model.":
        state = {name.replace("backbone.", "model."): tensor for name, tensor in state.items()}
    torch.save({name: tensor.clone() for name, tensor in state.items()}, file)
    ours = sinuous.create_model(name, checkpoint_path=file, **options).eval()
    with torch.no_grad():
        near(ours(x), theirs(x, use_cache=False).logits)


def test_our_own_checkpoints_load(tmp_path: Path) -> None:
    model, x = sinuous.create_model("mamba_130m", **MAMBA).eval(), tokens()
    save_safetensors(model.state_dict(), tmp_path / "ours.safetensors")
    again = sinuous.create_model("mamba_130m", checkpoint_path=tmp_path / "ours.safetensors", **MAMBA).eval()
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)


def test_rows_that_pad_the_vocabulary_are_cut_or_filled() -> None:
    padded, bare = SequenceModel(VOCAB, DIM, 1, pad_vocab_multiple=8), SequenceModel(VOCAB, DIM, 1)
    cut = checkpoint_filter_fn(padded.state_dict(), bare)["embedding.weight"]
    assert torch.equal(cut, padded.embedding.weight[:VOCAB])
    filled = checkpoint_filter_fn(bare.state_dict(), padded)["embedding.weight"]
    assert torch.equal(filled[:VOCAB], bare.embedding.weight)
    assert not filled[VOCAB:].any()
    other = SequenceModel(VOCAB + 200, DIM, 1)
    assert checkpoint_filter_fn(other.state_dict(), bare)["embedding.weight"].shape == (VOCAB + 200, DIM)


def test_heads_are_tied_and_untied() -> None:
    tied, free = SequenceModel(VOCAB, DIM, 1), SequenceModel(VOCAB, DIM, 1, tie_head=False)
    state = {**tied.state_dict(), "lm_head.weight": tied.embedding.weight}
    assert checkpoint_filter_fn(state, tied).keys() == tied.state_dict().keys()
    assert torch.equal(checkpoint_filter_fn(tied.state_dict(), free)["head.weight"], tied.embedding.weight)
    with pytest.raises(ValueError, match=r"a head of its own .* tie_head=False"):
        checkpoint_filter_fn(free.state_dict(), tied)


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        ("mlp.fc1", ("mlp.fc1_x", "mlp.fc1_g")),
        ("mlp.proj_up_gate_z", ("mlp.fc1_g", "mlp.fc1_x")),
        ("mixer.qkv_opreact", ("mixer.q", "mixer.k", "mixer.v", "mixer.ogate_preact")),
        ("mixer.ifgate_preact", ("mixer.igate_preact", "mixer.fgate_preact")),
    ],
)
def test_matrices_stored_as_one_are_cut(layer: str, parts: tuple[str, ...]) -> None:
    model = build("mlstm_large", 1, mlp="swiglu")
    state = dict(model.state_dict())
    for kind in ("weight", "bias"):
        pieces = [state.pop(name) for part in parts if (name := f"layers.0.{part}.{kind}") in state]
        if pieces:
            state[f"layers.0.{layer}.{kind}"] = torch.cat(pieces)
    found = checkpoint_filter_fn(state, model)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())


def test_layers_that_a_model_has_as_one_stay_one() -> None:
    plain = build(mlp="gelu", depth=1)
    assert checkpoint_filter_fn(plain.state_dict(), plain).keys() == plain.state_dict().keys()


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    save_safetensors(SequenceModel(VOCAB, 16, 3).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"for another SequenceModel: embedding\.weight has shape"):
        sinuous.create_model("mamba_130m", checkpoint_path=tmp_path / "other.safetensors", **MAMBA)
