"""diffusers' own tests of models and of their training, on LaMamba-Diff.

Neither its wheel nor its source archive has them: `SINUOUS_DIFFUSERS_TESTS` names the folder `tests` of a checkout of
huggingface/diffusers. Without it these tests skip themselves.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

FOLDER = Path(os.environ.get("SINUOUS_DIFFUSERS_TESTS", ""))
if not (FOLDER / "models" / "testing_utils").is_dir():
    pytest.skip(
        "diffusers' tests are not here; set SINUOUS_DIFFUSERS_TESTS to the folder tests of a checkout of it",
        allow_module_level=True,
    )

from sinuous.vision.generation import LaMambaDiff  # noqa: E402


def testers() -> Any:
    """Import `models/testing_utils` of the folder, under a name of its own, since this folder is called tests, too."""
    package = types.ModuleType("diffusers_tests")
    package.__path__ = [str(FOLDER)]
    sys.modules.setdefault("diffusers_tests", package)
    return importlib.import_module("diffusers_tests.models.testing_utils")


TESTERS = testers()


class Tiny(TESTERS.BaseModelTesterConfig):
    model_class = LaMambaDiff
    main_input_name = "hidden_states"
    input_shape = (4, 8, 8)
    output_shape = (8, 8, 8)

    def get_init_dict(self) -> dict[str, Any]:
        heads: dict[str, Any] = {"num_heads": 2, "window_size": 4, "d_state": 2}
        return {
            "sample_size": 8,
            "num_classes": 8,
            "embed_dim": 16,
            "depths": [1, 1, 1],
            "bottleneck_depth": 1,
            **heads,
        }

    def get_dummy_inputs(self, batch_size: int = 4) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch_size, *self.input_shape, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "class_labels": torch.randint(8, (batch_size,), generator=generator),
        }


@pytest.mark.slow
class TestModel(Tiny, TESTERS.ModelTesterMixin):
    pass


@pytest.mark.slow
class TestTraining(Tiny, TESTERS.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={"LaMambaDiff"})
