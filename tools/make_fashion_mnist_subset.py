"""Make vision/samples/fashion_mnist: a balanced seventh of Fashion-MNIST in the format of the whole.

    python tools/make_fashion_mnist_subset.py FOLDER        # the four IDX files, packed with gzip or not

Takes 10,000 of the first 50,000 training images, 2,000 of the last 10,000 and 2,000 of the test images, each in equal
parts per class, chosen and shuffled with a fixed seed. In the training file the 2,000 come last, so that in the
subset as in the whole the last sixth of the training file is the validation set.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinuous.vision.datasets import read_idx

SEED = 0
CLASSES = 10
TARGET = Path(__file__).parents[1] / "vision" / "samples" / "fashion_mnist"


def balanced(labels: NDArray[np.uint8], count: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """`count` shuffled positions in `labels`, the same number from each class."""
    chosen = [generator.permutation(np.flatnonzero(labels == c))[: count // CLASSES] for c in range(CLASSES)]
    return generator.permutation(np.concatenate(chosen))


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write unsigned bytes in the IDX format; gzip's time stamp is 0, so that equal input gives equal files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the four IDX files of Fashion-MNIST")
    source = parser.parse_args().folder
    generator = np.random.default_rng(SEED)
    TARGET.mkdir(parents=True, exist_ok=True)
    for part, ranges in {"train": [(0, 50_000, 10_000), (50_000, 60_000, 2_000)], "t10k": [(0, 10_000, 2_000)]}.items():
        images, labels = read_idx(source, f"{part}-images-idx3-ubyte"), read_idx(source, f"{part}-labels-idx1-ubyte")
        rows = np.concatenate([start + balanced(labels[start:stop], n, generator) for start, stop, n in ranges])
        write_idx(TARGET / f"{part}-images-idx3-ubyte.gz", images[rows])
        write_idx(TARGET / f"{part}-labels-idx1-ubyte.gz", labels[rows])


if __name__ == "__main__":
    main()
