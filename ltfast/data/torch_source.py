"""Large pictures by torch's DataLoader, PIL and torchvision: the readable twin of the DALI pipeline, and its stand-in.

A task is one step: a worker decodes each picture once and makes its views, one PIL call after another, from the
numbers that large_views.py draws. It hands back uint8 pictures (a quarter of the floats' traffic); normalisation
happens on the device.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as F  # here, not in functions: each forked worker would import it again
from PIL.Image import Image, preinit
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ltfast.data.base import Batch
from ltfast.data.color import BRIGHTNESS, CONTRAST, HUE, SATURATION
from ltfast.data.decode import BadImage, decode
from ltfast.data.large_source import LargeSource, Step, Substitutes, available_cores
from ltfast.data.large_views import ViewDraw, ViewRecipe, crop_windows, draw_views, evaluation_window
from ltfast.data.lists import ImageList
from ltfast.data.randaugment import apply_rand_augment_pil

preinit()
AHEAD = 2  # steps that each worker prepares in advance


class Decoded(NamedTuple):
    """What a worker returns: uint8 views [b, H, W, 3], the images they show [b], and (image, reason) of bad files.

    Without views: a bad file under on_bad_image="fail", or a class without a good file.
    """

    views: tuple[Tensor, ...]
    shown: Tensor
    bad: list[tuple[int, str]]


def augment(image: Image, draw: ViewDraw, i: int, image_size: int) -> Image:
    """View of picture i of a draw: crop, resize, flip, jitter, gray, RandAugment, each as torchvision or timm does
    it.
    """
    size = torch.tensor([[image.height, image.width]])
    crop = type(draw.crop)(*(part[i : i + 1] for part in draw.crop))
    top, left, height, width = crop_windows(crop, size)[0].tolist()
    image = F.resized_crop(image, top, left, height, width, [image_size, image_size], InterpolationMode.BILINEAR)
    if bool(draw.flip[i]):
        image = F.hflip(image)
    if draw.jitter is not None:
        if bool(draw.jitter.applied[i]):
            factors = draw.jitter.factors[i].tolist()
            for step in draw.jitter.order[i].tolist():
                image = _jitter_step(image, step, factors[step])
        if bool(draw.jitter.gray[i]):
            image = F.to_grayscale(image, num_output_channels=3)
    if draw.augment is not None:
        image = apply_rand_augment_pil(image, draw.augment, i)
    return image


def _jitter_step(image: Image, step: int, factor: float) -> Image:
    if step == HUE:
        return F.adjust_hue(image, factor) if factor else image
    adjust = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}[step]
    return adjust(image, factor)


def evaluation_crop(image: Image, image_size: int) -> Image:
    """torchvision's Resize(evaluation_size(image_size)) and CenterCrop(image_size)."""
    height, width, top, left = evaluation_window(image.height, image.width, image_size)
    return F.crop(F.resize(image, [height, width]), top, left, image_size, image_size)


def pixels(image: Image) -> Tensor:
    """uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class TrainTasks(torch.utils.data.Dataset[Decoded]):
    """Step -> Decoded, in a worker; holds no device memory."""

    images: ImageList
    views: tuple[ViewRecipe, ...]
    image_size: int
    seed: int
    skip: bool
    substitutes: Substitutes

    def __getitem__(self, step: Step) -> Decoded:  # type: ignore[override]
        draws = draw_views(self.views, self.seed, step.epoch, step.position)
        size = self.image_size
        views = [torch.empty(len(step.index), size, size, 3, dtype=torch.uint8) for _ in draws]
        shown, bad = step.index.clone(), []
        for i, wanted in enumerate(step.index.tolist()):
            image = None
            for index in self.substitutes(wanted):
                try:
                    image = decode(self.images.read(index))
                    break
                except BadImage as error:
                    bad.append((index, str(error)))
                    if not self.skip:
                        break
            if image is None:
                return Decoded((), shown, bad)
            shown[i] = index
            for view, draw in zip(views, draws, strict=True):
                view[i] = pixels(augment(image, draw, i, size))
        return Decoded(tuple(views), shown, bad)


@dataclass(frozen=True)
class EvaluationTasks(torch.utils.data.Dataset[Decoded]):
    """Images of a split, int64 [b] -> Decoded without the bad files, in a worker."""

    images: ImageList
    image_size: int

    def __getitem__(self, wanted: Tensor) -> Decoded:  # type: ignore[override]
        size = self.image_size
        pictures, shown, bad = [torch.empty(0, size, size, 3, dtype=torch.uint8)], [], []
        for index in wanted.tolist():
            try:
                picture = evaluation_crop(decode(self.images.read(index)), size)
                pictures.append(pixels(picture)[None])
                shown.append(index)
            except BadImage as error:
                bad.append((index, str(error)))
        return Decoded((torch.cat(pictures),), torch.tensor(shown, dtype=torch.int64), bad)


class TorchSource(LargeSource):
    """LargeSource by DataLoader workers; workers=0 decodes in this process."""

    loader = "torch"

    def _load(self, dataset: torch.utils.data.Dataset[Decoded], tasks: list[Step] | list[Tensor]) -> Iterator[Decoded]:
        workers = min(self.workers, len(tasks), available_cores())  # more would only cost memory, and torch warns
        # One worker task is one whole batch: the loader's own batching is off.
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its base seed is not drawn from the generator that a resumed run goes on with
        )
        # A worker that collects garbage of its parent runs destructors that need the parent's threads: a DALI
        # pipeline's waits for ever. So nothing is collected between fork and _start_worker.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return iter(loader)
        finally:
            if collecting:
                gc.enable()

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        tasks = TrainTasks(
            self.lists["train"],
            self.views,
            self.image_size,
            self.seed,
            self.on_bad_image != "fail",
            self.substitutes,
        )
        for decoded in self._load(tasks, list(self.epoch_steps(epoch, start_step))):
            for index, reason in decoded.bad:
                self.report_bad("train", index, reason)
            if not decoded.views:
                self.no_substitute(decoded.bad[-1][0])
            views = tuple(self.finisher.plain(view) for view in decoded.views)
            yield Batch(views, self.labels("train", decoded.shown), self.on_device(decoded.shown))

    def _evaluate_batches(self, split: str, parts: list[Tensor]) -> Iterator[Batch]:
        for decoded in self._load(EvaluationTasks(self.lists[split], self.image_size), parts):
            for index, reason in decoded.bad:
                self.report_bad(split, index, reason)
            if len(decoded.shown):
                view = self.finisher.plain(decoded.views[0])
                yield Batch((view,), self.labels(split, decoded.shown), self.on_device(decoded.shown))


def _start_worker(_: int) -> None:
    gc.freeze()
    gc.enable()
    # A terminal, a scheduler and torch's launcher signal workers too, but the step and the checkpoint that their parent
    # still makes need them. They end when it says so (multiprocessing's terminate) and, by torch's watch, when it is gone.
    parent, numbers = os.getppid(), (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def heed_parent() -> None:
        while signal.sigwaitinfo(numbers).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=heed_parent, daemon=True).start()
