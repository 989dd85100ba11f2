"""Triton kernels of ltfast, each beside its torch oracle (imported as ltfast.kernels).

CUDA tensors take the kernel, CPU tensors the oracle's arithmetic in cache-sized blocks; with TRITON_INTERPRET=1 CPU
tensors take the kernel too.
"""

from .anchor import anchor_penalty, collapse_anchors
from .coefficients import AscentStats, ascent_coefficients
from .common import counting
from .gram import gram, gram_partials
from .perturb import perturb
from .step import adamw_step, sgd_step

__all__ = [
    "AscentStats",
    "adamw_step",
    "anchor_penalty",
    "ascent_coefficients",
    "collapse_anchors",
    "counting",
    "gram",
    "gram_partials",
    "perturb",
    "sgd_step",
]
