"""Language models of fla-org/flash-linear-attention: options of their config.json, and the names of their weights.

    x ← x + attn(attn_norm(x));  x ← x + down_proj(silu(gate_proj(n)) ⊙ up_proj(n)),  n = mlp_norm(x)

A block of theirs is a `ResidualBlock` with an RMS norm and a SwiGLU under other names, around a layer whose parameters
have in `sinuous.core.mixers` the names that they have there. So a file needs new names only, but for the lower bounds
of HGRN and HGRN2, which the model has for all layers in one matrix.

    options = fla_options("gla-1.3B-100B/config.json")
    model = sinuous.create_model("fla_lm", checkpoint_path="gla-1.3B-100B/model.safetensors", **options)

`sinuous.load("fla-hub/gla-1.3B-100B")` does both. docs/fla.md lists the families.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sinuous.core.checks import described

_RENAMED = (
    (r"^(model|backbone)\.", ""),
    (r"^embeddings\.", "embedding."),
    (r"^(layers\.\d+)\.(attn|mixer)_norm\.", r"\1.norm."),
    (r"^(layers\.\d+)\.attn\.", r"\1.mixer."),
    (r"^(layers\.\d+)\.mlp_norm\.", r"\1.norm2."),
    (r"^(layers\.\d+)\.mlp\.gate_proj\.", r"\1.mlp.fc1_g."),
    (r"^(layers\.\d+)\.mlp\.up_proj\.", r"\1.mlp.fc1_x."),
    (r"^(layers\.\d+)\.mlp\.down_proj\.", r"\1.mlp.fc2."),
    (r"^norm\.", "norm_f."),
    (r"^lm_head\.", "head."),
)

_RWKV = "its blocks mix channels with those of the token before, which no MLP here does"
_UNAVAILABLE = {"rwkv6": _RWKV, "rwkv7": _RWKV}
"""Families whose layers are here and whose blocks are not."""

_FOREIGN = {".ffn.": f"rwkv6 or rwkv7: {_RWKV}", "res_proj.": "a model with attnres_block_size"}
"""Parts of names of parameters that no option here makes, and models that have them."""

LAYER_EPS = {"lightnet": 1e-6, "gsa": 1e-5, "hgrn2": 1e-5}
"""ε of the norm inside layers that call their kernel without their own."""

COMMON = {"hidden_ratio": 4, "intermediate_size": None, "norm_eps": 1e-6, "tie_word_embeddings": False, "attn": None}
_CONVOLUTION = {"use_short_conv": False, "conv_size": 4}
_HEADS = {"num_heads": 4, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 1.0}
_DELTA = {"use_short_conv": True, "conv_size": 4, "allow_neg_eigval": False}
_STATE_SPACE = {"state_size": 16, "conv_kernel": 4, "expand": 2, "use_bias": False, "use_conv_bias": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gla": (
        "gla",
        {**_HEADS, "expand_k": 0.5, "feature_map": None, **_CONVOLUTION, "use_output_gate": True, "clamp_min": None},
    ),
    "retnet": ("retention", {**_HEADS, "num_heads": 8, "expand_v": 2.0, "feature_map": None, "use_output_gate": True}),
    "linear_attn": (
        "linear_attention",
        {
            **_HEADS,
            "feature_map": "elementwise_product",
            "tie_feature_map_qk": False,
            "norm_q": False,
            "norm_k": False,
            "norm_feature_map": False,
        },
    ),
    "hgrn": ("hgrn", {"expand_ratio": 1, **_CONVOLUTION, "use_lower_bound": True}),
    "hgrn2": ("hgrn2", {"num_heads": None, "expand_ratio": 128, **_CONVOLUTION, "use_lower_bound": True}),
    "gsa": (
        "gsa",
        {**_HEADS, "num_slots": 64, "feature_map": "swish", **_CONVOLUTION, "gate_logit_normalizer": 8},
    ),
    "lightnet": ("lightnet", {"num_heads": None, "expand_ratio": 128, **_CONVOLUTION, "gate_low_rank_dim": 128}),
    "delta_net": (
        "delta_net",
        {
            "num_heads": 16,
            "expand_k": 1.0,
            "expand_v": 1.0,
            "use_beta": True,
            "use_gate": False,
            **_DELTA,
            "qk_activation": "silu",
            "qk_norm": "l2",
        },
    ),
    "gated_deltanet": (
        "gated_delta_net",
        {
            "num_heads": 6,
            "num_v_heads": None,
            "head_dim": 256,
            "expand_v": 2.0,
            "use_gate": True,
            **_DELTA,
            "output_gate_activation": "swish",
        },
    ),
    "gated_deltaproduct": (
        "gated_delta_product",
        {
            "num_heads": 6,
            "head_dim": 256,
            "expand_v": 2.0,
            "num_householder": 1,
            "use_output_gate": True,
            "use_forget_gate": False,
            **_DELTA,
        },
    ),
    "kda": (
        "kda",
        {"num_heads": 16, "num_v_heads": None, "head_dim": 128, "expand_v": 1.0, **_DELTA, "lower_bound": None},
    ),
    "mamba": ("mamba", {**_STATE_SPACE, "dt_rank": None}),
    "mamba2": (
        "mamba2",
        {
            **_STATE_SPACE,
            "state_size": 128,
            "head_dim": 64,
            "n_groups": 1,
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
            "dt_limit": (0.0, math.inf),
        },
    ),
    "samba": ("mamba", {"state_size": 16, "conv_kernel": 4, "expand": 2, "use_bias": False, "dt_rank": None}),
    "transformer": (
        "softmax_attention",
        {
            "num_heads": 32,
            "num_kv_heads": None,
            "qkv_bias": False,
            "qk_norm": False,
            "window_size": None,
            "rope_theta": 10_000.0,
        },
    ),
}
"""For each family that loads, its mixer and its options with fla's defaults."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "retnet": {"hidden_ratio": 2},
    "mamba": {"norm_eps": 1e-5},
    "mamba2": {"norm_eps": 1e-5},
    "samba": {"norm_eps": 1e-5},
}

