r"""Scores of generated pictures of clothing, by the features and the judgement of one of our classifiers.

    fd = |m - m'|² + tr(S + S' - 2 (S S')^½)          of the means m and covariances S of made and real features
    kid                                               squared MMD of the kernel (f·f'/d + 1)³, unbiased
    precision, recall                                 shares of made features among the real ones, and of real ones
                                                      among the made, where a set reaches as far round each of its
                                                      points as that point's third neighbour
    accuracy                                          share of pictures that the judge takes for their class

The Fréchet distance lies in the features of our classifier, 64 of them in Vim's smallest. It is no FID, which is
defined by one network of others, and its values do not compare with published FIDs; they compare with each other, for
the same judge and about as many pictures.

Sources: Heusel et al. (arXiv 1706.08500) for the distance; Bińkowski et al. (1801.01401) for the kernel; Kynkäänniemi
et al. (1904.06991) for precision and recall.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import sinuous
from sinuous.core.checks import described
from sinuous.core.modes import evaluating

JUDGE = "vim_nano.fashion_mnist"
NEIGHBOURS = 3
BATCH = 250
SUBSETS = 10
SUBSET = 1000
"""Pictures of each of the `SUBSETS` random parts over which torchmetrics averages the kernel's distance."""


@torch.no_grad()
def score(images: Tensor, labels: Tensor, *, real: Tensor, judge: str | nn.Module = JUDGE) -> dict[str, float]:
    """Compare made pictures with real ones; the same values every time.

    Args:
        images: made pictures `[N, C, 28, 28]` from -1 to 1, or of 32 pixels, whose edge of 2 is cut off.
        labels: the classes that they were made for, `[N]`.
        real: real pictures of either size, `[M, C, h, w]` from -1 to 1.
        judge: name of a classifier with weights that ship, or a model with timm's `forward_features`, `forward_head`
            and `pretrained_cfg`, whose mean and std it is shown the pictures by.

    Returns:
        `fd`, `kid`, `precision`, `recall` and `accuracy`.

    Raises:
        ValueError: if there are fewer pictures than features, on either side, or a shape or value is another.
    """
    model: Any = sinuous.create_model(judge, pretrained=True) if isinstance(judge, str) else judge
    _check("images", images, model)
    _check("real", real, model)
    if labels.shape != (len(images),):
        raise ValueError(f"labels must be one for each of the {len(images)} pictures (got {described(labels)})")
    with evaluating(model):
        made, logits = _judged(images, model)
        known, _ = _judged(real, model)
    features = made.shape[1]
    for name, count in (("images", len(made)), ("real", len(known))):
        if count < features:
            raise ValueError(
                f"{name} must be at least as many as the judge has features, {features}, for a covariance of full rank "
                f"(got {count}); make more pictures"
            )
    return {
        "fd": _of_metric(FrechetInceptionDistance(feature=_Features(features)), made, known),
        "kid": _kid(made, known),
        "precision": _share_within(made, known),
        "recall": _share_within(known, made),
        "accuracy": float((logits.argmax(-1) == labels.to(logits.device)).double().mean()),
    }


class _Features(nn.Identity):
    """Hands features to torchmetrics, which would compute them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _of_metric(metric: Any, made: Tensor, known: Tensor) -> float:
    metric.update(known, real=True)
    metric.update(made, real=False)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def _kid(made: Tensor, known: Tensor) -> float:
    size = min(len(made), len(known), SUBSET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept, which they are here anyway
        metric = KernelInceptionDistance(feature=_Features(made.shape[1]), subsets=SUBSETS, subset_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _of_metric(metric, made, known)


def _check(name: str, images: Tensor, model: Any) -> None:
    cfg = model.pretrained_cfg
    channels, side = cfg["input_size"][0], cfg["input_size"][-1]
    shapes = [(channels, side, side), (channels, side + 4, side + 4)]
    if images.ndim != 4 or tuple(images.shape[1:]) not in shapes:
        raise ValueError(
            f"{name} must have shape [N, {channels}, {side}, {side}], or {side + 4} pixels a side (got "
            f"{list(images.shape)})"
        )
    if not images.isfinite().all() or (images.numel() and images.abs().max() > 1.001):
        raise ValueError(
            f"{name} must lie between -1 and 1 (got {float(images.min()):g} to {float(images.max()):g}); pictures from "
            "0 to 1 are brought there by 2 x - 1"
        )


def _judged(images: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    """Features `[N, F]` and logits `[N, K]`."""
    cfg = model.pretrained_cfg
    side, device = cfg["input_size"][-1], next(model.parameters()).device
    edge = (images.shape[-1] - side) // 2
    mean, std = (torch.tensor(cfg[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
    features, logits = [], []
    for batch in images.split(BATCH):
        x = batch[..., edge : edge + side, edge : edge + side].float().to(device)
        tokens = model.forward_features((x / 2 + 0.5 - mean) / std)
        features.append(model.forward_head(tokens, pre_logits=True))
        logits.append(model.forward_head(tokens))
    return torch.cat(features), torch.cat(logits)


def _share_within(points: Tensor, reached: Tensor) -> float:
    """Share of `points` that lie no farther from some point of `reached` than its third neighbour there."""
    reached = reached.double()
    # The nearest of all is the point itself.
    radii = torch.cat(
        [torch.cdist(part, reached).topk(NEIGHBOURS + 1, largest=False)[0] for part in reached.split(BATCH)]
    )
    near = [(torch.cdist(part, reached) <= radii[:, -1]).any(1).double() for part in points.double().split(BATCH)]
    return float(torch.cat(near).mean())
