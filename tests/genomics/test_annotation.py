"""Annotation equals the model on the whole sequence, whatever the chunk, and reaches every base once."""

import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sinuous.genomics import annotation
from sinuous.genomics.caduceus import Caduceus
from sinuous.genomics.dna_xlstm import DNAXLSTM
from sinuous.genomics.letters import DNATokenizer

TOKENIZER = DNATokenizer()


def annotator(pattern: str = "slstm", **options: Any) -> DNAXLSTM:
    """A model with large weights, so that what it has read long ago still matters."""
    model = DNAXLSTM(16, 2, 2, pattern=pattern, head="position", num_classes=5, strands="shared", **options).eval()
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        weights.data += 0.2 * torch.randn(weights.shape, generator=generator)
    return model


def record(name: str, sequence: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, sequence=sequence)


def random_sequence(length: int, seed: int = 0) -> str:
    drawn = torch.randint(4, (length,), generator=torch.Generator().manual_seed(seed))
    return "".join("ACGT"[i] for i in drawn.tolist())


def whole(model: DNAXLSTM, sequence: str) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENIZER.encode(sequence)[None])[0]


@pytest.mark.parametrize("pattern", ["mlstm", "slstm", "mamba"])
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (1, 50), (19, 1), (97, 10), (97, 96), (97, 97), (97, 1000)])
def test_chunks_do_not_change_logits(pattern: str, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation, "STEPS", 37)  # so that the trunk reads a chunk in parts, too
    model = annotator(pattern).double()
    sequence = random_sequence(length)
    parts = list(annotation.strand_logits(model, TOKENIZER.encode(sequence).to(torch.uint8), chunk=chunk))
    assert [first for first, _ in parts] == list(range(0, length, chunk))
    logits = torch.cat([part for _, part in parts])
    assert logits.shape == (length, 5)
    torch.testing.assert_close(logits, whole(model, sequence), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"join_dim": 12, "class_complement": (0, 2, 1, 4, 3)},
        {"sinusoidal": True},
        {"pattern": "mlstm", "rotary": True},
        {"pattern": ("slstm", "mlstm")},
    ],
)
def test_options_of_models_do_not_meet_chunks(options: dict[str, Any]) -> None:
    model = annotator(**options).double()
    sequence = random_sequence(120)
    logits = [part for _, part in annotation.strand_logits(model, TOKENIZER.encode(sequence), chunk=33)]
    torch.testing.assert_close(torch.cat(logits), whole(model, sequence), rtol=0, atol=1e-10)


def test_few_states_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = annotator().double()
    ids = TOKENIZER.encode(random_sequence(203))
    size = annotation._Strands(model, ids).state_bytes
    shelves: list[tuple[weakref.ref[torch.Tensor], int]] = []
    most = 0
    make = annotation._shelf

    def counted(state: Any, places: int) -> Any:
        nonlocal most
        shelf = make(state, places)
        shelves.append((weakref.ref(shelf[0].c), places))
        most = max(most, sum(places for first, places in shelves if first() is not None))
        return shelf

    monkeypatch.setattr(annotation, "_shelf", counted)
    for kept in (68, 20, 12):
        monkeypatch.setattr(annotation, "STATES_BYTES", kept * size)
        shelves.clear()
        most = 0
        logits = torch.cat([part for _, part in annotation.strand_logits(model, ids, chunk=3)])
        assert kept / 4 < most <= kept
        torch.testing.assert_close(logits, model(ids[None])[0].detach(), rtol=0, atol=1e-10)


def test_states_of_a_long_sequence_fit_the_memory() -> None:
    for chunks in (1, 2, 27, 928, 30_000, 10**6):
        for state_bytes in (1, 21_000, 2_400_000):
            levels, parts = annotation.plan(chunks, state_bytes)
            assert parts**levels >= chunks
            assert levels * parts * state_bytes <= annotation.STATES_BYTES or parts == 2
    assert annotation.plan(928, 21_000) == (1, 928)


