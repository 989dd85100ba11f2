"""Figures of what the model gets right: by class size, many/medium/few, confusion, calibration, worst classes.

Each function takes the runs' numbers as entries and returns a Figure (or one per run).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ltfast.data.base import FEW_BELOW, MANY_ABOVE
from ltfast.report.numbers import Confusion
from ltfast.report.page import Entry
from ltfast.report.predictions import PICTURES, Predictions
from ltfast.report.style import (
    FAINT,
    INK,
    PAGE_WIDTH,
    colour,
    distinct,
    hatch,
    legend_below,
    line,
    log_ticks,
    marker,
    panels,
    shorten,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Sequence[Entry]
# Above this many classes a mark is the mean of the classes of one size: with three test images per class, as iNaturalist has,
# thousands of marks would lie on four lines, one over the other.
CLASS_MARKS = 1000
# Characters of a row's and a column's class name, by the number of panels beside each other.
LABELS = {1: (28, 24), 2: (22, 18), 3: (16, 12)}


def draw_class_size(runs: Runs) -> Figure:
    """Accuracy of each class, or of the classes of each size, against training images, with a smoothed curve."""
    from matplotlib.patheffects import Normal, Stroke

    figure, (ax,) = panels(1, width=7.2, height=3.4)
    for i, name, run in runs:
        size, accuracy = run["size"], run["accuracy"]
        many = len(size) >= 100
        if len(size) > CLASS_MARKS:
            size, accuracy = mean_of_each_size(size, accuracy)
        ax.scatter(
            size, accuracy, s=14 if many else 34, marker=marker(i), facecolor=colour(i), edgecolor="white",
            linewidth=0.5, alpha=0.6 if many else 0.95, zorder=3,
        )  # fmt: skip
        look: dict[str, Any] = {"linestyle": line(i), "color": colour(i)}
        (drawn,) = ax.plot(run["curve_x"], run["curve_y"], zorder=4, **look)  # marks on it would pass for classes
        drawn.set_path_effects([Stroke(linewidth=4, foreground="white", alpha=0.5), Normal()] if many else [])
        ax.plot([], [], marker=marker(i), label=name, **look)
    ax.set(xscale="log", ylim=(-4, 104), xlabel="training images of the class", ylabel="test accuracy (%)")
    low, high = ax.get_xlim()
    for label, start, end in (
        ("few-shot", 0, FEW_BELOW),
        ("medium-shot", FEW_BELOW, MANY_ABOVE),
        ("many-shot", MANY_ABOVE, np.inf),
    ):
        left, right = max(low, start), min(high, end)
        if right > 1.2 * left:
            where: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            ax.text((left * right) ** 0.5, 1.01, label, fontsize=7.5, color="#555555", **where)
            ax.axvline(right, color="#888888", linewidth=0.8 if right < high else 0, linestyle=":")
    log_ticks(ax.xaxis)
    legend_below(figure, [ax])
    return figure


def mean_of_each_size(size: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct class sizes, and the mean accuracy of the classes of each that have test images."""
    known = np.isfinite(accuracy)
    sizes, place = np.unique(size[known], return_inverse=True)
    return sizes, np.bincount(place, accuracy[known]) / np.bincount(place)


def draw_shots(runs: Runs) -> Figure:
    """Bars of accuracy over all, many-, medium- and few-shot classes."""
    figure, (ax,) = panels(1, width=7.2 if len(runs) < 5 else PAGE_WIDTH, height=3.0)
    names, width = runs[0].data["names"], 0.84 / len(runs)
    for r, (i, name, run) in enumerate(runs):
        x = np.arange(len(names)) + (r - (len(runs) - 1) / 2) * width
        values = run["accuracy"]
        bars = ax.bar(
            x, np.nan_to_num(values), 0.92 * width, color=colour(i), hatch=hatch(i), edgecolor="white", label=name
        )
        labels = ["-" if np.isnan(v) else f"{v:.1f}" for v in values]
        ax.bar_label(bars, labels, padding=2, fontsize=8 if len(runs) < 5 else 6.5)
    classes = runs[0].data["classes"]
    same = all(run["classes"] == classes for _, _, run in runs)
    ticks = [f"{n}\n{c} class{'es' if c != 1 else ''}" if same else n for n, c in zip(names, classes, strict=True)]
    ax.set_xticks(np.arange(len(names)), ticks)
    ax.set(ylim=(0, 110), ylabel="test accuracy (%)", yticks=range(0, 101, 20))
    ax.grid(axis="x", visible=False)
    legend_below(figure, [ax])
    return figure


