"""Make the bundled byte-level text set: Jane Austen's six novels, one of them held out.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb FOLDER
    pip install rdata
    python tools/make_austen_text.py FOLDER/usr/lib/R/site-library/janeaustenr/data

The novels (1811 to 1818) are in the public domain; the R package janeaustenr (MIT, © Julia Silge) holds them line by
line. Training text: Emma, Mansfield Park, Northanger Abbey, Pride and Prejudice, Sense and Sensibility. Persuasion is
held out: the first half validates, the second half tests.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from pathlib import Path

import rdata

TRAINING = ("emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility")
HELD_OUT = "persuasion"
FOLDER = Path(__file__).resolve().parent.parent / "core" / "language" / "samples" / "austen"


def novels(folder: Path) -> dict[str, bytes]:
    """Name to text, from R's lazy-load database: an index (.rdx) and compressed objects one after the other (.rdb)."""
    index, objects = rdata.read_rds(folder / "Rdata.rdx"), (folder / "Rdata.rdb").read_bytes()
    found = {}
    for name, (start, length) in index["variables"].items():
        size = 4  # of the uncompressed object, ahead of it
        parsed = rdata.parser.parse_data(zlib.decompress(objects[int(start) + size : int(start) + int(length)]))
        found[str(name)] = "\n".join(map(str, rdata.conversion.convert(parsed))).encode() + b"\n"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with Rdata.rdb and Rdata.rdx")
    texts = novels(parser.parse_args().folder)
    middle = texts[HELD_OUT].index(b"\n", len(texts[HELD_OUT]) // 2) + 1
    parts = {
        "train": b"\n".join(texts[name] for name in TRAINING),
        "val": texts[HELD_OUT][:middle],
        "test": texts[HELD_OUT][middle:],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, text in parts.items():
        (FOLDER / f"{split}.txt.xz").write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        print(split, f"{len(text):,} bytes")


if __name__ == "__main__":
    main()
