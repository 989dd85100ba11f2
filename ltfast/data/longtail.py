"""Long-tailed subsets as the field draws them (Cui et al. 2019, LDAM 2019 and everything after).

Class c of C keeps int(n_max * (1/r)^(c / (C-1))) images (exp) or n_max / int(n_max / r) in its first / second half of
classes (step). Which ones: one numpy RandomState(0) shuffles the positions of every class in turn, and the first n_c
stay. Validation images are the LAST of the same shuffle, so a class keeps exactly the field's images unless head and
tail of its shuffle meet: then the training subset gives way (at CIFAR-10, r = 100 and 50 per class, only class 0: 4,950
instead of 5,000).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ltfast.errors import UserError
from ltfast.launch import speaks

IMBALANCE_TYPES = ("exp", "step")
SUBSET_SEED = 0
log = logging.getLogger("ltfast.data")

IntArray = NDArray[np.int64]


class Subset(NamedTuple):
    """Positions in the full pool; train is grouped by class, each class in the order of its shuffle."""

    train: IntArray
    val: IntArray


def long_tail_counts(n_max: int, num_classes: int, imbalance: float, kind: str = "exp") -> IntArray:
    """Images to keep of each class, int64 [C], largest first. UserError for imbalance < 1 or an unknown kind.

    The expression is LDAM's, factor 1/r raised to c/(C-1), so that rounding falls as in published counts.
    """
    if not imbalance >= 1:
        raise UserError(f"--imbalance {imbalance:g}: it is n_max / n_min, so it must be at least 1 (1 = balanced)")
    if kind not in IMBALANCE_TYPES:
        raise UserError(f"--imbalance-type {kind!r}: choose one of {', '.join(IMBALANCE_TYPES)}")
    factor = 1 / imbalance
    if kind == "exp":
        counts = [int(n_max * factor ** (c / max(1, num_classes - 1))) for c in range(num_classes)]
    else:
        head = num_classes // 2 if imbalance > 1 else num_classes
        counts = [n_max] * head + [int(n_max * factor)] * (num_classes - head)
    return np.array(counts, dtype=np.int64)


def select_subset(labels: IntArray, counts: IntArray, val_per_class: int = 0, seed: int = SUBSET_SEED) -> Subset:
    """Draw `counts[c]` training and `val_per_class` validation images of each class from the pool, disjointly.

    labels: [n] class of each image of the pool. Of a class with no more than `val_per_class` images all but one are held
    out; a warning says of how many. UserError where a class has no image to train on.
    """
    if val_per_class < 0:
        raise UserError(f"--val-per-class {val_per_class}: it must be 0 (no validation split) or more")
    rng = np.random.RandomState(seed)
    train, val, scarce = [], [], 0
    ends = np.cumsum(np.bincount(labels, minlength=len(counts)))
    by_class = np.split(np.argsort(labels, kind="stable"), ends)  # positions of a class, in ascending order
    for c, keep in enumerate(counts.tolist()):
        positions = by_class[c]
        rng.shuffle(positions)
        if len(positions) == 0:
            raise UserError(f"class {c} has no image; every class needs at least one")
        scarce += len(positions) <= val_per_class
        available = max(len(positions) - val_per_class, 1)
        if keep < 1:
            raise UserError(f"class {c} keeps none of its {len(positions)} images to train on: lower --imbalance")
        train.append(positions[: min(keep, available)])
        val.append(positions[available:])
    if scarce and speaks():
        log.warning(
            "--val-per-class %d: classes with no more images than that: %d; all but one of theirs are held out",
            val_per_class, scarce,
        )  # fmt: skip
    return Subset(np.concatenate(train), np.concatenate(val))


def limited_counts(counts: IntArray, limit: int) -> IntArray:
    """Counts [C] that sum to min(limit, total) in the same proportions, each at least 1 (largest remainders)."""
    total = int(counts.sum())
    if limit < len(counts):
        raise UserError(f"--limit-train {limit}: at least one image for each of the {len(counts)} classes is needed")
    if limit >= total:
        return counts.copy()
    exact = counts * (limit / total)
    kept = np.maximum(np.floor(exact).astype(np.int64), 1)
    while kept.sum() != limit:
        gap = exact - kept
        step = 1 if kept.sum() < limit else -1
        gap[kept + step < 1] = np.inf
        gap[kept + step > counts] = -np.inf
        chosen = np.argsort(-step * gap, kind="stable")[: abs(limit - int(kept.sum()))]
        kept[chosen[np.isfinite(gap[chosen])]] += step
    return kept


def first_of_each_class(labels: IntArray, counts: IntArray) -> IntArray:
    """Positions of the first `counts[c]` images of each class, in ascending order."""
    by_class = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=len(counts))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[rank < counts[labels[by_class]]])
