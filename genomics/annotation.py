"""Labels for every base of a sequence of any length, each from all that stands on both sides of it.

The model reads both strands with one causal trunk f, and joins them at each base:

    u = f(x),   v = flip f(rc x),   logits_t = join(u_t, v_t)

u_t has read the bases up to t, v_t those from t on. So two passes label a chromosome without windows: the first reads
from right to left and keeps the trunk's state where chunks meet; the second goes from left to right, reads each chunk
for u, and for v once more from the state at its right border. Labels do not depend on the chunk.

Memory: bytes of the sequence, two chunks of features, and at most `STATES_BYTES` of states. A chromosome of 30.4 Mb
meets at 927 borders of chunks of 32,768; the state of an sLSTM block of width d has 7 d numbers (six blocks of 128:
21 kB; 20 MB in all). Where the states of all borders were more than that (an mLSTM block of width 256 has 264 kB), they
are kept at fewer borders, and those between are found again by reading once more: with k levels n borders need
k · n^(1/k) states and k + 2 readings of the trunk in all.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sinuous.core.checks import check_sizes
from sinuous.core.ragged import select_rows

CHUNK = 32_768
STEPS = 4096
"""Bases that the trunk reads at a time, within a chunk: what it holds meanwhile stays in the processor's cache."""
STATES_BYTES = 128 << 20
GAP = "gap"
"""Label of letters that stand for no certain base."""

Progress = Callable[[str, str, int, int], None]
"""Called with the name of the sequence, the pass, and how many bases it has read, of how many."""


class Stretch(NamedTuple):
    """Neighbouring bases with one label: those from `start`, counted from 0, up to the one before `end`."""

    name: str
    start: int
    end: int
    label: str


class Part(NamedTuple):
    """Bases of a sequence that were labelled together.

    Attributes:
        name: of the sequence.
        start: its first base, from 0.
        probabilities: of the classes at each base, `[n, K]`.
        gaps: whether a letter stands for no certain base, bool `[n]`.
    """

    name: str
    start: int
    probabilities: Tensor
    gaps: Tensor


