"""timm's `tests/test_models.py`, its parameters replaced by our models; see conftest.py for how to run it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm

import sinuous.video
import sinuous.vision  # noqa: F401  (registers our models with timm)
from sinuous.core import registry

pytestmark = pytest.mark.timm_suite

VERSION = importlib.metadata.version("timm")
FILE = Path(__file__).parents[2] / ".cache" / "timm_tests" / VERSION / "test_models.py"

# timm sorts its families into such with and without maps of features; ours without are named here.
WITHOUT_MAPS = (
    "lightnet_*",
    "plstm_vis_*",
    "test_lightnet",
    "test_videomamba",
    "test_plstm_vis",
    "test_vim",
    "test_vir",
    "vim_*",
    "videomamba_*",
    "vir_*",
)


def ours() -> set[str]:
    known = set(filter(timm.is_model, registry.list_models(domain="vision")))
    small = {name for name in known if name.startswith("test_") or name.endswith("_nano")}
    asked = os.environ.get("SINUOUS_TIMM_MODELS", "")
    names = known if asked == "all" else {name.strip() for name in asked.split(",")} if asked else small
    if unknown := names - known:
        raise ValueError(f"SINUOUS_TIMM_MODELS names {sorted(unknown)}; there are 'all' and {sorted(known)}")
    return names


OF_PICTURES = ("test_model_default_cfgs",)
"""Tests of timm that make pictures of their own."""


def ours_of_clips() -> set[str]:
    known = set(filter(timm.is_model, registry.list_models(domain="video")))
    return known if os.environ.get("SINUOUS_TIMM_MODELS") == "all" else {n for n in known if n.startswith("test_")}


def clip_size(model: Any = None, model_name: str = "", target: Any = None) -> tuple[int, ...]:
    """What timm's tests ask for the size of an input, of models of clips."""
    model = timm.create_model(model_name, device="meta") if model is None else getattr(model, "model", model)
    return (model.in_chans, model.num_frames, *model.patch_embed.img_size[1:])


def timm_tests(names: set[str]) -> ModuleType:
    """timm's test module, imported with a `list_models` that sees only `names`."""
    modules = sorted({timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in names})
    list_models = timm.list_models

    def list_ours(filter: Any = "", module: Any = "", exclude_filters: Any = "", **kwargs: Any) -> list[str]:
        if "vit_*" in filter:
            filter = [*filter, *WITHOUT_MAPS]
        if "vit_*" in exclude_filters:
            exclude_filters = [*exclude_filters, *WITHOUT_MAPS]
        found = list_models(filter, modules if module else "", exclude_filters=exclude_filters, **kwargs)
        return [name for name in found if name.partition(".")[0] in names]

    spec = importlib.util.spec_from_file_location("timm_tests_test_models", FILE)
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", list_ours)
        patch.setattr(timm, "list_pretrained", lambda *_, **__: [])
        spec.loader.exec_module(tests)
    return tests


def applicable(tests: ModuleType, names: set[str]) -> Iterator[tuple[str, Any]]:
    """What pytest shall find: fixtures, and the tests whose `model_name`s are ours and not fixed in timm's file."""
    for key, value in vars(tests).items():
        if not key.startswith("test_"):
            if type(value).__name__ == "FixtureFunctionDefinition":
                yield key, value
            continue
        models = [
            str(model)
            for mark in getattr(value, "pytestmark", [])
            if mark.name == "parametrize" and mark.args[0] == "model_name"
            for model in mark.args[1]
        ]
        if models and all(model.partition(".")[0] in names for model in models):
            yield key, value


if not FILE.exists():
    pytest.skip(
        f"timm's tests are not here; run: python tools/fetch_timm_tests.py (for {FILE})", allow_module_level=True
    )

globals().update(applicable(timm_tests(ours()), ours()))

of_clips = timm_tests(ours_of_clips())
of_clips._get_input_size = clip_size
for name, test in applicable(of_clips, ours_of_clips()):
    if name.startswith("test_") and not name.startswith(OF_PICTURES):
        globals()[f"{name}_of_clips"] = test
