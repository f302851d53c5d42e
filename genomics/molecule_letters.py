"""Tokens of SMILES and SELFIES.

Source of the cuts between tokens, and of the vocabularies that are learnt: ml-jku/Chem-xLSTM. What a SMILES may have:
the grammar of RDKit (Code/GraphMol/SmilesParse) and OpenSMILES.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import described
from sinuous.genomics.vocabulary import Vocabulary

ELEMENTS = (
    *("H", "He", "Li", "Be", "B", "C", "N", "O", "F", "Ne", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ar", "K", "Ca"),
    *("Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br", "Kr", "Rb", "Sr", "Y"),
    *("Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe", "Cs", "Ba", "La", "Ce"),
    *("Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu", "Hf", "Ta", "W", "Re", "Os", "Ir"),
    *("Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm"),
    *("Bk", "Cf", "Es", "Fm", "Md", "No", "Lr", "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc"),
    *("Lv", "Ts", "Og"),
)
AROMATIC = ("b", "c", "n", "o", "p", "s", "si", "as", "se", "te")
PROVISIONAL = ("Uun", "Uuu", "Uub", "Uut", "Uuq", "Uup", "Uuh", "Uus", "Uuo")
"""Names that elements 110 to 118 had, which RDKit still reads."""
CHIRALITIES = ("TH", "AL", "SP", "SQ", "TB", "BP", "OH")
"""Classes that may follow an `@`, those of older SMILES included."""
SIGNS = tuple("()[].=#-+\\/:~@?<>*$%'")
RINGS = tuple(f"%{ring}" for ring in range(10, 100))
PAD, BEG, END = "[PAD]", "[BEG]", "[END]"
SMILES = (PAD, BEG, END, *SIGNS, *"0123456789", *AROMATIC, *ELEMENTS, *RINGS, *CHIRALITIES, *PROVISIONAL)


def _longest_first(*tokens: str) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


PARTS = re.compile(r"\[[^\]]*\]?|Cl|Br|%[1-9]\d|.", re.DOTALL)
"""Atoms in brackets, whole, and tokens between them, where few elements may stand: `Sn` is sulfur, then nitrogen."""
BRACKETED = re.compile(
    rf"(?<=@)(?:{_longest_first(*CHIRALITIES)})|{_longest_first(*PROVISIONAL, *ELEMENTS, *AROMATIC)}|.", re.DOTALL
)
"""Tokens between brackets, where every element may stand: `Sn` is tin."""
CHEM_XLSTM = re.compile(
    r"(?<=\[)Cs(?=\])|Si|Xe|Ba|Rb|Ra|Sr|Dy|Li|Kr|Bi|Mn|He|Am|Pu|Cm|Pm|Ne|Th|Ni|Pr|Fe|Lu|Pa|Fm|Tm|Tb|Er|Be|Al|Gd|Eu|te"
    r"|As|Pt|Lr|Sm|Ca|La|Ti|Te|Ac|Cf|Rf|Na|Cu|Au|Nd|Ag|Se|se|Zn|Mg|Br|Cl|Pb|Sb|%\d\d|.",
    re.DOTALL,
)
"""Tokens of learnt vocabularies: these elements, in brackets or not, and any other character by itself, also those that
the authors' pattern drops, of which `\\` is the most frequent."""


class _MoleculeTokenizer(Vocabulary):
    """Ids of the tokens of a molecule's text."""

    remedy: str

    def __init__(self, tokens: Sequence[str], pad: str = PAD) -> None:
        self.ids = {token: i for i, token in enumerate(tokens) if token}
        self.pad, self.start, self.end = (self.ids[token] for token in (pad, BEG, END))
        super().__init__(tokens, letters=set(self.ids.values()) - {self.pad, self.start, self.end})

    def tokenize(self, text: str) -> list[str]:
        """Split a text into tokens, which join to it again."""
        raise NotImplementedError

    def encode(self, text: str, name: str | None = None) -> Tensor:
        """Ids `[T]` of a molecule's text, int64, without start and end tokens.

        Args:
            text: one molecule, or several with `.` between them.
            name: of the record, which an error tells.

        Raises:
            ValueError: for a token that the vocabulary lacks, with the record, the position and the token.
        """
        if not isinstance(text, str):
            raise ValueError(f"a molecule must be a string (got {described(text)}); encode molecules one by one")
        tokens = self.tokenize(text)
        try:
            return torch.tensor([self.ids[token] for token in tokens], dtype=torch.long)
        except KeyError:
            missing = next(i for i, token in enumerate(tokens) if token not in self.ids)
            raise self._missing(text, sum(map(len, tokens[:missing])), tokens[missing], name) from None

    def _missing(self, text: str, place: int, token: str, name: str | None) -> ValueError:
        return self._refusal(text, place, token, name, self.remedy)


