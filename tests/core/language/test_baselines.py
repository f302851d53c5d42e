"""Models of bytes to compare with, against definitions written out."""

from __future__ import annotations

import json
import lzma
import math

import numpy as np
import pytest

from sinuous.core.language.baselines import NGram, xz_bits
from sinuous.core.language.datasets import ByteText
from sinuous.core.language.models import WEIGHTS

TEXT = b"the cat sat on the mat; the hat was flat, the rat was fat. " * 3 + bytes(range(0, 256, 7))


def witten_bell(text: bytes, context: bytes, byte: int) -> float:
    """p(byte | context) by the recursion."""
    shorter = witten_bell(text, context[1:], byte) if context else 1 / 256
    following = [
        text[i + len(context)] for i in range(len(text) - len(context)) if text[i : i + len(context)] == context
    ]
    if not following:
        return shorter
    kinds = len(set(following))
    return (following.count(byte) + kinds * shorter) / (len(following) + kinds)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_n_grams_follow_the_recursion(order: int) -> None:
    scored = b"the bat sat there\x00\xff the fat cat"
    expected = [-math.log2(witten_bell(TEXT, scored[max(i - order + 1, 0) : i], byte)) for i, byte in enumerate(scored)]
    np.testing.assert_allclose(NGram(TEXT, order).bits(scored), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [b"th", b"\xff\xff", b""])
def test_probabilities_sum_to_one(context: bytes) -> None:
    model = NGram(TEXT, 3)
    p = [2 ** -model.bits(context + bytes([byte]))[-1] for byte in range(256)]
    assert sum(p) == pytest.approx(1, abs=1e-12)


def test_longest_n_grams_fit_into_their_numbers() -> None:
    text = b"\xff" * 20
    assert NGram(text, 7).bits(text)[-1] < 0.2


@pytest.mark.parametrize("text", [b"", b"a", b"ab"])
def test_short_texts(text: bytes) -> None:
    assert np.isfinite(NGram(text).bits(b"abc")).all()
    assert NGram(TEXT).bits(text).shape == (len(text),)


def test_without_training_every_byte_has_eight_bits() -> None:
    assert NGram(b"").bits(b"xyz").tolist() == [8, 8, 8]


def test_wrong_orders_are_refused() -> None:
    for order in (0, 8):
        with pytest.raises(ValueError, match="order must be at"):
            NGram(TEXT, order)


def test_xz_counts_what_a_text_adds() -> None:
    random = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    alone = xz_bits(random)
    assert alone == 8 * len(lzma.compress(random, preset=9 | lzma.PRESET_EXTREME)) / len(random)
    assert alone > 8
    assert xz_bits(random, after=random) < 0.2
    with pytest.raises(ValueError, match="the text is empty"):
        xz_bits(b"")


def test_the_card_of_the_shipped_weights_has_these_scores() -> None:
    card = json.loads((WEIGHTS / "bytes_nano.austen.json").read_text())["baselines"]
    train, test = (bytes(ByteText().split(split).text) for split in ("train", "test"))
    for name, order in (("trigrams of bytes", 3), ("n-grams of 6 bytes", 6)):
        assert NGram(train, order).bits(test)[1:].mean() == pytest.approx(card[name]["bits_per_byte"], abs=5e-5)
    # Releases of xz may differ a little.
    assert xz_bits(test) == pytest.approx(card["xz"]["bits_per_byte"], rel=1e-2)
    assert xz_bits(test, train) == pytest.approx(card["xz after the training text"]["bits_per_byte"], rel=1e-2)
