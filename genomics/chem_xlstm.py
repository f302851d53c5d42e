"""Chem-xLSTM: mLSTM language models of molecules, written as SMILES or SELFIES.

    x ← x + mlstm(norm(x))                                `depth` times
    logits = norm_f(x) Wᵀ

Paper: Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165). Reference: https://github.com/ml-jku/Chem-xLSTM (Apache-2.0).
This is an independent implementation that reads the reference's state dictionaries. Their files do not say how many
heads a model has, nor which token an id is: give `num_heads` (8 for the released models) and read the vocabulary that
lies beside the weights:

    model = sinuous.create_model("chem_xlstm_15m", checkpoint_path="model.pt")
    model.tokenizer = SmilesTokenizer.from_file("init_arguments.json")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import check_arguments
from sinuous.core.registry import register_model
from sinuous.genomics.heads import HeadedModel, tokenizer_for
from sinuous.genomics.letters import SmilesTokenizer
from sinuous.genomics.xlstm import XLSTM_STACK, bio_xlstm_cfgs, fit_xlstm

__all__ = ["ChemXLSTM", "checkpoint_filter_fn"]

SIZES: dict[str, dict[str, Any]] = {
    "chem_xlstm_1_6m": {},
    "chem_xlstm_15m": {"dim": 512, "depth": 9, "num_heads": 8},
    "chem_xlstm_nano": {"depth": 3, "num_heads": 4, "pattern": "slstm", "vocab_size": SmilesTokenizer().vocab_size},
}


class ChemXLSTM(HeadedModel):
    """Chem-xLSTM.

    Args:
        dim: D, width of the residual stream.
        depth: number of blocks.
        num_heads: of each block's memory.
        vocab_size: V; `model.tokenizer` is a `SmilesTokenizer` where it has as many tokens, else None until it is set.
        pattern: names of mixers, taken in turn and over again. `slstm` brings an MLP with it.
        head: `"lm"`, `"sequence"` or `"position"`.
        num_classes: of the last two heads.
        drop_rate: dropout after the embedding and inside the MLPs.

    Raises:
        ValueError: if a size or a choice is not allowed.
    """

    @check_arguments
    def __init__(
        self,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 1,
        vocab_size: int = 37,
        pattern: str | Sequence[str] = "mlstm",
        head: str = "lm",
        num_classes: int = 0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            depth,
            num_heads,
            pattern,
            head,
            num_classes,
            tokenizer_for(vocab_size, SmilesTokenizer),
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
            **XLSTM_STACK,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: ChemXLSTM) -> dict[str, Tensor]:
    """The authors' weights, or our own, as `model` has them; a head of another kind is left out with a warning.

    Raises:
        ValueError: if the weights have another vocabulary or another number of heads.
    """
    return fit_xlstm(state_dict, model)


default_cfgs = bio_xlstm_cfgs(
    {
        "chem_xlstm_1_6m": {"input_size": (99,)},
        "chem_xlstm_15m": {"input_size": (99,)},
        "chem_xlstm_nano": {"input_size": (64,)},
    },
    "Chem-xLSTM",
)


def _create(variant: str, **kwargs: Any) -> ChemXLSTM:
    return ChemXLSTM(**{**SIZES[variant], **kwargs})


@register_model(domain="genomics")
def chem_xlstm_1_6m(pretrained: bool = False, **kwargs: Any) -> ChemXLSTM:
    """Chem-xLSTM with four blocks of width 256 and one head: the authors' example."""
    return _create("chem_xlstm_1_6m", **kwargs)


@register_model(domain="genomics")
def chem_xlstm_15m(pretrained: bool = False, **kwargs: Any) -> ChemXLSTM:
    """Chem-xLSTM with nine blocks of width 512 and eight heads, trained on ChEMBL in the paper."""
    return _create("chem_xlstm_15m", **kwargs)


@register_model(domain="genomics")
def chem_xlstm_nano(pretrained: bool = False, **kwargs: Any) -> ChemXLSTM:
    """Chem-xLSTM with three sLSTM blocks of width 256 over a fixed vocabulary of SMILES, small enough to ship; ours."""
    return _create("chem_xlstm_nano", **kwargs)
