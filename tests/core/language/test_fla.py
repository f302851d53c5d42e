"""Language models of fla-org/flash-linear-attention: their configurations, and weights under their names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import sinuous
from sinuous.core.language.fla_checkpoints import FAMILIES, LAYER_EPS, fla_options
from sinuous.core.sequence_model import SequenceModel

DIM, DEPTH, VOCAB, HIDDEN = 32, 2, 11, 24
QKVO = "q_proj.weight k_proj.weight v_proj.weight o_proj.weight "
CONVOLUTIONS = "q_conv1d.weight k_conv1d.weight v_conv1d.weight "
FORGET = "A_log dt_bias a_proj.weight b_proj.weight "
MAMBA = "A_log D conv1d.weight conv1d.bias in_proj.weight x_proj.weight dt_proj.weight dt_proj.bias out_proj.weight"
PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "gla": (
        {"num_heads": 2},
        QKVO + "g_proj.weight gk_proj.0.weight gk_proj.1.weight gk_proj.1.bias g_norm_swish_gate.weight",
    ),
    "retnet": ({"num_heads": 2}, QKVO + "g_proj.weight g_norm_swish_gate.weight"),
    "linear_attn": (
        {"num_heads": 2},
        QKVO + "norm.weight " + " ".join(
            f"feature_map_{stream}.layer{i}.{kind}" for stream in "qk" for i in (1, 2) for kind in ("weight", "bias")
        ),
    ),
    "hgrn": ({}, "i_proj.weight f_proj.weight g_proj.weight g_norm.weight o_proj.weight"),
    "hgrn2": ({"expand_ratio": 8}, "q_proj.weight f_proj.weight i_proj.weight g_norm.weight o_proj.weight"),
    "gsa": ({"num_heads": 2, "num_slots": 5}, QKVO + "f_proj.weight g_norm.weight"),
    "lightnet": (
        {"expand_ratio": 8, "gate_low_rank_dim": 4},
        QKVO + "g_proj.0.weight g_proj.1.weight g_norm.weight",
    ),
    "delta_net": ({"num_heads": 2}, QKVO + CONVOLUTIONS + "b_proj.weight o_norm.weight"),
    "gated_deltanet": (
        {"num_heads": 2, "head_dim": 6, "output_gate_activation": "sigmoid"},
        QKVO + CONVOLUTIONS + FORGET + "g_proj.weight o_norm.weight",
    ),
    "gated_deltaproduct": (
        {"num_heads": 2, "head_dim": 6, "num_householder": 2, "use_forget_gate": True},
        QKVO + CONVOLUTIONS + FORGET + "g_proj.weight o_norm.weight",
    ),
    "kda": (
        {"num_heads": 2, "head_dim": 8},
        QKVO + CONVOLUTIONS + "A_log dt_bias f_proj.0.weight f_proj.1.weight b_proj.weight g_proj.0.weight "
        "g_proj.1.weight g_proj.1.bias o_norm.weight",
    ),
    "mamba": ({"state_size": 4}, MAMBA),
    "mamba2": (
        {"state_size": 4, "head_dim": 8, "dt_limit": [0.0, {"__float__": "Infinity"}]},
        "dt_bias A_log D conv1d.weight conv1d.bias in_proj.weight norm.weight out_proj.weight",
    ),
    "samba": ({"state_size": 4, "hidden_ratio": 1}, MAMBA),
    "transformer": ({"num_heads": 4, "qk_norm": True}, QKVO + "q_norm.weight k_norm.weight"),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", PUBLISHED)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config(family: str, **changed: Any) -> dict[str, Any]:
    options = PUBLISHED[family][0] if family in PUBLISHED else {}
    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "vocab_size": VOCAB}
    return {"model_type": family, **sizes, "intermediate_size": HIDDEN, **options, **changed}


def create(config: Mapping[str, Any], **options: Any) -> SequenceModel:
    model = sinuous.create_model("fla_lm", **{**fla_options(config), "dtype": torch.float64, **options})
    assert isinstance(model, SequenceModel)
    return model.eval()


def with_weights(config: Mapping[str, Any]) -> SequenceModel:
    """A model with no two parameters alike."""
    model = create(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def published(family: str, model: SequenceModel) -> dict[str, Tensor]:
    """Weights of `model` under the names that fla gives them, written out."""
    ours, root, head = model.state_dict(), "model.", "lm_head.weight"
    norm, mixer, last = "attn_norm", "attn", "norm"
    if family in ("mamba", "mamba2", "samba"):
        norm, mixer, last = "mixer_norm" if family == "samba" else "norm", "mixer", "norm_f"
        root = "backbone."
    named = {
        root + "embeddings.weight": ours["embedding.weight"],
        root + last + ".weight": ours["norm_f.weight"],
        head: ours["head.weight"],
    }
    for i in range(DEPTH):
        there, here = f"{root}layers.{i}.", f"layers.{i}."
        named[f"{there}{norm}.weight"] = ours[here + "norm.weight"]
        named |= {f"{there}{mixer}.{name}": ours[f"{here}mixer.{name}"] for name in PUBLISHED[family][1].split()}
        if family not in ("mamba", "mamba2"):
            named[there + "mlp_norm.weight"] = ours[here + "norm2.weight"]
            for theirs, layer in (("gate_proj", "fc1_g"), ("up_proj", "fc1_x"), ("down_proj", "fc2")):
                named[f"{there}mlp.{theirs}.weight"] = ours[f"{here}mlp.{layer}.weight"]
    if family in ("hgrn", "hgrn2"):
        named[root + "lower_bounds"] = torch.zeros(DEPTH, DIM, dtype=torch.float64)
    return named


def written(state: Mapping[str, Tensor], folder: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


@each_family
def test_published_names_give_the_whole_model(family: str, tmp_path: Path) -> None:
    model, ids = with_weights(config(family)), torch.randint(VOCAB, (2, 9))
    file = written(published(family, model), tmp_path)
    if family in ("hgrn", "hgrn2"):
        for i in range(DEPTH):  # of a softmax of zeros, the shares of layers 1 to i
            model.get_buffer(f"layers.{i}.mixer.bounds").fill_(i / DEPTH)
    torch.testing.assert_close(create(config(family), checkpoint_path=file)(ids), model(ids), atol=1e-12, rtol=0)


def test_a_block_is_a_layer_and_a_swiglu_behind_norms() -> None:
    told = config("gla", norm_eps=1e-3)
    model, ids = with_weights(told), torch.randint(VOCAB, (2, 9))
    state = published("gla", model)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * state[f"model.{name}.weight"]

    x = state["model.embeddings.weight"][ids]
    for i in range(DEPTH):
        layer: Any = model.layers[i]
        x = x + layer.mixer(norm(x, f"layers.{i}.attn_norm"))
        n, mlp = norm(x, f"layers.{i}.mlp_norm"), f"model.layers.{i}.mlp."
        gate, up = n @ state[mlp + "gate_proj.weight"].T, n @ state[mlp + "up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ state[mlp + "down_proj.weight"].T
    torch.testing.assert_close(model(ids), norm(x, "norm") @ state["lm_head.weight"].T, atol=1e-12, rtol=0)
    assert layer.mixer.g_norm_swish_gate.eps == 1e-3


def test_a_folder_of_theirs_is_opened_and_saved_as_ours(tmp_path: Path) -> None:
    attention = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 3}
    model, ids = with_weights(config("gated_deltanet")), torch.randint(VOCAB, (2, 9))
    (tmp_path / "theirs").mkdir()
    written(published("gated_deltanet", model), tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config("gated_deltanet")))
    loaded = sinuous.load(tmp_path / "theirs")
    assert torch.equal(loaded(ids), model(ids))
    sinuous.save(loaded, tmp_path / "ours")
    assert torch.equal(sinuous.load(tmp_path / "ours")(ids), model(ids))
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config("gated_deltanet", attn=attention)))
    with pytest.raises(ValueError, match="the checkpoint is"):
        sinuous.load(tmp_path / "theirs")


def test_a_norm_that_is_not_fused_with_its_gate_has_another_name(tmp_path: Path) -> None:
    model, ids = with_weights(config("gla")), torch.randint(VOCAB, (2, 9))
    state = {name.replace("g_norm_swish_gate", "g_norm"): t for name, t in published("gla", model).items()}
    assert torch.equal(create(config("gla"), checkpoint_path=written(state, tmp_path))(ids), model(ids))
    ungated = with_weights(config("gla", use_output_gate=False))
    assert "layers.0.mixer.g_norm.weight" in ungated.state_dict()


def test_bounds_rise_by_the_shares_of_a_softmax(tmp_path: Path) -> None:
    told = config("hgrn2", num_hidden_layers=2)
    state = published("hgrn2", with_weights(told))
    state["model.lower_bounds"] = torch.tensor([[0.0], [math.log(3)]]).expand(2, DIM).double()
    file = written(state, tmp_path)
    loaded = create(told, checkpoint_path=file)
    torch.testing.assert_close(loaded.get_buffer("layers.0.mixer.bounds"), torch.zeros(DIM).double())
    torch.testing.assert_close(loaded.get_buffer("layers.1.mixer.bounds"), torch.full((DIM,), 0.75).double())
    with pytest.raises(ValueError, match="channel_bounds=True"):
        create({**told, "use_lower_bound": False}, checkpoint_path=file)


def test_layers_of_attention_stand_where_the_configuration_says() -> None:
    window = {"layers": [1], "num_heads": 4, "window_size": 3, "rope_theta": 500.0}
    options = fla_options(config("gla", num_hidden_layers=4, attn=[window, {"layers": [3], "num_heads": 2}]))
    assert options["pattern"] == ("gla", "sliding_window_attention", "gla", "softmax_attention")
    model: Any = SequenceModel(**options)
    attention = model.layers[1].mixer
    assert (attention.window_size, attention.num_heads, attention.rope_theta) == (3, 4, 500.0)
    assert (model.layers[3].mixer.num_heads, model.layers[3].mixer.rope_theta) == (2, 10_000.0)
    assert fla_options(config("transformer", window_size=7))["pattern"] == "sliding_window_attention"


def test_options_left_out_are_as_the_authors_have_them() -> None:
    def parameters(family: str, **changed: Any) -> int:
        told = {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000, **changed}
        with torch.device("meta"):
            model = SequenceModel(**fla_options({"model_type": family, **told}))
        return sum(parameter.numel() for parameter in model.parameters())

    counted = {
        "gla": 1_365_514_240, "retnet": 1_351_727_104, "linear_attn": 1_389_524_992, "hgrn": 1_364_346_880,
        "hgrn2": 1_364_346_880, "gsa": 1_376_929_792, "lightnet": 1_376_929_792, "delta_net": 1_365_677_056,
        "kda": 1_390_941_568, "transformer": 1_364_297_728,
    }  # fmt: skip
    assert {family: parameters(family) for family in counted} == counted
    assert parameters("gated_deltanet", num_hidden_layers=21) == 1_387_348_732
    assert parameters("gated_deltaproduct", num_hidden_layers=21) == 1_387_090_432
    assert parameters("mamba", num_hidden_layers=48) == 1_400_276_992
    assert parameters("mamba2", num_hidden_layers=48) == 1_371_839_488
    assert sinuous.model_info("lightnet_1_4b").params == 1_376_929_792
    assert sinuous.model_info("fla_lm").params == 1_365_514_240
    assert set(FAMILIES) == set(PUBLISHED)


@pytest.mark.parametrize(("hidden", "dim"), [(24, 32), (5632, 2048), (29, 112), (123, 112), (2007, 1000)])
def test_the_width_of_the_mlp_is_the_one_of_the_configuration(hidden: int, dim: int) -> None:
    with torch.device("meta"):
        model: Any = SequenceModel(**fla_options(config("lightnet", hidden_size=dim, intermediate_size=hidden)))
    assert model.layers[0].mlp.fc2.in_features == hidden


@pytest.mark.parametrize("family", LAYER_EPS)
def test_layers_that_ignore_their_epsilon_have_the_one_of_their_kernel(family: str) -> None:
    model: Any = create(config(family, norm_eps=1e-2))
    assert model.layers[0].mixer.g_norm.eps == {"lightnet": 1e-6, "gsa": 1e-5, "hgrn2": 1e-5}[family]
    assert model.layers[0].norm.eps == model.norm_f.eps == 1e-2


@pytest.mark.parametrize("family", ["gla", "retnet"])
def test_feature_maps_have_the_names_of_activations(family: str) -> None:
    for theirs, ours in ((None, "identity"), ("swish", "swish"), ("silu", "swish"), ("relu", "relu")):
        model: Any = create(config(family, feature_map=theirs))
        assert model.layers[0].mixer.feature_map.kind == ours


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("rwkv7", {}, "'rwkv7'.* do not load here, since its blocks mix channels"),
    ("comba", {}, "'comba'.* do not load here; of fla's, these do: gla, "),
    ("gla", {"hidden_act": "gelu"}, "hidden_act of fla's gla must be swish or silu .*'gelu'"),
    ("gla", {"elementwise_affine": False}, "elementwise_affine=False"),
    ("gla", {"attnres_block_size": 4}, "attnres_block_size=4"),
    ("hgrn2", {"expand_ratio": 12}, "expand_ratio of fla's hgrn2 must divide hidden_size .*got 12 and 32"),
    ("gla", {"attn": {"layers": [2], "num_heads": 4}}, "attn names layer 2, and there are 2"),
    ("gla", {"attn": {"num_heads": 4}}, "attn must name layers and num_heads"),
    (
        "gla",
        {"attn": [{"layers": [0], "num_heads": 4}, {"layers": [1], "num_heads": 2}]},
        "attn has layers of softmax_attention with different options",
    ),
]


@pytest.mark.parametrize(("family", "changed", "message"), REFUSED)
def test_what_cannot_be_had_here_is_named(family: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fla_options(config(family, **changed))


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="no vocab_size"):
        fla_options({"model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.attn_res_proj.weight", "attn_res_proj.weight of a model with attnres_block_size"),
        ("model.layers.1.ffn.key.weight", "ffn.key.weight of rwkv6 or rwkv7: its blocks mix channels"),
        ("model.layers.1.attn.novel.weight", "novel"),
    ],
)
def test_weights_without_a_place_are_named(name: str, message: str, tmp_path: Path) -> None:
    state = {**published("gla", with_weights(config("gla"))), name: torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        create(config("gla"), checkpoint_path=written(state, tmp_path))
