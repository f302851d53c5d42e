"""The authors' checkpoints of SaShiMi as our models have them: both layouts, older names, lengths of kernels.

Source: state-spaces/s4: models/sashimi (the standalone class), src/models/sequence/backbones/{sashimi,unet}.py (the
published checkpoints) and checkpoints/convert_v3_to_v4.py (older names).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sinuous.audio.sashimi_backbone import SashimiBackbone
from sinuous.core.mixers.s4 import S4Kernel

BESIDE = ("encoder.", "decoder.")
"""Parts of the authors' training module that are not the net."""

_OLDER = (
    (r"^encoder\.weight$", "encoder.0.weight"),
    (r"^decoder\.output_transform\.", "decoder.0.output_transform."),
)
_OLDER_SYSTEMS = (
    (r"\.kernel\.kernel\.L$", ".kernel.l_kernel"),
    (r"\.kernel\.kernel\.", ".kernel."),
    (r"(?<!\.layer)\.layer\.(?=kernel\.|D$)", ".layer.layer."),
    (r"\.(inv|log)_w_real$", ".A_real"),
)


def fit_sashimi(state_dict: Mapping[str, Tensor], model: nn.Module, net: SashimiBackbone) -> dict[str, Tensor]:
    """Weights of the authors or our own, by the names of `model`, of which `net` is a part or the whole.

    What the authors keep beside the net is left out where `model` is the net alone.
    """
    place = "" if model is net else "model."
    own = tuple(f"{name}." for name, _ in model.named_children()) if place else ()
    alone = {parameter for parameter, _ in model.named_parameters(recurse=False)} | {
        buffer for buffer, _ in model.named_buffers(recurse=False)
    }
    flat = any(re.search(r"(^|\.)u_layers\.\d+\.(norm|layer|linear)\.", name) for name in state_dict)
    state: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _OLDER:
            name = re.sub(pattern, replacement, name)
        name, tensor = of_system(name, tensor, net.mixer_options.get("dt_transform") == "softplus")
        if not place:
            if name.startswith(BESIDE):
                continue
            name = name.removeprefix("model.")
        elif not name.startswith(own) and name not in alone:
            name = place + name
        if flat:
            name = re.sub(r"u_layers\.(\d+)\.", lambda match: _of_tier(int(match[1]), net), name)
        if tensor.ndim == 3 and tensor.shape[2] == 1 and name.endswith(".weight"):
            tensor = tensor.squeeze(2)  # of a convolution with one tap
        state[name] = tensor
    take_lengths_out(state, model)
    return state


def take_lengths_out(state: dict[str, Tensor], model: nn.Module) -> None:
    """Make the C of every system of `model` that of its recurrence, in place, where `state` has lengths of kernels."""
    for name, kernel in model.named_modules():
        if isinstance(kernel, S4Kernel) and f"{name}.C" in state:
            kernel.take_length_out(state, f"{name}.")


def _of_tier(place: int, net: SashimiBackbone) -> str:
    """Name of the layer at `place` of the U-Net's flat list on the way up, in a list for each rate."""
    layers = 1 + net.depth * (2 if net.ff else 1)
    return f"u_layers.{place // layers}.{place % layers}."


def of_system(name: str, tensor: Tensor, softplus: bool) -> tuple[str, Tensor]:
    """A parameter of S4 in the names and with the signs of version 4; others as they are.

    Args:
        name: of version 4 or older.
        tensor: the parameter.
        softplus: steps are the softplus of what is stored, not its exponential.
    """
    for pattern, replacement in _OLDER_SYSTEMS:
        name = re.sub(pattern, replacement, name)
    place, _, kind = name.rpartition(".")
    if kind == "w_imag":
        return f"{place}.A_imag", -tensor
    if kind == "log_dt":
        raw = tensor.reshape(-1, 1)
        if softplus:
            step = raw.double().exp()
            raw = (step + torch.log(-torch.expm1(-step))).to(raw.dtype)  # whose softplus is the step
        return f"{place}.inv_dt", raw
    if kind == "D" and tensor.ndim == 1:
        return name, tensor.unsqueeze(0)
    return name, tensor
