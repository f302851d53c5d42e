"""A piece of music that goes on: `sinuous demo audio`."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.audio.demo_models import Sound, model_of, sound_of
from sinuous.audio.generation import score, stream
from sinuous.audio.io import AudioWriter, read_audio, resample
from sinuous.core.checks import check_positive, check_range, check_sizes
from sinuous.core.demo_parts import Tell, check_output, progress_bar
from sinuous.core.files import written_whole

MODEL = "sashimi_nano.hold_music"
OUT = Path("sinuous_audio.wav")
ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff")
CHUNK_SECONDS = 0.1
"""Of sound that are made between two looks at the keyboard."""


@dataclass
class Piece:
    """A piece while it is made.

    Attributes:
        sound: how its codes are heard.
        codes: of the prompt and of what came after it.
        bits: of all codes.
        prompt: how many codes the prompt has.
        recording: codes with which the recording itself goes on behind the prompt, as far as it does.
        recording_bits: of those.
        seconds: that the model took for the others.
        engine: what made them.
    """

    sound: Sound
    codes: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)
    prompt: int = 0
    recording: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    recording_bits: Tensor = field(default_factory=lambda: torch.zeros(0))
    seconds: float = 0.0
    engine: str = ""

    @property
    def wave(self) -> Tensor:
        return torch.cat([self.sound.codec.decode(codes) for codes in self.codes])

    @property
    def recorded(self) -> Tensor:
        """The recording as a wave, from the prompt on."""
        return self.sound.codec.decode(torch.cat([*self.codes[: self.prompt > 0], self.recording]))

    def per_sample(self, bits: Tensor) -> Tensor:
        """Bits of samples from those of codes."""
        return bits.view(-1, self.sound.codec.codes_per_sample).sum(1)


def run(options: argparse.Namespace) -> list[Path]:
    """Go on from a clip, and write the sound and its figure.

    Ctrl-C ends the piece where it is: both files are written, and KeyboardInterrupt is raised again.

    Returns:
        The files that were written.

    Raises:
        ValueError: for what cannot be read, made or written.
        FileNotFoundError: if there is no such clip.
        OSError: if the disk is full.
    """
    figure = _checked(options)
    model: Any = model_of(options.model, MODEL, options.seed)
    if not hasattr(model, "prefill") or not hasattr(model, "vocab_size"):
        raise ValueError(f"--model must be a model of codes (got {options.model}); give sashimi_nano")
    sound = sound_of(options.model or MODEL, model, options.codec, options.rate)
    piece = Piece(sound)
    prompt = sound.codec.encode(_heard(options, sound.rate, options.prompt_seconds))
    recording = _recording(options, sound, len(prompt))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    stopped: KeyboardInterrupt | None = None
    with AudioWriter(options.out, sound.rate) as writer:
        try:
            with progress_bar() as tell:
                for codes in _made(piece, model, prompt, options, tell):
                    writer.write(sound.codec.decode(codes))
        except KeyboardInterrupt as stop:
            stopped = stop
        if stopped is not None and not piece.codes:
            raise stopped
    piece.recording = recording[: sum(map(len, piece.codes)) - piece.prompt]
    piece.recording_bits = torch.full(piece.recording.shape, math.nan)
    if stopped is None and len(piece.recording):
        whole = torch.cat([prompt, piece.recording])
        try:
            piece.recording_bits = score(model, whole, silence=sound.codec.silence)[len(prompt) :]
        except KeyboardInterrupt as stop:
            stopped = stop
    written = [options.out, *_drawn(piece, options, figure)]
    _tell(piece)
    if stopped is not None:
        print(*written, sep="\n")
        raise stopped
    return written


def _checked(options: argparse.Namespace) -> Path:
    """Look at the options; returns the name of the figure."""
    check_range(0, math.inf, **{"--start": options.start, "--prompt-seconds": options.prompt_seconds})
    check_positive(**{"--seconds": options.seconds})
    if options.rate is not None:
        check_sizes(**{"--rate": options.rate})
    figure: Path = options.out.with_suffix(".png")
    check_output("--out", options.out, ENDINGS, [options.clip])
    check_output("the figure beside --out", figure, (".png",), [options.clip])
    return figure


def _heard(options: argparse.Namespace, rate: int, seconds: float) -> Tensor:
    """The clip's wave `[T]` from the prompt's beginning on, for so many seconds or as long as it lasts."""
    if options.prompt_seconds == 0:
        return torch.zeros(0)
    if options.clip is None:
        wave, own = bundled()
        wave = wave[int(options.start * own) :][: round(seconds * own)]
        if not len(wave):
            raise ValueError(f"--start must lie in the bundled clip (got {options.start}); give 0")
        return resample(wave, own, rate)
    wave, _ = read_audio(options.clip, sample_rate=rate, mono=True, start=options.start, seconds=seconds)
    return wave[0, : round(seconds * rate)]


def _recording(options: argparse.Namespace, sound: Sound, prompt: int) -> Tensor:
    """Codes with which the clip goes on behind the prompt, which was read alone and knows nothing of them."""
    try:
        wave = _heard(options, sound.rate, options.prompt_seconds + options.seconds)
    except ValueError:  # it is damaged behind the prompt, which was read
        wave = torch.zeros(0)
    return sound.codec.encode(wave)[prompt:]


def bundled() -> tuple[Tensor, int]:
    """Four seconds of hold music, `[T]`, that are in no training, and their samples per second."""
    from sinuous.audio.datasets import HoldMusic
    from sinuous.audio.datasets.hold_music import RATE

    return HoldMusic().waves("test")[0], RATE


def _made(piece: Piece, model: Any, prompt: Tensor, options: argparse.Namespace, tell: Tell) -> Iterator[Tensor]:
    """Codes of the prompt, and those that the model makes, part by part; each is in the piece first."""
    codec, rate = piece.sound
    total = max(1, round(options.seconds * rate)) * codec.codes_per_sample
    parts = stream(
        model,
        total,
        chunk=max(1, round(CHUNK_SECONDS * rate)) * codec.codes_per_sample,
        prompt=prompt,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        silence=codec.silence,
    )
    if len(prompt):
        piece.prompt = len(prompt)
        piece.codes.append(prompt)
        piece.bits.append(torch.full(prompt.shape, math.nan))
        yield prompt
        piece.bits[0] = score(model, prompt, silence=codec.silence)
    done = 0
    for part in parts:
        piece.codes.append(part.codes[0])
        piece.bits.append(part.bits[0])
        piece.seconds += part.codes.numel() / part.samples_per_second
        piece.engine, done = part.engine, done + part.codes.shape[1]
        yield part.codes[0]
        tell("making", done, total)


def _drawn(piece: Piece, options: argparse.Namespace, path: Path) -> list[Path]:
    """Draw the figure; without matplotlib say what is missing, since the sound is there all the same."""
    if importlib.util.find_spec("matplotlib") is None:
        print("the figure needs matplotlib: pip install 'sinuous[train]'")
        return []
    from sinuous.audio.drawing import draw_continuation

    codec, rate = piece.sound
    source = "silence" if not piece.prompt else "a bundled clip" if options.clip is None else options.clip.name
    title = f"{options.model or MODEL} goes on from {source}, temperature {options.temperature:g}, seed {options.seed}"
    with written_whole(path) as unfinished:
        prompt = piece.prompt // codec.codes_per_sample
        bits = piece.per_sample(torch.cat(piece.bits))
        recorded = piece.per_sample(torch.cat([*piece.bits[: piece.prompt > 0], piece.recording_bits]))
        recording = (piece.recorded, recorded) if len(piece.recording) else None
        draw_continuation(piece.wave, rate, prompt, bits, title, unfinished, recording)
    return [path]


def _tell(piece: Piece) -> None:
    """Print what prompt and continuation cost the model, and how fast it was."""
    codec, rate = piece.sound
    prompt = piece.prompt // codec.codes_per_sample
    bits = piece.per_sample(torch.cat(piece.bits))
    if prompt:
        heard = f"{float(bits[:prompt].mean()):.3f} bits a sample"
        print(f"prompt: {prompt / rate:.1f} s, {heard if not bits[:prompt].isnan().any() else 'not scored'}")
    made = len(bits) - prompt
    if made:
        speed = made / max(piece.seconds, 1e-9)
        print(
            f"made: {made / rate:.1f} s, {float(bits[prompt:].mean()):.3f} bits a sample ({codec.name}), "
            f"{speed / rate:.2f} × real time by engine {piece.engine} ({speed:,.0f} samples/s)"
        )
    real = piece.per_sample(piece.recording_bits)
    if len(real) and not real.isnan().any():
        print(f"the recording goes on: {len(real) / rate:.1f} s, {float(real.mean()):.3f} bits a sample")
