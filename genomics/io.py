"""Files of sequences, annotations, variants and molecules, one function each, told by their content.

    for record in read_sequences("genome.fa.gz"):
        print(record.name, len(record.sequence))

Every reader opens the file and looks at its beginning when it is called, and then reads on as its result is iterated,
one record at a time. What is wrong with a file is said in a sentence with the line.
"""

from __future__ import annotations

from sinuous.genomics.io_molecules import Molecule, read_molecules
from sinuous.genomics.io_sequences import Record, read_sequences
from sinuous.genomics.io_tables import Feature, Variant, read_features, read_variants

__all__ = [
    "Feature",
    "Molecule",
    "Record",
    "Variant",
    "read_features",
    "read_molecules",
    "read_sequences",
    "read_variants",
]
