"""Maps the top-level folders onto `sinuous.<folder>`; everything else is in pyproject.toml."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

TOP = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["sinuous"]["folders"]

names = [name for top in TOP for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]

setup(
    packages=["sinuous", *(f"sinuous.{name}" for name in names)],
    package_dir={"sinuous": "src/sinuous", **{f"sinuous.{top}": top for top in TOP}},
)
