"""Make `typecheck_view/sinuous/`: real folders and links to files, so that mypy and import-linter see one package.

Checking the top-level folders directly would give every class two identities (`core.x` and `sinuous.core.x`), and
linked folders make some checkers silently read nothing; links to files in real folders do neither.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIEW = ROOT / "typecheck_view" / "sinuous"
TOP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["sinuous"]["folders"]


def main() -> None:
    shutil.rmtree(VIEW.parent, ignore_errors=True)
    sources = [(path, path.relative_to(ROOT / "src" / "sinuous")) for path in (ROOT / "src" / "sinuous").rglob("*.py*")]
    sources += [(path, path.relative_to(ROOT)) for top in TOP for path in (ROOT / top).rglob("*.py")]
    sources = [(path, place) for path, place in sources if "__pycache__" not in path.parts]
    for path, place in sources:
        link = VIEW / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    print(f"{len(sources)} files linked under {VIEW.parent.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
