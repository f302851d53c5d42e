"""Biological sequences: DNA, proteins and molecules. Importing this registers the models.

    from sinuous.genomics import DNATokenizer, read_sequences, score

Names of `__all__` are loaded on first use.
"""

from __future__ import annotations

from sinuous.core.lazy import lazily
from sinuous.genomics import caduceus, chem_xlstm, dna_xlstm, prot_xlstm

_LAZY = {
    "DNATokenizer": "letters",
    "ProteinTokenizer": "letters",
    "SelfiesTokenizer": "letters",
    "SmilesTokenizer": "letters",
    "annotate": "annotation",
    "embed": "reading",
    "fill_spans": "filling",
    "molecule_report": "molecule_sets",
    "mutation_effects": "effects",
    "position_probabilities": "reading",
    "read_features": "io",
    "read_molecules": "io",
    "read_sequences": "io",
    "read_variants": "io",
    "sample_molecules": "design",
    "score": "reading",
    "variant_effects": "effects",
}
"""Public names, and the modules that they are in."""

__all__ = ["caduceus", "chem_xlstm", "dna_xlstm", "prot_xlstm", *_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
