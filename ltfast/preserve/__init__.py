"""Grouped knowledge preservation: quality -> memory bank -> groups -> Fisher -> one collapsed anchor."""

from ltfast.preserve.anchor import (
    Anchor,
    anchor_coefficients,
    group_sizes,
    stream_anchor,
)
from ltfast.preserve.bank import Lumps, MemoryBank
from ltfast.preserve.fisher import (
    fisher_sums,
    reestimate_batchnorm,
    sample_indices,
    swapped_parameters,
)
from ltfast.preserve.grouping import group_by_frequency, group_classes, similarities, spectral_groups
from ltfast.preserve.quality import Quality, QualityStats

__all__ = [
    "Anchor",
    "Lumps",
    "MemoryBank",
    "Quality",
    "QualityStats",
    "anchor_coefficients",
    "fisher_sums",
    "group_by_frequency",
    "group_classes",
    "group_sizes",
    "reestimate_batchnorm",
    "sample_indices",
    "similarities",
    "spectral_groups",
    "stream_anchor",
    "swapped_parameters",
]