def test_a_region_is_labelled_as_in_the_whole() -> None:
    model = annotator("mlstm").double()
    ids = TOKENIZER.encode(random_sequence(150))
    logits = model(ids[None])[0].detach()
    for region in ((0, 150), (0, 1), (149, 150), (40, 101)):
        parts = list(annotation.strand_logits(model, ids, chunk=16, region=region))
        assert parts[0][0] == region[0]
        found = torch.cat([part for _, part in parts])
        torch.testing.assert_close(found, logits[slice(*region)], rtol=0, atol=1e-10)
    assert not list(annotation.strand_logits(model, ids, chunk=16, region=(70, 70)))
    with pytest.raises(ValueError, match="region must be a part of chr1, 0-150"):
        list(annotation.label_parts(model, [record("chr1", 150 * "A")], region=(100, 151)))


def test_every_base_has_one_label() -> None:
    model = annotator()
    model.pretrained_cfg = {"label_names": ("intergenic", "gene +", "gene -", "CDS +", "CDS -")}
    sequences = {"one": "g", "chr1": "NNN" + random_sequence(300) + 40 * "N" + random_sequence(77, 1), "empty": ""}
    sequences["chr2"] = 30 * "R" + random_sequence(64, 2).lower()
    records = [record(name, sequence) for name, sequence in sequences.items()]
    per_chunk = [list(annotation.annotate(model, iter(records), chunk=chunk)) for chunk in (1000, 64, 29)]
    assert per_chunk[0] == per_chunk[1] == per_chunk[2]
    found = per_chunk[0]
    for name, sequence in sequences.items():
        own = [stretch for stretch in found if stretch.name == name]
        assert [s.start for s in own] == [0, *(s.end for s in own)][: len(own)]
        assert (own[-1].end if own else 0) == len(sequence)
        assert all(a.label != b.label for a, b in itertools.pairwise(own))
    gaps = [stretch[:3] for stretch in found if stretch.label == annotation.GAP]
    assert gaps == [("chr1", 0, 3), ("chr1", 303, 343), ("chr2", 0, 30)]
    labels = model(TOKENIZER.encode(sequences["chr1"])[None])[0].argmax(-1)
    names = model.pretrained_cfg["label_names"]
    for stretch in found:
        if stretch.name == "chr1" and stretch.label != annotation.GAP:
            assert {names[i] for i in labels[stretch.start : stretch.end].tolist()} == {stretch.label}
    assert len({stretch.label for stretch in found}) > 3


def test_progress_reaches_the_end_of_both_passes() -> None:
    told: list[tuple[str, str, int, int]] = []
    list(annotation.annotate(annotator(), [record("chr1", 100 * "ACT")], chunk=64, progress=lambda *a: told.append(a)))
    for direction in ("right to left", "left to right"):
        done = [(bases, of) for name, which, bases, of in told if which == direction]
        assert done == sorted(done)
        assert done[-1] == (300, 300)


def test_what_cannot_be_annotated_is_refused() -> None:
    model = annotator()
    others = DNAXLSTM(16, 2, 2), DNAXLSTM(16, 2, 2, strands="shared"), Caduceus(16, 1, head="position", num_classes=2)
    for other in others:
        with pytest.raises(ValueError, match=r"strands='shared'.*direction='causal' and head='position'"):
            annotation.annotate(other, [])
    growing = DNAXLSTM(
        16, 2, 2, pattern=("slstm", "softmax_attention"), head="position", num_classes=2, strands="shared"
    )
    with pytest.raises(ValueError, match="constant state"):
        annotation.annotate(growing, [])
    tied = DNAXLSTM(16, 2, 2, head="position", num_classes=2, strands="shared", direction="tied")
    with pytest.raises(ValueError, match="direction='causal'"):
        annotation.annotate(tied, [])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        list(annotation.annotate(model, [], chunk=0))
    late = 1_100_000 * "A" + "E"
    with pytest.raises(ValueError, match="'chr9' at position 1100001 of 1100001"):
        list(annotation.annotate(model, [record("chr9", late)]))
