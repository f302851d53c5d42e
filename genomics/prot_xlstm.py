"""Prot-xLSTM: mLSTM language models of proteins, which read a protein's homologs before it.

    x ← x + mlstm(norm(x))                                `depth` times, queries and keys rotated by their positions
    logits = norm_f(x) Wᵀ

A text is one protein after another, each behind a `<cls>`; positions count from 0 at each `<cls>`, so that homologs lie
over each other. Where spans were cut out of a protein, `position_ids` say where the tokens stand in the whole one (see
`sinuous.genomics.spans`).

Paper: Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165). Reference: https://github.com/ml-jku/Prot-xLSTM (Apache-2.0).
This is an independent implementation that reads the reference's state dictionaries. Other sizes than the named ones are
in the `config.json` beside them:

    options = config_options("protxlstm_26M_30B/config.json")
    model = sinuous.create_model("prot_xlstm_26m", checkpoint_path="protxlstm_26M_30B/pytorch_model.bin", **options)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import check_arguments, check_sizes, described
from sinuous.core.mixers import positions
from sinuous.core.mixers.mlstm import FORGET_BIAS
from sinuous.core.registry import register_model
from sinuous.core.stack import State
from sinuous.genomics.heads import HeadedModel, tokenizer_for
from sinuous.genomics.letters import ProteinTokenizer
from sinuous.genomics.xlstm import XLSTM_STACK, bio_xlstm_cfgs, fit_xlstm

__all__ = ["ProtXLSTM", "checkpoint_filter_fn", "config_options"]

SIZES: dict[str, dict[str, Any]] = {
    "prot_xlstm_26m": {},
    "prot_xlstm_102m": {"dim": 1024},
    # A relative ends hundreds of residues before the same place of the next one: heads that forget within 20 to 400
    # steps at the start, as published, do not learn to look it up in the little that a small model reads.
    "prot_xlstm_nano": {"dim": 192, "depth": 4, "forget_bias": (8.0, 8.0)},
}


class ProtXLSTM(HeadedModel):
    """Prot-xLSTM.

    Args:
        dim: D, width of the residual stream.
        depth: number of blocks.
        num_heads: of each block's memory.
        vocab_size: V; `model.tokenizer` is a `ProteinTokenizer` where it has as many tokens, else None until it is set.
        pattern: names of mixers, taken in turn and over again. `slstm` brings an MLP with it.
        head: `"lm"`, `"sequence"` or `"position"`.
        num_classes: of the last two heads.
        rotary_theta: base of the rotary positions.
        max_position_embeddings: number of positions; later ones are read as the last, as in the published models.
        forget_bias: of the memory's forget gates at the start, see `sinuous.core.mixers.mlstm.MLSTM`.
        drop_rate: dropout after the embedding and inside the MLPs.

    Raises:
        ValueError: if a size or a choice is not allowed.
    """

    @check_arguments
    def __init__(
        self,
        dim: int = 512,
        depth: int = 16,
        num_heads: int = 4,
        vocab_size: int = 38,
        pattern: str | Sequence[str] = "mlstm",
        head: str = "lm",
        num_classes: int = 0,
        rotary_theta: float = 5e5,
        max_position_embeddings: int = 2048,
        forget_bias: Sequence[float] = FORGET_BIAS,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(max_position_embeddings=max_position_embeddings)
        super().__init__(
            vocab_size,
            dim,
            depth,
            num_heads,
            pattern,
            head,
            num_classes,
            tokenizer_for(vocab_size, ProteinTokenizer),
            {"mlstm": {"rotary": "inner", "rotary_theta": rotary_theta, "forget_bias": forget_bias}},
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
            **XLSTM_STACK,
        )
        self.max_position_embeddings = max_position_embeddings

    def forward_features(
        self, x: Tensor, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Features `[B, T, D]` that the head reads.

        Args:
            x: ids `[B, T]`, or embeddings `[B, T, D]`, packed `[1, ΣT]`.
            cu_seqlens: boundaries of packed sequences, `[N + 1]`.
            position_ids: int64 `[B, T]`. If absent, they count from 0 at each `<cls>` and at the start of each
                sequence; in embeddings no `<cls>` is seen.
        """
        if position_ids is None and isinstance(x, Tensor) and x.ndim > 1:
            position_ids = self._counted(x, None, cu_seqlens)
        return super().forward_features(x, cu_seqlens, self._clamped(position_ids))

    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        last_only: bool = False,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        if position_ids is None and isinstance(x, Tensor) and x.ndim > 1:
            position_ids = self._counted(x, _next_position(state), None)
        return super().prefill(x, state, last_only=last_only, position_ids=self._clamped(position_ids))

    def step(self, x_t: Tensor, state: State, position_ids: Tensor | None = None) -> tuple[Tensor, State]:
        if position_ids is None and isinstance(x_t, Tensor) and x_t.ndim > 0:
            position_ids = self._counted(x_t.unsqueeze(1), _next_position(state), None).squeeze(1)
        return super().step(x_t, state, self._clamped(position_ids))

    prefill.__doc__, step.__doc__ = HeadedModel.prefill.__doc__, HeadedModel.step.__doc__

    def _counted(self, x: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Steps since the last `<cls>` or the start of the sequence, int64 `[B, T]`, `start` of them before `x`."""
        counted = positions.steps(x, start, cu_seqlens).expand(x.shape[:2])
        if x.is_floating_point() or self.tokenizer is None:
            return counted
        index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        # Where counting began: in front of the first step, at a boundary, or at a <cls>.
        origin = torch.where(x == self.tokenizer.start, index, index - counted).cummax(1).values
        return index - origin

    def _clamped(self, position_ids: Tensor | None) -> Tensor | None:
        if not isinstance(position_ids, Tensor) or position_ids.dtype != torch.int64:  # which the stack refuses
            return position_ids
        return position_ids.clamp(0, self.max_position_embeddings - 1)


def _next_position(state: Any) -> Tensor | None:
    """The position of the next step, `[B]`, of the first block that keeps one."""
    parts = state if isinstance(state, tuple | list) else ()
    kept: list[Tensor] = [part.position for part in parts if hasattr(part, "position")]
    return kept[0] if kept else None


def config_options(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ProtXLSTM` out of the authors' configuration.

    Args:
        config: what a `config.json` beside weights says, or its path; the `model` part of a file for training. Older
            ones speak of sLSTM blocks, which no model of theirs has.

    Raises:
        ValueError: if it is no such configuration, or its model has another kind of positions, biases or a tied head.
    """
    content = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    content = content.get("model", content) if isinstance(content, Mapping) else content
    try:
        memory = content["mlstm_block"]["mlstm"]
        options = {"dim": content["embedding_dim"], "depth": content["num_blocks"]}
    except (KeyError, TypeError) as error:
        name = "a configuration" if isinstance(config, Mapping) else os.fspath(config)
        raise ValueError(
            f"{name} is not Prot-xLSTM's (got {described(content)} without {error}); "
            "give the config.json that lies beside its weights"
        ) from None
    for key, only in (("position_embeddings", "rot_1d"), ("bias", False), ("tie_weights", False)):
        if content.get(key, only) != only:
            raise ValueError(
                f"the configuration has {key} {content[key]!r} and a ProtXLSTM {only!r}; "
                "its weights have no place in this model"
            )
    theta = content.get("rope_base_frequency", 10_000)
    wanted = {
        "num_heads": memory.get("num_heads", 4),
        "vocab_size": content.get("vocab_size", 38),
        "rotary_theta": float(theta),
        "max_position_embeddings": content.get("max_position_embeddings", 2048),
    }
    return {**options, **wanted}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: ProtXLSTM) -> dict[str, Tensor]:
    """The authors' weights, or our own, as `model` has them; a head of another kind is left out with a warning.

    Raises:
        ValueError: if the weights have another vocabulary, another number of heads, or learned positions.
    """
    if any("position_embedding." in name for name in state_dict):
        raise ValueError(
            "the checkpoint has learned positions (position_embedding), and a ProtXLSTM has rotary ones alone; "
            "choose weights that were trained with position_embeddings rot_1d"
        )
    return fit_xlstm(state_dict, model)


default_cfgs = bio_xlstm_cfgs({name: {"input_size": (2048,)} for name in SIZES}, "Prot-xLSTM")


def _create(variant: str, **kwargs: Any) -> ProtXLSTM:
    return ProtXLSTM(**{**SIZES[variant], **kwargs})


@register_model(domain="genomics")
def prot_xlstm_26m(pretrained: bool = False, **kwargs: Any) -> ProtXLSTM:
    """Prot-xLSTM with sixteen blocks of width 512, the smaller of the paper's."""
    return _create("prot_xlstm_26m", **kwargs)


@register_model(domain="genomics")
def prot_xlstm_102m(pretrained: bool = False, **kwargs: Any) -> ProtXLSTM:
    """Prot-xLSTM with sixteen blocks of width 1024, the larger of the paper's."""
    return _create("prot_xlstm_102m", **kwargs)


@register_model(domain="genomics")
def prot_xlstm_nano(pretrained: bool = False, **kwargs: Any) -> ProtXLSTM:
    """Prot-xLSTM with four blocks of width 192, small enough to ship; ours."""
    return _create("prot_xlstm_nano", **kwargs)
