"""Data of sounds: bundled samples, or the field's files in a folder.

Each of these gives one split: `hold_music("train", length=8192)`. The classes give all three and are what
configurations name: `HoldMusic(length=8192).split("train")`.
"""

from __future__ import annotations

from sinuous.audio.datasets.changes import WaveChanges
from sinuous.audio.datasets.files import SAMPLES
from sinuous.audio.datasets.folders import AudioFolder, Music, audio_folder, music
from sinuous.audio.datasets.hold_music import HoldMusic, hold_music
from sinuous.audio.datasets.notes import FAMILIES, Notes, notes
from sinuous.audio.datasets.speech_commands import DIGITS, WORDS, SpeechCommands, speech_commands
from sinuous.audio.datasets.voices import LANGUAGES, Voices, voices
from sinuous.audio.datasets.waves import WaveWindows

__all__ = [
    "DIGITS",
    "FAMILIES",
    "LANGUAGES",
    "SAMPLES",
    "WORDS",
    "AudioFolder",
    "HoldMusic",
    "Music",
    "Notes",
    "SpeechCommands",
    "Voices",
    "WaveChanges",
    "WaveWindows",
    "audio_folder",
    "hold_music",
    "music",
    "notes",
    "speech_commands",
    "voices",
]
