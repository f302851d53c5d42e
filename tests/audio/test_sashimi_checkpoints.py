"""Authors' checkpoints of SaShiMi: the two layouts, older names, lengths of kernels, Lightning files.

Their classes were run once against these readings (audio.md 2.10); here the files are made from our own weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sinuous
from sinuous.core.mixers.s4 import S4Kernel
from sinuous.kernels.torch.discretization import conj, discretize, matrix

SMALL: dict[str, Any] = {"embed_dim": 8, "depth": 2, "mixer_options": {"d_state": 8}}
LENGTH = 30


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cut_off(kernel: S4Kernel) -> Tensor:
    """`C (1 - Ā^L)`, as the authors' S4 stores its readout once it has been run over L = 30 steps."""
    dt, A, B, C, P = (t.double() for t in kernel())  # type: ignore[union-attr]
    factor, _, p, q = discretize(dt, A, B, P, "bilinear")
    assert p is not None
    assert q is not None
    power = torch.linalg.matrix_power(matrix(factor, p, q), LENGTH)
    rows = conj(C).flatten(-2).unsqueeze(-2)
    return conj((rows - rows @ power).squeeze(-2).unflatten(-1, (-1, 2))).float()


def published(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of a model as the authors' later runs store them."""
    state = dict(model.state_dict())
    for name, kernel in model.named_modules():
        if isinstance(kernel, S4Kernel):
            state[f"{name}.C"] = cut_off(kernel)
            state[f"{name}.l_kernel"] = torch.tensor(LENGTH)
    return state


def older(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same before version 4: other names, signs and shapes, and steps stored as logarithms."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^(en|de)coder\.0\.", r"\1coder.", name).replace(".layer.layer.kernel.", ".layer.kernel.kernel.")
        name = name.replace(".layer.layer.D", ".layer.D").replace("l_kernel", "L").replace("A_real", "inv_w_real")
        if name.endswith("inv_dt"):
            name, tensor = name.replace("inv_dt", "log_dt"), F.softplus(tensor.double()).log().squeeze(1).float()
        if name.endswith("A_imag"):
            name, tensor = name.replace("A_imag", "w_imag"), -tensor
        renamed[name] = tensor.squeeze(0) if name.endswith(".layer.D") else tensor
    return renamed


def flattened(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The U-Net's way up in one list."""

    def place(match: re.Match[str]) -> str:
        return f"u_layers.{int(match[1]) * layers + int(match[2])}."

    return {re.sub(r"u_layers\.(\d+)\.(\d+)\.", place, name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_published_file_gives_the_logits_of_its_weights(tmp_path: Path, unet: bool, old: bool) -> None:
    name = "sashimi_sc09_unet" if unet else "sashimi_sc09"
    model = sinuous.create_model(name, **SMALL).eval()
    state = published(model)
    assert any(key.endswith("linear.weight_g") for key in state) is not unet
    state = flattened(state, 5) if unet else state
    state = older(state) if old else state
    torch.save({"pytorch-lightning_version": "1.9", "state_dict": state}, tmp_path / "run.ckpt")
    torch.save(state, tmp_path / "run.pt")
    codes = torch.randint(256, (1, 33))
    for file in ("run.ckpt", "run.pt"):
        read = sinuous.create_model(name, checkpoint_path=tmp_path / file, **SMALL).eval()
        torch.testing.assert_close(read(codes), model(codes), atol=2e-5, rtol=0)


def test_older_files_settle_the_function_of_the_step(tmp_path: Path) -> None:
    model = sinuous.create_model("sashimi_sc09", **SMALL).eval()
    torch.save(older(published(model)), tmp_path / "old.pt")
    exp = {**SMALL, "mixer_options": {"d_state": 8, "dt_transform": "exp"}}
    read = sinuous.create_model("sashimi_sc09", checkpoint_path=tmp_path / "old.pt", **exp).eval()
    codes = torch.randint(256, (1, 33))
    torch.testing.assert_close(read(codes), model(codes), atol=2e-5, rtol=0)


@pytest.mark.parametrize("unet", [False, True])
def test_the_standalone_class_has_matrices_of_three_axes_and_no_head(tmp_path: Path, unet: bool) -> None:
    options = {**SMALL, "unet": unet, "mixer_options": {"d_state": 8, "n_ssm": None, "dt_transform": "exp"}}
    net = sinuous.create_model("sashimi_backbone", **options).eval()
    pointwise = re.compile(r"(\.linear|\.ff\.0\.0|\.ff\.2)\.weight$")
    state = {k: t.unsqueeze(2) if pointwise.search(k) else t for k, t in published(net).items()}
    assert sum(t.ndim == 3 and t.shape[2] == 1 for t in state.values()) > 5
    torch.save(state, tmp_path / "net.pt")
    read = sinuous.create_model("sashimi_backbone", checkpoint_path=tmp_path / "net.pt", **options).eval()
    x = torch.randn(1, 33, 8)
    torch.testing.assert_close(read(x), net(x), atol=2e-5, rtol=0)


def test_the_net_alone_reads_a_whole_model(tmp_path: Path) -> None:
    model = sinuous.create_model("sashimi_sc09", **SMALL).eval()
    torch.save(published(model), tmp_path / "run.pt")
    net = sinuous.create_model("sashimi_backbone", checkpoint_path=tmp_path / "run.pt", norm="scalar", **SMALL).eval()
    x = torch.randn(1, 17, 8)
    torch.testing.assert_close(net(x), model.model(x), atol=2e-5, rtol=0)


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    torch.save(published(sinuous.create_model("sashimi_sc09", **SMALL)), tmp_path / "run.pt")
    with pytest.raises(ValueError, match="the checkpoint"):
        sinuous.create_model("sashimi_2l", checkpoint_path=tmp_path / "run.pt", **SMALL)
    with pytest.raises(ValueError, match="for another Sashimi"):
        sinuous.create_model("sashimi_sc09", checkpoint_path=tmp_path / "run.pt", **{**SMALL, "embed_dim": 16})


@pytest.mark.parametrize("options", [{}, {"embedding": "both", "head": "logistic"}], ids=str)
def test_saved_models_come_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model = sinuous.create_model("test_sashimi", **options).eval()
    sinuous.save(model, tmp_path / "model")
    read = sinuous.load(tmp_path / "model").eval()
    codes = torch.randint(16, (2, 19))
    torch.testing.assert_close(read(codes), model(codes), atol=0, rtol=0)
