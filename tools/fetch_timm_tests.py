"""Get timm's own tests, which its wheel leaves out, into `.cache/timm_tests`: `python tools/fetch_timm_tests.py`.

pip downloads the source distribution of the timm that is installed. `--sdist FILE` takes one that is already here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

TARGET = Path(__file__).parents[1] / ".cache" / "timm_tests"


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="timm-VERSION.tar.gz, instead of a download")
    options = parser.parse_args()
    version = importlib.metadata.version("timm")
    with tempfile.TemporaryDirectory() as folder:
        sdist = options.sdist
        if sdist is None:
            download = ["download", "--no-deps", "--no-binary", "timm", f"timm=={version}"]
            subprocess.run([sys.executable, "-m", "pip", *download, "-d", folder], check=True)
            sdist = Path(folder) / f"timm-{version}.tar.gz"
        count = unpack(sdist, TARGET / version)
    print(f"{count} files in {TARGET / version}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
