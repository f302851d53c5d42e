"""Weights of the first xLSTM models (arXiv 2405.04517), from the names and conventions of NX-AI's `xLSTMBlockStack`.

There a block has its layer and, after an sLSTM, a gated feed-forward; norms keep their weight's difference from one;
and an sLSTM cell made for the authors' CUDA kernel has its recurrent weights and biases in another order than one made
without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_NORMS = ("xlstm_norm.weight", "ffn_norm.weight", "post_blocks_norm.weight")

_RENAMED = (
    (r"^((model|backbone)\.)*xlstm_block_stack\.", ""),
    (r"^((model|backbone)\.)*token_embedding\.", "embedding."),
    (r"^((model|backbone)\.)*lm_head\.", "head."),
    (r"^blocks\.(\d+)\.xlstm_norm\.", r"layers.\1.norm."),
    (r"^blocks\.(\d+)\.xlstm\.", r"layers.\1.mixer."),
    (r"^blocks\.(\d+)\.ffn_norm\.", r"layers.\1.norm2."),
    (r"^blocks\.(\d+)\.ffn\.proj_up\.", r"layers.\1.mlp.fc1."),
    (r"^blocks\.(\d+)\.ffn\.proj_down\.", r"layers.\1.mlp.fc2."),
    (r"^post_blocks_norm\.", "norm_f."),
)

_KERNEL, _BIAS = "slstm_cell._recurrent_kernel_", "slstm_cell._bias_"


def is_block_stack(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of NX-AI's `xLSTMBlockStack`, by itself or in its `xLSTMLMModel`."""
    return any(name.endswith(".xlstm_norm.weight") for name in state)


def from_block_stack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its weights under the names of a `SequenceModel`, with norms and sLSTM cells as we have them."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_NORMS):
            tensor = tensor + 1
        elif name.endswith(_KERNEL):
            tensor = _kernel(tensor)
        elif name.endswith(_BIAS) and _is_for_cuda(kernel := state[name.removesuffix(_BIAS) + _KERNEL]):
            heads, size, _ = kernel.shape
            tensor = tensor.unflatten(0, (heads, 4, size)).transpose(0, 1).flatten()
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def _is_for_cuda(kernel: Tensor) -> bool:
    """`[H, in, 4 · out]` instead of `[H, 4 · out, in]`."""
    return kernel.shape[2] == 4 * kernel.shape[1]


def _kernel(kernel: Tensor) -> Tensor:
    return kernel.mT.contiguous() if _is_for_cuda(kernel) else kernel
