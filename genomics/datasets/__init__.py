"""Data of genomes, proteins and molecules: bundled samples, or the field's files in a folder.

Each of these makes data with the splits `train`, `val` and `test`: `genome_windows(root="FOLDER").split("test")`.
"""

from __future__ import annotations

from sinuous.genomics.datasets.files import SAMPLES
from sinuous.genomics.datasets.folders import SequenceFolder as sequence_folder
from sinuous.genomics.datasets.genome import CLASSES, MERGED_CLASSES, MERGED_INTO
from sinuous.genomics.datasets.genome import AnnotationWindows as annotation_windows
from sinuous.genomics.datasets.genome import GenomeWindows as genome_windows
from sinuous.genomics.datasets.molecules import Molecules as molecules
from sinuous.genomics.datasets.proteins import LADDER
from sinuous.genomics.datasets.proteins import HomologContexts as homolog_contexts
from sinuous.genomics.datasets.splice import SpliceSites as splice_sites

__all__ = [
    "CLASSES",
    "LADDER",
    "MERGED_CLASSES",
    "MERGED_INTO",
    "SAMPLES",
    "annotation_windows",
    "genome_windows",
    "homolog_contexts",
    "molecules",
    "sequence_folder",
    "splice_sites",
]
