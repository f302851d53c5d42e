"""Every model of the domain has a configuration, which builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import sinuous
from sinuous import genomics

FOLDER = Path(genomics.__file__).parent / "configs" / "model" / "genomics"
NAMES = sinuous.list_models(domain="genomics")


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_a_configuration_that_builds_it(name: str) -> None:
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    options = {key: value for key, value in config.items() if key not in ("defaults", "_target_")}
    with torch.device("meta"):
        model = sinuous.create_model(**options)
    assert options["name"] == name
    assert model.head_kind == "lm"


def test_every_configuration_is_of_a_model() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == NAMES
