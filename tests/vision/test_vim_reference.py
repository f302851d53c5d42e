"""Vim against the authors' code.

data/vim_reference.safetensors holds weights (`model.*`, fp32), two images (`input`), the logits, and gradients of
`(logits · (1, 2, 3, 4, 5)).sum()` (`grad.*`). They were made with hustvl/Vim at commit dd0358a: its `VisionMamba` with
img_size (24, 40), patch and stride 8, width 16, depth 3, state 4, 5 classes, the middle class token and
`if_divide_out`, on a CPU in fp64. Its fused CUDA functions were replaced by its own plain-torch references
(`mamba_inner_ref`, `selective_scan_ref`, raised from fp32 to fp64), its fused norms by the unfused branch. Random
weights, moved away from their initial values so that no term vanishes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sinuous.vision.vim import Vim, checkpoint_filter_fn

FILE = load_file(Path(__file__).parent / "data" / "vim_reference.safetensors")


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in FILE.items() if name.startswith(prefix)}


def vim(dtype: torch.dtype) -> Vim:
    model = Vim(img_size=(24, 40), patch_size=8, embed_dim=16, depth=3, d_state=4, num_classes=5).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": part("model."), "epoch": 300}, model))
    return model.to(dtype)


# The file keeps gradients in fp32.
@pytest.mark.parametrize(("dtype", "bound", "grad_bound"), [(torch.float64, 1e-13, 1e-7), (torch.float32, 1e-6, 1e-5)])
def test_logits_and_gradients(dtype: torch.dtype, bound: float, grad_bound: float) -> None:
    model = vim(dtype)
    logits = model(FILE["input"].to(dtype))
    assert (logits - FILE["logits"]).abs().max() < bound
    (logits * torch.arange(1, 6, dtype=dtype)).sum().backward()
    parameters = dict(model.named_parameters())
    for name, wanted in part("grad.").items():
        found = parameters[name].grad
        assert found is not None
        assert (found - wanted).norm() < grad_bound * wanted.norm(), name


def test_the_class_token_stands_in_the_middle() -> None:
    """A port with the token in front gives other logits for the same weights."""
    model = vim(torch.float64)
    tokens = model.forward_features(FILE["input"].double())
    assert torch.equal(model.head(tokens[:, 7]), model(FILE["input"].double()))
    assert (model.head(tokens[:, 0]) - FILE["logits"]).abs().max() > 0.01
