"""Tokenizers of pictures, as diffusers' `VQModel`: LlamaGen's VQ-f16, which AiM's authors use, and our own.

The codes of VQ-f16 lie on a sphere: what is encoded is compared with codes of length 1, so that the nearest is the one
in the same direction. A codebook that is normalised once gives the same codes without normalising what is encoded.

Source: Sun et al., "Autoregressive Model Beats Diffusion" (arXiv 2406.06525), section 2.1; names as in
FoundationVision/LlamaGen (MIT).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from sinuous.core.checkpoints import load_state_dict, read_metadata
from sinuous.core.registry import check_weights
from sinuous.core.weights import all_weights

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


PREFIX = "vqvae."
"""Of the tokenizer's weights in a file that holds AiM's, too."""


def load_vq_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Read a tokenizer of pictures as diffusers' `VQModel`, in evaluation mode.

        latents = tokenizer.encode(pictures).latents                 pictures [B, C, h, w] from -1 to 1
        codes = tokenizer.quantize(latents)[2][2]                    [B · h/f · w/f], row by row, f of the tokenizer

    Args:
        path: a VQ-f16 in a file of AiM's (its `vqvae.*`) or LlamaGen's; a folder that a `VQModel` or an `AiMPipeline`
            was saved to; or the name of weights of AiM that come with the package, such as "aim_nano.fashion_mnist".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no such tokenizer.
    """
    place = Path(path)
    if not place.exists() and (weights := all_weights().get(os.fspath(path))) is not None:
        place = weights.file
    if place.is_dir():
        return _of_folder(place)
    if not place.exists() and not place.suffix:
        raise FileNotFoundError(
            f"there is no tokenizer {os.fspath(path)}; train one with `sinuous train "
            "experiment=generation/fashion_mnist_vq` and give the folder tokenizer/ of its run"
        )
    state = load_state_dict(place)
    config = json.loads(read_metadata(place).get("pipeline", "{}")).get("vqvae")
    if config is not None:
        tokenizer, weights_of_it = VQModel.from_config(config), of_tokenizer(state)
    else:
        tokenizer, weights_of_it = _of_llamagen(of_tokenizer(state), place)
    check_weights(weights_of_it, tokenizer)
    tokenizer.load_state_dict(weights_of_it)
    return tokenizer.eval()


def of_tokenizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a tokenizer, of a file that may hold others beside them."""
    if any(name.startswith(PREFIX) for name in state):
        return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    return dict(state)


def _of_folder(folder: Path) -> Any:
    inner = folder / "vqvae" if (folder / "vqvae").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise ValueError(f"{folder} holds no VQModel; give the folder that its save_pretrained wrote")
    return VQModel.from_pretrained(inner).eval()


def _of_llamagen(state: dict[str, Tensor], path: Path) -> tuple[Any, dict[str, Tensor]]:
    state.pop("quantize.codebook_used", None)
    codebook = state.get("quantize.embedding.weight")
    if codebook is None or "encoder.conv_blocks.0.res.0.conv1.weight" not in state:
        raise ValueError(f"{path} holds no VQ tokenizer; give AiM's model.safetensors or LlamaGen's vq_ds16")
    sizes = _sizes(state)
    renamed = {_our_name(name): tensor for name, tensor in state.items()}
    renamed["quantize.embedding.weight"] = F.normalize(codebook, dim=-1)
    return VQModel(**sizes), {name: t.flatten(1) if _is_linear(name, t) else t for name, t in renamed.items()}


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
