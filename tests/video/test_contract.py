"""VideoMamba keeps the interface of backbones: the tests of tests/vision/test_contract.py, on clips."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sinuous.core import registry

FILE = Path(__file__).parents[1] / "vision" / "test_contract.py"
FOR_PICTURES = {
    "test_set_input_size_to_another_aspect",  # these make their own inputs, pictures; see test_videomamba.py
    "test_intermediates_are_maps_of_the_strides_they_name",
    "test_wrong_images_are_told",
}
FRAMES = 2

spec = importlib.util.spec_from_file_location("contract_of_pictures", FILE)
assert spec is not None
assert spec.loader is not None
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)


def clips(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, FRAMES, *contract.SIDES, dtype=dtype)


def build(name: str, **options: object) -> object:
    return built(name, **{"num_frames": FRAMES, **options})


built, contract.build, contract.images = contract.build, build, clips
MODELS = [name for name in registry.list_models("test_*", domain="video") if registry.find_entry(name)[2].in_timm]
pytestmark = pytest.mark.parametrize("name", MODELS)
globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if (name.startswith("test_") and name not in FOR_PICTURES) or name == "_seed"
    }
)


def test_intermediates_are_volumes_of_patches(name: str) -> None:
    model, x = build(name), clips()
    final, volumes = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [volume.shape for volume in volumes] == [(2, 32, FRAMES, 5, 8)] * 4
    (second,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(second, volumes[1])
    assert [volume.shape for volume in build(name, features_only=True)(x)] == [(2, 32, FRAMES, 5, 8)] * 4
