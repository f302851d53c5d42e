"""Scores of made pictures: closed forms and brute force with a judge of known features, and the judge that ships."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics")

from sinuous.vision.datasets import fashion_mnist
from sinuous.vision.generation.scores import score

FEATURES = 4


class Judge(nn.Module):
    """The first pixels are the features, the largest of them is the class."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)}
        self.unused = nn.Parameter(torch.zeros(()))

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else 3 * features


def pictures(count: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)


def scored(made: Tensor, real: Tensor, **options: Any) -> dict[str, float]:
    labels = options.pop("labels", torch.zeros(len(made), dtype=torch.long))
    return score(made, labels, real=real, judge=options.pop("judge", Judge()))


def test_moved_pictures_are_as_far_as_they_were_moved() -> None:
    real = pictures(300)
    values = scored(real + 0.25, real)
    assert values["fd"] == pytest.approx(FEATURES * 0.25**2, abs=1e-4)
    assert scored(real, real)["fd"] == pytest.approx(0, abs=1e-4)


def test_a_wider_spread_has_the_distance_of_its_deviations() -> None:
    real = pictures(300)
    centred = real - real.mean(0)
    covariance = torch.cov(centred.flatten(1).double().T)
    wanted = float((2 - 1) ** 2 * covariance.trace())  # of S and 4 S: tr(S + 4 S - 2 · 2 S)
    assert scored(2 * centred, centred)["fd"] == pytest.approx(wanted, rel=1e-3)


def test_the_kernels_distance_is_the_unbiased_one() -> None:
    made, real = pictures(40, 1) + 0.3, pictures(40, 2)
    a, b = made.flatten(1).double(), real.flatten(1).double()

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.T / FEATURES + 1) ** 3

    def within(points: Tensor) -> Tensor:
        return (kernel(points, points).sum() - kernel(points, points).trace()) / (40 * 39)

    wanted = within(a) + within(b) - 2 * kernel(a, b).mean()
    assert scored(made, real)["kid"] == pytest.approx(float(wanted), rel=1e-4)


def test_precision_and_recall_are_those_of_every_pair_looked_at() -> None:
    made, real = pictures(30, 1)[:, :, :, :] * 0.5 + 0.1, pictures(50, 2)

    def share(points: Tensor, reached: Tensor) -> float:
        inside = 0
        for point in points:
            for other in reached:
                radius = sorted(float((other - third).norm()) for third in reached)[3]
                if float((point - other).norm()) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    values = scored(made, real)
    flat_made, flat_real = made.flatten(1).double(), real.flatten(1).double()
    assert values["precision"] == pytest.approx(share(flat_made, flat_real))
    assert values["recall"] == pytest.approx(share(flat_real, flat_made))
    assert values["recall"] < values["precision"]
    far = scored(made.abs() - 1, real.abs())
    assert (far["precision"], far["recall"]) == (0, 0)


def test_accuracy_is_the_share_that_the_judge_takes_for_their_class() -> None:
    made = pictures(20)
    labels = made.flatten(1).argmax(1)
    labels[:5] = (labels[:5] + 1) % FEATURES
    assert scored(made, pictures(20, 1), labels=labels)["accuracy"] == 0.75


def test_padding_is_cut_off_and_the_same_values_come_again() -> None:
    made, real = pictures(30, 1), pictures(1100, 2)
    padded = nn.functional.pad(made, (2, 2, 2, 2), value=-1.0)
    state = torch.get_rng_state()
    assert scored(made, real) == scored(padded, real)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (pictures(3), {}, r"images must be at least as many as the judge has features, 4, .*\(got 3\); make more"),
        (pictures(9), {"real": pictures(2)}, "real must be at least as many"),
        (
            torch.zeros(9, 1, 3, 3),
            {},
            r"images must have shape \[N, 1, 2, 2\], or 6 pixels a side \(got \[9, 1, 3, 3\]\)",
        ),
        (torch.zeros(9, 3, 2, 2), {}, "images must have shape"),
        (5 * pictures(9), {}, "images must lie between -1 and 1"),
        (torch.full((9, 1, 2, 2), torch.nan), {}, "images must lie between -1 and 1"),
        (pictures(9), {"labels": torch.zeros(8)}, "one for each of the 9 pictures"),
        (pictures(9), {"judge": "vim_nano.fashion"}, "vim_nano"),
    ],
)
def test_what_cannot_be_scored_is_refused(made: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored(made, options.pop("real", pictures(9)), **options)


def test_the_judge_that_ships_knows_clothing_from_noise() -> None:
    def of(split: str, count: int) -> tuple[Tensor, Tensor]:
        data = fashion_mnist(split)
        return torch.tensor(data.images[:count])[:, None] / 127.5 - 1, torch.tensor(data.labels[:count]).long()

    (real, _), (made, labels) = of("test", 150), of("train", 100)
    clothing = score(made, labels, real=real)
    noise = score(torch.randn(100, 1, 32, 32).clamp(-1, 1), labels, real=real)
    assert clothing["accuracy"] > 0.8
    assert clothing["fd"] < noise["fd"] / 20
    assert clothing["kid"] < noise["kid"] / 20
    assert min(clothing["precision"], clothing["recall"]) > 0.6
