"""Large pictures by DALI: C++ reading, decoding and cropping, colour in torch on the device; broken files do not end
a run.

DALI runs ahead over the ends of epochs: the feed numbers its steps through, so no pipeline is ever reset (a reset in
mid-epoch would be ignored) and an epoch starts without a pause. One bad file ends a DALI pipeline for good; then the
culprit is found, named once, replaced (or left out, in evaluation), and the pipeline is built anew at that step,
which takes about 0.3 s.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltfast.data.base import Batch
from ltfast.data.check import examine
from ltfast.data.dali_pipeline import PREFETCH, decode_pipeline, decodes_regions, evaluation_pipeline, train_pipeline
from ltfast.data.decode import BadImage, decode, look
from ltfast.data.large_source import LargeSource, Step
from ltfast.data.large_views import ViewDraw, draw_views
from ltfast.data.lists import ImageList


class Sent(NamedTuple):
    """A training step handed to DALI and not yet back: images after replacement, and the draws that colour needs."""

    step: Step
    shown: Tensor
    draws: tuple[ViewDraw, ...]


class TrainSchedule:
    """What DALI asks for: the steps from (epoch, step) on, without end.

    It must not own the pipeline that it feeds: a pipeline in a reference cycle waits for the garbage collector, and
    one that is collected in a forked worker process hangs there for ever. Hence the weak reference to the source.
    """

    def __init__(self, source: DaliSource, epoch: int, step: int) -> None:
        self.source, self.groups = weakref.proxy(source), source.group_of_class
        self.first = epoch * source.steps_per_epoch + step
        self.sent: deque[Sent] = deque()
        self._epoch, self._steps = -1, list[Step]()

    def __call__(self, info: Any) -> tuple[Any, ...]:
        """A pure function of info.iteration (and of the files known to be bad)."""
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
        contents = encoded(source.lists["train"], shown, max(source.workers, 1))
        return contents, across, down, place, flip, shown.numpy()

    def starts_at(self, epoch: int, step: int) -> bool:
        """Whether the next step that comes back is (epoch, step), drawn with the groups of now."""
        if self.groups is not self.source.group_of_class:
            return False
        return bool(self.sent) and (self.sent[0].step.epoch, self.sent[0].step.step) == (epoch, step)


class EvaluationSchedule:
    """What DALI asks for in evaluation: the given parts of a split, one after another."""

    def __init__(self, images: ImageList, parts: list[Tensor], threads: int) -> None:
        self.images, self.parts, self.threads = images, parts, threads
        self.sent = deque(parts)

    def __call__(self, info: Any) -> tuple[Any, ...]:
        if info.iteration >= len(self.parts):
            raise StopIteration
        index = self.parts[info.iteration]
        return encoded(self.images, index, self.threads), index.numpy()


class DaliSource(LargeSource):
    """LargeSource by DALI; workers is its number of CPU threads. Needs the package nvidia-dali."""

    loader = "dali"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device_id = (self.device.index or 0) if self.device.type == "cuda" else None
        self._kept: tuple[TrainSchedule, Any] | None = None
        # Images whose bytes need no look before they are decoded; see dali_pipeline.decodes_regions.
        regions = decodes_regions(len(self.views), self.device_id)
        self._looked_at = torch.full((self.sizes["train"],), not regions)

    def usable(self, index: Tensor) -> Tensor:
        """See LargeSource.usable; where regions are decoded, every file is looked at (30 us) before its first use."""
        while True:
            shown = super().usable(index)
            new = shown[~self._looked_at[shown]].tolist()
            if not new:
                return shown
            self._looked_at[new] = True
            for i in dict.fromkeys(new):
                if reason := examine(self.lists["train"], i)[0]:
                    self.report_bad("train", i, reason)

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        kept, self._kept = self._kept, None
        if kept is None or not kept[0].starts_at(epoch, start_step):
            kept = None  # frees an old pipeline before a new one is built
            kept = self._train_pipeline(epoch, start_step)
        schedule, pipeline = kept
        for step in range(start_step, self.steps_per_epoch):
            while (outputs := self._run(pipeline)) is None:
                self._find_bad("train", [sent.shown for sent in schedule.sent])
                schedule, pipeline = self._train_pipeline(epoch, step)
            # No name here may keep this batch alive while the next one is made.
            yield self._finished(schedule.sent.popleft(), outputs)
        self._kept = (schedule, pipeline)

    def _finished(self, sent: Sent, outputs: list[Tensor]) -> Batch:
        shown = outputs.pop()
        assert torch.equal(shown, sent.shown), "DALI returned another step than the one awaited"
        views = tuple(self.finisher.view(outputs.pop(0), draw) for draw in sent.draws)
        return Batch(views, self.labels("train", shown), self.on_device(shown))

    def _train_pipeline(self, epoch: int, step: int) -> tuple[TrainSchedule, Any]:
        schedule = TrainSchedule(self, epoch, step)
        pipeline = train_pipeline(
            schedule,
            views=len(self.views),
            loose=self.lists["train"].loose,
            image_size=self.image_size,
            batch=self.batch // self.world,
            threads=max(self.workers, 1),
            device_id=self.device_id,
        )
        pipeline.build()
        return schedule, pipeline

    def _evaluate_batches(self, split: str, parts: list[Tensor]) -> Iterator[Batch]:
        schedule, pipeline = self._evaluation_pipeline(split, parts)
        while schedule.sent:
            outputs = self._run(pipeline)
            if outputs is None:
                self._find_bad(split, list(schedule.sent)[: 1 + PREFETCH])
                schedule, pipeline = self._evaluation_pipeline(split, list(schedule.sent))
                continue
            shown = schedule.sent.popleft()
            yield Batch((self.finisher.plain(outputs[0]),), self.labels(split, shown), self.on_device(shown))

    def _evaluation_pipeline(self, split: str, parts: list[Tensor]) -> tuple[EvaluationSchedule, Any]:
        """A pipeline over the parts, known bad files left out."""
        images, threads = self.lists[split], max(self.workers, 1)
        if self.bad:
            good = [[i for i in part.tolist() if images.paths[i] not in self.bad] for part in parts]
            parts = [torch.tensor(part, dtype=torch.int64) for part in good if part]
        schedule = EvaluationSchedule(images, parts, threads)
        pipeline = evaluation_pipeline(
            schedule,
            loose=images.loose,
            image_size=self.image_size,
            batch=max(map(len, parts), default=1),
            threads=threads,
            device_id=self.device_id,
        )
        pipeline.build()
        return schedule, pipeline

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
                found = [(i, reason) for i in dict.fromkeys(index.tolist()) if (reason := check(images, i))]
                if found:
                    for i, reason in found:
                        self.report_bad(split, i, reason)
                    return
        raise self._failure


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


def _by_header(images: ImageList, index: int) -> str:
    try:
        return look(images.read(index))
    except BadImage as error:
        return str(error)


def _by_pil(images: ImageList, index: int) -> str:
    try:
        decode(images.read(index))
    except BadImage as error:
        return str(error)
    return ""


def _by_dali(images: ImageList, index: int) -> str:
    try:
        decode_pipeline(images.read(index)).run()
    except RuntimeError as error:
        after = str(error).partition("encountered:")[2].strip() or str(error).strip()
        return "DALI cannot decode it: " + after.splitlines()[0]
    return ""
