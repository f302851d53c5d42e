"""Write on from a prompt with a model of bytes, and show which characters surprised it.

The text appears as it is written. Then come the speed, and how many bits the model needs for each byte of a text that
it has not seen, beside other models of bytes. The figure colours each character by its surprisal: the prompt and what
the model wrote, and a passage that it only read.
"""

from __future__ import annotations

import argparse
import codecs
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.core.generation import Sampling, stream
from sinuous.core.hub import load
from sinuous.core.language.baselines import BYTES, NGram, xz_bits
from sinuous.core.language.datasets import ByteText, read_text
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.weights import all_weights

MODEL = "bytes_nano.austen"
PROMPT = "Anne had walked as far as the sea with Captain Wentworth, and "
WINDOW = 1024
"""Bytes that are read together, as in the test of the shipped weights: a byte is scored after those before it in its
window."""
MEASURED = 65_536
"""Bytes of a text of the user's that are scored at most: seconds on one core."""
PASSAGE = 700
"""Bytes of the passage in the figure."""
FIGURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="what the model goes on from")
    parser.add_argument("--tokens", type=int, default=600, metavar="N", help="bytes to write")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable byte each time")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest bytes that have so much")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; another seed, another text")
    parser.add_argument("--model", default=MODEL, metavar="NAME.TAG", help="a model of bytes with weights, or a folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text of yours to measure the models on")
    parser.add_argument("--out", type=Path, default=Path("sinuous_language.txt"), metavar="TXT", help="for the text")
    parser.add_argument(
        "--figure", type=Path, default=Path("sinuous_language.png"), metavar="PNG", help="for the figure"
    )


def run(options: argparse.Namespace) -> None:
    """Write, measure and draw as `options` ask for.

    What has been written when Ctrl-C comes stays in `options.out`.

    Raises:
        ValueError: for what cannot be done, naming the option.
        FileNotFoundError: if there is no such text.
    """
    _check(options)
    text = None if options.text is None else _own_text(options.text)
    model = byte_model(options.model)
    continuation = _write(model, options)
    print(f"\n{len(continuation.text):,} bytes, {continuation.tokens_per_second:.0f} bytes/s")
    _show_scores(_recorded(options.model) if text is None else measure(model, text), options, text)
    drawn = _draw(model, continuation, text, options)
    print(options.out)
    if drawn:
        print(options.figure)


def _check(options: argparse.Namespace) -> None:
    if not options.prompt:
        raise ValueError("--prompt must not be empty; give at least one character to go on from")
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1 (got {options.tokens})")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 9223372036854775807 (got {options.seed})")
    if options.out.is_dir():
        raise ValueError(f"--out must be a text's file, such as {options.out / 'written.txt'} (got {options.out})")
    if options.figure.is_dir() or options.figure.suffix not in FIGURES:
        raise ValueError(
            f"--figure must be a file that ends in {', '.join(FIGURES)}, such as {options.figure / 'seen.png'} "
            f"(got {options.figure})"
        )
    if options.out.resolve() == options.figure.resolve():
        raise ValueError(f"--out and --figure must be two files (got {options.out} for both)")
    _sampling(options)


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        temperature=options.temperature, top_p=options.top_p, max_new_tokens=options.tokens, seed=options.seed
    )


def _own_text(path: Path) -> bytes:
    text = read_text(path)
    if len(text) < 2:
        raise ValueError(f"{path} has {len(text)} bytes, and each is scored after others; give a longer text")
    return text


def byte_model(name: str) -> SequenceModel:
    """A causal model of bytes with its weights, by name or from a folder.

    Raises:
        ValueError: if it has no weights, or is a model of something else.
    """
    model = load(name).eval()
    if not isinstance(model, SequenceModel) or not model.causal or model.vocab_size != BYTES:
        raise ValueError(
            f"the demo needs a causal model of {BYTES} bytes (got {name!r}); `sinuous models --pretrained` lists names"
        )
    return model


@dataclass
class Continuation:
    """Text while it is being written.

    Attributes:
        prompt: what it goes on from.
        text: bytes written so far.
        seconds: from the first of them to the last.
    """

    prompt: bytes
    text: bytearray = field(default_factory=bytearray)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return (len(self.text) - 1) / self.seconds if self.seconds > 0 else math.nan

    def write(self, model: SequenceModel, sampling: Sampling) -> Iterator[str]:
        """Characters as the model writes them, each as soon as its bytes are complete; fills `text`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        began = None
        for token in stream(model, self.prompt, sampling):
            began = time.perf_counter() if began is None else began
            self.text.append(token.id)
            self.seconds = time.perf_counter() - began
            yield decoder.decode(bytes([token.id]))
        yield decoder.decode(b"", final=True)


def printable(text: str) -> str:
    """`text` with the replacement character for what a terminal would obey: control characters but new line and tab."""
    obeyed = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
    return text.translate(obeyed)


def _write(model: SequenceModel, options: argparse.Namespace) -> Continuation:
    """Let the model write to the terminal; what it has written lands in `options.out`, whatever ends it."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    continuation = Continuation(options.prompt.encode("utf-8", "surrogateescape"))
    print(printable(continuation.prompt.decode(errors="replace")), end="", flush=True)
    try:
        for characters in continuation.write(model, _sampling(options)):
            print(printable(characters), end="", flush=True)
    finally:
        options.out.write_bytes(continuation.prompt + continuation.text + b"\n")
    print()
    return continuation


