"""`sinuous bench denoisers`, and what denoisers keep for a size."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sinuous
from sinuous.apps import cli

pytest.importorskip("diffusers")

from sinuous.vision.generation.bench.denoisers import giga_operations
from sinuous.vision.generation.windows import WindowAttention


def test_denoisers_are_measured_beside_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page, figure = tmp_path / "rows.csv", tmp_path / "page.md", tmp_path / "figure.png"
    words = f"--models test_lamamba_diff,dit_s --sizes 4,8 --repeats 1 --no-memory --csv {rows} --markdown {page}"
    assert cli.main(["bench", "denoisers", *words.split(), "--figure", str(figure)]) == 0
    with rows.open() as file:
        measured = list(csv.DictReader(file))
    assert [(row["size"], row["model"]) for row in measured] == [
        (size, model) for size in ("4", "8") for model in ("test_lamamba_diff", "dit_s")
    ]
    for ours, theirs in zip(measured[::2], measured[1::2], strict=True):
        expected = float(theirs["median_ms"]) / float(ours["median_ms"])
        assert float(ours["ratio"]) == pytest.approx(expected, rel=1e-3)
        assert float(theirs["ratio"]) == 1
    assert "dit_s" in page.read_text()
    assert figure.stat().st_size > 1000


def test_operations_of_dit_are_the_papers() -> None:
    assert giga_operations("dit_xl", 32) == pytest.approx(118.67, abs=0.005)
    assert giga_operations("dit_xl", 64) == pytest.approx(524.58, abs=0.005)


def test_an_unknown_denoiser_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "denoisers", "--models", "vim_nano"]) == 2
    assert "there is no denoiser 'vim_nano' of latents; there are" in capsys.readouterr().err


def test_what_is_kept_for_a_size_is_no_tensor_of_a_tracer_or_of_inference() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, 4, (11, 11), shifted=True)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    mixer = sinuous.core.mixers.build_mixer("ss2d", 4, routes="serpentine")
    x = torch.randn(1, 11, 11, 4)

    def both(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = attention(x) + mixer(x.flatten(1, 2), grid=[11, 11]).unflatten(1, [11, 11])
        return y

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        both(mode.from_tensor(x))
    both(x)
    with torch.inference_mode():
        expected = both(x)
    made = both(x)
    torch.testing.assert_close(made, expected)
    made.square().sum().backward()
    assert all(p.grad is not None for p in (*attention.parameters(), *mixer.parameters()))
