"""Grouped knowledge preservation: quality -> memory bank -> groups -> Fisher -> one collapsed anchor."""

from ltfast.preserve.anchor import (
    Anchor,
    anchor_coefficients,
    build_anchor,
    group_sizes,
    penalty_by_shares,
    penalty_gradient,
    penalty_value,
    share_coefficients,
    stream_anchor,
)
from ltfast.preserve.bank import Lumps, MemoryBank
from ltfast.preserve.fisher import (
    fisher_diagonal,
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
    "build_anchor",
    "fisher_diagonal",
    "fisher_sums",
    "group_by_frequency",
    "group_classes",
    "group_sizes",
    "penalty_by_shares",
    "penalty_gradient",
    "penalty_value",
    "reestimate_batchnorm",
    "sample_indices",
    "share_coefficients",
    "similarities",
    "spectral_groups",
    "stream_anchor",
    "swapped_parameters",
]
