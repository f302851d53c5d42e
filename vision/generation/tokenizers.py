"""Tokenizers of pictures: LlamaGen's VQ-f16, which AiM's authors use, as diffusers' `VQModel`.

Its codes lie on a sphere: what is encoded is compared with codes of length 1, so that the nearest is the one in the
same direction. A codebook that is normalised once gives the same codes without normalising what is encoded.

Source: Sun et al., "Autoregressive Model Beats Diffusion" (arXiv 2406.06525), section 2.1; names as in
FoundationVision/LlamaGen (MIT).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from sinuous.core.checkpoints import load_state_dict
from sinuous.core.registry import check_weights

_RENAMED = (
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up_blocks.\1."),
    (r"\.res\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def load_vq_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Read a VQ-f16 from a file of AiM's (its `vqvae.*`) or LlamaGen's, as diffusers' `VQModel`, in evaluation mode.

        latents = tokenizer.encode(pictures).latents                 pictures [B, 3, h, w] from -1 to 1
        codes = tokenizer.quantize(latents)[2][2]                    [B · h/16 · w/16], row by row

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no such tokenizer.
    """
    state = load_state_dict(path)
    prefix = "vqvae."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state.pop("quantize.codebook_used", None)
    codebook = state.get("quantize.embedding.weight")
    if codebook is None or "encoder.conv_blocks.0.res.0.conv1.weight" not in state:
        raise ValueError(f"{os.fspath(path)} holds no VQ tokenizer; give AiM's model.safetensors or LlamaGen's vq_ds16")
    sizes = _sizes(state)
    renamed = {_our_name(name): tensor for name, tensor in state.items()}
    renamed["quantize.embedding.weight"] = F.normalize(codebook, dim=-1)
    tokenizer = VQModel(**sizes)
    weights = {name: t.flatten(1) if _is_linear(name, t) else t for name, t in renamed.items()}
    check_weights(weights, tokenizer)
    tokenizer.load_state_dict(weights)
    return tokenizer.eval()


def _is_linear(name: str, tensor: Tensor) -> bool:
    return re.search(r"\.to_(q|k|v|out\.0)\.weight$", name) is not None and tensor.ndim == 4


def _our_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the `VQModel` that has such weights."""
    levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.conv_blocks."))
    layers = 1 + max(int(n.split(".")[4]) for n in state if n.startswith("encoder.conv_blocks.0.res."))
    codes, width = state["quantize.embedding.weight"].shape
    channels = [state[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": width,
        "scaling_factor": 1.0,
    }
