"""Molecules drawn from a language model of them, freely or like others.

    model = sinuous.create_model("chem_xlstm_nano", pretrained=True)
    smiles = sample_molecules(model, 1000, syntax=True)
    similar = sample_molecules(model, 100, like=["CC(=O)Oc1ccccc1C(=O)O", "CC(C)Cc1ccc(cc1)C(C)C(=O)O"])

Source of drawing in context: Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165), section 4.3 and ml-jku/Chem-xLSTM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor
from torch.utils import _pytree as pytree

from sinuous.core.checks import check_sizes, described
from sinuous.core.generation import Allowed, Sampling, generate
from sinuous.core.sequence_model import SequenceModel
from sinuous.genomics.molecule_letters import WHOLE, SelfiesTokenizer, SmilesTokenizer
from sinuous.genomics.syntax import SmilesSyntax

SAMPLING = Sampling(temperature=1.0, max_new_tokens=128)
"""How molecules are drawn where nothing is said."""
ROWS = 256
"""Molecules that are drawn together at most."""
STATES = 2**25
"""Bytes that the states of molecules which are drawn together may take: what caches hold is twice as fast."""


def sample_molecules(
    model: Any,
    count: int,
    like: Iterable[str] = (),
    syntax: bool = False,
    sampling: Sampling | None = None,
) -> list[str]:
    """Draw molecules from a causal language model of SMILES or SELFIES.

    Args:
        model: with `model.tokenizer`, and a head for tokens.
        count: how many are drawn.
        like: molecules that the model reads first, joined by `.`, for it to go on in their way; each drawn molecule
            then ends at a `.`, too, as what follows would be the next one.
        syntax: admit only tokens after which every bracket, branch and ring can be closed within the limit, and is, and
            keep to valences where the grammar leaves a choice (`sinuous.genomics.syntax`); of SELFIES, whole symbols.
        sampling: how tokens are chosen and when a molecule ends at the latest; temperature 1, 128 tokens, if absent. Of
            one `seed`, each molecule's is counted up, so that the same numbers give the same molecules.

    Returns:
        SMILES, as they were written, `count` of them. Without `syntax` some may not parse.

    Raises:
        ValueError: if the model has no tokenizer of molecules or no head for tokens, `count` is no whole number above
            0, or `like` has a token that the vocabulary lacks.
        NotImplementedError: if the model is not causal.
    """
    check_sizes(count=count)
    tokenizer = _tokenizer(model)
    prompt, ends = _prompt(tokenizer, like)
    sampling = SAMPLING if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling (got {described(sampling)}); give Sampling(temperature=1)")
    allowed = _allowed(tokenizer, ends, syntax)
    seeds = _seeds(sampling.seed, count)
    sampling = replace(sampling, stop_tokens=[*sampling.stop_tokens, *ends])
    rows = _rows_at_once(model)
    texts: list[str] = []
    for start in track(range(0, count, rows), "drawing molecules", transient=True, disable=count <= rows):
        if isinstance(allowed, SmilesSyntax):
            allowed.restart()
        some = seeds[start : start + rows]
        drawn = generate(model, [prompt] * len(some), replace(sampling, seed=some), allowed=allowed)
        texts += [_written(tokenizer, tokens) for tokens in drawn.tokens]
    return texts


def _tokenizer(model: Any) -> SmilesTokenizer | SelfiesTokenizer:
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, SmilesTokenizer | SelfiesTokenizer):
        raise ValueError(
            f"model must have a tokenizer of molecules (got {described(tokenizer)}); set model.tokenizer, for instance "
            "to SmilesTokenizer.from_file('init_arguments.json')"
        )
    head = getattr(model, "head_kind", "lm")
    if head != "lm":
        raise ValueError(f"model must have head='lm', which gives the next token (got {head!r}); build it with that")
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"model.tokenizer must have as many tokens as the model, {model.vocab_size} (got {tokenizer.vocab_size}); "
            "set the one that it was trained with"
        )
    return tokenizer


def _prompt(tokenizer: SmilesTokenizer | SelfiesTokenizer, like: Iterable[str]) -> tuple[list[int], list[int]]:
    """Tokens that the model reads first, and those at which a molecule ends."""
    if isinstance(like, str | bytes) or not isinstance(like, Iterable):
        raise ValueError(f"like must be a list of SMILES (got {described(like)}); put a single one into a list")
    prompt, ends = [cast("int", tokenizer.start)], [cast("int", tokenizer.end)]
    for i, smiles in enumerate(like):
        if not isinstance(smiles, str) or not smiles:
            raise ValueError(f"like must be a list of SMILES (got {described(smiles)} at place {i}); leave it out")
        encode = tokenizer.encode_smiles if isinstance(tokenizer, SelfiesTokenizer) else tokenizer.encode
        separator = tokenizer.encode(".", f"like[{i}]").tolist()
        prompt += encode(smiles, f"like[{i}]").tolist() + separator
        ends = [ends[0], *separator]
    return prompt, ends


def _allowed(tokenizer: SmilesTokenizer | SelfiesTokenizer, ends: list[int], syntax: bool) -> Allowed:
    """Admit what is meant by `syntax`, or else all letters and ends, but no empty text."""
    if syntax and isinstance(tokenizer, SmilesTokenizer):
        return SmilesSyntax(tokenizer.tokens, [tokenizer.tokens[i] for i in ends])
    ids = tokenizer.letters.tolist()
    if syntax:
        ids = [i for i in ids if tokenizer.tokens[i] in WHOLE]
    first = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    first[ids] = True
    later = first.clone()
    later[ends] = True
    first[ends] = False

    def allowed(row: int, tokens: Sequence[int], left: int, logits: Tensor) -> Tensor:
        return later if len(tokens) else first

    return allowed


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [int(s) for s in torch.randint(2**62, (count,))]
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed must have one number for each of the {count} molecules (got {len(seed)}), or be one")
    return list(seed)


def _rows_at_once(model: SequenceModel) -> int:
    """Molecules whose states fit into `STATES` bytes."""
    state = pytree.tree_leaves(model.initial_state(1))
    size = sum(part.numel() * part.element_size() for part in state if isinstance(part, Tensor))
    return max(1, min(ROWS, STATES // max(size, 1)))


def _written(tokenizer: SmilesTokenizer | SelfiesTokenizer, tokens: Tensor) -> str:
    if isinstance(tokenizer, SelfiesTokenizer):
        try:
            return tokenizer.decode_smiles(tokens)
        except ValueError:  # a symbol that was spelled out and not ended
            pass
    return tokenizer.decode(tokens)
