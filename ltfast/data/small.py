"""SmallSource: every split lives on the device as uint8; a batch is an index gather and views made there, per sample.

No workers, no host copies and no synchronisation inside an epoch: order and keys go to the device when it starts. What
a step sees is a pure function of (seed, epoch, position), so CPU and CUDA, one rank and many, first run and resumed run
see the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ltfast.data.augment import Plain, View
from ltfast.data.base import SPLITS, Batch, lacking_classes
from ltfast.data.pool import Splits
from ltfast.data.rng import epoch_key, uniforms
from ltfast.data.sampler import Ordered, check_batch, check_sampler, rank_slice, steps_per_epoch, times_before


class SmallSource(Ordered):
    """A `Source` over splits that fit on the device. Attributes as in base.Source; `images[split]` and `labels[split]`
    on `device`.

    views: the training views (1 or 3); plain: the view of `evaluate`; batch: the global batch, a multiple of world and
    at most the training images; epochs_total: needed by the progressive sampler. UserError for what a user can set
    wrong.
    """

    eval_batch = 1024

    def __init__(
        self,
        splits: Splits,
        *,
        views: Sequence[View],
        plain: Plain,
        batch: int,
        sampler: str = "instance",
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        epochs_total: int | None = None,
        name: str = "data",
    ) -> None:
        self.class_names = splits.class_names
        self.num_classes = len(splits.class_names)
        self.train_labels = splits.labels["train"]
        self.train_counts = splits.train_counts
        self.sizes = {split: len(splits.labels[split]) for split in SPLITS}
        self.paths: Mapping[str, Sequence[str]] = splits.paths
        self.test_from, self.val_from = splits.test_from, splits.val_from
        self.lacking = lacking_classes(splits.labels, self.num_classes)
        self.fingerprint = f"{zlib.crc32(self.train_labels.numpy().tobytes(), splits.identity):08x}"
        if self.sizes["train"]:  # else a model is evaluated
            check_batch(batch, self.sizes["train"], world, name)
        check_sampler(sampler, epochs_total)
        self.device = torch.device(device)
        self.images = {split: splits.images[split].to(self.device) for split in SPLITS}
        self.labels = {split: splits.labels[split].to(self.device) for split in SPLITS}
        self.views = tuple(view.to(self.device) for view in views)
        self.normalise(plain.mean, plain.std)
        self.batch, self.sampler, self.seed = batch, sampler, seed
        self.rank, self.world, self.epochs_total = rank, world, epochs_total
        self.steps_per_epoch = steps_per_epoch(self.sizes["train"], batch) if self.sizes["train"] else 0
        probe = self.plain(self.images["train"][:1])
        self.input_shape: tuple[int, int, int] = (probe.shape[1], probe.shape[2], probe.shape[3])

    def normalise(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """See `Source.normalise`."""
        self.mean, self.std = mean, std
        self.plain = Plain(mean, std).to(self.device)

    def epoch_indices(self, epoch: int) -> Tensor:
        """[steps, batch / world] int64 on the device: the images that this rank trains on, step by step."""
        return super().epoch_indices(epoch).to(self.device)

    def epoch_draws(self, epoch: int) -> Tensor:
        """[steps, batch / world] int64 on the device, for `make_batch`: image + n * (times it was drawn before)."""
        order = self.whole_epoch(epoch)
        draws = order + self.sizes["train"] * times_before(order)
        return rank_slice(draws, self.batch, self.rank, self.world).to(self.device)

    def epoch_key(self, epoch: int) -> Tensor:
        """Scalar int64 tensor on the device that stands for (seed, epoch) in `make_batch`."""
        return epoch_key(self.seed, epoch, self.device)

    def make_batch(self, draw: Tensor, key: Tensor) -> Batch:
        """The training batch for `draw` [b] of `epoch_draws`: tensor arithmetic only, so it can be compiled or captured.
        Augmentation hangs on the draw, so an image that is drawn again looks different.

        `source.make_batch = torch.compile(source.make_batch, fullgraph=True)` makes one graph for all epochs.
        """
        index = draw % self.sizes["train"]
        images = self.images["train"][index]
        views = []
        for stream, view in enumerate(self.views):
            numbers = uniforms(key, draw, stream, view.draws) if view.draws else None
            views.append(view(images, numbers))
        return Batch(tuple(views), self.labels["train"][index], index)

    def train(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See Source.train."""
        draws, key = self.epoch_draws(epoch), self.epoch_key(epoch)
        for step in range(start_step, self.steps_per_epoch):
            yield self.make_batch(draws[step], key)

    def evaluate(self, split: str, indices: Tensor | None = None, batch: int | None = None) -> Iterator[Batch]:
        """See Source.evaluate; ranks take contiguous, nearly equal parts, and the last batch may be smaller."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        chosen = torch.arange(self.sizes[split]) if indices is None else indices
        mine = chosen.tensor_split(self.world)[self.rank].to(self.device)
        for index in mine.split(batch or self.eval_batch):
            if len(index):
                yield Batch((self.plain(self.images[split][index]),), self.labels[split][index], index)
