"""Files of sound: reading, writing and another sampling rate. Waves are float32 with channels first, `[C, T]`.

    wave, rate = read_audio("song.flac", sample_rate=8000, mono=True)
    write_audio("song.wav", wave, rate)

WAV, FLAC, Ogg (Vorbis and Opus), MP3 and AIFF are read and written by soundfile (libsndfile), of the extra `audio`.
What is wrong with a file is said in a sentence with its name.
"""

from __future__ import annotations

from sinuous.audio.io_reading import AudioInfo, audio_info, read_audio
from sinuous.audio.io_writing import AudioWriter, write_audio
from sinuous.audio.resampling import resample

__all__ = ["AudioInfo", "AudioWriter", "audio_info", "read_audio", "resample", "write_audio"]
