"""Large pictures by DALI: C++ reading, decoding and cropping, colour in torch on the device; broken files do not end
a run.

DALI runs ahead over the ends of epochs: the feed numbers its steps through, so no pipeline is ever reset (a reset in
mid-epoch would be ignored) and an epoch starts without a pause. One bad file ends a DALI pipeline for good; then the
culprit is found, named once, replaced (or left out, in evaluation), and the pipeline is built anew at that step.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltfast.data.base import Batch
from ltfast.data.check import examine
from ltfast.data.dali_pipeline import PREFETCH, decode_pipeline, decodes_regions, evaluation_pipeline, train_pipeline
from ltfast.data.dali_schedule import EvaluationSchedule, Schedule, TrainSchedule, part_size
from ltfast.data.decode import BadImage, dali_fault, decode, look
from ltfast.data.large_source import LargeSource
from ltfast.data.lists import ImageList
from ltfast.errors import UserError

# DALI's own words (dali/core/cuda_error.h) for what no file is to blame for; of files it says "Failed to decode sample" or
# "nvImageCodec failure".
DEVICE_MEMORY = r"CUDA allocation failed|Can't allocate \d+ bytes on device|out of memory"
CUDA_ERROR = r"CUDA (runtime|driver) API error|Can't allocate \d+ bytes on host"


class Running(NamedTuple):
    """A built pipeline and what feeds it."""

    schedule: Schedule
    pipeline: Any


class DaliSource(LargeSource):
    """LargeSource by DALI; workers is its number of CPU threads. Needs the package nvidia-dali."""

    loader = "dali"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device_id = device_number(self.device)
        self.threads = max(self.workers, 1)
        self.part = part_size(self.device.type, self.threads, self.batch // self.world)
        self._kept: Running | None = None
        # Images whose bytes need no look before they are decoded. On a GPU all need one: nobody has seen what its decoders make
        # of broken files. On a CPU those of train where regions are decoded, and TIFFs, whose floats DALI shows as white.
        tiff = {s: torch.from_numpy(x.paths.ending_in(b".tif", b".tiff")) for s, x in self.lists.items()}
        self._looked_at = {s: ~t if self.device_id is None else torch.zeros_like(t) for s, t in tiff.items()}
        if decodes_regions(len(self.views), self.device_id):
            self._looked_at["train"].fill_(False)

    def usable(self, index: Tensor) -> Tensor:
        """See LargeSource.usable; files that need a look get it before their first use."""
        while True:
            shown = super().usable(index)
            if not self._look("train", shown):
                return shown

    def _look(self, split: str, index: Tensor) -> bool:
        """Whether some of the images had to be looked at; reports the bad ones."""
        looked_at = self._looked_at[split]
        new = index[~looked_at[index]].unique(sorted=False).tolist()
        if not new:
            return False
        looked_at[new] = True
        with ThreadPoolExecutor(self.threads) as pool:  # they wait for the disk, each for a file
            for i, found in zip(new, pool.map(lambda i: examine(self.lists[split], i), new), strict=True):
                if found.bad:
                    self.report_bad(split, i, found.bad)
        return True

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        running, self._kept = self._kept, None
        if running is None or not running.schedule.starts_at(epoch, start_step):
            running = None
            running = self._train_pipeline(epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            while not (made := self._next(running, "train", self.batch // self.world)):
                sent = [sent.shown for sent in running.schedule.sent]
                running = None  # frees the old pipeline before new ones are built
                self._find_bad("train", sent)
                running = self._train_pipeline(epoch, step)
            yield made.pop()  # no name here may keep this batch alive while the next one is made
        self._kept = running

    def _next(self, running: Running, split: str, count: int) -> list[Batch]:
        """The next `count` pictures as one batch in a list; an empty list when DALI failed (in self._failure)."""
        views, indices = list[Tensor](), list[Tensor]()
        done = 0
        while done < count:
            if not (outputs := self._run(running.pipeline)):
                return []
            sent = running.schedule.sent.popleft()
            indices.append(outputs.pop())
            assert torch.equal(indices[-1], sent.shown), "DALI returned other pictures than those awaited"
            size = len(sent.shown)
            if size < count and not views:
                views = [self.finisher.empty(count, outputs[0]) for _ in sent.draws]
            places = [view[done : done + size] for view in views]
            made = [self.finisher.view(outputs.pop(0), draw, place) for draw, place in zip_longest(sent.draws, places)]
            views, done = views or made, done + size
        shown = torch.cat(indices)
        return [Batch(tuple(views), self.labels(split, shown), self.on_device(shown))]

    def _train_pipeline(self, epoch: int, step: int) -> Running:
        schedule = TrainSchedule(self, epoch, step)
        pipeline = train_pipeline(
            schedule,
            views=len(self.views),
            loose=self.lists["train"].loose,
            image_size=self.image_size,
            batch=self.part,
            threads=self.threads,
            device_id=self.device_id,
        )
        return self._built(schedule, pipeline)

    def _evaluate_batches(self, split: str, parts: list[Tensor]) -> Iterator[Batch]:
        for part in parts:
            self._look(split, part)
        waiting = self._without_bad(split, parts)
        running: Running | None = self._evaluation_pipeline(split, waiting)
        while waiting:
            assert running is not None
            if made := self._next(running, split, len(waiting[0])):
                waiting.popleft()
                yield made.pop()
            else:
                sent = [sent.shown for sent in running.schedule.sent][: 1 + PREFETCH]
                running = None
                self._find_bad(split, sent)
                waiting = self._without_bad(split, waiting)
                running = self._evaluation_pipeline(split, waiting)

    def _without_bad(self, split: str, batches: Iterable[Tensor]) -> deque[Tensor]:
        """The batches without files known to be bad, where those are left out."""
        if not self.bad or not self.skips(split):
            return deque(batches)
        paths = self.lists[split].paths
        good = ([i for i in batch.tolist() if paths[i] not in self.bad] for batch in batches)
        return deque(torch.tensor(batch, dtype=torch.int64) for batch in good if batch)

    def _evaluation_pipeline(self, split: str, batches: Iterable[Tensor]) -> Running:
        images = self.lists[split]
        largest = max(map(len, batches), default=1)
        size = part_size(self.device.type, self.threads, largest)
        schedule = EvaluationSchedule(images, batches, size, self.threads)
        pipeline = evaluation_pipeline(
            schedule,
            loose=images.loose,
            image_size=self.image_size,
            batch=size,
            threads=self.threads,
            device_id=self.device_id,
        )
        return self._built(schedule, pipeline)

    def _built(self, schedule: Schedule, pipeline: Any) -> Running:
        try:
            pipeline.build()
        except RuntimeError as error:
            fault = self._fault(error)
            if self.device_id is None or isinstance(fault, torch.OutOfMemoryError):
                raise fault or error from None
            raise UserError(
                f"DALI cannot work on this GPU ({_reason(error).splitlines()[0]}); --loader torch does without it"
            ) from error
        return Running(schedule, pipeline)

    def _fault(self, error: RuntimeError) -> RuntimeError | None:
        """What to raise at once where the device is at fault; None where a file may be."""
        return None if self.device_id is None else _fault_of_the_device(error)

    def _run(self, pipeline: Any) -> list[Tensor]:
        """The next outputs as tensors without a copy, or none when DALI failed (the reason is in self._failure)."""
        try:
            if self.device_id is None:
                outputs = pipeline.run()
            else:
                outputs = pipeline.run(torch.cuda.current_stream(self.device))
            return [torch.from_dlpack(output.as_tensor()) for output in outputs]
        except RuntimeError as error:
            if fault := self._fault(error):
                raise fault from None
            self._failure = error.with_traceback(None)  # whose frames would keep the pipeline
            return []

    def _find_bad(self, split: str, sent: list[Tensor]) -> None:
        """Reports the bad files among the images sent; raises DALI's own error when none is to be found.

        Cheapest look first: headers, then a full decode by PIL, then DALI alone, one file at a time.
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
        if self.device_id is None:
            raise self._failure
        said = _reason(self._failure).splitlines()[0]
        raise RuntimeError(
            f"DALI: {said}; no picture is to blame, so the GPU's memory may be short: try a smaller --batch, or --loader torch"
        ) from self._failure


def device_number(device: torch.device) -> int | None:
    """DALI's name of a device: the number of a GPU (of the current one where it has none), None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _fault_of_the_device(error: RuntimeError) -> RuntimeError | None:
    """What to raise instead of looking for a bad file, or None."""
    said = _reason(error)
    if re.search(DEVICE_MEMORY, said):
        return torch.OutOfMemoryError(f"DALI: {said}")
    return error if re.search(CUDA_ERROR, said) else None


def _reason(error: RuntimeError) -> str:
    """DALI's message without the lines of code that it quotes before."""
    return str(error).partition("encountered:")[2].strip() or str(error).strip()


def _by_header(images: ImageList, index: int) -> str:
    try:
        data = images.read(index)
        return look(data) or dali_fault(data)
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
        return f"DALI cannot decode it, --loader torch can: {_reason(error).splitlines()[0]}"
    return ""
