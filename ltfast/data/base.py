"""What every data source promises: batches whose order and augmentation are pure functions of (seed, epoch, position).

Shapes: B batch of this rank, C classes, n training images. Groups for reporting follow the field: many-shot classes
have more than 100 training images, medium-shot 20 to 100, few-shot fewer than 20.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

SPLITS = ("train", "val", "test")
SHOT_NAMES = ("many", "medium", "few")
MANY_ABOVE = 100
FEW_BELOW = 20
Levels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel, of values in 0..1."""


class Batch(NamedTuple):
    """One rank's part of one step.

    views: 1 or 3 tensors [B, channels, H, W], float32, normalised; labels: [B] int64; index: [B] int64, position in the
    split.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor  # type: ignore[assignment]


@runtime_checkable
class Source(Protocol):
    """A data set with its sampler and augmentation, ready to iterate; see `ltfast.data.load`.

    train_counts is LongTensor[C] and train_labels LongTensor[n], both on the CPU; sizes maps each split to its number
    of images (val may have none); test_from is the set's own split that the test images are of, 'val' where the set calls
    it so, 'train' where they are held out of it, and val_from likewise; lacking maps each split to its number of classes
    without an image; fingerprint tells other training images in hexadecimal, wherever they lie; eval_batch is how many images
    `evaluate` gives at a time; paths maps each split to the names of its files, where they are files.
    """

    num_classes: int
    class_names: tuple[str, ...]
    train_counts: Tensor
    train_labels: Tensor
    input_shape: tuple[int, int, int]
    sizes: dict[str, int]
    test_from: str
    val_from: str
    lacking: dict[str, int]
    fingerprint: str
    steps_per_epoch: int
    eval_batch: int
    paths: Mapping[str, Sequence[str]]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def train(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from `start_step` on: ceil(n / batch) steps of a constant size."""
        ...

    def evaluate(self, split: str, indices: Tensor | None = None, batch: int | None = None) -> Iterator[Batch]:
        """One plain view of every image of the split (or of `indices`), this rank's share of it, each image exactly
        once."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides which image stands where in an epoch, as plain values: a run goes on only where it is the same."""
        ...

    def normalise(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Take this mean and deviation of each channel (of values in 0..1) for the plain views from now on."""
        ...

    def set_groups(self, group_of_class: Tensor) -> None:
        """Tell the group-stratified sampler which group each class belongs to (LongTensor[C])."""
        ...


def lacking_classes(labels: Mapping[str, ArrayLike], num_classes: int) -> dict[str, int]:
    """How many of the classes have no image in a split, for `labels` [n] of each split on the CPU."""
    counts = {split: np.bincount(np.asarray(y), minlength=num_classes) for split, y in labels.items()}
    return {split: int((count[:num_classes] == 0).sum()) for split, count in counts.items()}


def split_note(sizes: Mapping[str, int], test_from: str, lacking: Mapping[str, int], num_classes: int) -> str:
    """What is unusual about the splits, in one line: no test split of the set's own, no validation, classes without an
    image; '' for nothing. Arguments as in Source."""
    test = {"val": "tested on the split named val, there is no other", "train": "tested on images held out of train"}
    parts = [test[test_from]] if test_from in test else []
    if not sizes.get("val", 0):
        parts.append("no validation split, so no best checkpoint is chosen (--val-per-class N holds one out of train)")
    for split in ("val", "test"):
        if sizes.get(split, 0) and lacking[split]:
            parts.append(
                f"{split} has no image of {lacking[split]:,} of {num_classes:,} classes: means are over the others"
            )
    return "; ".join(parts)


def shot_groups(counts_C: Tensor) -> Tensor:
    """Reporting group of each class, LongTensor[C]: 0 many (> 100 training images), 1 medium (20 to 100),
    2 few (< 20)."""
    counts = counts_C.to(torch.int64)
    return torch.where(counts > MANY_ABOVE, 0, torch.where(counts < FEW_BELOW, 2, 1))
