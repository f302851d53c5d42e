"""Packages that matter to a run: their versions, and the extra that brings one that is missing."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement

from sinuous.core.domains import domains

PACKAGES = (
    "sinuous",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "lightning",
    "torchmetrics",
    "torchdata",
    "hydra-core",
    "numpy",
)
"""Those whose versions are told and kept with a run."""


def installed() -> dict[str, str | None]:
    """Versions of `PACKAGES`, None for those that are not there."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def extra_with(module: str) -> str | None:
    """The extra that brings the top-level `module`, such as `sinuous[train]`, from the metadata of our package and of
    those that bring domains; None if no extra does."""
    for project in dict.fromkeys(("sinuous", *(domain.distribution for domain in domains().values()))):
        try:
            requirements = importlib.metadata.requires(project) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in requirements:
            requirement = Requirement(text)
            if _plain(requirement.name) != _plain(module) or requirement.marker is None:
                continue
            for extra in importlib.metadata.metadata(project).get_all("Provides-Extra") or []:
                if extra != "all" and requirement.marker.evaluate({"extra": extra}):
                    return f"{project}[{extra}]"
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
