"""Caduceus: sizes, and the authors' weights of one strand and of both, along either path of their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sinuous
from sinuous.genomics.letters import DNATokenizer

DIM, INNER, STATE, RANK, ROWS = 20, 40, 16, 2, 16
COMPLEMENT = torch.cat([DNATokenizer().complement, torch.arange(12, ROWS)])
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int, scale: float = 0.4) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale


def file_of(depth: int) -> State:
    """Weights of single strands by the authors' names, no two numbers alike."""
    state = {"embeddings.word_embeddings.weight": draw(ROWS, DIM, scale=1), "norm_f.weight": draw(DIM)}
    for i in range(depth):
        state[f"layers.{i}.norm.weight"] = draw(DIM)
        shared = {"in_proj.weight": draw(2 * INNER, DIM), "out_proj.weight": draw(DIM, INNER)}
        for side in ("mamba_fwd", "mamba_rev"):
            own = {
                "conv1d.weight": draw(INNER, 1, 4),
                "conv1d.bias": draw(INNER),
                "x_proj.weight": draw(RANK + 2 * STATE, INNER),
                "dt_proj.weight": draw(INNER, RANK),
                "dt_proj.bias": draw(INNER),
                "A_log": draw(INNER, STATE),
                "D": draw(INNER),
            }
            state |= {f"layers.{i}.mixer.{side}.{name}": tensor for name, tensor in (shared | own).items()}
    return state


def published(state: State, strands: str, fused: bool = False, prefix: str = "caduceus.backbone.") -> State:
    """The names of the authors' masked language model; those of both strands depend on the path."""
    outer = prefix.removesuffix("caduceus.backbone.")
    if strands == "single":
        named = {prefix + name: tensor for name, tensor in state.items()}
        return named | {outer + "lm_head.weight": state["embeddings.word_embeddings.weight"]}
    parts = (".mixer.",) if fused else (".mixer.", ".norm.", "norm_f.")
    named = {}
    for name, tensor in state.items():
        for part in parts:
            name = name.replace(part, f"{part}submodule.")
        named[prefix + name.replace("word_embeddings.", "word_embeddings.embedding.")] = tensor
    maps = dict.fromkeys(
        [f"{prefix}embeddings.word_embeddings.complement_map", f"{outer}lm_head.complement_map"], COMPLEMENT
    )
    return named | maps | {outer + "lm_head.lm_head.weight": state["embeddings.word_embeddings.weight"]}


