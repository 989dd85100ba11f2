"""Generated pictures in the place of files: a list can be planned and stepped through before a single picture is at
hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltfast.data.base import Batch
from ltfast.data.large_source import LargeSource
from ltfast.data.rng import epoch_key, uniforms

COARSE = 4  # pictures are COARSE x COARSE colours, enlarged: smooth, and different for every image


class SyntheticSource(LargeSource):
    """LargeSource whose pictures are smooth colours drawn from (seed, split, image): same order, labels and shapes,
    no file read.
    """

    loader = "synthetic"

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for step in self.epoch_steps(epoch, start_step):
            views = tuple(self._pictures(step.index, view) for view in range(len(self.views)))
            yield Batch(views, self.labels("train", step.index), self.on_device(step.index))

    def _evaluate_batches(self, split: str, parts: list[Tensor]) -> Iterator[Batch]:
        for index in parts:
            yield Batch((self._pictures(index, 3),), self.labels(split, index), self.on_device(index))

    def _pictures(self, index: Tensor, stream: int) -> Tensor:
        colours = uniforms(epoch_key(self.seed, 0), index, stream, 3 * COARSE * COARSE).view(-1, 3, COARSE, COARSE)
        large = torch.nn.functional.interpolate(
            colours.to(self.device), size=(self.image_size, self.image_size), mode="bilinear"
        )
        return self.finisher.plain((large * 255).to(torch.uint8).permute(0, 2, 3, 1))
