"""Maps the top-level folders onto `sinuous.<folder>`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

TOP = ("core", "kernels", "vision", "audio", "video", "genomics", "apps")

names = [name for top in TOP for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]

setup(
    packages=["sinuous", *(f"sinuous.{name}" for name in names)],
    package_dir={"sinuous": "src/sinuous", **{f"sinuous.{top}": top for top in TOP}},
)