def mamba(p: State, x: Tensor) -> Tensor:
    x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    x = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=INNER).mT)
    dt, B, C = (x @ p["x_proj.weight"].T).split([RANK, STATE, STATE], -1)
    dt = F.softplus(F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"])).unsqueeze(-1)
    h, out = x.new_zeros(len(x), INNER, STATE), []
    for t in range(x.shape[1]):
        h = torch.exp(-dt[:, t] * p["A_log"].exp()) * h + dt[:, t] * B[:, t, None] * x[:, t, :, None]
        out.append((h * C[:, t, None]).sum(-1) + p["D"] * x[:, t])
    return (torch.stack(out, 1) * F.silu(z)) @ p["out_proj.weight"].T


def block(state: State, i: int, x: Tensor) -> Tensor:
    def of(side: str) -> State:
        prefix = f"layers.{i}.mixer.{side}."
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    normed = F.rms_norm(x, [DIM], state[f"layers.{i}.norm.weight"], 1e-5)
    return x + mamba(of("mamba_fwd"), normed) + mamba(of("mamba_rev"), normed.flip(1)).flip(1)


def features(state: State, ids: Tensor, depth: int) -> Tensor:
    x = state["embeddings.word_embeddings.weight"][ids]
    for i in range(depth):
        x = block(state, i, x)
    return F.rms_norm(x, [DIM], state["norm_f.weight"], 1e-5)


def both_strands(state: State, ids: Tensor, depth: int, fused: bool) -> Tensor:
    """The authors' stream [u, v], v reversed in time and channels; their fused path exchanges the halves first."""
    embedding = state["embeddings.word_embeddings.weight"]
    u, v = embedding[ids], embedding[COMPLEMENT[ids].flip(1)].flip(1, 2)
    for i in range(depth):
        u, v = (v, u) if fused else (u, v)
        u, v = block(state, i, u), block(state, i, v.flip(1, 2)).flip(1, 2)
    norm = state["norm_f.weight"]
    v = F.rms_norm(v.flip(1, 2), [DIM], norm, 1e-5).flip(1, 2)
    return torch.cat([F.rms_norm(u, [DIM], norm, 1e-5), v], -1)


def load(state: State, folder: Path, depth: int, **options: Any) -> nn.Module:
    torch.save(state, folder / "model.bin")
    options = {"dim": DIM, "depth": depth, **options}
    return sinuous.create_model(
        "caduceus_ph_1k", checkpoint_path=folder / "model.bin", dtype=torch.float64, **options
    ).eval()


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("caduceus_ph_1k", {}, 1_934_592),
        ("caduceus_ps_1k", {}, 1_934_592),
        ("caduceus_ph_131k", {}, 7_725_312),
        ("caduceus_ps_131k", {}, 7_725_312),
        ("caduceus_ph_1k", {"dim": 118}, 470_702),
        ("caduceus_ph_1k", {"depth": 8}, 3_864_832),
    ],
)
def test_models_have_the_authors_numbers_of_parameters(name: str, options: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.strands == ("shared" if "_ps_" in name else "single")
    assert (model.vocab_size, model.padded_vocab_size, model.tokenizer.vocab_size) == (12, 16, 12)


@pytest.mark.parametrize("prefix", ["caduceus.backbone.", "model.caduceus.backbone."])
def test_the_authors_weights_give_their_features_and_logits(prefix: str, tmp_path: Path) -> None:
    state, ids = file_of(3), torch.randint(12, (2, 7))
    model = load(published(state, "single", prefix=prefix), tmp_path, 3)
    expected = features(state, ids, 3)
    torch.testing.assert_close(model.forward_features(ids), expected, rtol=0, atol=1e-10)
    logits = expected @ state["embeddings.word_embeddings.weight"].T
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("depth", [2, 4])
def test_the_authors_weights_of_both_strands_give_their_numbers_along_either_path(
    fused: bool, depth: int, tmp_path: Path
) -> None:
    state, ids = file_of(depth), torch.randint(12, (2, 7))
    model = load(published(state, "shared", fused), tmp_path, depth, strands="shared")
    expected = both_strands(state, ids, depth, fused)
    torch.testing.assert_close(model.forward_features(ids), expected, rtol=0, atol=1e-10)
    u, v = expected[..., :DIM], expected[..., DIM:].flip(-1)
    head = state["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(model(ids), u @ head.T + v @ head[COMPLEMENT].T, rtol=0, atol=1e-10)
    turned = model(model.reverse_complement(ids))
    assert (turned - model(ids).flip(1)[..., COMPLEMENT]).abs().max() < 1e-11


def test_the_two_paths_differ_for_the_same_weights() -> None:
    state, ids = file_of(2), torch.randint(12, (2, 7))
    assert (both_strands(state, ids, 2, False) - both_strands(state, ids, 2, True)).abs().max() > 0.1


def test_the_fused_path_of_an_odd_number_of_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fused path of both strands and has 3 blocks"):
        load(published(file_of(3), "shared", fused=True), tmp_path, 3, strands="shared")


def test_tensors_that_are_shared_may_be_stored_once(tmp_path: Path) -> None:
    state, ids = file_of(2), torch.randint(12, (2, 7))
    once = {
        name: tensor
        for name, tensor in published(state, "single").items()
        if "mamba_rev.in_proj" not in name and "mamba_rev.out_proj" not in name and name != "lm_head.weight"
    }
    expected = features(state, ids, 2)
    torch.testing.assert_close(load(once, tmp_path, 2).forward_features(ids), expected, rtol=0, atol=1e-10)
    untied = load(once, tmp_path, 2, tie_head=False)
    torch.testing.assert_close(untied(ids), load(once, tmp_path, 2)(ids), rtol=0, atol=1e-10)


def test_weights_of_another_model_are_refused_with_the_remedy(tmp_path: Path) -> None:
    state = file_of(2)
    with pytest.raises(ValueError, match="build it with strands='shared'"):
        load(published(state, "shared"), tmp_path, 2)
    with pytest.raises(ValueError, match="build it with strands='single' or 'conjoined'"):
        load(published(state, "single"), tmp_path, 2, strands="shared")
    with pytest.raises(ValueError, match="the model 24; build the model with vocab_size=16"):
        load(published(state, "single"), tmp_path, 2, vocab_size=20)
    own_head = published(state, "single") | {"lm_head.weight": draw(ROWS, DIM)}
    with pytest.raises(ValueError, match="build the model with tie_head=False"):
        load(own_head, tmp_path, 2)
    load(own_head, tmp_path, 2, tie_head=False)
    apart = published(state, "single")
    apart["caduceus.backbone.layers.1.mixer.mamba_rev.in_proj.weight"] = draw(2 * INNER, DIM)
    with pytest.raises(ValueError, match="bidirectional_weight_tie=False"):
        load(apart, tmp_path, 2)
    with pytest.raises(ValueError, match=r"is for another Caduceus: .* choose the model, or its sizes"):
        load(published(state, "single"), tmp_path, 2, dim=24)


@pytest.mark.parametrize("strands", ["single", "conjoined", "shared"])
@pytest.mark.parametrize("head", ["lm", "position", "sequence"])
def test_every_head_takes_every_strand_packed_or_not(strands: str, head: str) -> None:
    options = {} if head == "lm" else {"num_classes": 2}
    model = sinuous.create_model(
        "caduceus_ph_1k", dim=DIM, depth=2, strands=strands, head=head, dtype=torch.float64, **options
    ).eval()
    ids, bounds = torch.randint(12, (1, 9)), torch.tensor([0, 4, 9])
    separate = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], 0 if head == "sequence" else 1)
    torch.testing.assert_close(model(ids, bounds), separate, rtol=0, atol=1e-11)
    assert not model.causal
    if strands != "single" and head == "position":
        turned = model(model.reverse_complement(ids))
        torch.testing.assert_close(turned, model(ids).flip(1), rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="no causal trunk"):
        _ = model.trunk


def test_the_authors_classifier_is_read(tmp_path: Path) -> None:
    state, ids = file_of(2), torch.randint(7, 12, (2, 7))
    weight = draw(3, DIM)
    named = {name: tensor for name, tensor in published(state, "single").items() if name != "lm_head.weight"}
    model = load(named | {"score.weight": weight}, tmp_path, 2, head="sequence", num_classes=3)
    torch.testing.assert_close(model(ids), features(state, ids, 2).mean(1) @ weight.T, rtol=0, atol=1e-10)
