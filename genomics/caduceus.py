"""Caduceus: Mamba in both directions over DNA, of one strand (PH) or both (PS).

    x ← x + bimamba(RMSNorm(x))                           `depth` times
    bimamba(x) = mamba(x) + flip(mamba'(flip x))          which share in_proj and out_proj, and nothing else
    logits = RMSNorm(x) Wᵀ                                W the embedding itself

`caduceus_ph_…` reads single strands; the authors average them over both for predictions (`strands="conjoined"`).
`caduceus_ps_…` is equivariant to the reverse complement, `strands="shared"`.

Paper: Schiff et al., "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling" (arXiv 2403.03234).
Reference: https://github.com/kuleshov-group/caduceus (Apache-2.0). This is an independent implementation that reads the
reference's state dictionaries:

    model = sinuous.create_model("caduceus_ps_131k", checkpoint_path="model.safetensors")

The reference has two paths through the blocks of PS, which give different numbers for the same weights. Without fused
norms, [u, v] goes through as `sinuous.genomics.strands` says. With them, the first half goes on as the second, and the
other way, in every block: with A(x) = x reversed in time and channels,

    fused        u ← g(A w),  w ← g(A u)                  w = A(v) the second strand, g a block with its residual
    not fused    u ← g(u),    w ← g(w)

where g is turned with A in every other block: A g A is g with its directions exchanged and the channels of its norm, of
in_proj and of out_proj in reverse order. So weights of the fused path, which names its norms differently, are read into
the other path with every other block turned, and give the authors' numbers. The released weights are of the fused path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor

from sinuous.core.checks import check_arguments
from sinuous.core.registry import register_model
from sinuous.genomics.heads import check_vocabulary, fit_head
from sinuous.genomics.strands import StrandedModel, fit_strands

__all__ = ["Caduceus", "checkpoint_filter_fn"]

SIZES: dict[str, dict[str, Any]] = {
    "caduceus_ph_1k": {"depth": 4},
    "caduceus_ps_1k": {"depth": 4, "strands": "shared"},
    "caduceus_ph_131k": {"depth": 16},
    "caduceus_ps_131k": {"depth": 16, "strands": "shared"},
}


class Caduceus(StrandedModel):
    """Caduceus.

    Args:
        dim: D, width of the residual stream.
        depth: number of blocks.
        vocab_size: V; the embedding has rows up to the next multiple of 8, and logits as many columns.
        head: `"lm"`, `"sequence"` or `"position"`.
        num_classes: of the last two heads.
        tie_head: the matrix of the head for tokens is the embedding.
        strands, class_complement, join_dim: see `StrandedModel`.
        drop_rate: dropout after the embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if a size or a choice is not allowed, or two of them do not go together.
    """

    @check_arguments
    def __init__(
        self,
        dim: int = 256,
        depth: int = 4,
        vocab_size: int = 12,
        head: str = "lm",
        num_classes: int = 0,
        tie_head: bool = True,
        strands: str = "single",
        class_complement: Sequence[int] | None = None,
        join_dim: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            depth,
            pattern="vim_pair",
            mixer_options={"vim_pair": {"divide_out": False}},
            head=head,
            num_classes=num_classes,
            strands=strands,
            class_complement=class_complement,
            join_dim=join_dim,
            tie_head=tie_head,
            causal=False,
            pad_vocab_multiple=8,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )


_RENAMED = (
    (r"^((model|caduceus|backbone)\.)+", ""),
    (r"^embeddings\.word_embeddings\.", "embedding."),
    (r"^lm_head\.", "head."),
    (r"^score\.", "sequence_head."),
    (r"\.mamba_fwd\.", "."),
    (r"\.mamba_rev\.(conv1d|x_proj|dt_proj)\.", r".\1_b."),
    (r"\.mamba_rev\.A_log$", ".A_b_log"),
    (r"\.mamba_rev\.D$", ".D_b"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: Caduceus) -> dict[str, Tensor]:
    """The authors' weights, or our own, as `model` has them; a head of another kind is left out with a warning.

    Raises:
        ValueError: if the weights have another vocabulary or other letters for complements, are of one strand where
            `model` is of both, or the other way, have projections of their own in either direction, a head of their own
            where `model`'s is tied, or are of the fused path and an odd number of blocks.
    """
    state = fit_strands(state_dict, model)
    if any(".mamba_fwd." in name for name in state):
        fused = state.keys() != state_dict.keys() and not any(".norm.submodule." in name for name in state_dict)
        state = _from_authors(state, fused)
    check_vocabulary(state, model)
    state = fit_head(state, model)
    head = state.get("head.weight")
    if model.head_kind == "lm" and model.tie_head and head is not None:
        if not torch.equal(head, state.get("embedding.weight", head)):
            raise ValueError(
                "the checkpoint has a head of its own and the model's is tied to its embedding; "
                "build the model with tie_head=False"
            )
        del state["head.weight"]
    elif model.head is not None and head is None and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"].clone()
    return state


def _from_authors(theirs: Mapping[str, Tensor], fused: bool) -> dict[str, Tensor]:
    state = {}
    for name, tensor in theirs.items():
        if re.search(r"\.mamba_rev\.(in|out)_proj\.", name):
            if not torch.equal(tensor, theirs[name.replace("mamba_rev", "mamba_fwd")]):
                raise ValueError(
                    f"the checkpoint has projections of its own in either direction ({name} differs from that of "
                    "mamba_fwd) and the model shares them; it was made with bidirectional_weight_tie=False"
                )
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    weight = state.get("sequence_head.weight")
    if weight is not None:
        state.setdefault("sequence_head.bias", weight.new_zeros(len(weight)))
    return _not_fused(state) if fused else state


def _not_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the fused path, those of every other block turned, as the other path needs them."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    if depth % 2:
        raise ValueError(
            f"the checkpoint is of the fused path of both strands and has {depth} blocks; with an odd number the "
            "authors' code leaves the strands exchanged, which this model cannot do; run it with their code"
        )
    turned = {}
    for name, tensor in state.items():
        block = re.match(r"layers\.(\d+)\.", name)
        if block is not None and int(block[1]) % 2 == 0:
            name = _exchanged(name)
            if name.endswith((".norm.weight", ".norm.bias", ".out_proj.weight")):
                tensor = tensor.flip(0)
            elif name.endswith(".in_proj.weight"):
                tensor = tensor.flip(1)
        turned[name] = tensor
    return turned


def _exchanged(name: str) -> str:
    """The name of the same parameter of the other direction; the same where both share it."""
    for ours, other in (("conv1d", "conv1d_b"), ("x_proj", "x_proj_b"), ("dt_proj", "dt_proj_b"), ("A_log", "A_b_log"),
                        ("D", "D_b")):  # fmt: skip
        for part, instead in ((ours, other), (other, ours)):
            if f".mixer.{part}." in f"{name}.":
                return f"{name}.".replace(f".mixer.{part}.", f".mixer.{instead}.").removesuffix(".")
    return name


def _cfg(name: str) -> dict[str, Any]:
    _, kind, length = name.split("_")
    return {
        "num_classes": 0,
        "input_size": ({"1k": 1024, "131k": 131072}[length],),
        "classifier": "head",
        "first_conv": "embedding",
        "license": "apache-2.0",
        "paper_name": "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling",
        "paper_ids": "arXiv:2403.03234",
        "origin_url": f"https://huggingface.co/kuleshov-group/caduceus-{kind}_seqlen-{length}_d_model-256_n_layer-"
        f"{SIZES[name]['depth']}",
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(name) for name in SIZES})


def _create(variant: str, **kwargs: Any) -> Caduceus:
    return Caduceus(**{**SIZES[variant], **kwargs})


@register_model(domain="genomics")
def caduceus_ph_1k(pretrained: bool = False, **kwargs: Any) -> Caduceus:
    """Caduceus-PH with four blocks of width 256, of single strands, for 1,024 bases."""
    return _create("caduceus_ph_1k", **kwargs)


@register_model(domain="genomics")
def caduceus_ps_1k(pretrained: bool = False, **kwargs: Any) -> Caduceus:
    """Caduceus-PS with four blocks of width 256, equivariant to the reverse complement, for 1,024 bases."""
    return _create("caduceus_ps_1k", **kwargs)


@register_model(domain="genomics")
def caduceus_ph_131k(pretrained: bool = False, **kwargs: Any) -> Caduceus:
    """Caduceus-PH with sixteen blocks of width 256, of single strands, for 131,072 bases."""
    return _create("caduceus_ph_131k", **kwargs)


@register_model(domain="genomics")
def caduceus_ps_131k(pretrained: bool = False, **kwargs: Any) -> Caduceus:
    """Caduceus-PS with sixteen blocks of width 256, equivariant to the reverse complement, for 131,072 bases."""
    return _create("caduceus_ps_131k", **kwargs)