class SmilesTokenizer(_MoleculeTokenizer):
    r"""SMILES in tokens as Chem-xLSTM cuts them: elements, aromatic atoms, bonds, brackets, single digits, `%nn`.

    The vocabulary is one fixed list of 268: all elements, isotopes, charges and maps digit by digit, `/` and `\`, `@`
    and the classes of chirality. Whatever RDKit reads as a SMILES is tokenized, and its tokens join to it again.

    `from_file` reads a vocabulary that Chem-xLSTM learnt; there a missing token raises, where the authors' code drops a
    character or reads it as padding.

    Attributes:
        start, end, pad: `[BEG]`, `[END]`, `[PAD]`.
    """

    kind = "SMILES"
    remedy = "take it out; blanks, names and whatever else may follow a SMILES are not part of it"

    def __init__(self) -> None:
        super().__init__(SMILES)
        self.learnt_from: Path | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SmilesTokenizer:
        """Read the vocabulary of a model of Chem-xLSTM's authors.

        Args:
            path: an `init_arguments.json`, or its folder. Where its `vocab_size`, the number of rows of the model, is
                more than it has tokens, the rows beyond them stand for nothing.

        Raises:
            ValueError: if the file is not there or has no such vocabulary.
        """
        path = Path(path)
        file = path / "init_arguments.json" if path.is_dir() else path
        try:
            arguments = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read a vocabulary from {file} ({error}); give an init_arguments.json") from error
        tokenizer = cls.__new__(cls)
        _MoleculeTokenizer.__init__(tokenizer, _learnt_tokens(arguments, file))
        tokenizer.learnt_from = file
        return tokenizer

    def tokenize(self, text: str) -> list[str]:
        if self.learnt_from is not None:
            return CHEM_XLSTM.findall(text)
        tokens: list[str] = []
        for part in PARTS.findall(text):
            if part[0] == "[":
                tokens += BRACKETED.findall(part)
            else:
                tokens.append(part)
        return tokens

    def _missing(self, text: str, place: int, token: str, name: str | None) -> ValueError:
        if self.learnt_from is None:
            return super()._missing(text, place, token, name)
        after = 0
        for whole in SmilesTokenizer().tokenize(text):  # an element that the authors' pattern cuts in two has one name
            if after <= place < after + len(whole):
                place, token = after, whole
                break
            after += len(whole)
        remedy = f"{self.learnt_from} has {len(self.ids)} tokens; leave such molecules out, or use SmilesTokenizer()"
        return self._refusal(text, place, token, name, remedy)


def _learnt_tokens(arguments: Any, file: Path) -> list[str]:
    """Tokens by id, `""` for those of the model's rows that have none."""
    labels = arguments.get("token2label") if isinstance(arguments, dict) else None
    if not isinstance(labels, dict) or not {PAD, BEG, END} <= set(labels):
        raise ValueError(
            f"{file} has no token2label with {PAD}, {BEG} and {END}; give the init_arguments.json of a Chem-xLSTM model"
        )
    capacity = arguments.get("vocab_size")
    size = max(len(labels), capacity if isinstance(capacity, int) else 0)
    ids = list(labels.values())
    if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < size for i in ids):
        raise ValueError(f"the labels of {file} must be different numbers from 0 to {size - 1}; the file is damaged")
    tokens = [""] * size
    for token, i in labels.items():
        tokens[i] = token
    return tokens


