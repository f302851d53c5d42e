"""Get timm's own tests, which its wheel leaves out, into `.cache/timm_tests`: `python tools/fetch_timm_tests.py`.

pip downloads the source distribution of the timm that is installed. `--sdist FILE` takes one that is already here.
Where no download works, this says so and succeeds: the tests then skip themselves.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

CACHE = Path(__file__).parents[1] / ".cache"
LIMIT = 180  # seconds for one way to download


def unpack(sdist: Path, target: Path) -> int:
    """Copy the files of the archive's `tests` folder to `target`; returns how many."""
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            path = PurePosixPath(member.name)
            content = archive.extractfile(member)
            if content is not None and path.parent.name == "tests" and path.name.startswith("test_"):
                (target / path.name).write_bytes(content.read())
                count += 1
    return count


def pips() -> list[list[str]]:
    """Commands that may run pip, best first. Environments made by uv have none of their own."""
    commands = [[sys.executable, "-m", "pip"]] if importlib.util.find_spec("pip") else []
    for uv in (shutil.which("uv"), shutil.which(CACHE / "uv" / "bin" / "uv")):
        commands += [[uv, "tool", "run", "--python", sys.executable, "pip"]] if uv else []
    for name in ("pip3", "pip"):
        path = shutil.which(name)
        commands += [[path]] if path else []
    return commands


def download(version: str, folder: Path) -> Path | None:
    """timm's source distribution in `folder`, or None after saying why there is none."""
    sdist, reason = folder / f"timm-{version}.tar.gz", "neither pip nor uv is here"
    what = ["download", "--quiet", "--no-deps", "--no-binary", "timm", f"timm=={version}", "--dest", str(folder)]
    for pip in pips():
        try:
            done = subprocess.run([*pip, *what], capture_output=True, text=True, timeout=LIMIT)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"{type(error).__name__} of {pip[0]}"
            continue
        if sdist.exists():  # also where pip failed afterwards, on the metadata, which nobody needs here
            return sdist
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
    print(f"timm {version}'s tests are left out ({reason}); give its source archive with --sdist to have them")
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="timm-VERSION.tar.gz, instead of a download")
    options = parser.parse_args(arguments)
    version = importlib.metadata.version("timm")
    target = CACHE / "timm_tests" / version
    if (target / "test_models.py").exists():
        print(f"timm {version}'s tests are in {target}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sdist = options.sdist or download(version, Path(folder))
        if sdist is None:
            return 0
        try:
            count = unpack(sdist, target)
        except (OSError, tarfile.TarError):
            count = 0
        if not (target / "test_models.py").exists():
            parser.error(f"{sdist} is no source archive of timm; give timm-{version}.tar.gz")
    print(f"{count} files in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
