"""Make audio/samples: pieces of hold music, and notes of a sound font, small enough to come with the package.

    apt-get download asterisk-moh-opsound-wav fluid-soundfont-gm       # then dpkg -x each into FOLDER
    python tools/audio_samples.py FOLDER
    python tools/audio_samples.py FOLDER --notes NOTES --pitches 36:96:4 --velocities 40,80 --seconds 1 --ending flac

The second command renders more notes than come with the package into a folder of yours, for data.root=NOTES. Notes need
the program fluidsynth (Debian's fluidsynth 2.3.1) on PATH. Equal input and versions give equal files.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from sinuous.audio.datasets.files import sound_files
from sinuous.audio.datasets.hold_music import BLOCK, PERIOD, RATE
from sinuous.audio.datasets.notes import COLUMNS, FAMILIES, LIST, PER_FAMILY, Note
from sinuous.audio.io import read_audio, write_audio

TARGET = Path(__file__).parents[1] / "audio" / "samples"
PIECES = {"macroform-cold_day": 0, "macroform-the_simplicity": 0}
"""Tracks of which a piece of 16 blocks is taken, and its first block."""
TICKS, SLOT, HELD = 480, 3, 0.8
"""MIDI's ticks of a second, seconds from one note to the next, and the share of a clip that the key is down."""
RENDERING = 32000
SILENT = 0.01
"""Peak below which an instrument has no sound at a pitch, and the note is left out."""
SMALLEST = {"opus": 0.95, "ogg": 1.0}
"""Compression of lossy files, from 0 to 1: 19,000 bits a second of Opus."""


def hold_music(source: Path, target: Path) -> None:
    """Write a piece of each of `PIECES`."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sound_files(source):
        if file.stem in PIECES:
            start = PIECES[file.stem] * BLOCK / RATE
            wave, rate = read_audio(file, start=start, seconds=PERIOD * BLOCK / RATE)
            write_audio(target / f"{file.stem}.flac", wave, rate)


def variable_length(number: int) -> bytes:
    """A number as MIDI writes times: seven bits a byte, high ones first."""
    parts = [number & 127]
    while number := number >> 7:
        parts.append(number & 127 | 128)
    return bytes(reversed(parts))


def midi(notes: Sequence[tuple[int, int, int]], seconds: float) -> bytes:
    """A MIDI file that plays notes (program, pitch, velocity), one each `SLOT` seconds."""
    held = round(HELD * seconds * TICKS)
    events = b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big")  # microseconds of a quarter note: a second
    rest = 0
    for program, pitch, velocity in notes:
        events += variable_length(rest) + bytes([0xC0, program, 0, 0x90, pitch, velocity])
        events += variable_length(held) + bytes([0x80, pitch, 0])
        rest = SLOT * TICKS - held
    events += variable_length(rest) + b"\xff\x2f\x00"
    head = b"MThd" + (6).to_bytes(4, "big") + b"".join(n.to_bytes(2, "big") for n in (0, 1, TICKS))
    return head + b"MTrk" + len(events).to_bytes(4, "big") + events


def render(font: Path, notes: Sequence[tuple[int, int, int]], seconds: float, rate: int) -> list[Tensor]:
    """Clips `[T]` of notes (program, pitch, velocity), without reverberation."""
    with tempfile.TemporaryDirectory() as folder:
        score, sound = Path(folder, "notes.mid"), Path(folder, "notes.wav")
        score.write_bytes(midi(notes, seconds))
        dry = ["-R", "0", "-C", "0", "-r", str(RENDERING), "-g", "1.5", "-o", "synth.dynamic-sample-loading=1"]
        subprocess.run(["fluidsynth", "-niq", *dry, "-F", sound, font, score], check=True, capture_output=True)
        return [
            read_audio(sound, sample_rate=rate, mono=True, start=number * SLOT, seconds=seconds)[0][0]
            for number in range(len(notes))
        ]


def write(path: Path, wave: Tensor, rate: int) -> None:
    """Write a wave `[T]`, small where the format is lossy."""
    ending = path.suffix[1:]
    if ending not in SMALLEST:
        write_audio(path, wave, rate)
        return
    subtype = "OPUS" if ending == "opus" else "VORBIS"
    options = {"format": "OGG", "subtype": subtype, "compression_level": SMALLEST[ending]}
    with soundfile.SoundFile(path, "w", rate, 1, **options) as file:
        for block in wave.split(rate):
            file.write(block.numpy())


def write_notes(
    font: Path,
    target: Path,
    pitches: Sequence[int],
    velocities: Sequence[int],
    seconds: float,
    rate: int,
    ending: str,
) -> None:
    """Write a file for each family, with the notes of its instruments in a row, and their list."""
    target.mkdir(parents=True, exist_ok=True)
    fade = torch.linspace(1, 0, round(0.02 * rate))
    rows: list[Note] = []
    for number, family in enumerate(FAMILIES):
        name = f"{family.replace(' ', '_')}.{ending}"
        programs = range(number * PER_FAMILY, (number + 1) * PER_FAMILY)
        notes = list(itertools.product(programs, pitches, velocities))
        clips = render(font, notes, seconds, rate)
        for place, (note, clip) in enumerate(zip(notes, clips, strict=True)):
            clip[-len(fade) :] *= fade
            if float(clip.abs().max()) > SILENT:
                rows.append(Note(name, place * seconds, seconds, *note))
        write(target / name, torch.cat(clips), rate)
    with (target / LIST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((n.file, f"{n.start:g}", f"{n.seconds:g}", n.program, n.pitch, n.velocity) for n in rows)


def numbers(text: str) -> list[int]:
    """Whole numbers from `1,2,3`, or from `first:last:step`."""
    if ":" in text:
        return list(range(*map(int, text.split(":"))))
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the unpacked packages")
    parser.add_argument("--notes", type=Path, help="render notes into this folder, and nothing else")
    parser.add_argument("--pitches", type=numbers, default=[45, 52, 59, 66, 73], help="MIDI's half tones")
    parser.add_argument("--velocities", type=numbers, default=[90], help="up to 127")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a note")
    parser.add_argument("--rate", type=int, default=16000, help="samples per second")
    parser.add_argument("--ending", default="opus", help="of the files' names")
    options = parser.parse_args()
    (font,) = options.folder.rglob("FluidR3_GM.sf2")
    if options.notes is None:
        (moh,) = options.folder.rglob("moh")
        hold_music(moh, TARGET / "hold_music")
    write_notes(
        font,
        options.notes or TARGET / "notes",
        options.pitches,
        options.velocities,
        options.seconds,
        options.rate,
        options.ending,
    )


if __name__ == "__main__":
    main()
