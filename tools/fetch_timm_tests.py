"""Get timm's own tests, which its wheel leaves out, into `.cache/timm_tests`: `python tools/fetch_timm_tests.py`.

pip downloads the source distribution of the timm that is installed. `--sdist FILE` takes one that is already here.
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


def pip() -> list[str]:
    """A command that runs pip: environments made by uv have none, so that uv is asked for one."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv") or shutil.which(CACHE / "uv" / "bin" / "uv")
    if uv is None:
        raise SystemExit("neither pip nor uv is here; install one of them, or give the archive with --sdist")
    return [uv, "tool", "run", "pip"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="timm-VERSION.tar.gz, instead of a download")
    options = parser.parse_args()
    version = importlib.metadata.version("timm")
    target = CACHE / "timm_tests" / version
    if (target / "test_models.py").exists():
        print(f"timm {version}'s tests are in {target}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sdist = options.sdist
        if sdist is None:
            what = ["download", "--quiet", "--no-deps", "--no-binary", "timm", f"timm=={version}", "--dest", folder]
            if subprocess.run([*pip(), *what]).returncode:
                raise SystemExit(f"timm {version} could not be downloaded; give its source archive with --sdist")
            sdist = Path(folder) / f"timm-{version}.tar.gz"
        count = unpack(sdist, target)
    print(f"{count} files in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
