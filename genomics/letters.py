"""Letters of DNA, proteins and molecules, and the numbers under which models read them.

    ids = DNATokenizer().encode("ACGTN")  # tensor([7, 8, 9, 10, 11])

Every tokenizer is a `Vocabulary`: `encode(text, name=None) -> LongTensor [T]`, without a start or an end token,
`decode(ids)`, `vocab_size`, `tokens`, the ids `start end pad mask unknown ignored`, and the sorted tensors of ids
`letters natural special`. Those of molecules are in `sinuous.genomics.molecule_letters`.

Sources: the vocabularies of ml-jku/DNA-xLSTM and kuleshov-group/caduceus (12 tokens), and of ml-jku/Prot-xLSTM (38).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sinuous.core.checks import described
from sinuous.genomics.molecule_letters import SelfiesTokenizer, SmilesTokenizer
from sinuous.genomics.vocabulary import Vocabulary

__all__ = ["DNATokenizer", "ProteinTokenizer", "SelfiesTokenizer", "SmilesTokenizer"]

DROPPED, STOP, REFUSED = 253, 254, 255
"""Entries of a table that are no ids: letters that go, `*`, which may end a text, and letters that raise."""


class _LetterTokenizer(Vocabulary):
    """One letter, one id, read through a table of all 256 bytes."""

    table: bytes
    remedy: str

    def encode(self, text: str | bytes, name: str | None = None) -> Tensor:
        if isinstance(text, str):
            try:
                raw = text.encode("ascii")
            except UnicodeEncodeError as error:
                raise self._refusal(text, error.start, text[error.start], name, self.remedy) from None
        elif isinstance(text, bytes | bytearray):
            raw = bytes(text)
        else:
            raise ValueError(f"a text must be a string of letters (got {described(text)}); encode texts one by one")
        ids = np.frombuffer(raw.translate(self.table), np.uint8)
        if ids.max(initial=0) >= DROPPED:
            ids = self._mended(ids, raw, name)
        return torch.from_numpy(ids.astype(np.int64))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        row = self._checked(ids).numpy()
        if row.size and np.isin(row, self.letters.numpy()).all():  # a chromosome in a second
            letters = np.array([token if len(token) == 1 else "?" for token in self.tokens], "S1")
            written: bytes = letters[row].tobytes()
            return written.decode("ascii")
        return super().decode(ids)

    def _mended(self, ids: np.ndarray, raw: bytes, name: str | None) -> np.ndarray:
        kept = np.flatnonzero(ids != DROPPED)
        if kept.size and ids[kept[-1]] == STOP:
            kept = kept[:-1]
        refused = kept[ids[kept] >= DROPPED]
        if refused.size:
            place, text = int(refused[0]), raw.decode("latin-1")
            raise self._refusal(text, place, text[place], name, self.remedy)
        mended: np.ndarray = ids[kept]
        return mended


def _table(ids: Mapping[str, int]) -> bytes:
    """A table of bytes, which has each letter in both cases."""
    table = np.full(256, REFUSED, np.uint8)
    for letter, i in ids.items():
        table[[ord(letter), ord(letter.lower())]] = i
    return table.tobytes()


DNA = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
SEVERAL_BASES = "RYSWKMBDHVN"
"""IUPAC's codes of two bases and more."""


class DNATokenizer(_LetterTokenizer):
    """Bases under the 12 ids of HyenaDNA, Caduceus and DNA-xLSTM: A 7, C 8, G 9, T 10, N 11.

    Lower case (soft-masked) is read as upper case, U as T, and IUPAC's other codes (R Y S W K M B D H V) as N. Any
    other letter, gaps included, raises.

    Attributes:
        complement: int64 `[12]`, A ↔ T and C ↔ G, all others fixed; `complement[ids].flip(-1)` is the other strand.
        ignored: N, which no score counts.
        natural: A, C, G, T.
    """

    kind = "DNA"
    start, end, pad, mask, unknown, ignored = 2, 1, 4, 3, 6, 11
    remedy = "a sequence of DNA has A C G T U, N and IUPAC's codes of several bases"
    table = _table({**dict.fromkeys(SEVERAL_BASES, 11), "A": 7, "C": 8, "G": 9, "T": 10, "U": 10})

    def __init__(self) -> None:
        super().__init__(DNA, letters=range(7, 12), natural=range(7, 11))
        self.complement = torch.arange(len(DNA))
        self.complement[7:11] = torch.tensor([10, 9, 8, 7])


RESIDUES = "LAGVSERTIDPKQNFYMHWC"
PROTEIN = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *RESIDUES,
    *("X", "B", "U", "Z", "O", ".", "-", "<null_1>", "<mask>"),
    *(f"<mask-{k}>" for k in range(1, 6)),
)


class ProteinTokenizer(_LetterTokenizer):
    """Residues under the 38 ids of Prot-xLSTM and ProtMamba: the twenty natural ones 4 to 23, X B U Z O 24 to 28.

    Gaps (`-` and `.`) and a `*` at the end go, lower case (insertions of an A3M alignment) is read as upper case, and J
    (leucine or isoleucine) as X. Any other letter, a `*` inside included, raises.

    Attributes:
        start: `<cls>`, which begins every protein; the next `<cls>` is all that stands between two.
        end: `<eos>`, which stands between a protein whose spans were cut out and these spans.
        span_masks: int64 `[5]`, `<mask-1>` to `<mask-5>`, which name the spans.
        natural: the twenty residues of the genetic code.
    """

    kind = "proteins"
    start, end, pad, mask, unknown = 0, 2, 1, 32, 3
    remedy = "a protein has the twenty residues' letters, X B Z J U O, gaps - and ., and a * at its end only"
    table = _table(
        {**{letter: PROTEIN.index(letter) for letter in (*RESIDUES, *"XBUZO")}, "J": PROTEIN.index("X")}
        | {"-": DROPPED, ".": DROPPED, "*": STOP}
    )

    def __init__(self) -> None:
        super().__init__(PROTEIN, letters=range(4, 29), natural=range(4, 24))
        self.span_masks = torch.arange(33, 38)
