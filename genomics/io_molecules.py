"""Files of molecules: lists of SMILES, tables with a column of them, and SDF."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from sinuous.core.checks import check_choice
from sinuous.genomics.files import Lines, shown
from sinuous.genomics.molecules import problem, read_mol_block

NAMES = ("name", "id", "title", "identifier", "compound", "molecule", "chembl_id", "zinc_id", "cid")
"""Columns of a table that name a molecule, the first that there is."""


class Molecule(str):
    """A SMILES, with the name of the molecule in its file, `""` where it has none, and its line.

    Attributes:
        smiles: itself.
        name: of the molecule.
        line: at which it begins, from 1.
    """

    name: str
    line: int

    def __new__(cls, smiles: str, name: str = "", line: int = 0) -> Molecule:
        molecule = super().__new__(cls, smiles)
        molecule.name, molecule.line = name, line
        return molecule

    @property
    def smiles(self) -> str:
        return str(self)

    def __getnewargs__(self) -> tuple[str, str, int]:  # type: ignore[override]
        return str(self), self.name, self.line


class _Entry(NamedTuple):
    """A molecule that was not looked at yet: its SMILES or, in an SDF, its connection table."""

    line: int
    name: str
    text: str
    is_block: bool = False


def read_molecules(path: str | os.PathLike[str], on_invalid: str = "raise") -> Iterator[Molecule]:
    """Stream the molecules of a file as SMILES: as they are written, or, from an SDF, canonical ones of RDKit.

    A list has a SMILES on each line, perhaps with a name behind it. A table (commas, semicolons or tabs) has a column
    whose header says smiles. An SDF has connection tables (V2000 or V3000). All may be compressed by gzip; content
    tells them apart.

    Args:
        path: of the file.
        on_invalid: `"raise"`, or `"skip"` what RDKit cannot read as a molecule; a warning counts it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty or cut, or for an invalid molecule, with the line.
        ModuleNotFoundError: if the extra `genomics` is missing.
    """
    check_choice("on_invalid", on_invalid, ("raise", "skip"))
    lines = Lines(path)
    try:
        return _valid(lines, _entries(lines), on_invalid == "skip")
    except BaseException:
        lines.close()
        raise


def _valid(lines: Lines, entries: Iterator[_Entry], skip: bool) -> Iterator[Molecule]:
    seen = skipped = 0
    first = ""
    try:
        for entry in entries:
            seen += 1
            if entry.is_block:
                smiles, reason = read_mol_block(entry.text)
            else:
                reason = problem(entry.text) or ""
                smiles = None if reason else entry.text
            if smiles is not None:
                yield Molecule(smiles, entry.name, entry.line)
                continue
            what = f"the molecule {entry.name!r}" if entry.is_block else shown(entry.text, 80)
            if not skip:
                raise lines.refusal(
                    f"{what} is not valid ({reason}); correct it, or give on_invalid='skip'", entry.line
                )
            first = first or f"line {entry.line}: {what} is not valid ({reason})"
            skipped += 1
    finally:
        lines.close()
    if not seen:
        raise ValueError(f"{lines.path} has no molecules; give a file with some")
    if skipped:
        warnings.warn(f"{lines.path}: {skipped} of {seen} molecules were skipped; {first}", stacklevel=2)


def _entries(lines: Lines) -> Iterator[_Entry]:
    """The reader of a text, by its first lines."""
    head = lines.ahead(4)
    if len(head) == 4 and re.search(r"V[23]000\s*$", head[3]):
        return _sdf(lines)
    lines.skip_blank()
    (header,) = lines.ahead(1)
    for pattern in ("(canonical[_ ]|isomeric[_ ])?smiles", r"[\w .()-]*smiles[\w .()-]*"):
        for delimiter in "\t,; ":
            cells = [cell.strip().lower() for cell in next(csv.reader([header.strip()], delimiter=delimiter))]
            columns = [i for i, cell in enumerate(cells) if re.fullmatch(pattern, cell)]
            if columns:
                names = [cells.index(name) for name in NAMES if name in cells]
                return _table(lines, delimiter, columns[0], names[0] if names else None)
    return _list(lines)


def _list(lines: Lines) -> Iterator[_Entry]:
    for line in lines:
        if line.strip() and not line.startswith("#"):
            smiles, *rest = line.split(None, 1)
            name = re.sub(r"^\|[^|]*\|", "", "".join(rest)).strip()  # behind an extension of ChemAxon's
            yield _Entry(lines.number, name, smiles)


def _table(lines: Lines, delimiter: str, column: int, name_column: int | None) -> Iterator[_Entry]:
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter)
    next(rows)
    while True:
        start = lines.number + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise lines.refusal(f"no row of a table ({error}); correct it") from error
        if row is None:
            return
        if any(cell.strip() for cell in row):
            smiles, name = (row[i].strip() if i is not None and i < len(row) else "" for i in (column, name_column))
            yield _Entry(start, name, smiles)


def _sdf(lines: Lines) -> Iterator[_Entry]:
    start, ended = lines.number + 1, False
    block: list[str] = []
    for line in lines:
        if line.startswith("$$$$"):
            yield _Entry(start, block[0].strip() if block else "", "\n".join(block), is_block=True)
            start, block, ended = lines.number + 1, [], False
        elif not ended:  # behind its end come properties
            block.append(line)
            ended = line.startswith("M  END")
    if any(line.strip() for line in block):
        if not ended:
            raise lines.refusal(
                f"the molecule {block[0].strip()!r} has no end, a line 'M  END'; the file is cut", start
            )
        yield _Entry(start, block[0].strip(), "\n".join(block), is_block=True)
