"""Packages that matter to a run: their versions, and the extra that brings one that is missing."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def extras(project: str = "sinuous") -> dict[str, list[Requirement]]:
    """Requirements that each extra of `project` adds, from its metadata; `all`, which repeats them, is left out."""
    extras_of = importlib.metadata.metadata(project).get_all("Provides-Extra") or []
    requirements = [Requirement(text) for text in importlib.metadata.requires(project) or []]

    def added(requirement: Requirement, extra: str) -> bool:
        marker = requirement.marker
        return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})

    return {extra: [r for r in requirements if added(r, extra)] for extra in extras_of if extra != "all"}


DISTRIBUTIONS = {
    "Bio": "biopython",
    "cv2": "opencv-python",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Distributions of modules that are imported under another name, for those that are not installed."""


def extra_with(module: str) -> str | None:
    """The extra that brings the top-level `module`, such as `sinuous[train]`, from the metadata of our package and of
    those that bring domains; None if no extra does."""
    installed_by = importlib.metadata.packages_distributions().get(module, [])
    names = {canonicalize_name(name) for name in (module, DISTRIBUTIONS.get(module, module), *installed_by)}
    for project in dict.fromkeys(("sinuous", *(domain.distribution for domain in domains().values()))):
        try:
            requirements = extras(project)
        except importlib.metadata.PackageNotFoundError:
            continue
        for extra, added in requirements.items():
            if any(canonicalize_name(requirement.name) in names for requirement in added):
                return f"{project}[{extra}]"
    return None
