"""Effects of variants and mutations are the differences of log p that their equations say; fillings read both sides."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from letter_models import TOKENIZERS, letter_model, letters
from torch import Tensor

from sinuous.core.sampling import Sampling
from sinuous.genomics import contexts, effects, fill_spans, mutation_effects, score, variant_effects
from sinuous.genomics.spans import cut

GENOME = {"chr1": letters("dna", 90, 1).lower(), "chr2": "A" + letters("dna", 40, 2) + "NN"}
WILD = letters("protein", 23, 3)
CONTEXT = [letters("protein", 30, 4), letters("protein", 11, 5)]


def close(a: Tensor, b: Tensor | float) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float64).expand_as(a), rtol=0, atol=1e-10)


def other_strand(sequence: str) -> str:
    return sequence.upper()[::-1].translate(str.maketrans("ACGT", "TGCA"))


def replaced(ref: str, first: int, stop: int, alt: str) -> str:
    return ref[:first] + alt + ref[stop:]


@pytest.mark.parametrize("pattern", ["mlstm", "slstm"])
def test_variants_change_log_p_of_both_strands(pattern: str) -> None:
    model = letter_model("dna", pattern)
    base = GENOME["chr1"][49].upper()
    alt = "ACGT"[("ACGT".index(base) + 1) % 4]
    variants = [
        ("chr1", 50, base, alt),
        ("chr1", 50, base.lower(), alt.lower()),
        ("chr1", 50, GENOME["chr1"][49:53], base),
        ("chr1", 50, base, base + "TTACG"),
        ("chr1", 1, GENOME["chr1"][:2], "G"),
        ("chr2", 1, "A", "C"),
        ("chr2", 43, "N", "A"),
        ("chr1", 50, base, base),
    ]
    found = variant_effects(model, GENOME, variants, flank=12)
    for effect, (name, position, ref, new) in zip(found, variants, strict=True):
        sequence, first = GENOME[name], position - 1
        left, right = max(0, first - 12), first + len(ref) + 12
        windows = [sequence[left:right], sequence[left:first] + new + sequence[first + len(ref) : right]]
        sums = score(model, [*windows, *map(other_strand, windows)], reduce="sum")
        close(effect, ((sums[1] - sums[0]) + (sums[3] - sums[2])) / 2)
    assert found[0] == found[1] != 0
    assert found[-1] == 0
    assert len(set(found.tolist())) == len(variants) - 1


def test_variants_do_not_depend_on_the_strand_or_on_others() -> None:
    model = letter_model("dna")
    sequence = GENOME["chr1"].upper()
    variants = [("chr1", place, sequence[place - 1], "T" if sequence[place - 1] != "T" else "A") for place in (3, 40)]
    both = variant_effects(model, GENOME, variants, flank=9)
    for i, (name, place, ref, alt) in enumerate(variants):
        turned = (name, 90 - place + 1, other_strand(ref), other_strand(alt))
        records = iter([SimpleNamespace(name=name, sequence=other_strand(sequence))])
        close(variant_effects(model, records, [turned], flank=9), both[i])
    assert variant_effects(model, GENOME, []).shape == (0,)


def test_a_wrong_reference_is_told_with_place_and_alleles() -> None:
    model = letter_model("dna")
    base = GENOME["chr1"][9].upper()
    wrong, other = [letter for letter in "ACGT" if letter != base][:2]
    with pytest.raises(ValueError, match=rf"chr1:10.*got reference {wrong}, alternative {base}.*swapped"):
        variant_effects(model, GENOME, [("chr1", 10, wrong, base)])
    with pytest.raises(ValueError, match=rf"chr1:10.*got reference {wrong}, alternative {other}.*another version"):
        variant_effects(model, GENOME, [("chr1", 10, wrong, other)])


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (("chr3", 1, "A", "C"), "no sequence 'chr3'.*chr1, chr2"),
        (("chr2", 0, "A", "C"), "bases 1 to 43"),
        (("chr2", 44, "A", "C"), "bases 1 to 43"),
        (("chr2", 43, "NN", "C"), "bases 1 to 43"),
        (("chr2", 1, "A", "<DEL>"), "no sequence of bases"),
        (("chr2", 1, "A", ""), "no sequence of bases"),
        (("chr2", 1, "A", "E"), "chr2:1 A>E"),
        (("chr2", 1.5, "A", "C"), "like"),
        (("chr2", 1, "A"), "must have a name"),
        (7, "must have a name"),
    ],
)
def test_wrong_variants_are_refused(variant: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        variant_effects(letter_model("dna"), GENOME, [variant])


def test_other_models_score_no_variants() -> None:
    with pytest.raises(ValueError, match="must be causal"):
        variant_effects(letter_model("dna", causal=False), GENOME, [])
    with pytest.raises(ValueError, match="use a model of DNA"):
        variant_effects(letter_model("protein"), GENOME, [])
    with pytest.raises(ValueError, match="flank must be 0 or more"):
        variant_effects(letter_model("dna"), GENOME, [], flank=-1)


def log_p_behind(model: Any, text: str, context: list[str]) -> Tensor:
    """Sum of log p of a protein behind others, by one call on all of it."""
    tokenizer = TOKENIZERS["protein"]
    placed = [cut(tokenizer.encode(protein), [], tokenizer) for protein in (*context, text)]
    ids, places = (torch.cat(part) for part in zip(*placed, strict=True))
    with torch.no_grad():
        logits = model(ids[None], position_ids=places[None])[0]
    log_p = logits[:, 4:29].log_softmax(-1)
    last = torch.arange(len(ids) - len(text), len(ids))
    return log_p[last - 1, ids[last] - 4].sum()


def mutated(*changes: tuple[int, str]) -> tuple[str, str]:
    """The name of a mutant, and its letters."""
    text = WILD
    for place, new in changes:
        text = replaced(text, place - 1, place, new)
    return ":".join(f"{WILD[place - 1]}{place}{new}" for place, new in changes), text


@pytest.mark.parametrize("context", [[], CONTEXT])
def test_mutants_change_log_p_behind_their_context(context: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "ROWS", 3)
    monkeypatch.setattr(contexts, "CHUNK", 13)
    model = letter_model("protein")
    one, two = mutated((23, "W")), mutated((2, "W"), (7, "H"))
    named = [one[0], two[0], WILD, f"{WILD[0]}1{WILD[0]}", two[1], WILD[:9] + "WW" + WILD[9:], WILD[3:], WILD.lower()]
    texts = [one[1], two[1], WILD, WILD, two[1], named[5], named[6], WILD]
    found = mutation_effects(model, WILD, named, context)
    for effect, text in zip(found, texts, strict=True):
        close(effect, log_p_behind(model, text, context) - log_p_behind(model, WILD, context))
    assert found[[2, 3, 7]].tolist() == [0, 0, 0]
    assert found[1] == found[4] != 0


def test_mutants_by_filling_in() -> None:
    model, tokenizer = letter_model("protein"), TOKENIZERS["protein"]
    wild = tokenizer.encode(WILD)
    expected = []
    for place, new in ((1, "H"), (9, "W"), (23, "C")):
        behind = [cut(tokenizer.encode(protein), [], tokenizer) for protein in CONTEXT]
        behind.append(cut(wild, [(place - 1, place)], tokenizer))
        ids, places = (torch.cat(part)[None] for part in zip(*behind, strict=True))
        with torch.no_grad():
            log_p = model(ids, position_ids=places)[0, -2, 4:24].log_softmax(-1)
        expected.append(log_p[int(tokenizer.encode(new)) - 4] - log_p[int(wild[place - 1]) - 4])
    names = [mutated((1, "H"))[0], mutated((1, "H"), (9, "W"), (23, "C"))[0], WILD, mutated((9, "W"))[1]]
    found = mutation_effects(model, WILD, names, CONTEXT, method="fim")
    close(found, torch.stack([expected[0], sum(expected, torch.tensor(0.0)), torch.tensor(0.0), expected[1]]))
    assert found[2] == 0
    assert mutation_effects(model, WILD, [], method="fim").shape == (0,)


@pytest.mark.parametrize(
    ("mutants", "method", "words"),
    [
        (["A0V"], "sequence", "letters 1 to 23"),
        (["A99V"], "sequence", "letters 1 to 23"),
        ([f"{'W' if WILD[4] != 'W' else 'A'}5C"], "sequence", f"has {WILD[4]} at 5"),
        (["A23"], "sequence", "like A23V"),
        ([f"{WILD[4]}5C:{WILD[4]}5D"], "sequence", "twice"),
        ([f"{WILD[4]}5C:"], "sequence", "like A23V"),
        ([""], "sequence", "like A23V"),
        (["MK1"], "sequence", "like A23V"),
        (["MK@"], "sequence", "MK@"),
        ("A23V", "sequence", "must be a list"),
        ([WILD + "A"], "fim", "use method='sequence'"),
        ([f"{WILD[4]}5X"], "fim", "twenty residues"),
        ([], "both", "method must be"),
    ],
)
def test_wrong_mutants_are_refused(mutants: Any, method: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mutation_effects(letter_model("protein"), WILD, mutants, method=method)


def test_other_models_fill_nothing_in() -> None:
    dna = letter_model("dna")
    assert mutation_effects(dna, "ACGT", ["A1C", "ACGT", "AGT"], context=["GGG"]).shape == (3,)
    for call in (
        lambda: mutation_effects(dna, "ACGT", ["A1C"], method="fim"),
        lambda: fill_spans(dna, "ACGT", [(0, 1)]),
    ):
        with pytest.raises(ValueError, match="use a ProteinTokenizer"):
            call()
    with pytest.raises(ValueError, match="must be causal"):
        fill_spans(letter_model("protein", causal=False), WILD, [(0, 1)])


def natural_alone(model: Any, ids: list[int], places: list[int]) -> int:
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None], position_ids=torch.tensor(places)[None])[0, -1]
    return 4 + int(logits[4:24].argmax())


def test_spans_are_filled_with_the_likeliest_residues_one_after_another() -> None:
    model, tokenizer = letter_model("protein"), TOKENIZERS["protein"]
    spans = [(15, 17), (2, 5)]
    filled = fill_spans(model, WILD, spans, CONTEXT)
    assert len(filled) == len(WILD)
    behind = [cut(tokenizer.encode(protein), [], tokenizer) for protein in CONTEXT]
    hidden = replaced(replaced(WILD, 2, 5, "XXX"), 15, 17, "XX")
    token_ids, positions = cut(tokenizer.encode(hidden), spans, tokenizer)
    ids, places = (torch.cat(part).tolist() for part in zip(*behind, (token_ids, positions), strict=True))
    for i in range(len(ids)):
        if ids[i] == 24:
            ids[i] = natural_alone(model, ids[:i], places[:i])
    expected = list(WILD)
    tail = tokenizer.decode([i for i in ids[-7:] if i < 33])
    expected[2:5], expected[15:17] = tail[:3], tail[3:]
    assert filled == "".join(expected)


def test_more_than_five_spans_go_in_rounds_and_none_is_read_before_it_is_filled() -> None:
    model = letter_model("protein")
    spans = [(i, i + 2) for i in range(0, 21, 3)]
    assert len(spans) == 7
    filled = fill_spans(model, WILD, spans)
    kept = [i for i in range(len(WILD)) if not any(a <= i < b for a, b in spans)]
    assert [filled[i] for i in kept] == [WILD[i] for i in kept]
    scrambled = WILD
    for a, b in spans:
        scrambled = replaced(scrambled, a, b, "WH")
    assert fill_spans(model, scrambled, list(reversed(spans))) == filled
    first = fill_spans(model, replaced(replaced(WILD, 15, 17, "XX"), 18, 20, "XX"), spans[:5])
    assert first[:14] == filled[:14]
    last = fill_spans(model, filled, spans[5:])
    assert last == filled


def test_sampled_fillings_hang_on_the_seed_and_are_residues() -> None:
    model = letter_model("protein")
    spans = [(0, 12), (13, 23)]
    draws = [fill_spans(model, WILD, spans, sampling=Sampling(temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert set("".join(draws)) <= set("LAGVSERTIDPKQNFYMHWC")
    penalised = fill_spans(model, WILD, spans, sampling=Sampling(repetition_penalty=1e6))
    assert penalised != fill_spans(model, WILD, spans)
    assert fill_spans(model, WILD, []) == WILD
    assert fill_spans(model, WILD.lower() + "*", []) == WILD


@pytest.mark.parametrize(
    ("sequence", "spans", "options", "words"),
    [
        (WILD, [(20, 24)], {}, "from 0 to 23"),
        (WILD, [(2, 5), (4, 6)], {}, "must not overlap"),
        (WILD[:5] + "--" + WILD[5:], [(2, 4)], {}, "no gaps"),
        (["A"], [(0, 1)], {}, "letters of a protein"),
        (WILD, [(0, 1)], {"sampling": 0.8}, "must be a Sampling"),
        (WILD, [(0, 1)], {"sampling": Sampling(seed=(1, 2))}, "one number"),
        (WILD, [(0, 1)], {"context": "MKT"}, "contexts must be a list"),
        (WILD, [(0, 1)], {"context": ["MK4"]}, "'context 1' at position 3"),
    ],
)
def test_wrong_fillings_are_refused(sequence: Any, spans: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fill_spans(letter_model("protein"), sequence, spans, **options)


def test_all_pairs_of_residues_share_one_sum() -> None:
    """Probabilities of the two residues of a protein sum to one, behind any context."""
    model = letter_model("protein")
    everything = "LAGVSERTIDPKQNFYMHWCXBUZO"
    mutants = [a + b for a, b in itertools.product(everything, everything)]
    found = mutation_effects(model, "LL", mutants, CONTEXT[1:])
    close((found + log_p_behind(model, "LL", CONTEXT[1:])).exp().sum(), 1.0)


def test_files_stand_for_genome_and_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "TOGETHER", 2)
    genome, vcf = tmp_path / "genome.fa", tmp_path / "some.vcf"
    genome.write_text("".join(f">{name} of a test\n{sequence}\n" for name, sequence in GENOME.items()))
    base = GENOME["chr1"][49].upper()
    others = [letter for letter in "ACGT" if letter != base]
    lines = [f"chr1\t50\t.\t{base}\t{','.join(others)}", "chr2\t1\trs1\tA\tAG", f"chr1\t50\t.\t{base}\t{others[0]}"]
    vcf.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n" + "\n".join(lines) + "\n")
    variants = [*(("chr1", 50, base, alt) for alt in others), ("chr2", 1, "A", "AG"), ("chr1", 50, base, others[0])]
    told: list[tuple[int, int]] = []
    model = letter_model("dna")
    found = variant_effects(model, genome, vcf, flank=8, progress=lambda *now: told.append(now))
    close(found, variant_effects(model, GENOME, iter(variants), flank=8))
    assert told == [(2, 5), (4, 5), (5, 5)]
