"""Scene cuts from features of frames: SceneTiling, of a whole film or as its frames come.

    c_i = cos(f_i, f_{i+1});   d_i = (l_i + r_i - 2 c_i) / 2;   cut where d_i > mean(d) + α std(d)

l_i and r_i are the peaks of similarity nearest to the left and right of i, reached while similarity rises. As frames
come, only the left side is known: d_i = (l_i - c_i) / 2, against the mean and deviation so far.

Source: VideoLLaMB (arXiv 2409.01071), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.checks import check_range, described

LEAST_DEPTH = 1e-6
"""Depths below this are rounding of equal features."""


def scene_cuts(features: Tensor, alpha: float = 1.0) -> list[int]:
    """The first frame of every scene but the first.

    Args:
        features: one row for each frame, `[T, D]`, such as a class token.
        alpha: deviations above the mean depth from which a valley is a cut.

    Raises:
        ValueError: if `features` is no such matrix, or has values that are not finite.
    """
    _check(features, 2)
    check_range(-math.inf, math.inf, alpha=alpha)
    if len(features) < 3:
        return []
    c = F.cosine_similarity(features[:-1].double(), features[1:].double(), dim=-1).tolist()
    left, right = _rising(c), _rising(c[::-1])[::-1]
    sides = zip(left, c, right, strict=True)
    depths = torch.tensor([(before + after - 2 * own) / 2 for before, own, after in sides], dtype=torch.float64)
    threshold = max(LEAST_DEPTH, float(depths.mean() + alpha * depths.std(correction=0)))
    return [i + 1 for i, depth in enumerate(depths.tolist()) if depth > threshold]


def stream_scene_cuts(features: Iterable[Tensor], alpha: float = 1.0) -> Iterator[int]:
    """The first frame of every scene but the first, as soon as it has come; the past alone decides.

    Args:
        features: of one frame after another, `[D]` each.
        alpha: as in `scene_cuts`.

    Raises:
        ValueError: if a feature is no vector, or not finite.
    """
    check_range(-math.inf, math.inf, alpha=alpha)
    before: Tensor | None = None
    previous = peak = -1.0
    count, total, squares = 0, 0.0, 0.0
    for number, feature in enumerate(features):
        _check(feature, 1)
        if before is not None:
            own = float(F.cosine_similarity(before.double(), feature.double(), dim=0))
            peak = peak if previous >= own else own
            depth, previous = (peak - own) / 2, own
            count, total, squares = count + 1, total + depth, squares + depth * depth
            mean = total / count
            deviation = math.sqrt(max(0.0, squares / count - mean * mean))
            if depth > max(LEAST_DEPTH, mean + alpha * deviation):
                yield number
        before = feature


def _rising(similarity: list[float]) -> list[float]:
    """For each place, the peak that is reached by walking to the left while similarity rises."""
    peaks: list[float] = []
    for place, own in enumerate(similarity):
        peaks.append(peaks[-1] if place and similarity[place - 1] >= own else own)
    return peaks


def _check(features: Tensor, axes: int) -> None:
    shape = "[T, D]" if axes == 2 else "[D]"
    if not isinstance(features, Tensor) or features.ndim != axes:
        raise ValueError(f"features must be a tensor {shape} (got {described(features)}); stack the rows of the frames")
    if not features.isfinite().all():
        raise ValueError("features must be finite (got NaN or infinity); look at the model that made them")
