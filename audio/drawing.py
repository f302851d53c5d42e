"""Figures of sound: a wave, its spectrogram, and what each sample costs a model."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

_INK, _FAINT, _LINE, _MARK, _WAVE = "#1c1c1e", "#8e8e93", "#d1d1d6", "#b5482a", "#1f5f8b"

WINDOW = 0.032
"""Seconds of the windows of a spectrogram."""
COLUMNS = 1600
"""Places along the axis of time, at most: what is denser is drawn as its mean or its extremes."""
RANGE = 80.0
"""Decibels below the loudest that are told from silence."""

Numbers = NDArray[np.float32]


def spectrogram(wave: Tensor, rate: int, loudest: float | None = None) -> Numbers:
    """Power in decibels below the loudest, at most `RANGE`, of a wave `[T]`: `[frequencies, columns]`.

    The loudest is the wave's own, or a power from `loudest_of`. Frequencies are evenly spaced from 0 to half the rate.
    Windows are of `WINDOW` seconds, eight of them in the time of one, and more often than `COLUMNS` their powers are
    averaged.
    """
    power = _power(wave, rate)
    most = max(float(power.max()) if loudest is None else loudest, 1e-10)
    decibels: Numbers = (10 * (power / most).clamp(10 ** (-RANGE / 10), 1).log10()).numpy()
    return decibels


def loudest_of(*waves: Tensor, rate: int) -> float:
    """The most power in the spectrograms of several waves, for one scale of all."""
    return max(float(_power(wave, rate).max()) for wave in waves)


def _power(wave: Tensor, rate: int) -> Tensor:
    size = max(16, 2 ** round(np.log2(max(WINDOW * rate, 1))))
    hop = max(size // 8, 1)
    together = max(1, -(-(len(wave) // hop + 1) // COLUMNS))
    window = torch.hann_window(size)
    padded = F.pad(wave.float(), (size // 2, size // 2))
    columns = []
    block = 512 * together * hop  # in parts, for sounds of any length
    for start in range(0, max(len(wave), 1), block):
        part = padded[start : start + block - hop + size]
        power = torch.stft(part, size, hop, window=window, center=False, return_complex=True).abs().square()
        power = F.pad(power, (0, -power.shape[1] % together), mode="replicate")
        columns.append(power.unflatten(1, (-1, together)).mean(2))
    return torch.cat(columns, 1)


def draw_continuation(
    wave: Tensor,
    rate: int,
    prompt: int,
    bits: Tensor,
    title: str,
    path: str | os.PathLike[str],
    recording: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Draw a sound that a model went on with, its spectrogram and its bits, into an image file.

    Args:
        wave: `[T]`, the prompt and what the model made.
        rate: samples per second.
        prompt: samples of the prompt, whose end is marked.
        bits: that each sample cost the model, `[T]`.
        title: printed above.
        path: of the image.
        recording: wave and bits of the prompt and what followed it in truth, at most T samples; its spectrogram is
            drawn below the model's, in the same scale.
    """
    seconds = len(wave) / rate
    sounds = {"prompt, then the model": wave} | ({"prompt, then the recording": recording[0]} if recording else {})
    loudest = loudest_of(*sounds.values(), rate=rate)
    figure = Figure(figsize=(11, 3.4 + 2.4 * len(sounds)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle("What comes next?", x=0.012, ha="left", fontsize=14, weight="bold", color=_INK)
    heights = [1, *[3] * len(sounds), 1.2]
    axes: Any = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_wave(axes[0], wave, seconds)
    axes[0].set_title(title, loc="left", fontsize=9, color=_FAINT)
    spectra = axes[1:-1]
    for axis, (name, sound) in zip(spectra, sounds.items(), strict=True):
        shown = _draw_spectrogram(axis, sound, rate, loudest, name if recording else "")
    bar = figure.colorbar(shown, ax=axes, pad=0.01, aspect=50, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_INK, length=0, labelsize=8)
    bar.set_label("dB below the loudest", fontsize=8, color=_INK)
    _draw_bits(axes[-1], bits, rate, prompt, None if recording is None else recording[1])
    axes[-1].set_xlabel("seconds", fontsize=8, color=_INK)
    for axis in axes:
        over = axis in spectra
        axis.axvline(prompt / rate, color="white" if over else _MARK, linewidth=1.2, linestyle=(0, (4, 2)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_LINE)
        axis.tick_params(colors=_INK, length=0, labelsize=8)
    axes[0].set_xlim(0, seconds)
    _name_parts(axes[0], prompt / rate, seconds)
    figure.savefig(path, dpi=150)


def _draw_spectrogram(axis: Any, wave: Tensor, rate: int, loudest: float, name: str) -> Any:
    axis.set_facecolor("#f2f2f7")  # behind the end of a recording
    shown = axis.imshow(
        spectrogram(wave, rate, loudest),
        origin="lower",
        aspect="auto",
        extent=(0, len(wave) / rate, 0, rate / 2000),
        cmap="magma",
        vmin=-RANGE,
        vmax=0,
        interpolation="nearest",
    )
    axis.set_ylabel("kHz", fontsize=8, color=_INK)
    axis.text(0.006, 0.95, name, fontsize=8, color="white", va="top", transform=axis.transAxes)
    return shown


def _name_parts(axis: Any, end: float, seconds: float) -> None:
    style: dict[str, Any] = {"fontsize": 8, "color": _MARK, "va": "top", "transform": axis.get_xaxis_transform()}
    gap = 0.004 * seconds
    if end > 0.08 * seconds:
        axis.text(end - gap, 0.98, "prompt", ha="right", **style)
    if end < 0.85 * seconds:
        axis.text(end + gap, 0.98, "made by the model", ha="left", **style)


def _draw_wave(axis: Any, wave: Tensor, seconds: float) -> None:
    low, high = _extremes(wave)
    times = np.linspace(0, seconds, len(low))
    axis.fill_between(times, low, high, color=_WAVE, linewidth=0.4, step="mid")
    most = float(wave.abs().max()) if len(wave) else 0.0
    axis.set(ylim=(-1.25 * max(most, 1e-3), 1.5 * max(most, 1e-3)), xlim=(0, seconds))
    axis.set_yticks([])


def _extremes(wave: Tensor) -> tuple[Numbers, Numbers]:
    """Lowest and highest samples of at most `COLUMNS` places."""
    width = max(1, -(-len(wave) // COLUMNS))
    rows = F.pad(wave.float()[None], (0, -len(wave) % width), mode="replicate")[0].unflatten(0, (-1, width))
    return rows.amin(1).numpy(), rows.amax(1).numpy()


def _draw_bits(axis: Any, bits: Tensor, rate: int, prompt: int, recording: Tensor | None) -> None:
    width = max(1, -(-len(bits) // 400))
    lines = [(bits, 0, _INK, "the model's own samples")]
    if recording is not None:
        lines.append((recording[prompt:], prompt, _MARK, "those of the recording"))
    most = 1.0
    for values, start, color, name in lines:
        means = F.avg_pool1d(values.float()[None], width, ceil_mode=True)[0].numpy()
        edges = start + np.minimum(np.arange(len(means) + 1) * width, len(values))
        axis.stairs(means, edges / rate, baseline=None, color=color, lw=1, label=name)
        most = max(most, float(np.nan_to_num(means).max(initial=0)))
    if recording is not None:
        axis.legend(loc="upper right", ncols=2, fontsize=7, frameon=False, labelcolor=_INK)
    axis.set_ylim(0, 1.35 * most if recording is not None else max(1.1 * most, 1.0))
    axis.set_ylabel("bits a sample", fontsize=8, color=_INK)
