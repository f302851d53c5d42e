"""Proteins behind their relatives: who is related, whole families in one split, which residues count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinuous.core.data import TokenData, lacking
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.genomics import spans
from sinuous.genomics.datasets import homolog_contexts
from sinuous.genomics.datasets.homology import kinship
from sinuous.genomics.letters import RESIDUES

START = 0


def protein(seed: int, length: int = 120) -> str:
    return "".join(np.random.default_rng(seed).choice(list(RESIDUES), length))


def test_relatives_share_words_and_clusters_are_closed() -> None:
    a, b, c = protein(0), protein(1), protein(2)
    both = a[:80] + b[:80]  # related to a and to b, which are not related to each other
    found = kinship([a, both, b, c, a[5:]])
    assert found.relatives(1).tolist() == [0, 2, 4] or set(found.relatives(1).tolist()) == {0, 2, 4}
    assert found.relatives(0).tolist() == [4, 1]  # closest first
    assert found.relatives(3).tolist() == []
    assert found.cluster.tolist() == [0, 0, 0, 3, 0]
    share = found.share[(found.first == 0) & (found.second == 4)]
    assert share == pytest.approx([1.0])  # all words of the shorter one
    shared = len({a[i : i + 5] for i in range(116)} & {both[i : i + 5] for i in range(156)})
    assert found.share[(found.first == 0) & (found.second == 1)] == pytest.approx([shared / 116])


def test_nothing_is_related_to_nothing() -> None:
    assert kinship([]).cluster.tolist() == []
    assert kinship(["MKV", "MKV"]).first.tolist() == []


@pytest.fixture(scope="module")
def data() -> homolog_contexts:
    return homolog_contexts(length=900)


def test_a_family_is_in_one_split(data: homolog_contexts) -> None:
    assert lacking(data, TokenData) == []
    genes = {split: data.genes(split) for split in ("train", "val", "test")}
    assert sorted(gene for of in genes.values() for gene in of) == list(range(150))
    clusters = {split: {int(data.kinship.cluster[gene]) for gene in of} for split, of in genes.items()}
    assert all(clusters.values())
    assert not clusters["train"] & clusters["val"] | clusters["train"] & clusters["test"]
    near = {int(one) for gene in genes["test"] for one in data.kinship.relatives(gene)}
    assert not near & set(genes["train"])


def test_training_rows_have_relatives_first_and_spans_behind(data: homolog_contexts) -> None:
    rows, tokenizer = data.split("train"), data.tokenizer
    torch.manual_seed(0)
    behind = 0
    for index in range(40):
        ids, targets, positions = rows[index]
        assert len(ids) == len(targets) == len(positions) <= 900
        assert torch.equal(targets[:-1], ids[1:])
        assert ids[0] == START
        begins = (ids == START).nonzero()[:, 0].tolist()
        assert (positions[begins] == 0).all()
        behind += len(begins) > 1
        if targets[-1] == START:  # a row that was not cut off
            residues = data.proteins[rows.genes[index]].residues
            assert tokenizer.decode(spans.join(ids[begins[-1] :], tokenizer)) == residues
    assert 10 < behind < 40


def test_genes_whose_relatives_do_not_fit_can_be_left_out() -> None:
    data = homolog_contexts(length=512, most=1, least=1, augment=False)
    rows, whole = data.split("train"), homolog_contexts(length=512).split("train")
    assert 0 < len(rows) < len(whole)
    for ids, targets, _ in (rows[i] for i in range(len(rows))):
        assert int((ids == data.tokenizer.start).sum()) == 2
        assert len(ids) <= 512
        assert targets[-1] == data.tokenizer.start  # nothing of the gene is cut off
    with pytest.raises(ValueError, match=r"data\.least must lie between 0 and 1 \(got 2\)"):
        homolog_contexts(most=1, least=2)


def test_without_augmentation_a_row_has_the_closest_relatives_whole(data: homolog_contexts) -> None:
    plain = homolog_contexts(length=2000, most=2, augment=False).split("train")
    ids, _, positions = plain[3]
    assert (ids == START).sum() - 1 == min(2, len(data.kinship.relatives(plain.genes[3])))
    assert torch.equal(positions == 0, ids == START)
    assert torch.equal(ids, plain[3][0])


def test_scored_rows_count_the_residues_of_the_gene_alone(data: homolog_contexts) -> None:
    rows = data.split("test")
    assert {before for _, before in rows.rows} == {0, 1}
    assert rows.lengths == sorted(rows.lengths)
    for (gene, before), (ids, targets, _) in zip(rows.rows, rows, strict=True):
        assert (ids == START).sum() == before + 1
        residues = data.proteins[gene].residues
        assert data.tokenizer.decode(targets[targets != IGNORED]) == residues.replace("X", "")
        assert targets[len(ids) - len(residues) - 1] == data.tokenizer.encode(residues[0])[0]
    ids, targets, more = data.collate([rows[0], rows[len(rows) - 1]])
    assert ids.shape == targets.shape == more["position_ids"].shape
    assert (targets[0, len(rows[0][0]) :] == IGNORED).all()
