"""Latents on a disk: what the VAE says of each picture, drawn anew at each visit, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from sinuous.vision.generation.latents import CachedLatents, Latents, main  # noqa: E402


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    sides = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**sides, **blocks, shift_factor=0.25).eval()


@pytest.fixture(scope="module")
def folders(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Pictures of two classes and three modes, the VAE and the latents."""
    base = tmp_path_factory.mktemp("latents")
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("bird", "fish"):
            folder = base / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(("RGB", "L", "RGBA")[i]).save(folder / f"{i}.png")
    vae.save_pretrained(base / "pipeline" / "vae")
    arguments = ["--vae", str(base / "pipeline"), "--size", "16", "--mirrored", "--batch-size", "4"]
    assert main([str(base / "images"), str(base / "latents"), *arguments]) == 0
    return base / "images", base / "pipeline", base / "latents"


def test_the_moments_are_the_vaes_of_the_picture_and_its_mirror_image(
    folders: tuple[Path, Path, Path], vae: Any
) -> None:
    images, _, latents = folders
    with Image.open(images / "train" / "fish" / "0.png") as picture:
        whole = picture.convert("RGB").resize((19, 16), Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.asarray(whole.crop((2, 0, 18, 16))) / 127.5 - 1).permute(2, 0, 1)[None].float()
    data = CachedLatents(latents)
    assert (len(data), data.classes, data[3][1]) == (6, ["bird", "fish"], 1)
    for view, shown in enumerate((pixels, pixels.flip(-1))):
        with torch.no_grad():
            moments = vae.encode(shown).latent_dist.parameters[0]
        torch.testing.assert_close(torch.tensor(data.moments[3, view]).float(), moments, atol=2e-2, rtol=1e-2)


def test_each_visit_draws_anew_around_the_scaled_mean(folders: tuple[Path, Path, Path], vae: Any) -> None:
    data = CachedLatents(folders[2])
    data.moments = np.array(data.moments[:, :1], np.float32)
    data.moments[0, 0, 4:] = np.log(0.09)
    drawn = torch.stack([data[0][0] for _ in range(400)])
    mean = vae.config.scaling_factor * (torch.tensor(data.moments[0, 0, :4]) - 0.25)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.02, rtol=0)
    assert float(drawn.std(0).mean()) == pytest.approx(vae.config.scaling_factor * 0.3, rel=0.03)
    still = CachedLatents(folders[2], "test", drawn=False)
    assert torch.equal(still[0][0], still[0][0])


def test_both_views_are_visited(folders: tuple[Path, Path, Path]) -> None:
    data = CachedLatents(folders[2])
    data.moments = np.zeros(data.moments.shape, np.float32)
    data.moments[:, 1, :4], data.moments[:, :, 4:] = 1.0, -30.0
    assert len({round(float(data[0][0].mean()), 3) for _ in range(30)}) == 2


def test_data_of_a_run_draws_in_training_alone(folders: tuple[Path, Path, Path]) -> None:
    data = Latents(folders[2], img_size=8, num_classes=2)
    assert data.example().shape == (1, *data.split("train")[0][0].shape)
    assert data.split("train").drawn
    assert not data.split("val").drawn
    assert data.classes == ["bird", "fish"]
    data.augment = False
    assert not data.split("train").drawn


def test_what_does_not_fit_is_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, pipeline, latents = folders
    with pytest.raises(ValueError, match=r"data.in_chans=4 data.img_size=8 data.num_classes=2"):
        Latents(latents).split("val")
    with pytest.raises(FileNotFoundError, match=r"has no latents\.json"):
        CachedLatents(tmp_path)
    (tmp_path / "latents.json").write_text(json.dumps({"classes": []}))
    with pytest.raises(ValueError, match="no facts on latents"):
        CachedLatents(tmp_path)
    for arguments, message in (
        ([str(images), "--vae", str(images)], "holds no VAE"),
        ([str(images), "--vae", str(pipeline), "--size", "15"], "size must be a multiple of 2 for this VAE (got 15)"),
        ([str(tmp_path), "--vae", str(pipeline), "--size", "16"], "has no folder 'train'"),
    ):
        assert main([arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
