"""Floors that models of sound must beat, computed from the same data as models read.

    python tools/audio_floors.py [--music FOLDER] [--voices FOLDER]     # folders with the unpacked packages

Hold music, bits a sample, codes of µ-law: a table of codes; one of codes by the code before; one by a linear prediction
of order 32 from the codes' levels, which are all that a model sees, fitted to the training blocks by least squares and
rounded to a code. Tables start every count at 0.02; each block is scored from its own start, silence before it.

Voices and notes, accuracy: a linear classifier of the mean and the deviation over time of 40 mel bands in decibels.

Without folders the bundled pieces and notes are read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sinuous.audio.codecs import Codec
from sinuous.audio.datasets import HoldMusic, Notes, Voices
from sinuous.core.extras import package

ORDER, BANDS = 32, 40
START = 0.02
"""Of every count: the tables have 65,536 of them."""
SPLITS = ("train", "val", "test")
CODES = NDArray[np.int64]


def before(codes: CODES, silence: int) -> CODES:
    """The code before each."""
    return np.concatenate(([silence], codes[:-1]))


def lagged(wave: NDArray[np.float64]) -> NDArray[np.float64]:
    """The `ORDER` samples before each, `[T, ORDER]`, silence before the first."""
    padded = np.concatenate((np.zeros(ORDER), wave[:-1]))
    return np.lib.stride_tricks.sliding_window_view(padded, ORDER)


def predictor(waves: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Weights of the least-squares prediction of a sample from the `ORDER` before it."""
    square, product = np.zeros((ORDER, ORDER)), np.zeros(ORDER)
    for wave in waves:
        rows = lagged(wave)
        square += rows.T @ rows
        product += rows.T @ wave
    return np.linalg.solve(square + 1e-9 * np.eye(ORDER), product)


def table(contexts: list[CODES], codes: list[CODES], kinds: int, vocab_size: int) -> NDArray[np.float64]:
    """Bits of each code behind each context, `[kinds, vocab_size]`."""
    counts = np.full((kinds, vocab_size), START)
    for context, code in zip(contexts, codes, strict=True):
        counts += np.bincount(context * vocab_size + code, minlength=counts.size).reshape(counts.shape)
    return np.log2(counts.sum(1, keepdims=True)) - np.log2(counts)


def music(data: HoldMusic) -> None:
    """Print the floors of hold music."""
    codec: Codec = data.codec
    codes = {split: [codec.encode(wave).numpy() for wave in data.waves(split)] for split in SPLITS}
    levels = {split: [codec.decode(torch.from_numpy(c)).double().numpy() for c in codes[split]] for split in SPLITS}
    weights = predictor(levels["train"])

    def predicted(wave: NDArray[np.float64]) -> CODES:
        guess = torch.from_numpy(lagged(wave) @ weights).float().clamp(-1, 1)
        return codec.encode(guess).numpy()

    contexts: dict[str, dict[str, list[CODES]]] = {
        "unigram": {split: [np.zeros_like(c) for c in codes[split]] for split in SPLITS},
        "bigram": {split: [before(c, codec.silence) for c in codes[split]] for split in SPLITS},
        f"table on linear prediction of order {ORDER}": {s: [predicted(wave) for wave in levels[s]] for s in SPLITS},
    }
    seconds = ", ".join(f"{split} {sum(map(len, codes[split])) / data.sample_rate:.1f} s" for split in SPLITS)
    print(f"hold music, {codec.name}: {seconds}")
    for name, context in contexts.items():
        bits = table(context["train"], codes["train"], codec.vocab_size, codec.vocab_size)
        scores = {
            split: np.concatenate([bits[c, k] for c, k in zip(context[split], codes[split], strict=True)]).mean()
            for split in ("val", "test")
        }
        print(f"  {name}: test {scores['test']:.3f} bits a sample, val {scores['val']:.3f}")


def features(clips: Any, mel: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation over time of mel bands in decibels, `[N, 2 BANDS]`, and the classes."""
    rows, labels = [], []
    for wave, label in clips:
        bands = 10 * torch.log10(mel(wave[0]) + 1e-10)
        rows.append(torch.cat([bands.mean(1), bands.std(1, correction=0)]))
        labels.append(label)
    return torch.stack(rows), torch.tensor(labels)


def linear(noun: str, data: Any, decay: float = 1e-3) -> None:
    """Print the accuracy of logistic regression on the features."""
    window = round(0.025 * data.sample_rate)
    mel = package("torchaudio.transforms", "audio").MelSpectrogram(
        data.sample_rate, n_fft=512 if data.sample_rate > 8000 else 256, win_length=window,
        hop_length=round(0.010 * data.sample_rate), n_mels=BANDS,
    )  # fmt: skip
    sets = {split: features(data.split(split), mel) for split in SPLITS}
    mean, deviation = sets["train"][0].mean(0), sets["train"][0].std(0) + 1e-6
    model = torch.nn.Linear(2 * BANDS, data.num_classes)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    inputs, labels = sets["train"]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model((inputs - mean) / deviation), labels) + decay * model.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scores = {}
    for split in ("val", "test"):
        inputs_, labels_ = sets[split]
        scores[split] = float((model((inputs_ - mean) / deviation).argmax(1) == labels_).float().mean())
    often = float(sets["test"][1].bincount().max() / len(sets["test"][1]))
    sizes = ", ".join(f"{split} {len(sets[split][1]):,}" for split in SPLITS)
    print(f"{noun}: {sizes}; most frequent class of test {often:.3f}")
    print(f"  log-mel linear: test accuracy {scores['test']:.3f}, val {scores['val']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--music", type=Path, help="the folder with the unpacked asterisk-moh-opsound-wav")
    parser.add_argument("--voices", type=Path, help="the folder with the unpacked asterisk-core-sounds-*-wav")
    options = parser.parse_args()
    music(HoldMusic(root=options.music))
    linear("notes", Notes(augment=False))
    if options.voices is not None:
        linear("voices", Voices(options.voices, augment=False))


if __name__ == "__main__":
    main()
