"""Everything of a run that needs its weights and data, within the time there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ltfast.errors import UserError
from ltfast.report import geometry
from ltfast.report.budget import Budget, Progress
from ltfast.report.landscape import side
from ltfast.report.predictions import Predictions, predict
from ltfast.report.profile import profile
from ltfast.report.runs import INTERRUPTED, OUT_OF_TIME, Live, Missing, RunView, open_live

PARTS = ("predictions", "profile", "curvature", "landscape", "plane")
SHARES = 6  # of the time a run takes: as its parts, and two for curvature (head and tail)


@dataclass
class Computed:
    """Results of one run by part; a part that is not there has its reason in `missing`."""

    predictions: Predictions | None = None
    profile: dict[str, Any] | None = None
    curvature: geometry.Curvature | None = None
    landscape: geometry.Landscape | None = None
    plane: geometry.Landscape | None = None
    missing: dict[str, str] = field(default_factory=lambda: dict.fromkeys(PARTS, INTERRUPTED))


def compute_all(
    views: Sequence[RunView],
    results: Sequence[Computed],
    budget: Budget,
    *,
    data_dir: str | None,
    quiet: bool,
) -> None:
    """Fill `results` run by run, so that one model is held at a time; every part gets a fair share of the time that is left."""
    budget.parts = len(views) * SHARES
    with Progress(len(views) * len(PARTS), quiet) as progress:
        for view, result in zip(views, results, strict=True):
            try:
                live = open_live(view, data_dir=data_dir)
            except Missing as reason:
                result.missing = dict.fromkeys(PARTS, str(reason))
                progress.note(f"{view.name}: {reason}; its log alone is drawn")
                budget.parts -= SHARES
                continue
            compute_run(view.name, live, result, budget, progress)


def compute_run(name: str, live: Live, result: Computed, budget: Budget, progress: Progress) -> None:
    """Fill `result`; parts for which no time is left say so."""
    points = side(geometry.LEVELS - 1) ** 2
    parts: dict[str, tuple[int | None, Callable[[Callable[[], None]], Any]]] = {
        "predictions": (None, lambda tick: predict(live, budget.share(), tick)),
        "profile": (None, lambda tick: profile(live, budget.share(), tick)),
        "curvature": (geometry.products(), lambda tick: geometry.curvature(live, budget.share, tick)),
        "landscape": (points, lambda tick: geometry.solution_landscape(live, budget.share(), tick)),
        "plane": (points, lambda tick: geometry.plane_landscape(live, budget.share(), tick)),
    }
    for part, (ticks, work) in parts.items():
        if budget.spent:
            result.missing[part] = OUT_OF_TIME
            continue
        with progress.part(f"{name}: {part}", ticks) as tick:
            try:
                setattr(result, part, work(tick))
            except torch.OutOfMemoryError:
                result.missing[part] = "the GPU's memory does not suffice"
            except (Missing, UserError) as reason:  # UserError: a picture that cannot be read
                result.missing[part] = str(reason)
