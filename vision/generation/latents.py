r"""Latents of pictures, kept as moments of a VAE's posterior, from which they are drawn anew at each visit.

    python -m sinuous.vision.generation.latents IMAGES OUT --vae FOLDER [--size 256 --mirrored]

    z = s (m - b + exp(l / 2) n)            m, l = encoder(picture);  s the VAE's scaling factor, b its shift, n normal

IMAGES has train/CLASS/* and val/CLASS/*, and test/CLASS/* where there is one; FOLDER is a VAE of diffusers
(`AutoencoderKL`), or a pipeline with one in vae/. OUT gets SPLIT_moments.npy [N, V, 2 C, h, w] in half precision, V = 2
with the mirrored picture behind the picture, SPLIT_labels.npy, and latents.json. `Latents` reads them.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), appendix G;
Peebles and Xie (2212.09748) draw the latents of DiT so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split, folder_of
from sinuous.core.files import written_whole

FACTS = "latents.json"


class CachedLatents(Dataset[tuple[Tensor, int]]):
    """Latents `[C, h, w]` and labels of one split, from moments that stay on the disk.

    Args:
        folder: that `write_latents` wrote.
        split: `train`, `val` or `test`; without a test split, `val` is that, too.
        drawn: draw each latent anew, and one of the picture and its mirror image where both are there; the picture's
            mean without.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the files do not belong together.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str = "train", drawn: bool = True) -> None:
        check_split(split)
        root = folder_of(folder)
        facts = read_facts(root)
        part = "val" if split == "test" and not (root / "test_moments.npy").is_file() else split
        paths = [root / f"{part}_{kind}.npy" for kind in ("moments", "labels")]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(
                    f"there is no {path}; write it with python -m sinuous.vision.generation.latents IMAGES {root} "
                    "--vae FOLDER"
                )
        self.moments, self.labels = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        if self.moments.ndim != 5 or len(self.moments) != len(self.labels):
            raise ValueError(
                f"{paths[0]} and {paths[1].name} do not belong together (got {list(self.moments.shape)} and "
                f"{list(self.labels.shape)}); write both again"
            )
        self.classes: list[str] = list(facts["classes"])
        self.scale, self.shift = float(facts["scaling_factor"]), float(facts["shift_factor"])
        self.drawn = drawn

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        views = self.moments[index]
        view = int(torch.randint(len(views), ())) if self.drawn else 0
        mean, log_variance = torch.from_numpy(views[view].astype(np.float32)).chunk(2)
        if self.drawn:
            mean = mean + (log_variance.clamp(-30, 20) / 2).exp() * torch.randn_like(mean)
        return self.scale * (mean - self.shift), int(self.labels[index])