def annotate(
    model: nn.Module,
    sequences: Iterable[Any],
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Iterator[Stretch]:
    """Yield the stretches of all sequences, from left to right; every base is in exactly one.

    Args:
        model: labels positions, with `strands="shared"` and `direction="causal"`.
        sequences: records with `.name` and `.sequence`, as `read_sequences` yields them; one at a time is held.
        chunk: bases between the borders where states are kept. More of them need less memory for states and more for
            features; labels stay the same.
        progress: told of the bases that were read.

    Raises:
        ValueError: if the model is another one, or a sequence has a letter that no DNA has.
    """
    check_annotator(model)
    return stretches(label_parts(model, sequences, chunk=chunk, progress=progress), classes_of(model))


def label_parts(
    model: nn.Module,
    sequences: Iterable[Any],
    *,
    chunk: int = CHUNK,
    region: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Part]:
    """Yield the probabilities of all sequences, a chunk at a time, from left to right.

    Args:
        model, sequences, chunk, progress: as in `annotate`.
        region: bases of each sequence to label, from 0, half-open; the trunk reads all others still, since labels
            depend on them.
    """
    tokenizer = check_annotator(model)
    check_sizes(chunk=chunk)
    told = progress or (lambda *_: None)
    for record in sequences:
        ids = encoded(tokenizer, record.sequence, record.name)
        start, end = (0, len(ids)) if region is None else region
        if not 0 <= start <= end <= len(ids):
            raise ValueError(f"region must be a part of {record.name}, 0-{len(ids)} (got {start}-{end})")

        def tell(which: str, done: int, of: int, name: str = record.name) -> None:
            told(name, which, done, of)

        for first, logits in strand_logits(model, ids, chunk=chunk, region=(start, end), progress=tell):
            letters = ids[first : first + len(logits)]
            yield Part(record.name, first, logits.softmax(-1), ~torch.isin(letters, tokenizer.natural.to(letters)))


def stretches(parts: Iterable[Part], classes: Sequence[str]) -> Iterator[Stretch]:
    """Join neighbours whose likeliest class is the same, or that are gaps, also across parts."""
    open_stretch: Stretch | None = None
    names = [*classes, GAP]
    for part in parts:
        labels = part.probabilities.argmax(-1).masked_fill(part.gaps, len(classes))
        values, counts = torch.unique_consecutive(labels, return_counts=True)
        ends = (part.start + counts.cumsum(0)).tolist()
        for label, start, end in zip(values.tolist(), [part.start, *ends], ends, strict=False):
            found = Stretch(part.name, start, end, names[label])
            if open_stretch is not None and (open_stretch.name, open_stretch.end, open_stretch.label) == (
                found.name, found.start, found.label,
            ):  # fmt: skip
                open_stretch = open_stretch._replace(end=end)
            else:
                if open_stretch is not None:
                    yield open_stretch
                open_stretch = found
    if open_stretch is not None:
        yield open_stretch


@torch.inference_mode()
def strand_logits(
    model: Any,
    ids: Tensor,
    *,
    chunk: int = CHUNK,
    region: tuple[int, int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield logits of a sequence, a chunk at a time, from left to right: what `model(ids)` gives for the whole.

    Args:
        model: with a causal `trunk`, whose strands `join` joins.
        ids: `[T]`, of any whole-number dtype.
        chunk: bases between the borders where states are kept.
        region: bases whose logits are asked for; all if absent.
        progress: told the pass, and how many bases it has read of how many.

    Yields:
        The first base of the chunk, and logits `[n, K]`.
    """
    start, end = (0, len(ids)) if region is None else region
    if start == end:
        return
    told = progress or (lambda *_: None)
    strands = _Strands(model, ids)
    left = strands.read_on(0, start, strands.initial())
    unread = len(ids) - start

    def read_back(a: int, b: int, state: Any) -> Any:
        nonlocal unread
        state = strands.read_back(a, b, state)
        if unread > 0:  # what is read once more does not count
            unread = max(unread - (b - a), 0)
            told("right to left", len(ids) - start - unread, len(ids) - start)
        return state

    right = strands.initial()
    for b in range(len(ids), end, -chunk):
        right = read_back(max(b - chunk, end), b, right)
    borders = [*range(start, end, chunk), end]
    for (a, b), entering in _entering(borders, right, *plan(len(borders) - 1, strands.state_bytes), read_back):
        if unread > 0:  # the leftmost part needs no border of its own
            unread = 0
            told("right to left", len(ids) - start, len(ids) - start)
        u, v, left = strands.features(a, b, left, entering)
        yield a, model.join(u, v)[0]
        told("left to right", b - start, end - start)


class _Strands:
    """Readings of a sequence by the trunk, on both strands."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.trunk, self.ids = model.trunk, ids
        self.complement = model.tokenizer.complement
        self.device = next(model.parameters()).device

    def initial(self) -> Any:
        return self.trunk.initial_state(1)

    @property
    def state_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(self.initial()))

    def read_on(self, a: int, b: int, state: Any) -> Any:
        """State of the first strand at b, from the one at a."""
        for start in range(a, b, STEPS):
            state = self.trunk.prefill(self._first(start, min(start + STEPS, b)), state)[1]
        return state

    def read_back(self, a: int, b: int, state: Any) -> Any:
        """State of the second strand at a, from the one at b."""
        for end in range(b, a, -STEPS):
            state = self.trunk.prefill(self._second(max(end - STEPS, a), end), state)[1]
        return state

    def features(self, a: int, b: int, left: Any, right: Any) -> tuple[Tensor, Tensor, Any]:
        """Features of both strands, `[1, b - a, D]` each, and the state of the first at b, from its state at a and that
        of the second at b: rows of one batch, since both read equally many bases."""
        state = pytree.tree_map(lambda *rows: torch.cat(rows), left, right)
        read = []
        for start in range(0, b - a, STEPS):
            end = min(start + STEPS, b - a)
            rows = torch.cat([self._first(a + start, a + end), self._second(b - end, b - start)])
            features, state = self.trunk.prefill(rows, state)
            read.append(features)
        both = torch.cat(read, 1)
        return both[:1], both[1:].flip(1), select_rows(state, [0])

    def _first(self, a: int, b: int) -> Tensor:
        return self.ids[None, a:b].long().to(self.device)

    def _second(self, a: int, b: int) -> Tensor:
        letters: Tensor = self.complement[self.ids[a:b].long()]
        return letters.flip(0)[None].to(self.device)


def plan(chunks: int, state_bytes: int) -> tuple[int, int]:
    """Levels of borders, and the parts into which each level cuts those of the one above, so that the states of all
    levels have at most `STATES_BYTES` together where two parts a level allow it.

    Level 1 keeps `parts` states over the whole, level 2 as many over one part of it, and so on.
    """
    kept = STATES_BYTES // max(state_bytes, 1)
    levels = next(n for n in itertools.count(1) if max(kept // n, 2) ** n >= chunks)
    return levels, next(n for n in itertools.count(1) if n**levels >= chunks)


def _entering(
    borders: Sequence[int], state: Any, levels: int, parts: int, read_back: Callable[[int, int, Any], Any]
) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yield chunks from left to right, and the state that enters each from the right; `state` enters the last."""
    chunks = len(borders) - 1
    if chunks == 1:
        yield (borders[0], borders[1]), state
        return
    size = -(-chunks // parts) if levels > 1 else 1
    stops = [*range(size, chunks, size), chunks]
    shelf = _shelf(state, len(stops))
    place = len(stops) - 1
    for i in range(chunks, size - 1, -1):
        if i < chunks:
            state = read_back(borders[i], borders[i + 1], state)
        if i == stops[place]:
            _put(shelf, place, state)
            place -= 1
    for place, (start, stop) in enumerate(itertools.pairwise([0, *stops])):
        entering = pytree.tree_map(operator.itemgetter(place), shelf)
        yield from _entering(borders[start : stop + 1], entering, levels - 1, parts, read_back)


def _shelf(state: Any, places: int) -> Any:
    """Room for so many states, in one piece: small tensors between large ones that come and go would split the
    memory, so that it grows with every state."""
    return pytree.tree_map(lambda t: t.new_empty(places, *t.shape), state)


def _put(shelf: Any, place: int, state: Any) -> None:
    for room, tensor in zip(pytree.tree_leaves(shelf), pytree.tree_leaves(state), strict=True):
        room[place] = tensor


def encoded(tokenizer: Any, sequence: str, name: str) -> Tensor:
    """Ids of a sequence in one byte a letter, `[T]`, without ever holding them in more."""
    ids = torch.empty(len(sequence), dtype=torch.uint8)
    for start in range(0, len(sequence), 1 << 20):
        letters = sequence[start : start + (1 << 20)]
        try:
            ids[start : start + len(letters)] = tokenizer.encode(letters, name)
        except ValueError:
            tokenizer.encode(sequence, name)  # tells the place in the whole
            raise
    return ids


def check_annotator(model: Any) -> Any:
    """The tokenizer of a model that labels positions from both strands of a causal trunk.

    Raises:
        ValueError: if the model is another one.
    """
    tokenizer = getattr(model, "tokenizer", None)
    joins = getattr(model, "strands", "shared") != "single" and getattr(model, "head_kind", "position") == "position"
    if not (joins and hasattr(model, "join") and hasattr(tokenizer, "complement") and hasattr(model, "trunk")):
        raise ValueError(
            "annotation reads both strands with one causal trunk: the model must have strands='shared', "
            f"direction='causal' and head='position' (got a {type(model).__name__})"
        )
    if not all(getattr(module, "constant_state", True) for module in model.modules()):
        raise ValueError(
            "annotation keeps states along a sequence, and this model's grow with it; build it with mixers of constant "
            "state, such as pattern='slstm'"
        )
    return tokenizer


def classes_of(model: Any) -> list[str]:
    """Names of a model's classes, or numbers if it has none."""
    names = list(cast("dict[str, Any]", getattr(model, "pretrained_cfg", {})).get("label_names") or ())
    return names or [str(i) for i in range(model.num_classes)]