SELFIES_ATOMS = (
    *("C", "=C", "#C", "N", "=N", "#N", "O", "=O", "S", "=S", "#S", "P", "=P", "#P", "B", "=B", "#B", "F", "Cl", "Br"),
    *("I", "NH1", "C@H1", "C@@H1", "C@", "C@@", "N+1", "=N+1", "#N+1", "O-1", "S-1", "N-1", "=N-1", "O+1", "=O+1"),
    *("S+1", "=S+1", "NH1+1", "NH2+1", "NH3+1", "=NH1+1", "=NH2+1", "C-1", "=C-1", "#C-1", "C+1", "=C+1", "P+1"),
    *("S@", "S@@", "/C", "\\C", "/N", "\\N", "/O", "\\O", "/S", "\\S", "/F", "/Cl", "\\Cl", "/C@@H1", "\\C@@H1"),
    *("/C@H1", "\\C@H1"),
)
SELFIES_STRUCTURE = tuple(
    f"{bond}{symbol}{size}" for symbol in ("Ring", "Branch") for size in (1, 2, 3) for bond in ("", "=", "#")
)
SELFIES_SYMBOLS = tuple(f"[{symbol}]" for symbol in (*SELFIES_STRUCTURE, *SELFIES_ATOMS))
NOP = "[nop]"
SELFIES = (NOP, BEG, END, ".", *SELFIES_SYMBOLS, "[", "]", *"0123456789=#/\\-+@", "Ring", "Branch", *ELEMENTS)
WHOLE = frozenset((*SELFIES_SYMBOLS, ".", NOP))
SYMBOLS = re.compile(r"\[[^\[\]]+\]|\.")
SPELLING = re.compile(rf"Ring|Branch|{_longest_first(*ELEMENTS)}|.", re.DOTALL)


class SelfiesTokenizer(_MoleculeTokenizer):
    """SELFIES (Krenn et al., arXiv 1905.13741): every sequence of its symbols is a molecule.

    Frequent symbols have an id of their own. Any other, such as `[13CH1-1]`, is spelled out in brackets, digits,
    element, chirality, hydrogens and charge, so that one fixed vocabulary has them all.

    `encode` and `decode` take and give SELFIES, `encode_smiles` and `decode_smiles` SMILES (with the package `selfies`
    of the extra `genomics`).

    Attributes:
        start, end, pad: `[BEG]`, `[END]`, `[nop]`.
    """

    kind = "SELFIES"
    remedy = "SELFIES is made of symbols in brackets, such as [C][=O]; encode_smiles takes SMILES"

    def __init__(self) -> None:
        super().__init__(SELFIES, pad=NOP)

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for symbol in SYMBOLS.findall(text):
            tokens += [symbol] if symbol in WHOLE else SPELLING.findall(symbol)
        return tokens

    def encode(self, text: str, name: str | None = None) -> Tensor:
        read = 0
        while isinstance(text, str) and (symbol := SYMBOLS.match(text, read)):
            read = symbol.end()
        if isinstance(text, str) and read < len(text):
            raise self._missing(text, read, text[read], name)
        return super().encode(text, name)

    def encode_smiles(self, smiles: str, name: str | None = None) -> Tensor:
        """Ids `[T]` of the SELFIES of a SMILES, int64, without start and end tokens.

        Raises:
            ValueError: if SELFIES cannot write the molecule.
            ModuleNotFoundError: if the extra `genomics` is missing.
        """
        import selfies

        if not isinstance(smiles, str):
            raise ValueError(f"a molecule must be a string (got {described(smiles)}); encode molecules one by one")
        try:
            written: str = selfies.encoder(smiles)
        except selfies.EncoderError as error:
            record = "the text" if name is None else repr(name)
            reason = " ".join(str(error).split())
            raise ValueError(f"SELFIES cannot write {smiles!r} of {record} ({reason}); leave it out") from error
        return self.encode(written, name)

    def decode_smiles(self, ids: Tensor | Sequence[int]) -> str:
        """Write ids `[T]` as SMILES.

        Raises:
            ValueError: if the ids are no SELFIES: a symbol that is spelled out must be whole.
            ModuleNotFoundError: if the extra `genomics` is missing.
        """
        import selfies

        text = self.decode(ids)
        try:
            written: str = selfies.decoder(text)
        except (selfies.DecoderError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{text!r} is no SELFIES ({reason}); give whole symbols") from error
        return written
