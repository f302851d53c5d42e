"""Domains by name: packages with models, data, tasks, a demo, measurements and Hydra configurations.

A domain is an entry of the group `sinuous.domains`, name to package, ours or a stranger's:

    [project.entry-points."sinuous.domains"]
    birds = "birdsong"

In the package, each part but the first may be missing:

    __init__.py       importing it registers the models and imports nothing heavy
    configs/          data/<domain>/*.yaml, model/<domain>/*.yaml, task/<domain>/*.yaml, experiment/<domain>/*.yaml
    demo.py           `sinuous demo <domain>`: a docstring, add_arguments(parser), run(options)
    bench.py          `sinuous bench <domain>`, the same three; or bench/<name>.py, each for `sinuous bench <name>`
    weights/          NAME.TAG.safetensors beside NAME.TAG.json, see `sinuous.core.weights`

The functions here find these parts without importing them, so that a list of demos costs no import of torch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

GROUP = "sinuous.domains"


@dataclass(frozen=True)
class Part:
    """A module that a command runs: a demo or a measurement.

    Attributes:
        name: by which the command knows it.
        module: dotted name of the module.
        summary: first line of its docstring.
    """

    name: str
    module: str
    summary: str

    def load(self) -> ModuleType:
        """Import the module.

        Raises:
            ModuleNotFoundError: if a package is missing that it needs.
        """
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class Domain:
    """A domain and the places of its parts.

    Attributes:
        name: of the entry point.
        package: dotted name of the package.
        distribution: name of the installed project that declares it.
    """

    name: str
    package: str
    distribution: str

    @functools.cached_property
    def folder(self) -> Path:
        """Where the package's files lie.

        Raises:
            ModuleNotFoundError: if there is no such package, or it is a single module.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"the domain {self.name!r} names {self.package}, which is no package; correct the entry point of "
                f"{self.distribution}",
                name=self.package,
            )
        return Path(next(iter(spec.submodule_search_locations)))

    @property
    def configs(self) -> Path | None:
        """The folder of its configurations, if it has one."""
        folder = self.folder / "configs"
        return folder if folder.is_dir() else None

    @property
    def demo(self) -> Part | None:
        """Its demo, if it has one."""
        return self._part("demo", self.name)

    @property
    def benches(self) -> list[Part]:
        """Its measurements: `bench.py` under the domain's name, or each module of `bench/` under its own."""
        if (single := self._part("bench", self.name)) is not None:
            return [single]
        files = sorted((self.folder / "bench").glob("*.py"))
        parts = [self._part(f"bench.{file.stem}", file.stem) for file in files if not file.stem.startswith("_")]
        return [part for part in parts if part is not None]

    def _part(self, module: str, name: str) -> Part | None:
        file = self.folder / (module.replace(".", "/") + ".py")
        if not file.is_file():
            return None
        return Part(name, f"{self.package}.{module}", summary(file))


def summary(file: Path) -> str:
    """First line of the docstring of a Python file, without its full stop; the file is not imported."""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].rstrip(".")


@functools.cache
def domains() -> dict[str, Domain]:
    """All domains by name, those whose package cannot be found left out with a warning."""
    known: dict[str, Domain] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        domain = Domain(entry.name, entry.value, entry.dist.name if entry.dist is not None else entry.value)
        try:
            _ = domain.folder
        except Exception as error:  # whatever a stranger's parent package raises, the other domains stay usable
            _leave_out(domain, error)
            continue
        known.setdefault(entry.name, domain)
    return known


@functools.cache
def load_domains() -> None:
    """Import every domain, which registers its models; those that cannot be imported are left out with a warning.

    The first model that is asked for may be built on another device (`with torch.device("meta")`): what a domain makes
    when it is imported stays on the CPU."""
    import torch  # which domains import anyway

    for domain in domains().values():
        try:
            with torch.device("cpu"):
                importlib.import_module(domain.package)
        except Exception as error:  # whatever a stranger's module raises, the other domains stay usable
            _leave_out(domain, error)


def _leave_out(domain: Domain, error: Exception) -> None:
    warnings.warn(
        f"the domain {domain.name} ({domain.package}) is left out: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=3,
    )
