"""What both loaders of large pictures share: order, shards, bad files.

An epoch is sampler.epoch_order, a pure function of (seed, epoch); step s of rank r trains on row s of its
rank_slice. A picture that cannot be decoded is replaced by the next image of its own class in list order, so shapes,
class shares and the order of all other images stay. In validation and test it is an error, unless on_bad_image="skip"
leaves it out; "fail" makes it one in training too.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from ltfast.data.base import SPLITS, Batch, lacking_classes
from ltfast.data.finish import Finisher
from ltfast.data.large_views import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe
from ltfast.data.lists import ImageList
from ltfast.data.sampler import Ordered, check_batch, check_sampler, steps_per_epoch
from ltfast.errors import UserError
from ltfast.launch import launched, processes_here

log = logging.getLogger("ltfast.data")
ON_BAD_IMAGE = ("auto", "skip", "fail")
MIN_IMAGE_SIZE = 8


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's part of one training step: place in the epoch and image of each picture, both int64 [b]."""

    epoch: int
    step: int
    position: Tensor
    index: Tensor


class LargeSource(Ordered):
    """Base of DaliSource and TorchSource; a `Source` (base.py) once `_train_batches` and `_evaluate_batches` exist.

    lists: train, val and test; views: 1 or 3 recipes; batch: global; workers: threads (DALI) or processes (torch),
    at least 0. UserError for what a user can set wrong.
    """

    loader = ""
    eval_batch = 256

    def __init__(
        self,
        lists: dict[str, ImageList],
        *,
        views: Sequence[ViewRecipe],
        image_size: int = 224,
        batch: int = 256,
        sampler: str = "instance",
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        epochs_total: int | None = None,
        workers: int = 2,
        on_bad_image: str = "auto",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        train = lists["train"]
        if len(train):  # else a model is evaluated
            check_batch(batch, len(train), world, train.source)
        check_sampler(sampler, epochs_total)
        if on_bad_image not in ON_BAD_IMAGE:
            raise UserError(f"--on-bad-image {on_bad_image!r}: choose one of {', '.join(ON_BAD_IMAGE)}")
        if image_size < MIN_IMAGE_SIZE:
            raise UserError(f"--image-size {image_size}: it must be at least {MIN_IMAGE_SIZE}")
        if len(views) not in (1, 3):
            raise ValueError(f"views must be 1 or 3 recipes, got {len(views)}")
        self.lists, self.views, self.image_size = lists, tuple(views), image_size
        self.num_classes = train.num_classes
        self.class_names = train.names
        self.train_labels = torch.from_numpy(train.labels.astype(np.int64))
        self.train_counts = torch.bincount(self.train_labels, minlength=self.num_classes)
        self.input_shape = (3, image_size, image_size)
        self.sizes = {split: len(lists[split]) for split in SPLITS}
        self.paths: Mapping[str, Sequence[str]] = {split: lists[split].paths for split in SPLITS}
        self.test_from, self.val_from = lists["test"].split or "test", lists["val"].split or "val"
        self.lacking = lacking_classes({split: lists[split].labels for split in SPLITS}, self.num_classes)
        self.fingerprint = f"{train.fingerprint():08x}"
        self.steps_per_epoch = steps_per_epoch(len(train), batch) if len(train) else 0
        self.batch, self.sampler, self.seed, self.epochs_total = batch, sampler, seed, epochs_total
        self.rank, self.world, self.workers = rank, world, workers
        self.on_bad_image = on_bad_image
        self.device = torch.device(device)
        # Half of the threads; DALI has the other half, for decoding and cropping.
        threads = max(workers // 2, 1) if self.loader == "dali" else 1
        self.mean, self.std = tuple(mean), tuple(std)
        self.finisher = Finisher(mean, std, self.device, threads)
        self.bad: dict[str, str] = {}
        self.replaced = torch.zeros((), dtype=torch.int64, device=self.device)  # this rank's, in this epoch so far
        self._labels = {split: torch.from_numpy(lists[split].labels.astype(np.int64)) for split in SPLITS}
        self.substitutes = Substitutes(train.labels)

    def normalise(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """See Source.normalise; before the first batch."""
        self.mean, self.std = mean, std
        self.finisher.normalise(mean, std)

    def epoch_steps(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """This rank's steps of one epoch. ValueError when start_step is outside the epoch."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        indices = self.epoch_indices(epoch)
        share = self.batch // self.world
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch + self.rank * share
            yield Step(epoch, step, torch.arange(first, first + share), indices[step])

    def train(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See Source.train."""
        wanted: list[Tensor] = []

        def counted(batch: Batch, step: int) -> Batch:
            if self.bad:
                if not wanted:
                    wanted.append(self.epoch_indices(epoch))
                self.replaced += (batch.index != self.on_device(wanted[0][step])).sum()
            return batch

        # map and no loop: a name of a loop would keep a batch alive while the next one is made.
        return map(counted, self._train_batches(epoch, start_step), itertools.count(start_step))

    def evaluate(self, split: str, indices: Tensor | None = None, batch: int | None = None) -> Iterator[Batch]:
        """See Source.evaluate: resize, centre crop, no augmentation; ranks take contiguous, nearly equal parts.

        A file that cannot be decoded is left out (on_bad_image="skip", and "auto" in the train split) or a UserError.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        chosen = torch.arange(self.sizes[split]) if indices is None else indices.to("cpu", torch.int64)
        mine = chosen.tensor_split(self.world)[self.rank]
        return self._evaluate_batches(split, [part for part in mine.split(batch or self.eval_batch) if len(part)])

    def usable(self, index: Tensor) -> Tensor:
        """index with every training image known to be bad replaced by its substitute; int64 [b]."""
        if not self.bad:
            return index
        paths = self.lists["train"].paths
        chosen = []
        for wanted in index.tolist():
            good = next((i for i in self.substitutes(wanted) if paths[i] not in self.bad), None)
            chosen.append(self.no_substitute(wanted) if good is None else good)
        return torch.tensor(chosen)

    def no_substitute(self, index: int) -> NoReturn:
        """UserError: every image of this one's class is bad."""
        images = self.lists["train"]
        raise UserError(
            f"{images.source}: no picture of class {self.class_names[int(images.labels[index])]!r} can be decoded, "
            f"for one {images.paths[index]!r}; see `ltfast data check`"
        )

    def skips(self, split: str) -> bool:
        """Whether a run goes on when a file of this split is bad."""
        return self.on_bad_image == "skip" or (self.on_bad_image == "auto" and split == "train")

    def report_bad(self, split: str, index: int, reason: str) -> None:
        """Names a bad file once: a warning where it is skipped, else a UserError."""
        images = self.lists[split]
        path = images.paths[index]
        if not self.skips(split):
            raise UserError(
                f"{images.file(index)} cannot be decoded ({reason}); replace it, take it off {images.source}, or use "
                "--on-bad-image skip"
            )
        if path not in self.bad:
            self.bad[path] = reason
            what = "replaced by another image of its class" if split == "train" else "left out"
            log.warning("%s cannot be decoded (%s): %s", Path(images.root, path), reason, what)

    def labels(self, split: str, index: Tensor) -> Tensor:
        """int64 labels on the source's device."""
        return self._labels[split][index].to(self.device, non_blocking=True)

    def on_device(self, index: Tensor) -> Tensor:
        """index on the source's device."""
        return index.to(self.device, non_blocking=True)

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _evaluate_batches(self, split: str, parts: list[Tensor]) -> Iterator[Batch]:
        raise NotImplementedError


class Substitutes:
    """substitutes(i): i, then the other images of its class in list order from i on, round once. 16 bytes per image."""

    def __init__(self, labels: np.ndarray) -> None:
        self._by_class = np.argsort(labels, kind="stable")
        self._place = np.empty_like(self._by_class)
        self._place[self._by_class] = np.arange(len(labels))
        self._labels, self._counts = labels, np.bincount(labels)
        self._starts = np.cumsum(self._counts) - self._counts

    def __call__(self, index: int) -> Iterator[int]:
        label = int(self._labels[index])
        count, start = int(self._counts[label]), int(self._starts[label])
        offset = int(self._place[index]) - start
        return (int(self._by_class[start + (offset + step) % count]) for step in range(count))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """This process's share of them, where a launcher runs several on this machine: a loader thread has memory of its own,
    DALI's for JPEGs 16 MiB on the GPU and as much pinned."""
    return max(1, available_cores() // (processes_here() if launched() else 1))
