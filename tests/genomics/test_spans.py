"""Spans cut out of proteins: the inverse, the positions, the draws."""

from collections import Counter

import pytest
import torch

from sinuous.genomics import spans
from sinuous.genomics.letters import DNATokenizer, ProteinTokenizer

PROTEINS = ProteinTokenizer()
MASKS = range(33, 38)


def drawn(seed: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 24, (1 + seed % 90,), generator=generator)
    return ids, spans.draw(len(ids), generator)


def test_join_undoes_cut() -> None:
    for seed in range(1000):
        ids, chosen = drawn(seed)
        cut, places = spans.cut(ids, chosen, PROTEINS)
        assert torch.equal(spans.join(cut, PROTEINS), ids)
        assert torch.equal(spans.join(cut[1:], PROTEINS), ids)
        wanted = Counter(ids.tolist()) + Counter([0])
        wanted += Counter([2] if chosen else []) + Counter(2 * list(MASKS[: len(chosen)]))
        assert Counter(cut.tolist()) == wanted
        residues = cut >= 4
        residues &= cut < 24
        assert torch.equal(ids[places[residues] - 1], cut[residues])
        assert sorted(places[residues].tolist()) == list(range(1, len(ids) + 1))


def test_a_cut_protein_is_laid_out_as_published() -> None:
    ids = torch.arange(4, 14)
    cut, places = spans.cut(ids, [(7, 8), (2, 4)], PROTEINS)
    assert cut.tolist() == [0, 4, 5, 33, 8, 9, 10, 34, 12, 13, 2, 33, 6, 7, 34, 11]
    assert places.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 0, 3, 3, 4, 8, 8]
    whole, places = spans.cut(ids, [], PROTEINS)
    assert whole.tolist() == [0, *range(4, 14)]
    assert places.tolist() == list(range(11))
    _, places = spans.cut(torch.full((3000,), 5), [(2500, 2510)], PROTEINS)
    assert places.max() == 2047


def test_spans_that_touch_and_whole_proteins() -> None:
    ids = torch.arange(4, 14)
    for chosen in ([(0, 3), (3, 10)], [(0, 10)], [(9, 10)]):
        cut, _ = spans.cut(ids, chosen, PROTEINS)
        assert torch.equal(spans.join(cut, PROTEINS), ids)


def test_draws_are_few_short_and_apart() -> None:
    counts = Counter()
    for seed in range(2000):
        chosen = spans.draw(300, torch.Generator().manual_seed(seed))
        counts[len(chosen)] += 1
        assert spans.check_spans(chosen, 300) == chosen
        for (start, stop), (following, _) in zip(chosen, [*chosen[1:], (300, 0)], strict=False):
            assert 1 <= stop - start < max(0.2 * (following - start), 2)
    assert max(counts) <= 5
    assert abs(counts[0] / 2000 - 0.368) < 0.04  # of Poisson(1)
    assert abs(counts[1] / 2000 - 0.368) < 0.04
    assert spans.draw(50, torch.Generator().manual_seed(3)) == spans.draw(50, torch.Generator().manual_seed(3))
    assert spans.draw(0) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([(3, 3)], "from 0 to 10"),
        ([(3, 11)], "3-11"),
        ([(-1, 2)], "-1-2"),
        ([(1, 4), (3, 5)], "1-4 and 3-5"),
        ([(i, i + 1) for i in range(6)], "at most 5"),
        ([(1, 2, 3)], "pairs"),
        ([("1", "2")], "a span must"),
        (7, "pairs"),
    ],
)
def test_wrong_spans_are_refused(wrong: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spans.cut(torch.arange(4, 14), wrong, PROTEINS)


def test_what_is_no_protein_is_refused() -> None:
    with pytest.raises(ValueError, match="residues of one protein"):
        spans.cut(torch.tensor([0, 4, 5]), [(0, 1)], PROTEINS)
    with pytest.raises(ValueError, match="each mask must have a span"):
        spans.join(torch.tensor([0, 4, 33, 5]), PROTEINS)
    with pytest.raises(ValueError, match="each mask must have a span"):
        spans.join(torch.tensor([0, 4, 5, 2, 33, 4]), PROTEINS)
    with pytest.raises(ValueError, match="behind <eos>"):
        spans.join(torch.tensor([0, 4, 33, 2, 5, 33, 4]), PROTEINS)
    with pytest.raises(ValueError, match="use a ProteinTokenizer"):
        spans.cut(torch.tensor([7, 8]), [(0, 1)], DNATokenizer())