@torch.inference_mode()
def surprisal(model: SequenceModel, text: bytes, window: int = WINDOW) -> Tensor:
    """Bits -log2 p of each byte of a text but the first, after those before it in windows, `[len(text) - 1]`.

    Windows of `window` bytes overlap by one, so that each byte but the first is a target once.
    """
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    ids = ids.to(next(model.parameters()).device)
    bits = []
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        log_p = model(part[None, :-1])[0].float().log_softmax(-1)
        bits.append(-log_p.gather(-1, part[1:, None]).squeeze(-1) / math.log(2))
    return torch.cat(bits).cpu()


def measure(model: SequenceModel, text: bytes) -> dict[str, float]:
    """Bits per byte of a text, of which the first `MEASURED` bytes are scored, under the model and under others.

    All but plain xz know the bundled training text. The first byte does not count, since the model reads it first.
    """
    text = text[:MEASURED]
    known = bytes(ByteText().split("train").text)
    return {
        "the model": float(surprisal(model, text).mean()),
        "n-grams of 6 bytes": float(NGram(known, 6).bits(text)[1:].mean()),
        "xz after the training text": xz_bits(text, known),
        "xz": xz_bits(text),
        "trigrams of bytes": float(NGram(known, 3).bits(text)[1:].mean()),
    }


def _recorded(name: str) -> dict[str, float]:
    """Bits per byte of the test text, as the card of shipped weights has them; empty for other weights."""
    weights = all_weights().get(name)
    if weights is None:
        return {}
    scores: Mapping[str, Mapping[str, Any]] = {"the model": weights.card["scores"]["test"]}
    scores = {**scores, **weights.card.get("baselines", {})}
    return {label: float(of["bits_per_byte"]) for label, of in scores.items() if "bits_per_byte" in of}


def _show_scores(scores: Mapping[str, float], options: argparse.Namespace, text: bytes | None) -> None:
    from rich.console import Console
    from rich.table import Table

    if not scores:
        return
    if text is None:
        title = "bits per byte of the test text, as recorded"
    else:
        title = f"bits per byte of {options.text}"
        title += f", its first {MEASURED:,} bytes" if len(text) > MEASURED else ""
    table = Table(title=title, title_justify="left")
    table.add_column("by")
    table.add_column("bits per byte", justify="right")
    for label, bits in sorted(scores.items(), key=lambda item: item[1]):
        table.add_row(options.model if label == "the model" else label, f"{bits:.3f}")
    Console().print(table)


def characters(text: bytes, bits: Sequence[float]) -> list[tuple[str, float]]:
    """Characters of a text and their surprisals: the sum over the bytes of each.

    Args:
        text: UTF-8; what is not becomes the replacement character.
        bits: of each byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pairs: list[tuple[str, float]] = []
    pending = 0.0
    for i, surprise in enumerate(bits):
        pending += surprise
        if decoded := printable(decoder.decode(text[i : i + 1], final=i == len(text) - 1)):
            pairs += [(character, pending / len(decoded)) for character in decoded]
            pending = 0.0
    return pairs


def _line_start(text: bytes, position: int) -> int:
    """The beginning of the first line that begins at `position` or after it and is not empty; else `position`."""
    position = max(position, 0)
    end = text.find(b"\n", position - 1) if position else -1
    rest = text[end:].lstrip(b"\n") if end >= 0 else b""
    return len(text) - len(rest) if rest else position


def _draw(model: SequenceModel, continuation: Continuation, text: bytes | None, options: argparse.Namespace) -> bool:
    """Draw the figure; without matplotlib say what is missing, since the text is there all the same."""
    if importlib.util.find_spec("matplotlib") is None:
        print("the figure needs matplotlib: pip install 'sinuous[train]'")
        return False
    from sinuous.core.language.drawing import Panel, draw_surprisal

    written = continuation.prompt + continuation.text
    prompt = len(continuation.prompt.decode(errors="replace"))
    of = "Persuasion, which it was not trained on" if text is None else str(options.text)
    span = bytes(ByteText().split("test").text) if text is None else text
    span = span[: WINDOW + 1]
    begin = _line_start(span, len(span) - PASSAGE)
    panels = []
    for title, whole, first, marked in (
        ("the prompt (underlined) and what the model wrote", written, 0, prompt),
        (f"a passage that it only read, from {of}", span, begin, 0),
    ):
        bits = [math.nan, *surprisal(model, whole).tolist()][first:]
        mean = float(torch.tensor(bits).nanmean())
        panels.append(Panel(f"{title}: {mean:.2f} bits per byte", characters(whole[first:], bits), marked))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    draw_surprisal(panels, f"{options.model}: surprisal of each character after those before it", options.figure)
    return True
