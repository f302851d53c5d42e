"""Effects of variants on how probable a model finds a genome, and of mutations on how probable it finds a protein.

variant_effects    mean over both strands of log p(window with the alternative) - log p(window)
mutation_effects   log p(mutant | context) - log p(wild type | context), or, by fill in the middle,
                   the sum over mutated residues of log p(new) - log p(old), each hidden and all others seen
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sinuous.core.checks import check_choice, described, is_whole
from sinuous.core.modes import evaluating
from sinuous.genomics import spans as fim
from sinuous.genomics.contexts import Placed, continue_from, read_context, started
from sinuous.genomics.reading import Progress, check_continues, letter_log_softmax, score_rows

METHODS = ("sequence", "fim")
TOGETHER = 64
"""Variants whose windows are in memory together."""


class Alleles(NamedTuple):
    """A variant: the reference's letters from `position` on, counted from 1, and what stands there instead."""

    name: str
    position: int
    ref: str
    alt: str


def variant_effects(
    model: nn.Module,
    genome: str | os.PathLike[str] | Mapping[str, str] | Iterable[Any],
    variants: str | os.PathLike[str] | Iterable[Sequence[Any]],
    flank: int = 1024,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Effects of variants of a genome, fp64 `[variants]`: above 0 where the model finds the alternative more probable.

        effect = mean over both strands of log p(window with alt) - log p(window with ref)

    in nats, the window being the reference's allele with `flank` bases on each side, or what there is of them. So an
    allele of other length has fewer or more bases to be paid for.

    Args:
        model: a causal model of DNA.
        genome: a file of sequences, sequences by name, or records with `.name` and `.sequence`.
        variants: a file in VCF, or tuples of name, position of the first base (from 1), reference and alternative.
        flank: bases on each side.
        progress: told of the variants that were scored, of how many.

    Raises:
        ValueError: if the model is another one, the genome has no such sequence or position, the reference's allele is
            not what the genome has, or an allele is no sequence of bases.
    """
    tokenizer = check_continues(model)
    if not hasattr(tokenizer, "complement"):
        raise ValueError(f"variants are of DNA, and the model reads {described(tokenizer)}; use a model of DNA")
    if not (is_whole(flank) and flank >= 0):
        raise ValueError(f"flank must be 0 or more and a whole number (got {described(flank)})")
    sequences = _by_name(genome)
    checked = [_checked(variant, sequences, tokenizer) for variant in _variants(variants)]
    effects: list[Tensor] = []
    for start in range(0, len(checked), TOGETHER):
        windows = [_windows(variant, sequences, flank) for variant in checked[start : start + TOGETHER]]
        numbers = {window: i for i, window in enumerate(dict.fromkeys(text for pair in windows for text in pair))}
        rows = [tokenizer.encode(window) for window in numbers]
        others = [tokenizer.complement[ids].flip(0) for ids in rows]
        sums = torch.stack([row.sum() for row in score_rows(model, [*rows, *others])]).view(2, -1).mean(0)
        effects += [sums[numbers[alt]] - sums[numbers[ref]] for ref, alt in windows]
        if progress is not None:
            progress(len(effects), len(checked))
    return torch.stack(effects) if effects else torch.zeros(0, dtype=torch.float64)


def _by_name(genome: Any) -> dict[str, str]:
    if isinstance(genome, str | os.PathLike):
        from sinuous.genomics.io import read_sequences

        genome = read_sequences(genome, unique=True)
    if isinstance(genome, Mapping):
        return dict(genome)
    return {record.name: record.sequence for record in genome}


def _variants(variants: Any) -> Iterator[Alleles]:
    if isinstance(variants, str | os.PathLike):
        from sinuous.genomics.io import read_variants

        variants = read_variants(variants)
    for variant in variants:
        try:
            name, position, ref, alt = variant
        except (TypeError, ValueError):
            raise ValueError(
                f"a variant must have a name, a position counted from 1, a reference and an alternative (got "
                f"{described(variant)}); give tuples such as ('chr1', 1000, 'A', 'G')"
            ) from None
        if not is_whole(position) or not (isinstance(ref, str) and isinstance(alt, str)):
            raise ValueError(f"a variant must be like ('chr1', 1000, 'A', 'G') (got {described(tuple(variant))})")
        yield Alleles(str(name), int(position), ref, alt)


def _checked(variant: Alleles, sequences: Mapping[str, str], tokenizer: Any) -> Alleles:
    """The variant, which must be one of this genome.

    Raises:
        ValueError: as `variant_effects`.
    """
    name, position, ref, alt = variant
    place = f"{name}:{position} {ref}>{alt}"
    sequence = sequences.get(name)
    if sequence is None:
        known = ", ".join(list(sequences)[:5]) + (" …" if len(sequences) > 5 else "")
        raise ValueError(f"the genome has no sequence {name!r} (for {place}); it has {known or 'none'}")
    if not (ref and alt and ref.isalpha() and alt.isalpha()):
        raise ValueError(
            f"{place} has an allele that is no sequence of bases; leave such variants out, and write a deletion with "
            "the base in front of it, as AT>A"
        )
    first, stop = position - 1, position - 1 + len(ref)
    if not 0 <= first < stop <= len(sequence):
        raise ValueError(
            f"{place} lies outside of {name}, which has bases 1 to {len(sequence)}; positions count from 1, and the "
            "reference must be of this genome"
        )
    ids, alternative = (tokenizer.encode(letters, name=f"the variant {place}") for letters in (ref, alt))
    if not torch.equal(ids, tokenizer.encode(sequence[first:stop], name=name)):
        after = sequence[first : first + len(alt)]
        swapped = len(after) == len(alt) and torch.equal(alternative, tokenizer.encode(after, name=name))
        hint = (
            "the alternative is what stands there: the alleles are swapped"
            if swapped
            else "the variant may be of another version of the genome, or count positions from 0"
        )
        raise ValueError(
            f"the reference of {place} is not what the genome has at {name}:{position}, {sequence[first:stop].upper()} "
            f"(got reference {ref}, alternative {alt}); {hint}"
        )
    return variant


def _windows(variant: Alleles, sequences: Mapping[str, str], flank: int) -> tuple[str, str]:
    """The window of the reference and the one of the alternative, in upper case."""
    sequence, first = sequences[variant.name], variant.position - 1
    stop = first + len(variant.ref)
    before, behind = sequence[max(first - flank, 0) : first], sequence[stop : stop + flank]
    return (before + variant.ref + behind).upper(), (before + variant.alt + behind).upper()


@torch.no_grad()
def mutation_effects(
    model: nn.Module,
    wild_type: str,
    mutants: Sequence[str],
    context: Sequence[str] = (),
    method: str = "sequence",
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Effects of mutations, fp64 `[mutants]`, in nats: above 0 where the model finds the mutant more probable.

    Args:
        model: a causal one; for `"fim"` one of proteins that was trained to fill in the middle.
        wild_type: letters of the sequence that is mutated. Its own effect is exactly 0.
        mutants: `A23V`, the 23rd letter, counted from 1, being A in the wild type and V in the mutant; several with
            `:` between them, as `A23V:L45P`; or the letters of a whole sequence, of any length for `"sequence"`.
        context: sequences that are read first, such as homologs.
        method: `"sequence"`, log p(mutant) - log p(wild type), or `"fim"`, which hides each mutated residue, reads all
            others of the wild type, and adds log p(new) - log p(old) of each, among the twenty residues.
        progress: told of the sequences that were read, of how many.

    Raises:
        ValueError: if the model is another one, or a mutant is not one of this wild type.
    """
    tokenizer = check_continues(model)
    check_choice("method", method, METHODS)
    if not isinstance(wild_type, str):
        raise ValueError(f"wild_type must be the letters of one sequence (got {described(wild_type)})")
    wild = tokenizer.encode(wild_type, name="wild_type")
    if not len(wild):
        raise ValueError("wild_type must have at least one letter (got none)")
    if isinstance(mutants, str | bytes) or not isinstance(mutants, Sequence):
        raise ValueError(f"mutants must be a list (got {described(mutants)}); give a list, of one if need be")
    rows = [_mutated(wild, mutant, tokenizer) for mutant in mutants]
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    with evaluating(model):
        state = read_context(model, context)
        if method == "fim":
            return _by_spans(model, wild, rows, mutants, state, progress)
        return _by_sequence(model, [wild, *rows], state, progress)


def _mutated(wild: Tensor, mutant: str, tokenizer: Any) -> Tensor:
    """Ids of a mutant.

    Raises:
        ValueError: if it is none of this wild type.
    """
    if not isinstance(mutant, str) or not mutant:
        raise ValueError(f"a mutant must be like A23V, A23V:L45P or a whole sequence (got {described(mutant)})")
    if not any(letter.isdigit() for letter in mutant):
        ids: Tensor = tokenizer.encode(mutant, name=f"the mutant {_shortened(mutant)}")
        return ids
    ids = wild.clone()
    places = set()
    for change in mutant.split(":"):
        parts = re.fullmatch(r"([A-Za-z])(\d+)([A-Za-z])", change.strip())
        if parts is None:
            raise ValueError(
                f"a mutant must be like A23V, A23V:L45P or a whole sequence (got {change!r} in {_shortened(mutant)})"
            )
        place = int(parts[2]) - 1
        old, new = (tokenizer.encode(parts[i], name=f"the mutant {_shortened(mutant)}") for i in (1, 3))
        if not 0 <= place < len(wild):
            raise ValueError(f"{change} lies outside of the wild type, which has letters 1 to {len(wild)}")
        if place in places:
            raise ValueError(f"{_shortened(mutant)} changes letter {place + 1} twice; leave one change out")
        if int(old) != int(wild[place]):
            there = tokenizer.decode(wild[place : place + 1])
            raise ValueError(
                f"{change} does not fit the wild type, which has {there} at {place + 1}; positions count from 1"
            )
        places.add(place)
        ids[place] = int(new)
    return ids


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}…"