def draw_confusion(runs: Sequence[tuple[str, Confusion, Sequence[str], Sequence[int]]]) -> Figure:
    """Shares of tail classes' test images by predicted class, one panel a run: (name, numbers, class names, counts)."""
    columns = min(3, len(runs))
    deepest = max(len(c.rows) for _, c, _, _ in runs)
    beside, below = LABELS[columns]
    longest = max((len(name) for _, _, names, _ in runs for name in names), default=0)
    upright = 0.0 if longest < 4 else 0.05 * min(below, longest)  # inches of the names below the columns
    figure, axes = panels(columns, -(-len(runs) // columns), height=1.3 + 0.27 * deepest + upright)
    image = None
    for ax, (name, found, names, counts) in zip(axes, runs, strict=False):
        long, short = distinct(names, beside), distinct(names, below)
        image = ax.imshow(found.shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        ax.grid(False)
        ax.set_yticks(range(len(found.rows)), [f"{long[c]} ({counts[c]})" for c in found.rows])
        labels = [*(short[c] for c in found.columns), "other"][: found.shares.shape[1]]
        ax.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) < 4 else 90)
        for i, j in np.ndindex(found.shares.shape):
            value = found.shares[i, j]
            if value >= 0.5:
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5 if columns < 3 else 6}
                ax.text(j, i, str(int(value + 0.5)), color="white" if value > 55 else INK, **look)
        for i, row in enumerate(found.rows):
            if row in found.columns:
                ax.add_patch(frame(found.columns.index(row), i))
        ax.set(title=shorten(name, 32), xlabel="predicted class")
    axes[0].set_ylabel("tail class\n(training images)")
    assert image is not None
    figure.colorbar(image, ax=axes[: len(runs)], label="% of its test images", fraction=0.03, pad=0.01)
    for ax in axes[len(runs) :]:
        ax.set_visible(False)
    return figure


def frame(x: int, y: int) -> Any:
    """An outline around one cell of an image: the correct class."""
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.4)


def draw_reliability(runs: Runs) -> Figure:
    """Accuracy against confidence in 15 bins, and under it the share of the test images in each bin."""
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = panels(columns, 2 * rows, height=1.8, sharex=True, height_ratios=[3, 1] * rows)
    for ax in axes:
        ax.set_visible(False)
    for i, (_, name, found) in enumerate(runs):
        upper = axes[2 * columns * (i // columns) + i % columns]
        lower = axes[2 * columns * (i // columns) + columns + i % columns]
        for ax in (upper, lower):
            ax.set_visible(True)
        bins = len(found.bin_seen)
        middle, width = (np.arange(bins) + 0.5) * 100 / bins, 100 / bins
        accuracy = np.nan_to_num(found.bin_accuracy)
        gap = np.nan_to_num(found.bin_confidence) - accuracy
        upper.bar(middle, accuracy, 0.94 * width, color=colour(0), label="accuracy")
        upper.bar(
            middle, gap, 0.94 * width, bottom=accuracy, facecolor="none", edgecolor=colour(1), hatch="////", linewidth=0.8,
            label="gap to confidence",
        )  # fmt: skip
        upper.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle="--", label="perfect")
        upper.set(title=f"{shorten(name)}: ECE {found.result['ece']:.1f} %", ylim=(0, 102), xlim=(0, 100))
        lower.bar(middle, 100 * found.bin_seen / found.bin_seen.sum(), 0.94 * width, color="#777777")
        lower.set(xlabel="confidence (%)", ylim=(0, None))
        lower.tick_params(labelbottom=True)
        if i % columns == 0:
            upper.set_ylabel("accuracy (%)")
            lower.set_ylabel("images (%)")
    legend_below(figure, axes)
    return figure


def draw_worst(name: str, found: Predictions, names: Sequence[str]) -> Figure:
    """The least accurate classes of one run, a row each: what they are taken for, most confident mistakes first."""
    worst, long, short = found.worst, distinct(names, 17, wrapped), distinct(names, 15, wrapped)
    figure, axes = panels(PICTURES + 1, len(worst), width=1.05, height=1.35, width_ratios=[1.6] + [1] * PICTURES)
    for r, item in enumerate(worst):
        row = axes[r * (PICTURES + 1) : (r + 1) * (PICTURES + 1)]
        for ax in row:
            ax.set_axis_off()
        images = f"{item.images} training image{'s' if item.images != 1 else ''}"
        where: dict[str, Any] = {"transform": row[0].transAxes, "fontsize": 9}
        row[0].text(0, 0.62, long[item.label], va="bottom", weight="bold", **where)
        row[0].text(0, 0.58, f"{int(item.accuracy + 0.5)} % right\n{images}", va="top", **where)
        for ax, mistake in zip(row[1:], item.mistakes, strict=False):
            ax.imshow(mistake.picture, vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(f"{short[mistake.predicted]}\n{100 * mistake.confidence:.0f} %", fontsize=7, linespacing=1.05)
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set(visible=True, color=FAINT)
        if not item.mistakes:
            row[1].text(0, 0.5, "no mistake", va="center", fontsize=8, transform=row[1].transAxes)
    figure.suptitle(f"{shorten(name, 40)}: most confident mistakes, under what they were taken for", fontsize=10)
    return figure
