"""One pass over the test split: calibration bins, and the worst classes with pictures of their mistakes.

Legend: B batch, C classes, n test images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltfast.evaluate import augmented
from ltfast.metrics import Accumulator
from ltfast.report.runs import OUT_OF_TIME, Live, Missing

Array = np.ndarray[Any, np.dtype[Any]]
WORST, PICTURES = 4, 6  # classes and pictures of each


class Mistake(NamedTuple):
    """One picture [H, W, 3] in 0..1, the class it was taken for, and the confidence in it."""

    picture: Array
    predicted: int
    confidence: float


class WorstClass(NamedTuple):
    """A class, its accuracy in %, its training images, and mistakes, most confident first."""

    label: int
    accuracy: float
    images: int
    mistakes: list[Mistake]


class Predictions(NamedTuple):
    """result: as `ltfast.metrics.Accumulator.to_dict`. Bins [15]: images, accuracy and mean confidence in % (NaN where
    empty). worst: least accurate classes first."""

    result: dict[str, Any]
    bin_seen: Array
    bin_accuracy: Array
    bin_confidence: Array
    worst: list[WorstClass]


@torch.no_grad()
def predict(live: Live, stop: Callable[[], bool], tick: Callable[[], None]) -> Predictions:
    """Figures of the last weights on the test split.

    Raises Missing if there is no test image or the time ran out on the way: parts of a test split mean nothing.
    """
    source = live.source
    if not source.sizes.get("test", 0):
        raise Missing("its data has no test split")
    accumulator = Accumulator(source.num_classes, source.train_counts, device=live.device)
    infer = augmented(live.model, live.config.run.tta)
    rows: list[Tensor] = []
    for batch in source.evaluate("test"):
        if rows and stop():
            raise Missing(OUT_OF_TIME)
        logits = infer(batch.views[0]).float()
        accumulator.update(logits, batch.labels)
        confidence, predicted = logits.softmax(1).max(1)
        rows.append(torch.stack([batch.index, batch.labels, predicted, (confidence * 1e6).long()]).cpu())
        tick()
    table = torch.cat(rows, 1)
    result, state = accumulator.to_dict(), {k: v.cpu().double().numpy() for k, v in accumulator.state().items()}
    seen = state["bin_seen"]
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy, confidence_mean = 100 * state["bin_correct"] / seen, 100 * state["bin_confidence"] / seen
    return Predictions(result, seen, accuracy, confidence_mean, worst_classes(live, result, table))


def worst_classes(live: Live, result: dict[str, Any], table: Tensor) -> list[WorstClass]:
    """The WORST least accurate classes, of equal ones those with the most training images, and their most confident mistakes.

    table [4, n]: index, label, predicted, ppm.
    """
    counts = live.source.train_counts.tolist()
    scored = [(acc, -counts[label], label) for label, acc in enumerate(result["per_class"]) if acc is not None]
    found = []
    for accuracy, _, label in sorted(scored)[:WORST]:
        wrong = table[:, (table[1] == label) & (table[2] != label)]
        wrong = wrong[:, torch.argsort(wrong[3], descending=True, stable=True)[:PICTURES]]
        pictures = pictures_of(live, wrong[0])
        mistakes = [
            Mistake(p, int(predicted), float(ppm) / 1e6)
            for p, predicted, ppm in zip(pictures, wrong[2], wrong[3], strict=True)
        ]
        found.append(WorstClass(label, accuracy, counts[label], mistakes))
    return found


def pictures_of(live: Live, index: Tensor) -> list[Array]:
    """Test pictures as [H, W, 3] in 0..1, in the order of `index`."""
    if not len(index):
        return []
    by_index = {}
    for batch in live.source.evaluate("test", index):
        for i, view in zip(batch.index.tolist(), batch.views[0], strict=True):
            by_index[i] = to_picture(view.cpu(), live)
    return [by_index[i] for i in index.tolist()]


def to_picture(view: Tensor, live: Live) -> Array:
    """Undo the normalisation of a plain view [ch, H, W]."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (live.source.mean, live.source.std))
    unit = (view * std + mean).clamp(0, 1).permute(1, 2, 0)
    return (unit.expand(-1, -1, 3) if unit.shape[2] == 1 else unit).numpy()