_ALSO = {"dt_rank": "time_step_rank", "dt_limit": "time_step_limit", "norm_eps": "layer_norm_epsilon"}
"""Names that other versions have for options, and transformers' configurations of Mamba and Mamba-2."""

_OURS = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "n_groups": "ngroups",
    "norm_feature_map": "normalize",
    "use_lower_bound": "channel_bounds",
}
_HEAD_OF_MAMBA2 = {"head_dim": "headdim"}


def is_fla(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a language model of fla's that has names of its own; its Mamba and Mamba-2 have
    those of transformers."""
    return any(re.search(r"layers\.\d+\.(attn|mixer)_norm\.weight$", name) for name in state)


def from_fla(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Its weights under the names of a `SequenceModel`.

    Raises:
        ValueError: if the file has parts that no option here makes, or lower bounds that `model` has no place for.
    """
    wanted = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part = next((part for part in _FOREIGN if part in name), None)
        if part is not None:
            raise ValueError(f"the checkpoint has {name} of {_FOREIGN[part]}; choose a file of another model")
        if name.endswith("lower_bounds"):
            renamed.update(_bounds(tensor, wanted))
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if name not in wanted:  # the layer with an unfused norm has the same weight under the name of the ungated one
            name = name.replace(".g_norm.", ".g_norm_swish_gate.")
        renamed[name] = tensor
    return renamed


def _bounds(logits: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bounds of each layer: shares of a softmax over the depth, summed up to that layer, less the first one's."""
    shares = logits.double().softmax(0)
    bounds = (shares.cumsum(0) - shares[0]).to(logits.dtype)
    places = {f"layers.{i}.mixer.bounds": bound for i, bound in enumerate(bounds)}
    if not wanted.keys() & places.keys():
        raise ValueError(
            "the checkpoint has learnt lower bounds for every channel and the model has none; "
            "build it with channel_bounds=True among the mixer_options"
        )
    return {name: bound for name, bound in places.items() if name in wanted}  # layers of attention have no use for any


def fla_options(config: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Options of a `SequenceModel` for a model of fla's.

    Args:
        config: what its config.json says, or the path of that file. Options that it leaves out are as fla's defaults.
            Options that change how something is computed and not what (`attn_mode`, `fuse_norm`, `fuse_swiglu` …) and
            those of training are not read.

    Raises:
        ValueError: if no mixer here computes the family's layer, or an option is not to be had here.
    """
    if isinstance(config, Mapping):
        return _options(config)
    content = json.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ValueError(f"{os.fspath(config)} holds no options (got {described(content)}); give fla's config.json")
    return _options(content)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    family = config.get("model_type")
    if family not in FAMILIES:
        why = f", since {_UNAVAILABLE[family]}" if family in _UNAVAILABLE else ""
        raise ValueError(
            f"models of model_type {described(family)} do not load here{why}; of fla's, these do: {', '.join(FAMILIES)}"
        )
    missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if name not in config]
    if missing:
        raise ValueError(f"the configuration has no {missing[0]}; give the config.json that lies beside the weights")
    mixer, defaults = FAMILIES[family]
    settings = {**COMMON, **_DEFAULTS.get(family, {}), **defaults}
    for names in (_ALSO, {name: name for name in settings}):
        settings.update({ours: config[name] for ours, name in names.items() if ours in settings and name in config})
    _refuse(config, family)

    dim, depth = config["hidden_size"], config["num_hidden_layers"]
    mixer, options = _mixer(family, mixer, dim, {name: settings[name] for name in defaults}, settings["norm_eps"])
    pattern, attention = [mixer] * depth, _attention(settings["attn"], depth)
    for layer, (name, _) in attention.items():
        pattern[layer] = name
    built: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "pad_vocab_multiple": 1,
        "dim": dim,
        "depth": depth,
        "pattern": tuple(pattern) if attention else mixer,
        "mixer_options": {name: chosen for name, chosen in [(mixer, options), *attention.values()] if name in pattern},
        "mlp": "none",
        "norm_eps": settings["norm_eps"],
        "tie_head": bool(settings["tie_word_embeddings"]),
    }
    if family in ("mamba", "mamba2"):
        return built
    hidden = None if family == "samba" else settings["intermediate_size"]  # samba's is the width inside its mixers
    if hidden is None:
        hidden = math.ceil(int(dim * (settings["hidden_ratio"] or 4) * 2 / 3) / 256) * 256
    return {**built, "mlp": "swiglu", "mlp_ratio": _ratio(hidden, dim), "mlp_multiple_of": 1}


def _refuse(config: Mapping[str, Any], family: str) -> None:
    activation = config.get("hidden_act", "swish")
    if activation not in ("swish", "silu"):
        raise ValueError(f"hidden_act of fla's {family} must be swish or silu to load here (got {activation!r})")
    if config.get("elementwise_affine", True) is False:
        raise ValueError(f"fla's {family} with elementwise_affine=False has norms without weights, which none here are")
    if config.get("attnres_block_size") is not None:
        raise ValueError(
            f"fla's {family} with attnres_block_size={config['attnres_block_size']} attends to the streams of earlier "
            "blocks, which no model here does"
        )


def _mixer(family: str, mixer: str, dim: int, settings: dict[str, Any], norm_eps: float) -> tuple[str, dict[str, Any]]:
    """The mixer's name and its options."""
    ours = {**_OURS, **(_HEAD_OF_MAMBA2 if family == "mamba2" else {})}
    if family == "hgrn2" and (size := settings.pop("expand_ratio")) is not None:
        if dim % size:
            raise ValueError(
                f"expand_ratio of fla's hgrn2 must divide hidden_size to load here (got {size} and {dim}); "
                "choose a file whose keys are as wide as its values"
            )
        settings["num_heads"] = dim // size
    elif family == "lightnet" and settings["num_heads"] is None:
        settings["num_heads"] = dim // settings["expand_ratio"]
    elif family == "hgrn":
        settings["expand"] = settings.pop("expand_ratio")
    elif family == "transformer":
        return _attention_mixer(settings)
    elif family == "gated_deltaproduct" and not settings.pop("use_forget_gate"):
        mixer = "delta_product"
    elif family == "linear_attn":
        settings["output_norm"] = "rms"
    if family in ("gla", "retnet"):
        settings["feature_map"] = {None: "identity", "silu": "swish"}.get(
            settings["feature_map"], settings["feature_map"]
        )
    options = {ours.get(name, name): value for name, value in settings.items()}
    if mixer == "mamba":
        rank = options["dt_rank"]
        options["dt_rank"] = None if rank == "auto" else rank
    else:
        options["norm_eps"] = LAYER_EPS.get(mixer, norm_eps)
    if mixer == "mamba2":
        options["dt_limit"] = tuple(_number(limit) for limit in options["dt_limit"])
    return mixer, options


def _number(value: Any) -> float:
    """A number as transformers writes it, which has words for those that JSON lacks."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _attention_mixer(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = dict(settings)
    if options.pop("window_size", None) is None:
        return "softmax_attention", options
    return "sliding_window_attention", {**options, "window_size": settings["window_size"]}


def _attention(attn: Any, depth: int) -> dict[int, tuple[str, dict[str, Any]]]:
    """For each layer of attention in a hybrid, the name and options of its mixer."""
    chosen: dict[int, tuple[str, dict[str, Any]]] = {}
    options_of: dict[str, dict[str, Any]] = {}
    for spec in [] if attn is None else [attn] if isinstance(attn, Mapping) else attn:
        of_layer = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10_000.0, **spec}
        layers = of_layer.pop("layers", None)
        if layers is None or "num_heads" not in spec:
            raise ValueError(f"attn must name layers and num_heads (got {described(spec)}); take fla's config.json")
        name, options = _attention_mixer(of_layer)
        if options_of.setdefault(name, options) != options:
            raise ValueError(
                f"attn has layers of {name} with different options (got {options_of[name]} and {options}); "
                "a model here has one set of options for each mixer"
            )
        if beyond := [layer for layer in layers if not 0 <= layer < depth]:
            raise ValueError(f"attn names layer {beyond[0]}, and there are {depth}, from 0; correct its layers")
        chosen.update(dict.fromkeys(layers, (name, options)))
    return chosen


def _ratio(hidden: int, dim: int) -> float:
    """A ratio that `Stack` makes exactly `hidden` of."""
    ratio = hidden / dim
    return math.nextafter(ratio, 0) if math.ceil(dim * ratio) > hidden else ratio
