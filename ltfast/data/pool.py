"""Small picture sets in memory: the full pool as read, and its long-tailed train / validation / test splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltfast.data.longtail import IntArray, first_of_each_class, limited_counts, long_tail_counts, select_subset
from ltfast.data.paths import PathTable
from ltfast.errors import UserError

ImageArray = NDArray[np.uint8]


class Pictures(Protocol):
    """What may stand for an image array: pictures made on indexing."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ch, H, W)."""
        ...

    def __getitem__(self, index: IntArray, /) -> ImageArray:
        """uint8 [m, ch, H, W] at these positions."""
        ...


@dataclass(frozen=True)
class Pool:
    """Everything a reader found. images: uint8 [n, ch, H, W]; labels: int64 [n]; the test split never changes."""

    images: ImageArray | Pictures
    labels: IntArray
    test_images: ImageArray
    test_labels: IntArray
    class_names: tuple[str, ...]
    val: tuple[ImageArray, IntArray] | None = None
    """A validation split of the data's own; None holds val_per_class out of train."""
    test_from: str = "test"
    """See base.Source."""
    identity: int = 0
    """Differs for other pictures where labels alone do not tell: of their names or files."""
    paths: Mapping[str, PathTable] = field(default_factory=dict)
    """Names of the files of each split, where they are files."""


@dataclass(frozen=True)
class Splits:
    """images[split]: uint8 [n, ch, H, W]; labels[split]: int64 [n]; for train, val (may be empty) and test."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    class_names: tuple[str, ...]
    test_from: str = "test"
    """See base.Source."""
    val_from: str = "train"
    """See base.Source."""
    identity: int = 0
    """That of the pool."""
    paths: Mapping[str, PathTable] = field(default_factory=dict)
    """See base.Source."""

    @property
    def train_counts(self) -> Tensor:
        """Training images of each class, LongTensor[C]."""
        return torch.bincount(self.labels["train"], minlength=len(self.class_names))


def check_labels(labels: IntArray, num_classes: int, where: str, *, complete: bool = True) -> None:
    """UserError naming `where` when a label is outside 0..C-1, or (complete) a class has no image."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is outside 0..{num_classes - 1}")
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if complete and len(missing):
        raise UserError(
            f"{where}: class {missing[0]} has no image; every one of the {num_classes:,} classes needs at least one"
        )


def long_tail_splits(
    pool: Pool,
    *,
    imbalance: float | None,
    imbalance_type: str = "exp",
    val_per_class: int = 0,
    limit_train: int | None = None,
    min_per_class: int = 0,
    where: str = "data",
) -> Splits:
    """Draw train and val from the pool (longtail.py has the rule); n_max is the smallest class of the pool.

    imbalance: n_max / n_min, None keeps the pool as it is; min_per_class: a floor for the counts; limit_train: keep at
    most so many training images in the same proportions; where: the file or folder that an error names.
    """
    num_classes = len(pool.class_names)
    check_labels(pool.labels, num_classes, where)
    check_labels(pool.test_labels, num_classes, f"{where} (test split)", complete=False)
    if num_classes < 2:
        raise UserError(f"{where}: only one class; a classifier needs at least two")
    if not len(pool.test_labels):
        raise UserError(f"{where}: no image in the test split; add some")
    present = np.bincount(pool.labels, minlength=num_classes)
    counts = (
        present if imbalance is None else long_tail_counts(int(present.min()), num_classes, imbalance, imbalance_type)
    )
    if pool.val is not None and val_per_class:
        raise UserError(
            f"--val-per-class {val_per_class}: {where} has a validation split of its own; leave the option out"
        )
    subset = select_subset(pool.labels, np.maximum(counts, min_per_class), val_per_class)
    train = subset.train
    if limit_train is not None:
        labels = pool.labels[train]
        kept = limited_counts(np.bincount(labels, minlength=num_classes), limit_train)
        train = train[first_of_each_class(labels, kept)]
    return _splits(pool, train, subset.val)


def held_out_splits(pool: Pool) -> Splits:
    """The splits of a pool without training images, which a reader has checked: there is a model to evaluate."""
    none = np.empty(0, dtype=np.int64)
    return _splits(pool, none, none)


def _splits(pool: Pool, train: IntArray, val: IntArray) -> Splits:
    val_images, val_labels = (pool.images[val], pool.labels[val]) if pool.val is None else pool.val
    paths = dict(pool.paths)
    if paths:
        paths["train"], drawn = paths["train"].select(train), paths["train"].select(val)
        paths["val"] = drawn if pool.val is None else paths["val"]
    images = {"train": pool.images[train], "val": val_images, "test": pool.test_images}
    labels_of = {"train": pool.labels[train], "val": val_labels, "test": pool.test_labels}
    return Splits(
        {split: torch.from_numpy(np.ascontiguousarray(array)) for split, array in images.items()},
        {split: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for split, array in labels_of.items()},
        pool.class_names,
        pool.test_from,
        "train" if pool.val is None else "val",
        pool.identity,
        paths,
    )
