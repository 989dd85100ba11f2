"""Large pictures by DALI: C++ reading, decoding and cropping, colour in torch on the device; broken files do not end
a run.

DALI runs ahead over the ends of epochs: the feed numbers its steps through, so no pipeline is ever reset (a reset in
mid-epoch would be ignored) and an epoch starts without a pause. One bad file ends a DALI pipeline for good; then the
culprit is found, named once, replaced (or left out, in evaluation), and the pipeline is built anew at that step,
which takes about 0.3 s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltfast.data.base import Batch
from ltfast.data.dali_pipeline import PREFETCH, decode_pipeline, evaluation_pipeline, train_pipeline
from ltfast.data.decode import BadImage, load_picture, look, read
from ltfast.data.large_source import LargeSource, Step
from ltfast.data.large_views import ViewDraw, draw_views
from ltfast.data.lists import ImageList


class Sent(NamedTuple):
    """A training step handed to DALI and not yet back: images after replacement, and the draws that colour needs."""

    step: Step
    shown: Tensor
    draws: tuple[ViewDraw, ...]


class TrainFeed:
    """The external source of one pipeline, and the pipeline: steps from (epoch, step) on, without end."""

    def __init__(self, source: DaliSource, epoch: int, step: int) -> None:
        self.source, self.groups = source, source.group_of_class
        self.first = epoch * source.steps_per_epoch + step
        self.sent: deque[Sent] = deque()
        self._epoch, self._steps = -1, list[Step]()
        self.pipeline = train_pipeline(
            self.next_inputs,
            views=len(source.views),
            image_size=source.image_size,
            batch=source.batch // source.world,
            threads=max(source.workers, 1),
            device_id=source.device_id,
        )
        self.pipeline.build()

    def next_inputs(self, info: Any) -> tuple[Any, ...]:
        """What DALI asks for: a pure function of info.iteration (and of the files known to be bad)."""
        source = self.source
        epoch, number = divmod(self.first + info.iteration, source.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, list(source.epoch_steps(epoch))
        step = self._steps[number]
        shown = source.usable(step.index)
        draws = draw_views(source.views, source.seed, epoch, step.position)
        self.sent.append(Sent(step, shown, draws))
        crops = [draw.crop for draw in draws]
        across, down, place = (torch.stack(part, dim=1).numpy() for part in zip(*crops, strict=True))
        flip = torch.stack([draw.flip for draw in draws], dim=1).float().numpy()
        return paths(source.lists["train"], shown), across, down, place, flip, shown.numpy()

    def starts_at(self, epoch: int, step: int) -> bool:
        """Whether the next step that comes back is (epoch, step), drawn with the groups of now."""
        if self.groups is not self.source.group_of_class:
            return False
        return bool(self.sent) and (self.sent[0].step.epoch, self.sent[0].step.step) == (epoch, step)


class EvaluationFeed:
    """The external source of an evaluation pipeline: the given parts of a split, known bad files left out."""

    def __init__(self, source: DaliSource, split: str, parts: list[Tensor]) -> None:
        self.images = source.lists[split]
        known = source.bad
        kept = [
            [i for i in part.tolist() if self.images.paths[i] not in known] if known else part.tolist()
            for part in parts
        ]
        self.sent = deque(torch.tensor(part, dtype=torch.int64) for part in kept if part)
        self._parts = list(self.sent)
        self.pipeline = evaluation_pipeline(
            self.next_inputs,
            image_size=source.image_size,
            batch=max(map(len, self._parts), default=1),
            threads=max(source.workers, 1),
            device_id=source.device_id,
        )
        self.pipeline.build()

    def next_inputs(self, info: Any) -> tuple[Any, ...]:
        """What DALI asks for, part by part."""
        if info.iteration >= len(self._parts):
            raise StopIteration
        index = self._parts[info.iteration]
        return paths(self.images, index), index.numpy()


class DaliSource(LargeSource):
    """LargeSource by DALI; workers is its number of CPU threads. Needs the package nvidia-dali."""

    loader = "dali"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device_id = (self.device.index or 0) if self.device.type == "cuda" else None
        self._kept: TrainFeed | None = None

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        feed, self._kept = self._kept, None
        if start_step < self.steps_per_epoch and (feed is None or not feed.starts_at(epoch, start_step)):
            feed = TrainFeed(self, epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            assert feed is not None
            while (outputs := self._run(feed.pipeline)) is None:
                self._find_bad("train", [sent.shown for sent in feed.sent])
                feed = TrainFeed(self, epoch, step)
            sent = feed.sent.popleft()
            *pictures, shown = outputs
            assert torch.equal(shown, sent.shown), "DALI returned another step than the one awaited"
            views = tuple(self.finisher.view(p, draw) for p, draw in zip(pictures, sent.draws, strict=True))
            yield Batch(views, self.labels("train", sent.shown), self.on_device(sent.shown))
        self._kept = feed

    def _evaluate_batches(self, split: str, parts: list[Tensor]) -> Iterator[Batch]:
        feed = EvaluationFeed(self, split, parts)
        while feed.sent:
            outputs = self._run(feed.pipeline)
            if outputs is None:
                self._find_bad(split, list(feed.sent)[: 1 + PREFETCH])
                feed = EvaluationFeed(self, split, list(feed.sent))
                continue
            shown = feed.sent.popleft()
            yield Batch((self.finisher.plain(outputs[0]),), self.labels(split, shown), self.on_device(shown))

    def _run(self, pipeline: Any) -> list[Tensor] | None:
        """The next outputs as tensors without a copy, or None when DALI failed (the reason is in self._failure)."""
        try:
            if self.device_id is None:
                outputs = pipeline.run()
            else:
                outputs = pipeline.run(torch.cuda.current_stream(self.device))
            return [torch.from_dlpack(output.as_tensor()) for output in outputs]
        except RuntimeError as error:
            self._failure = error
            return None

    def _find_bad(self, split: str, sent: list[Tensor]) -> None:
        """Reports the bad files among the images sent; raises DALI's own error when none is to be found.

        Cheapest look first: headers (30 us a file), then a full decode by PIL, then DALI alone, one file at a time.
        The batch that failed is the oldest that has not come back; the younger ones are asked only when it is
        innocent.
        """
        images = self.lists[split]
        for index in sent:
            for check in (_by_header, _by_pil, _by_dali):
                found = [(i, reason) for i in dict.fromkeys(index.tolist()) if (reason := check(images.file(i)))]
                if found:
                    for i, reason in found:
                        self.report_bad(split, i, reason)
                    return
        raise self._failure


def paths(images: ImageList, index: Tensor) -> list[np.ndarray]:
    """Full file names as uint8 arrays, as fn.io.file.read wants them."""
    root = bytes(images.root) + b"/"
    return [np.frombuffer(root + images.paths.raw(i), dtype=np.uint8) for i in index.tolist()]


def _by_header(path: str) -> str:
    try:
        return look(read(path))
    except BadImage as error:
        return str(error)


def _by_pil(path: str) -> str:
    try:
        load_picture(path)
    except BadImage as error:
        return str(error)
    return ""


def _by_dali(path: str) -> str:
    import os

    try:
        decode_pipeline(os.fsencode(path)).run()
    except RuntimeError as error:
        after = str(error).partition("encountered:")[2].strip() or str(error).strip()
        return "DALI cannot decode it: " + after.splitlines()[0]
    return ""
