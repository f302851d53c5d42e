"""The wheel holds every module and data file of the tree, and works from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["sinuous"]["folders"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git tracks, and unpacked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_the_wheel_has_the_files_of_the_tree_and_no_others(unpacked: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    wanted = {name.removeprefix("src/") for name in tracked if name.startswith("src/sinuous/")}
    wanted |= {f"sinuous/{name}" for name in tracked if name.startswith(tuple(f"{top}/" for top in TOP))}
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == wanted


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["train", "--cfg", "job", "experiment=vision/fashion_mnist"],
        ["models", "test_vim"],
    ],
)
def test_the_wheel_works_from_another_folder(unpacked: Path, tmp_path: Path, command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    place = "import sinuous.apps, sys; print(sinuous.apps.__file__)"
    where = subprocess.run([sys.executable, "-c", place], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert where.stdout.startswith(str(unpacked)), where.stdout + where.stderr
    done = subprocess.run(
        [sys.executable, "-m", "sinuous", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