def _by_sequence(model: Any, rows: list[Tensor], state: Any, progress: Progress | None) -> Tensor:
    """Differences of log p to the first row, of all others; equal rows are read once."""
    numbers: dict[tuple[int, ...], int] = {}
    places = [numbers.setdefault(tuple(row.tolist()), len(numbers)) for row in rows]
    distinct = [torch.tensor(row) for row in numbers]
    ignored = model.tokenizer.ignored
    read = [tuple(part[:-1] for part in started(row, model.tokenizer)) for row in distinct]
    sums = []
    for row, logits in zip(distinct, continue_from(model, state, cast("list[Placed]", read)), strict=True):
        log_p = letter_log_softmax(logits, model.tokenizer).double().cpu().gather(1, row[:, None]).squeeze(1)
        sums.append((log_p if ignored is None else log_p[row != ignored]).sum())
        if progress is not None:
            progress(len(sums), len(distinct))
    total = torch.stack(sums)[torch.tensor(places)]
    return total[1:] - total[0]


def _by_spans(
    model: Any, wild: Tensor, rows: list[Tensor], mutants: Sequence[str], state: Any, progress: Progress | None
) -> Tensor:
    tokenizer = model.tokenizer
    fim.marks_of(tokenizer)
    for row, mutant in zip(rows, mutants, strict=True):
        if len(row) != len(wild):
            raise ValueError(
                f"method='fim' compares residues, and {_shortened(mutant)} has {len(row)} where the wild type has "
                f"{len(wild)}; use method='sequence'"
            )
        changed = row != wild
        strangers = ~torch.isin(torch.cat([row[changed], wild[changed]]), tokenizer.natural)
        if strangers.any():
            raise ValueError(
                f"method='fim' compares the twenty residues, and {_shortened(mutant)} changes another letter; "
                "use method='sequence'"
            )
    sites = sorted({int(place) for row in rows for place in (row != wild).nonzero()})
    log_p = dict(zip(sites, residue_log_probabilities(model, wild, sites, state, progress), strict=True))
    effects = []
    for row in rows:
        changes = [(log_p[place], int(row[place]), int(wild[place])) for place in sites if row[place] != wild[place]]
        effects.append(sum((p[new] - p[old] for p, new, old in changes), torch.zeros((), dtype=torch.float64)))
    return torch.stack(effects)


@torch.no_grad()
def residue_log_probabilities(
    model: Any, wild: Tensor, sites: Sequence[int], state: Any, progress: Progress | None = None
) -> Iterator[Tensor]:
    """Yield log p of the residues at each site, `[V]`, the site hidden and all others of the protein read.

    Args:
        model: a causal one of proteins, in evaluation mode.
        wild: ids of the protein, `[T]`.
        sites: from 0.
        state: behind the context.
        progress: told of the sites that were read.
    """
    rows = [tuple(part[:-1] for part in fim.cut(wild, [(i, i + 1)], model.tokenizer)) for i in sites]
    others = torch.ones(model.vocab_size, dtype=torch.bool)
    others[model.tokenizer.natural] = False
    for i, logits in enumerate(continue_from(model, state, cast("list[Placed]", rows), last_only=True)):
        yield logits[0].double().cpu().masked_fill(others, -torch.inf).log_softmax(-1)
        if progress is not None:
            progress(i + 1, len(rows))
