"""Published language models by name, and their authors' checkpoints.

    model = sinuous.create_model("mamba_130m", checkpoint_path="pytorch_model.bin")

Mamba: Gu and Dao (arXiv 2312.00752); Mamba-2: Dao and Gu (arXiv 2405.21060); weights at huggingface.co/state-spaces.
Each name has the width and depth of the released `config.json`; 50,277 tokens of the GPT-NeoX tokenizer, padded to a
multiple of 8 or, for Mamba-2, 16. xLSTM 7B: Beck et al. (arXiv 2503.13427); weights at huggingface.co/NX-AI.

The first xLSTM models (Beck et al., arXiv 2405.04517) are `xlstm_14m` in other sizes: `pattern` says where their sLSTM
blocks are. `("mlstm",) * 7 + ("slstm",)` has as many of them as xLSTM[7:1]; a pattern as long as the model puts them at
places of choice, as `slstm_at` does in NX-AI/xlstm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor

from sinuous.core.language.fla_checkpoints import fla_options, from_fla, is_fla
from sinuous.core.language.xlstm_checkpoints import from_block_stack, is_block_stack
from sinuous.core.registry import register_model
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.weights import shipped_cfgs

__all__ = ["checkpoint_filter_fn"]

WEIGHTS = Path(__file__).parent / "weights"
NEOX_TOKENS = 50277
LARGEST_PADDING = 128  # a file whose vocabulary differs by more has other tokens

_MAMBA: dict[str, Any] = {"vocab_size": NEOX_TOKENS, "pattern": "mamba", "pad_vocab_multiple": 8}
_FLA: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000}
_MAMBA2: dict[str, Any] = {"vocab_size": NEOX_TOKENS, "pattern": "mamba2", "pad_vocab_multiple": 16}

SIZES: dict[str, dict[str, Any]] = {
    "mamba_130m": {**_MAMBA, "dim": 768, "depth": 24},
    "mamba_370m": {**_MAMBA, "dim": 1024, "depth": 48},
    "mamba_790m": {**_MAMBA, "dim": 1536, "depth": 48},
    "mamba_1_4b": {**_MAMBA, "dim": 2048, "depth": 48},
    "mamba_2_8b": {**_MAMBA, "dim": 2560, "depth": 64},
    "mamba2_130m": {**_MAMBA2, "dim": 768, "depth": 24},
    "mamba2_370m": {**_MAMBA2, "dim": 1024, "depth": 48},
    "mamba2_780m": {**_MAMBA2, "dim": 1536, "depth": 48},
    "mamba2_1_3b": {**_MAMBA2, "dim": 2048, "depth": 48},
    "mamba2_2_7b": {**_MAMBA2, "dim": 2560, "depth": 64},
    "xlstm_7b": {
        "vocab_size": 50304,
        "dim": 4096,
        "depth": 32,
        "pattern": "mlstm_large",
        "mixer_options": {"mlstm_large": {"num_heads": 8}},
        "mlp": "swiglu",
        "mlp_ratio": 8 / 3,
        "mlp_multiple_of": 64,
        "norm_eps": 1e-6,
        "tie_head": False,
        "logit_cap": 30.0,
        "weight_init": "xlstm",
    },
    "xlstm_14m": {
        "vocab_size": 50304,
        "dim": 128,
        "depth": 7,
        "pattern": ("mlstm", "slstm", "mlstm", "mlstm", "mlstm", "mlstm", "mlstm"),
        "mlp": {"slstm": "geglu"},
        "mlp_ratio": 1.3,
        "mlp_multiple_of": 64,
        "norm": "layer_no_bias",
        "tie_head": False,
        "weight_init": "xlstm",
    },
    "lightnet_1_4b": fla_options({"model_type": "lightnet", **_FLA}),
    "fla_lm": fla_options({"model_type": "gla", **_FLA}),
    "bytes_5m": {"vocab_size": 256, "dim": 256, "depth": 6, "pattern": "mamba2", "mlp": "swiglu", "mlp_ratio": 2.0},
    "bytes_nano": {"vocab_size": 256, "dim": 160, "depth": 6, "pattern": "mamba", "mlp": "swiglu", "mlp_ratio": 1.9},
}

# Of state-spaces/mamba, of transformers' Mamba and Mamba-2, and of NX-AI's xLSTM with transformers' copy of it.
_RENAMED = (
    (r"^(backbone|model)\.", ""),
    (r"^embeddings\.", "embedding."),
    (r"^blocks\.", "layers."),
    (r"^(layers\.\d+)\.norm_mlstm\.", r"\1.norm."),
    (r"^(layers\.\d+)\.mlstm_layer\.", r"\1.mixer."),
    (r"^(layers\.\d+)\.norm_ffn\.", r"\1.norm2."),
    (r"^(layers\.\d+)\.ffn\.", r"\1.mlp."),
    (r"\.mlp\.proj_up_gate\.", r".mlp.fc1_g."),
    (r"\.mlp\.proj_up\.", r".mlp.fc1_x."),
    (r"\.mlp\.proj_down\.", r".mlp.fc2."),
    (r"^out_norm\.", "norm_f."),
    (r"^lm_head\.", "head."),
)

# Matrices that some files store as one, from above to below: state-spaces/mamba's gated MLP, and the fused mode of
# NX-AI's xLSTM.
_FUSED = {
    "mlp.fc1": ("mlp.fc1_x", "mlp.fc1_g"),
    "mlp.proj_up_gate_z": ("mlp.fc1_g", "mlp.fc1_x"),
    "mixer.qkv_opreact": ("mixer.q", "mixer.k", "mixer.v", "mixer.ogate_preact"),
    "mixer.ifgate_preact": ("mixer.igate_preact", "mixer.fgate_preact"),
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: SequenceModel) -> dict[str, Tensor]:
    """The authors' names, transformers' or our own, as `model` has them.

    Rows of the vocabulary that only pad it are cut or filled with zeros. A head that repeats the embedding is left out
    where the model's head is tied.

    Raises:
        ValueError: if the head differs from the embedding and the model's head is tied.
    """
    if is_block_stack(state_dict):
        state_dict = from_block_stack(state_dict)
    elif is_fla(state_dict):
        state_dict = from_fla(state_dict, model)
    state = dict(_unfused({_ours(name): tensor for name, tensor in state_dict.items()}, model))
    for name in ("embedding.weight", "head.weight"):
        if name in state and state[name].ndim == 2:
            state[name] = _fit_vocabulary(state[name], model)
    head = state.get("head.weight")
    if head is not None and model.tie_head:
        if not torch.equal(head, state.get("embedding.weight", head)):
            raise ValueError(
                "the checkpoint has a head of its own and the model's is tied to its embedding; "
                "build the model with tie_head=False"
            )
        state["embedding.weight"] = state.pop("head.weight")
    elif head is None and not model.tie_head and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"].clone()
    return state


def _ours(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _fit_vocabulary(rows: Tensor, model: SequenceModel) -> Tensor:
    wanted = model.padded_vocab_size
    if rows.shape[0] == wanted or not 0 <= rows.shape[0] - model.vocab_size < LARGEST_PADDING:
        return rows
    return torch.cat([rows[:wanted], rows.new_zeros(max(0, wanted - rows.shape[0]), rows.shape[1])])


def _unfused(state: Mapping[str, Tensor], model: SequenceModel) -> dict[str, Tensor]:
    wanted = model.state_dict()
    cut: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, number, rest = (*name.split(".", 2), "", "")[:3]
        layer, _, kind = rest.rpartition(".")
        parts = [f"{block}.{number}.{part}.{kind}" for part in _FUSED.get(layer, ())]
        rows = [wanted[part].shape[0] for part in parts if part in wanted]
        if parts and len(rows) == len(parts) and sum(rows) == tensor.shape[0]:
            cut.update(zip(parts, tensor.split(rows), strict=True))
        else:
            cut[name] = tensor
    return cut


def _create(variant: str, **kwargs: Any) -> SequenceModel:
    return SequenceModel(**{**SIZES[variant], **kwargs})


def _cfg(origin: str, paper: str, arxiv: str, license: str = "apache-2.0", context: int = 2048) -> dict[str, Any]:
    return {
        "num_classes": NEOX_TOKENS,
        "input_size": (context,),
        "classifier": "head",
        "first_conv": "embedding",
        "license": license,
        "paper_name": paper,
        "paper_ids": f"arXiv:{arxiv}",
        "origin_url": f"https://huggingface.co/{origin}",
    }


_FLA_ORIGIN = "https://github.com/fla-org/flash-linear-attention"

_BYTES = {
    "num_classes": 256,
    "classifier": "head",
    "first_conv": "embedding",
    "license": "apache-2.0",
}

_MAMBA_PAPERS = {
    "mamba": ("Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "2312.00752"),
    "mamba2": (
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        "2405.21060",
    ),
}


def _mamba_cfgs() -> dict[str, Any]:
    cfgs = {}
    for name in SIZES:
        family, _, size = name.partition("_")
        if family in _MAMBA_PAPERS:
            origin = f"state-spaces/{family}-{size.replace('_', '.')}"
            cfgs[f"{name}.untrained"] = _cfg(origin, *_MAMBA_PAPERS[family])
    return cfgs


default_cfgs = generate_default_cfgs(
    {
        **_mamba_cfgs(),
        "xlstm_7b.untrained": _cfg(
            "NX-AI/xLSTM-7b",
            "xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference",
            "2503.13427",
            license="nxai-community",
            context=8192,
        ),
        "xlstm_14m.untrained": {
            **_cfg("", "xLSTM: Extended Long Short-Term Memory", "2405.04517", context=256),
            "num_classes": 50304,
            "origin_url": "https://github.com/NX-AI/xlstm",
        },
        "lightnet_1_4b.untrained": {
            **_cfg(
                "",
                "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
                "2405.21022",
            ),
            "num_classes": 32000,
            "origin_url": _FLA_ORIGIN,
        },
        "fla_lm.untrained": {
            **_cfg(
                "", "Gated Linear Attention Transformers with Hardware-Efficient Training", "2312.06635", license="mit"
            ),
            "num_classes": 32000,
            "origin_url": _FLA_ORIGIN,
        },
        "bytes_5m.untrained": {**_BYTES, "input_size": (256,)},
        **shipped_cfgs(WEIGHTS, "bytes_nano", {**_BYTES, "input_size": (1024,)}),
    }
)


@register_model(domain="language")
def mamba_130m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba with 24 blocks of width 768, trained on the Pile."""
    return _create("mamba_130m", **kwargs)


