"""Wrong options and images given to a Vim end in a ValueError that names them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

from sinuous.vision.vim import Vim

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 3}
NO_SIZE = (0, -1, 4.0, math.nan, "4", [4], True, None, np.array([4, 4]), torch.tensor([4, 4]))
NO_SIDE = (0, -8, 4.0, math.nan, "8", [8], [8, 8, 8], [8, "8"], [8, -8], True, np.array([8, 8]))
NO_RATE = (-0.1, 2, 2.0, math.nan, "0.1", [0.1], None)
WRONG: dict[str, tuple[Any, ...]] = {
    "img_size": (*NO_SIDE, 4, None),
    "patch_size": (*NO_SIDE, 32, None),
    "stride": NO_SIDE,
    "in_chans": NO_SIZE,
    "num_classes": (-1, 3.0, "3", None, [3]),
    "global_pool": ("max", 3, ["avg"], True),
    "class_token": ("front", 0, False),
    "embed_dim": NO_SIZE,
    "depth": NO_SIZE,
    "pos_embed": ("yes", 1, None),
    "route": ("no such", 3, None, [], ["raster", "rows"], [3]),
    "d_state": tuple(value for value in NO_SIZE if value is not None),
    "expand": (-1.0, math.nan, math.inf, "2", [2]),
    "mixer": ("no such", 3, None, ["mamba"]),
    "mixer_options": ("d_state", 3, [3], {"d_state": "8"}),
    "drop_rate": NO_RATE,
    "drop_path_rate": NO_RATE,
    "dynamic_img_size": ("yes", 1, None),
    "dtype": ("float32", np.float32),
}


def test_every_option_is_looked_at() -> None:
    assert set(inspect.signature(Vim).parameters) == {*WRONG, "d_conv", "device"}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_option_is_named(name: str, value: Any) -> None:
    named = "d_state" if name == "mixer_options" and isinstance(value, dict) else name
    with pytest.raises(ValueError, match=rf"{named} .*must|{named}.*got|no (scan )?{named} "):
        Vim(**{**SIZES, name: value})


IMAGES: dict[str, Any] = {
    "without a batch": torch.randn(3, 16, 16),
    "with an axis more": torch.randn(1, 1, 3, 16, 16),
    "gray": torch.randn(1, 1, 16, 16),
    "channels last": torch.randn(1, 16, 16, 3),
    "bytes": torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    "float64": torch.randn(1, 3, 16, 16).double(),
    "complex": torch.zeros(1, 3, 16, 16, dtype=torch.complex64),
    "on meta": torch.zeros(1, 3, 16, 16, device="meta"),
    "of another size": torch.randn(1, 3, 24, 16),
    "smaller than a patch": torch.randn(1, 3, 16, 4),
    "None": None,
    "a list": [[0.5]],
    "an array": np.zeros((1, 3, 16, 16), dtype=np.float32),
    "a word": "cat.png",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_wrong_images_are_told(kind: str) -> None:
    model = Vim(**SIZES)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"^(images|the image|x) .*(got|has|is on)"):
            call(IMAGES[kind])


@pytest.mark.parametrize("indices", [3, -1, [2], [-3], "all", 1.5, [0.5], ["a"]], ids=str)
def test_wrong_indices_of_blocks_are_named(indices: Any) -> None:
    model = Vim(**SIZES)
    with pytest.raises(ValueError, match=r"indices must be blocks .*\(got"):
        model.forward_intermediates(torch.randn(1, 3, 16, 16), indices=indices)
    with pytest.raises(ValueError, match=r"indices must be blocks .*\(got"):
        model.prune_intermediate_layers(indices)


def test_wrong_changes_are_named_and_change_nothing() -> None:
    model = Vim(**SIZES)
    for name in ("img_size", "patch_size"):
        for value in NO_SIDE:
            with pytest.raises(ValueError, match=f"{name} must"):
                model.set_input_size(**{name: value})
    for value in (-1, 2.0, "3", None):
        with pytest.raises(ValueError, match="num_classes must"):
            model.reset_classifier(value)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
