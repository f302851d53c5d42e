"""The list of top-level folders in pyproject.toml agrees with the tree and with the settings that repeat it."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
FOLDERS = set(SETTINGS["sinuous"]["folders"])


def test_the_list_names_the_packages_at_the_top_of_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files", "*/__init__.py"], cwd=ROOT, capture_output=True, check=True, text=True)
    assert {Path(name).parent.name for name in listed.stdout.split() if name.count("/") == 1} == FOLDERS


def test_every_folder_is_on_a_floor() -> None:
    (contract,) = SETTINGS["importlinter"]["contracts"]
    floors = [name.strip() for floor in contract["layers"] for name in floor.split("|")]
    assert sorted(floors) == sorted(f"sinuous.{folder}" for folder in FOLDERS)


def test_no_folder_is_imported_by_its_bare_name() -> None:
    assert set(SETTINGS["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == FOLDERS