class Latents:
    """Latents of a folder as data of a run: drawn in training, the means of pictures in validation and test.

    Args:
        root: the folder.
        img_size: side of the latents.
        in_chans: their channels.
        num_classes: which the folder must have.
    """

    noun = "latents"

    def __init__(
        self, root: str | os.PathLike[str] | None, img_size: int = 32, in_chans: int = 4, num_classes: int = 1000
    ) -> None:
        check_sizes(**{"data.img_size": img_size, "data.in_chans": in_chans, "data.num_classes": num_classes})
        self.root, self.img_size, self.in_chans, self.num_classes = root, img_size, in_chans, num_classes
        self.augment = True

    def split(self, name: str) -> CachedLatents:
        """The latents of `train`, `val` or `test`.

        Raises:
            ValueError: if they have another shape, or another number of classes, than this data says.
        """
        made = CachedLatents(folder_of(self.root), name, drawn=name == "train" and self.augment)
        there = (made.moments.shape[2] // 2, *made.moments.shape[3:], len(made.classes))
        if there != (self.in_chans, self.img_size, self.img_size, self.num_classes):
            channels, height, width, classes = there
            raise ValueError(
                f"the latents have {channels} channels, {height} x {width} cells and {classes} classes (data says "
                f"{self.in_chans}, {self.img_size} and {self.num_classes}); give data.in_chans={channels} "
                f"data.img_size={height} data.num_classes={classes}"
            )
        return made

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers."""
        classes: list[str] = list(read_facts(folder_of(self.root))["classes"])
        return classes

    def example(self) -> Tensor:
        return torch.zeros(1, self.in_chans, self.img_size, self.img_size)


def read_facts(folder: Path) -> dict[str, Any]:
    """Classes and factors of the latents in a folder.

    Raises:
        FileNotFoundError: if it has none.
        ValueError: if they cannot be read.
    """
    path = folder / FACTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder.resolve()} has no {FACTS}; write latents into it with python -m "
            "sinuous.vision.generation.latents IMAGES OUT --vae FOLDER"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {key: facts[key] for key in ("classes", "scaling_factor", "shift_factor")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no facts on latents ({error}); write the latents again") from error


@torch.no_grad()
def write_latents(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vae: Any,
    *,
    size: int = 256,
    mirrored: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = False,
) -> list[Path]:
    """Encode the pictures of a folder, and write their moments into another.

    Args:
        images: folder with train/CLASS/* and val/CLASS/*.
        out: where to write; made if it is not there.
        vae: diffusers' `AutoencoderKL`.
        size: the shorter side of a picture becomes so many pixels, and the middle square is cut out.
        mirrored: encode the mirror image, too.
        batch_size: pictures that are encoded together.
        num_workers: processes that read pictures.
        progress: show a bar.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: if there are no pictures.
        ValueError: if the VAE cannot make pictures of this size, or latents are not finite.
    """
    from rich.console import Console
    from rich.progress import track
    from torchvision import transforms

    from sinuous.vision.datasets import image_folder
    from sinuous.vision.io import PictureTransform

    check_sizes(size=size, batch_size=batch_size)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise ValueError(f"size must be a multiple of {factor} for this VAE (got {size})")
    source, target = Path(images), Path(out)
    steps = [
        transforms.Resize(size),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5),
    ]
    transform = PictureTransform(transforms.Compose(steps), vae.config.in_channels)
    splits = ["train", "val", *(["test"] if (source / "test").is_dir() else [])]
    parts = {split: image_folder(split, root=source, transform=transform) for split in splits}
    target.mkdir(parents=True, exist_ok=True)
    vae.eval()
    shape = (1 + mirrored, 2 * vae.config.latent_channels, size // factor, size // factor)
    written = []
    for split, pictures in parts.items():
        path = target / f"{split}_moments.npy"
        with written_whole(path) as unfinished:
            moments = np.lib.format.open_memmap(unfinished, "w+", np.float16, (len(pictures), *shape))
            labels, start = [], 0
            batches: Any = DataLoader(pictures, batch_size, num_workers=num_workers)
            if progress:
                label, console = f"encoding the pictures of {split}", Console(stderr=True)
                batches = track(batches, label, total=len(batches), transient=True, console=console)
            for x, y in batches:
                views = [x, x.flip(-1)] if mirrored else [x]
                encoded = torch.stack([vae.encode(view.to(vae.dtype)).latent_dist.parameters for view in views], 1)
                if not encoded.isfinite().all():
                    raise ValueError("the latents are not finite; load the VAE with torch_dtype=torch.float32")
                moments[start : start + len(x)] = encoded.float().cpu().numpy()
                start += len(x)
                labels.append(y)
            moments.flush()
        with written_whole(target / f"{split}_labels.npy") as unfinished, unfinished.open("wb") as file:
            np.save(file, torch.cat(labels).numpy())
        written += [path, target / f"{split}_labels.npy"]
    facts = {
        "classes": list(parts["train"].classes),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.get("shift_factor") or 0.0,
        "size": size,
    }
    with written_whole(target / FACTS) as unfinished:
        unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return [*written, target / FACTS]


def main(argv: Sequence[str] | None = None) -> int:
    """Encode a folder of pictures; print the names of the files, or a sentence on what is wrong."""
    parser = argparse.ArgumentParser("python -m sinuous.vision.generation.latents", description=__doc__.split("\n")[0])
    parser.add_argument("images", metavar="IMAGES", help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("out", metavar="OUT", help="folder for the latents")
    parser.add_argument("--vae", required=True, metavar="FOLDER", help="an AutoencoderKL, or a pipeline that has one")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the pictures (default: 256)")
    parser.add_argument("--mirrored", action="store_true", help="encode mirror images, too")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N")
    options = parser.parse_args(argv)
    try:
        vae = load_vae(options.vae)
        sizes = {name: getattr(options, name) for name in ("size", "mirrored", "batch_size", "num_workers")}
        for path in write_latents(options.images, options.out, vae, progress=True, **sizes):
            print(path)
    except (OSError, ValueError) as error:
        print(f"latents: {error}", file=sys.stderr)
        return 2
    return 0


def load_vae(folder: str | os.PathLike[str]) -> Any:
    """Read diffusers' `AutoencoderKL` from a folder of its own or one of a pipeline; on a GPU where there is one.

    Raises:
        ValueError: if the folder holds none.
    """
    from diffusers import AutoencoderKL

    inner = Path(folder) / "vae"
    place = inner if inner.is_dir() else Path(folder)
    if not (place / "config.json").is_file():
        raise ValueError(f"{folder} holds no VAE; give the folder that its save_pretrained wrote")
    vae: Any = AutoencoderKL.from_pretrained(place)
    return vae.to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