@register_model(domain="language")
def mamba_370m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba with 48 blocks of width 1024, trained on the Pile."""
    return _create("mamba_370m", **kwargs)


@register_model(domain="language")
def mamba_790m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba with 48 blocks of width 1536, trained on the Pile."""
    return _create("mamba_790m", **kwargs)


@register_model(domain="language")
def mamba_1_4b(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba with 48 blocks of width 2048, trained on the Pile."""
    return _create("mamba_1_4b", **kwargs)


@register_model(domain="language")
def mamba_2_8b(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba with 64 blocks of width 2560, trained on the Pile."""
    return _create("mamba_2_8b", **kwargs)


@register_model(domain="language")
def mamba2_130m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba-2 with 24 blocks of width 768, trained on the Pile."""
    return _create("mamba2_130m", **kwargs)


@register_model(domain="language")
def mamba2_370m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba-2 with 48 blocks of width 1024, trained on the Pile."""
    return _create("mamba2_370m", **kwargs)


@register_model(domain="language")
def mamba2_780m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba-2 with 48 blocks of width 1536, trained on the Pile."""
    return _create("mamba2_780m", **kwargs)


@register_model(domain="language")
def mamba2_1_3b(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba-2 with 48 blocks of width 2048, trained on the Pile."""
    return _create("mamba2_1_3b", **kwargs)


@register_model(domain="language")
def mamba2_2_7b(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Mamba-2 with 64 blocks of width 2560, trained on the Pile."""
    return _create("mamba2_2_7b", **kwargs)


@register_model(domain="language")
def xlstm_7b(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """xLSTM 7B: 32 blocks of width 4096 with 8 heads."""
    return _create("xlstm_7b", **kwargs)


@register_model(domain="language")
def xlstm_14m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Six mLSTM blocks and one sLSTM block of width 128: the authors' example of their first models."""
    return _create("xlstm_14m", **kwargs)


@register_model(domain="language")
def lightnet_1_4b(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """LightNet with 24 blocks of width 2048, each with a SwiGLU: the default of fla's language model."""
    return _create("lightnet_1_4b", **kwargs)


@register_model(domain="language")
def fla_lm(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """A language model of fla's, built by `fla_options`; without any options a GLA of 24 blocks of width 2048."""
    return _create("fla_lm", **kwargs)


@register_model(domain="language")
def bytes_5m(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Six blocks of width 256 over bytes, each with an MLP; the mixer is `pattern`."""
    return _create("bytes_5m", **kwargs)


@register_model(domain="language")
def bytes_nano(pretrained: bool = False, **kwargs: Any) -> SequenceModel:
    """Six Mamba blocks of width 160 over bytes, each with an MLP: two million parameters, small enough to ship."""
    return _create("bytes_nano", **kwargs)
