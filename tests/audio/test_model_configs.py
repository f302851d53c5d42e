"""Every model of sequences of the domain has a configuration, which builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import sinuous
from sinuous import audio

FOLDER = Path(audio.__file__).parent / "configs" / "model" / "audio"
NAMES = sorted({*sinuous.list_models("sashimi_*"), "test_sashimi", "wavenet_4m"} - {"sashimi_backbone"})


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_a_configuration_that_builds_it(name: str) -> None:
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    options = {key: value for key, value in config.items() if key not in ("defaults", "_target_")}
    assert options["name"] == name
    with torch.device("meta"):
        model = sinuous.create_model(**options)
    default = sinuous.model_info(name).params
    if name != "test_sashimi":
        assert sum(p.numel() for p in model.parameters()) == default


def test_every_configuration_is_of_a_model() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} <= set(sinuous.list_models(domain="audio"))
