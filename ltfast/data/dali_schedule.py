"""What DALI is told to do next: the steps of training, or the batches of an evaluation, part by part.

On a CPU a batch is made in parts: what DALI holds (decoded pictures, queued views) grows with the part, not with the
batch, and colour works on one part while DALI decodes the next two.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltfast.data.decode import BadImage
from ltfast.data.large_source import Step
from ltfast.data.large_views import ViewDraw, draw_views
from ltfast.data.lists import ImageList

if TYPE_CHECKING:
    from ltfast.data.dali_source import DaliSource

PART, PART_PER_THREAD = 16, 8  # pictures; whole batches hold more memory


def part_size(device_type: str, threads: int, batch: int) -> int:
    """Pictures that go through DALI together: a whole batch on a GPU, which is faster the more it has."""
    return batch if device_type == "cuda" else min(batch, max(PART, PART_PER_THREAD * threads))


def spans(total: int, size: int) -> list[slice]:
    """0..total in slices of at most `size`, as even as can be."""
    count = max(-(-total // size), 1)
    return [slice(i * total // count, (i + 1) * total // count) for i in range(count)]


class Sent(NamedTuple):
    """Pictures handed to DALI and not yet back: (epoch, step) of training, images after replacement [n], and each
    view's draws (None: evaluation's plain view).
    """

    step: tuple[int, int]
    shown: Tensor
    draws: tuple[ViewDraw | None, ...]


class Schedule:
    """What a pipeline is fed by; `sent` holds what has not come back, oldest first."""

    sent: deque[Sent]

    def starts_at(self, epoch: int, step: int) -> bool:
        """Whether what comes back next is this step of training."""
        return bool(self.sent) and self.sent[0].step == (epoch, step)


class TrainSchedule(Schedule):
    """What DALI asks for: the steps from (epoch, step) on, without end.

    It must not own the pipeline that it feeds: a pipeline in a reference cycle waits for the garbage collector, and
    one that is collected in a forked worker process hangs there for ever. Hence the weak reference to the source.
    """

    def __init__(self, source: DaliSource, epoch: int, step: int) -> None:
        self.source, self.groups = weakref.proxy(source), source.group_of_class
        self.first = epoch * source.steps_per_epoch + step
        self.sent = deque()
        self.parts = spans(source.batch // source.world, source.part)
        self._epoch, self._steps = -1, list[Step]()

    def __call__(self, info: Any) -> tuple[Any, ...]:
        """A pure function of info.iteration (and of the files known to be bad)."""
        source = self.source
        number, part = divmod(info.iteration, len(self.parts))
        epoch, number = divmod(self.first + number, source.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, list(source.epoch_steps(epoch))
        step = self._steps[number]
        shown = source.usable(step.index[self.parts[part]])
        draws = draw_views(source.views, source.seed, epoch, step.position[self.parts[part]])
        self.sent.append(Sent((epoch, number), shown, draws))
        crops = [draw.crop for draw in draws]
        across, down, place = (torch.stack(part, dim=1).numpy() for part in zip(*crops, strict=True))
        flip = torch.stack([draw.flip for draw in draws], dim=1).float().numpy()
        contents = encoded(source.lists["train"], shown, max(source.workers, 1))
        return contents, across, down, place, flip, shown.numpy()

    def starts_at(self, epoch: int, step: int) -> bool:
        """See Schedule.starts_at; not with other groups than those of now."""
        return self.groups is self.source.group_of_class and super().starts_at(epoch, step)


class EvaluationSchedule(Schedule):
    """What DALI asks for in evaluation: the given batches (int64 [n] each) of a split, in parts of at most `size`."""

    def __init__(self, images: ImageList, batches: Iterable[Tensor], size: int, threads: int) -> None:
        self.images, self.threads = images, threads
        self.parts = [batch[span] for batch in batches for span in spans(len(batch), size)]
        self.sent = deque(Sent((0, 0), part, (None,)) for part in self.parts)

    def __call__(self, info: Any) -> tuple[Any, ...]:
        """A pure function of info.iteration."""
        if info.iteration >= len(self.parts):
            raise StopIteration
        index = self.parts[info.iteration]
        return encoded(self.images, index, self.threads), index.numpy()


def encoded(images: ImageList, index: Tensor, threads: int) -> list[np.ndarray]:
    """What the graph reads: file names as uint8 arrays for fn.io.file.read, or the bytes themselves from tar
    shards.
    """
    if images.loose:
        root = bytes(images.root) + b"/"
        return [np.frombuffer(root + images.paths.raw(i), dtype=np.uint8) for i in index.tolist()]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda i: np.frombuffer(_bytes(images, i), dtype=np.uint8), index.tolist()))


def _bytes(images: ImageList, index: int) -> bytes:
    try:
        return images.read(index)
    except BadImage:
        return b""  # the decoder fails on it, and the search for the culprit finds the reason
