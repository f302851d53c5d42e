"""Packages of the extras have versions in constraints.txt, and those that are installed import together."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sinuous.apps import packages
from sinuous.apps.packages import extra_with, extras

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
IMPORTS = """
import importlib, json, sys

import torch

failures = {}
for module, attribute in json.loads(sys.argv[1]):
    try:
        imported = importlib.import_module(module)
        if attribute:
            getattr(imported, attribute)
    except BaseException as error:
        failures[module] = f"{type(error).__name__}: {error}"
print(json.dumps(failures))
"""
LAZY = {"diffusers": "AutoencoderKL"}
"""For modules that import their parts on first use, one that needs many of them."""


@functools.cache
def distributions() -> dict[str, set[str]]:
    """Names of the distributions that bring each installed top-level module."""
    found = importlib.metadata.packages_distributions()
    return {module: set(map(canonicalize_name, names)) for module, names in found.items()}


def modules(requirement: Requirement) -> list[str]:
    """Top-level public modules of an installed requirement."""
    name = canonicalize_name(requirement.name)
    return sorted(module for module, names in distributions().items() if name in names and not module.startswith("_"))


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """For each module of an installed extra that does not import beside the others, its error."""
    found = [module for added in extras().values() for requirement in added for module in modules(requirement)]
    pairs = json.dumps([(module, LAZY.get(module)) for module in dict.fromkeys(found)])
    done = subprocess.run([sys.executable, "-c", IMPORTS, pairs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return errors


@pytest.mark.parametrize("extra", extras())
def test_the_packages_of_an_extra_import_beside_the_others(extra: str, failures: dict[str, str]) -> None:
    for requirement in extras()[extra]:
        if not modules(requirement):
            pytest.skip(f"{requirement.name} is not installed: pip install 'sinuous[{extra}]'")
        assert not {module: failures[module] for module in modules(requirement) if module in failures}


@pytest.mark.parametrize("extra", extras())
def test_a_missing_package_is_found_in_its_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name under which it is imported, as an error of the import gives it."""
    for requirement in extras()[extra]:
        imported = modules(requirement)
        if not imported:
            pytest.skip(f"{requirement.name} is not installed: pip install 'sinuous[{extra}]'")
        assert [extra_with(module) for module in imported] == [f"sinuous[{extra}]"] * len(imported)
        with monkeypatch.context() as bare:
            bare.setattr(importlib.metadata, "packages_distributions", dict)
            assert f"sinuous[{extra}]" in map(extra_with, imported), f"add {requirement.name} to DISTRIBUTIONS"


def test_a_missing_package_of_another_name_is_found_in_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {"genomics": [Requirement("Biopython>=1.84")], "train": [Requirement("found_by-metadata")]}
    monkeypatch.setattr(packages, "extras", lambda project: added if project == "sinuous" else {})
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"fbm": ["Found-By.Metadata"]})
    assert extra_with("Bio") == "sinuous[genomics]"
    assert extra_with("fbm") == "sinuous[train]"
    assert extra_with("found_by_metadata") == "sinuous[train]"
    assert extra_with("nothing") is None


def test_constraints_fix_a_version_for_every_requirement() -> None:
    fixed = [Requirement(line) for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    for constraint in fixed:
        assert [specifier.operator for specifier in constraint.specifier] == ["=="], f"{constraint} is no NAME==VERSION"
        assert constraint.url is None
    here = {canonicalize_name(c.name): c for c in fixed if c.marker is None or c.marker.evaluate()}
    required = [Requirement(text) for text in importlib.metadata.requires("sinuous") or []]
    for requirement in required:
        if requirement.name != "sinuous":
            (version,) = here[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(version.version), f"{requirement} excludes {version}"
