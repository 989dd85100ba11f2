"""`ltfast data stats`: how many images each class has, and how long the tail is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ltfast.data.base import FEW_BELOW, MANY_ABOVE, SHOT_NAMES, shot_groups
from ltfast.data.check import distinct
from ltfast.data.lists import ImageList
from ltfast.errors import UserError
from ltfast.progress import counted

if TYPE_CHECKING:
    from rich.console import Console

CLASSES_SHOWN = 20
LARGEST_SHOWN = 5
PERCENTILES = (10, 25, 50, 75, 90)


@dataclass(frozen=True, slots=True)
class SplitStats:
    """Class counts of one split; imbalance is the largest over the smallest non-zero count."""

    split: str
    images: int
    classes: int
    largest: int
    smallest: int
    imbalance: float
    percentiles: dict[int, float]
    gini: float
    """0 when all classes are equally large, towards 1 when one class holds everything."""
    groups: dict[str, tuple[int, int]]
    """many / medium / few (by the training counts): classes, images of this split."""
    top_tenth: float
    """Share of the images that the largest tenth of the classes holds."""


def dataset_stats(lists: dict[str, ImageList]) -> list[SplitStats]:
    """Statistics of each split, 'train' first; the groups are those of the training counts, without empty classes."""
    train = np.bincount(lists["train"].labels)
    group = np.where(train > 0, shot_groups(torch.from_numpy(train)).numpy(), -1)
    return [
        _split_stats(split, np.bincount(images.labels, minlength=len(train)), group)
        for split, images in distinct(lists)
    ]


def _split_stats(split: str, counts: np.ndarray, group: np.ndarray) -> SplitStats:
    present = np.sort(counts[counts > 0])
    total, classes = int(counts.sum()), len(present)
    order = np.arange(1, classes + 1)
    gini = float(2 * (order * present).sum() / (classes * total) - (classes + 1) / classes) if total else 0.0
    groups = {
        name: (int((group == k).sum()), int(counts[: len(group)][group == k].sum()))
        for k, name in enumerate(SHOT_NAMES)
    }
    return SplitStats(
        split,
        total,
        classes,
        int(present[-1]) if classes else 0,
        int(present[0]) if classes else 0,
        float(present[-1] / present[0]) if classes else 0.0,
        {q: float(np.percentile(present, q)) if classes else 0.0 for q in PERCENTILES},
        gini,
        groups,
        float(present[-max(1, -(-classes // 10)) :].sum() / total) if total else 0.0,
    )


def print_stats(stats: list[SplitStats], console: Console | None = None) -> None:
    """One table: a column for each split."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table("", *(s.split for s in stats), title="Classes")
    rows: dict[str, list[str]] = {
        "images": [f"{s.images:,}" for s in stats],
        "classes": [f"{s.classes:,}" for s in stats],
        "largest .. smallest class": [f"{s.largest:,} .. {s.smallest:,}" for s in stats],
        "imbalance": [f"{s.imbalance:,.1f}" for s in stats],
        "percentiles " + " ".join(map(str, PERCENTILES)): [
            " ".join(f"{v:g}" for v in s.percentiles.values()) for s in stats
        ],
        "Gini coefficient": [f"{s.gini:.3f}" for s in stats],
        "share of the largest tenth": [f"{100 * s.top_tenth:.1f} %" for s in stats],
    }
    bounds = (f"> {MANY_ABOVE} images", f"{FEW_BELOW} to {MANY_ABOVE}", f"< {FEW_BELOW}")
    for name, bound in zip(SHOT_NAMES, bounds, strict=True):
        sizes = [s.groups[name] for s in stats]
        rows[f"{name} ({bound})"] = [f"{n:,} class{'es' if n != 1 else ''}, {counted(m, 'image')}" for n, m in sizes]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    (console or RichConsole()).print(table)


def print_classes(lists: dict[str, ImageList], console: Console | None = None) -> None:
    """One table of the classes by name, that with most training images first: how many each split has of them. Of more than
    CLASSES_SHOWN the LARGEST_SHOWN largest, and the smallest."""
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    splits = distinct(lists)
    names = max((images.names for _, images in splits), key=len)  # a list may have labels that train has not
    counts = np.stack([np.bincount(images.labels, minlength=len(names)) for _, images in splits], axis=1)
    order = np.argsort(-counts[:, 0], kind="stable").tolist()
    left_out = len(order) - CLASSES_SHOWN
    table = Table("class", *(split for split, _ in splits), title="Images of each class")
    for place, c in enumerate(order):
        if left_out > 0 and place == LARGEST_SHOWN:
            table.add_row(f"... {left_out:,} more ...")
        if not LARGEST_SHOWN <= place < LARGEST_SHOWN + left_out:
            shown = names[c].encode(errors="surrogateescape").decode(errors="replace")
            table.add_row(escape(shown), *(f"{n:,}" for n in counts[c].tolist()))
    (console or RichConsole()).print(table)


def plot_counts(lists: dict[str, ImageList], path: str | Path) -> None:
    """PNG (or any matplotlib format by suffix): training images of each class, largest first, with the group
    bounds. UserError where there is none or it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.bincount(lists["train"].labels)
    counts = counts[counts > 0]
    if not len(counts):
        raise UserError(f"{lists['train'].source}: no training image to draw")
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ordered = np.sort(counts)[::-1]
    edges = np.arange(len(ordered) + 1) + 0.5
    axes.stairs(ordered, edges, fill=True, color="C0", alpha=0.3)
    axes.stairs(ordered, edges, color="C0")
    axes.set_yscale("log")
    axes.set_xlim(0.5, len(ordered) + 0.5)
    for bound, name in ((MANY_ABOVE, "many"), (FEW_BELOW, "few")):
        axes.axhline(bound, color="0.4", linestyle="--", linewidth=0.8)
        side = "bottom" if name == "many" else "top"
        axes.text(edges[-1], bound, f"{name}-shot ", ha="right", va=side, fontsize=8, color="0.3")
    axes.set_xlabel(f"classes, largest first ({len(ordered):,})")
    axes.set_ylabel("training images")
    axes.set_title(f"{int(counts.sum()):,} images, imbalance {ordered[0] / ordered[-1]:,.0f}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: matplotlib knows no such suffix
        raise UserError(f"--plot {path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
