"""Scores of pictures that no generator made, beside the test pictures of Fashion-MNIST: real ones and noise.

python tools/generation_floors.py            # the pictures that come with the package
python tools/generation_floors.py FOLDER     # the whole set
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from sinuous.vision.datasets import fashion_mnist
from sinuous.vision.generation.scores import score


def pictures(split: str, source: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """All pictures of a split `[N, 1, 28, 28]` from -1 to 1, and their classes."""
    data = fashion_mnist(split, **source)
    return torch.tensor(data.images)[:, None] / 127.5 - 1, torch.tensor(data.labels).long()


def main() -> None:
    """Print a line for each kind of pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="with the IDX files of Fashion-MNIST")
    folder = parser.parse_args().folder
    source = {"source": "bundled"} if folder is None else {"source": "folder", "root": folder}
    (real, _), (known, labels) = pictures("test", source), pictures("train", source)
    noise = torch.randn(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for name, made in {"1,000 real": known[:1000], "2,000 real": known[:2000], "1,000 of noise": noise}.items():
        values = score(made, labels[: len(made)], real=real)
        print(name, *(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
