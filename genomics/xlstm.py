"""What the xLSTM models of biological sequences share: the blocks of the first xLSTM, and their authors' checkpoints.

    x ← x + mixer(norm(x));  and after an sLSTM  x ← x + W2 (gelu(a) ⊙ b), [a, b] = W1 norm2(x)

Paper: Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165, ICLR 2025); blocks as in Beck et al. (arXiv 2405.04517).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import DefaultCfg, generate_default_cfgs
from torch import Tensor

from sinuous.core.language.xlstm_checkpoints import from_block_stack, is_block_stack
from sinuous.core.weights import shipped_cfgs
from sinuous.genomics.heads import HeadedModel, check_vocabulary, fit_head

WEIGHTS = Path(__file__).parent / "weights"

XLSTM_STACK: dict[str, Any] = {
    "mlp": {"slstm": "geglu"},
    "mlp_ratio": 1.3,
    "mlp_multiple_of": 64,
    "norm": "layer_no_bias",
    "tie_head": False,
    "weight_init": "xlstm",
}
"""Arguments of `SequenceModel` that make it an xLSTM."""


def fit_xlstm(state_dict: Mapping[str, Tensor], model: HeadedModel) -> dict[str, Tensor]:
    """Authors' weights of an xLSTM, or our own, by the names of `model`; see `fit_head` for their heads.

    Raises:
        ValueError: if the weights have another vocabulary or other heads of memory than the model.
    """
    state = from_block_stack(state_dict) if is_block_stack(state_dict) else dict(state_dict)
    check_vocabulary(state, model)
    _check_memory_heads(state, model)
    state = fit_head(state, model)
    if not model.tie_head and "head.weight" not in state and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"].clone()
    return state


_HEADS_OF = (".mlstm_cell.igate.weight", ".slstm_cell._recurrent_kernel_")
"""Parameters with a row for each head of a block's memory."""


def _check_memory_heads(state: Mapping[str, Tensor], model: HeadedModel) -> None:
    ours = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(_HEADS_OF) and name in ours and len(tensor) != len(ours[name]):
            raise ValueError(
                f"the checkpoint's memory has {len(tensor)} heads and the model's {len(ours[name])} ({name}); "
                f"build the model with num_heads={len(tensor)}"
            )


def bio_xlstm_cfgs(names: Mapping[str, Mapping[str, Any]], repository: str) -> dict[str, DefaultCfg]:
    """timm's `default_cfgs` of a family, with a tag for each of the weights that ship.

    Args:
        names: of the registered models, with entries of their own, such as `input_size`.
        repository: of the authors, at github.com/ml-jku.
    """
    common = {
        "num_classes": 0,
        "classifier": "head",
        "first_conv": "embedding",
        "license": "apache-2.0",
        "paper_name": "Bio-xLSTM: Generative modeling, representation and in-context learning of biological and "
        "chemical sequences",
        "paper_ids": "arXiv:2411.04165",
        "origin_url": f"https://github.com/ml-jku/{repository}",
    }
    cfgs: dict[str, Any] = {}
    for name, own in names.items():
        cfgs |= shipped_cfgs(WEIGHTS, name, {**common, **own})
    made: dict[str, DefaultCfg] = generate_default_cfgs(cfgs)
    return made
