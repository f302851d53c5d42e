"""Hydra's search path, with the configurations of every domain and of the tasks that domains share."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

import sinuous.core.tasks
from sinuous.core.domains import domains

OWN = Path(__file__).parent / "configs"
SHARED = Path(sinuous.core.tasks.__file__).parent / "configs"


EXTRA: list[Path] = []
"""Folders of the user's, given by --config-dir."""


def folders() -> list[Path]:
    """Every folder with configurations: the user's, the roots, the shared tasks, the domains."""
    return [*EXTRA, OWN, SHARED, *(domain.configs for domain in domains().values() if domain.configs is not None)]


def known() -> list[str]:
    """Names of all configurations, as they are written after `GROUP=` but with their group: `data/DOMAIN/NAME`."""
    return sorted(
        {str(path.relative_to(folder).with_suffix("")) for folder in folders() for path in folder.rglob("*.yaml")}
    )


class DomainConfigs(SearchPathPlugin):
    """Adds the folders to what Hydra searches."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in folders():
            if folder not in (OWN, *EXTRA):  # Hydra has those already
                search_path.append(provider="sinuous", path=f"file://{folder}")


def register() -> None:
    """Make the plugin known to Hydra. May be called again."""
    Plugins.instance().register(DomainConfigs)
