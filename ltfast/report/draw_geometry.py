"""Figures of the loss's geometry: landscapes and Hessian spectra of head and tail.

Each function takes the runs' results of ltfast.report.geometry as entries and returns a Figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ltfast.report.curvature import Spectrum
from ltfast.report.geometry import SIDES, Landscape
from ltfast.report.page import Entry
from ltfast.report.style import INK, MAP, colour, hatch, legend_below, line, log_ticks, marker, panels, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 14  # filled contour levels
DECADES = 4  # told apart below the top of the scale: what is smaller counts as solved
PANEL, TALLEST = 3.45, 1.2  # width of a landscape in inches, and its greatest height over that
TEXT = 13  # points of print around the middle of a contour's value that must be free of edges and marks
LABEL = (12, -14, 12)  # points by which the labels of the three marks lie above them
LABELLED = 3  # runs: with more, the values over the bars run into each other
WIDTHS = 120  # of the smoothing Gaussian in the range of a spectrum
QUANTILE = 0.97  # losses above this quantile of all points share the last colour, so that basins keep most of the scale


def draw_landscapes(runs: Sequence[Entry], axis: str) -> Figure:
    """One row per run, head and tail side by side, all on one logarithmic colour scale; marks at the known weights."""
    heights = [0.45 + 3.05 * shape(run) for _, _, run in runs]  # titles and ticks, and the panel
    figure, axes = panels(2, len(runs), width=4.4, height=sum(heights) / len(runs), height_ratios=heights)
    values = [np.log10(np.clip(np.nan_to_num(run.surface.values.numpy(), nan=1e6), 1e-9, 1e6)) for _, _, run in runs]
    everything = np.concatenate([v.ravel() for v in values])
    high = np.quantile(everything, QUANTILE)
    levels = np.linspace(min(max(everything.min(), high - DECADES), high - 0.3), high, LEVELS)
    image = None
    for r, (_, name, run) in enumerate(runs):
        for k, side in enumerate(SIDES):
            ax = axes[2 * r + k]
            image = filled(ax, run, values[r][k], levels)
            ax.set(title=f"{shorten(name)}: {side}, {run.images[side]} images", ylabel="" if k else axis)
            ax.grid(False)
            ax.set_aspect("equal")
            ax.locator_params(nbins=6)
            marks(ax, run)
            if r + 1 == len(runs):
                ax.set_xlabel(axis)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, label="loss", fraction=0.04, pad=0.02, aspect=5 * sum(heights))
    ticks = levels[::2]
    bar.set_ticks(ticks.tolist(), labels=[f"{10**t:.2g}" for t in ticks])
    return figure


def filled(ax: Any, run: Landscape, z: Any, levels: Any) -> Any:
    """Filled contours of log10 loss with thin labelled lines between them, so that they read in grey as well."""
    x, y = run.surface.x.numpy(), run.surface.y.numpy()
    image = ax.contourf(x, y, z, levels=levels, cmap=MAP, extend="both")
    lines = ax.contour(x, y, z, levels=levels, colors="white", linewidths=0.5, linestyles="solid")
    for text in ax.clabel(lines, levels[1::2], colors=INK, fmt=lambda t: f"{10**t:.2g}", fontsize=6.5, inline=False):
        if free(text.get_position(), run):
            text.set_bbox({"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75})
        else:
            text.remove()
    return image


def shape(run: Landscape) -> float:
    """Height of a panel over its width: the same scale in x and y, but no taller than TALLEST."""
    return min(TALLEST, float(np.ptp(run.surface.y.numpy()) / np.ptp(run.surface.x.numpy())))


def free(place: tuple[float, float], run: Landscape) -> bool:
    """True if a small text there is neither cut at the edge of the panel nor under a mark, its label or their line."""
    x, y = run.surface.x.numpy(), run.surface.y.numpy()
    points = 72 * PANEL / max(np.ptp(x), np.ptp(y) / TALLEST)  # of print, a unit of distance
    low, high, marked = (points * (np.array(v) - place) for v in ((x[0], y[0]), (x[-1], y[-1]), run.points))
    if max(low.max(), -high.min()) > -TEXT:
        return False
    way = np.concatenate([np.linspace(a, b, 30) for a, b in itertools.pairwise(marked)] or [marked])
    if np.hypot(*way.T).min() < TEXT:
        return False
    wide = [TEXT + 2.2 * len(label) for label in run.labels]
    over = marked + [(0, LABEL[i]) for i in range(len(marked))]  # middles of the marks' labels
    return len(marked) == 1 or not ((np.abs(over[:, 0]) < wide) & (np.abs(over[:, 1]) < TEXT + 5)).any()


def marks(ax: Any, run: Landscape) -> None:
    """Numbered or starred marks at the known weights, joined in order of time."""
    x, y = zip(*run.points, strict=True)
    if len(x) > 1:
        ax.plot(x, y, color="white", linewidth=2.6, zorder=8)
        ax.plot(x, y, color=INK, linewidth=1.2, linestyle="--", zorder=8)
    for i, (a, b) in enumerate(run.points):
        shape = (5, 1, 0) if len(x) == 1 else marker(i)
        ax.plot(a, b, marker=shape, color="white", markersize=11, markeredgecolor=INK, zorder=9)
        if len(x) > 1:
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            side = (0, LABEL[i] - 3)
            ax.annotate(
                run.labels[i],
                (a, b),
                textcoords="offset points",
                xytext=side,
                ha="center",
                fontsize=7.5,
                bbox=box,
                zorder=10,
            )


def width_of(spectrum: Spectrum) -> float:
    """Width of the Gaussian that smooths a density."""
    return max(spectrum.top[0] - spectrum.bottom[0], 1e-12) / WIDTHS


def draw_spectra(runs: Sequence[Entry]) -> Figure:
    """Eigenvalue density of head and tail, largest eigenvalue and trace with their errors, all logarithmic."""
    figure, axes = panels(4, height=3.0)
    for ax, side in zip(axes[:2], SIDES, strict=True):
        spectra = [(i, name, run.spectra[side]) for i, name, run in runs]
        floor = min(0.3 / (s.size * width_of(s) * 2.5) for _, _, s in spectra)
        for i, name, s in spectra:
            look: dict[str, Any] = {"color": colour(i), "linestyle": line(i), "linewidth": 1.4}
            margin = 6 * width_of(s)
            grid = torch.linspace(s.bottom[0] - margin, s.top[0] + margin, 600, dtype=torch.float64)
            ax.plot(grid, np.maximum(s.density(grid, width_of(s)).numpy(), 1e-12), **look)
            # A probe may give the largest eigenvalue too little weight to be seen.
            ax.plot(s.top[0], 1.5 * floor, marker=marker(i), color=colour(i), markeredgecolor="white", zorder=5)
            ax.plot([], [], marker=marker(i), label=name, **look)
        ax.set(title=side, xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(floor, None))
        log_ticks(ax.yaxis, "{x:g}")
    tops = [[run.tops[side] for side in SIDES] for _, _, run in runs]
    traces = [[run.spectra[side].trace for side in SIDES] for _, _, run in runs]
    for ax, values, what in zip(axes[2:], (tops, traces), ("largest eigenvalue", "trace"), strict=True):
        bars_with_errors(ax, runs, values)
        ax.set(title=what, ylabel=what)
    legend_below(figure, axes[:2])
    return figure


def bars_with_errors(ax: Axes, runs: Sequence[Entry], values: Sequence[Sequence[tuple[float, float]]]) -> None:
    """A bar a run for head and for tail, `values` being (height, error or NaN); logarithmic where all are positive."""
    width, heights = 0.8 / len(runs), [height for pairs in values for height, _ in pairs]
    if min(heights) > 0:
        ax.set(yscale="log", ylim=(0.3 * min(heights), 3 * max(heights)))
        log_ticks(ax.yaxis, "{x:g}")
    for r, ((i, name, _), pairs) in enumerate(zip(runs, values, strict=True)):
        x = np.arange(2) + (r - (len(runs) - 1) / 2) * width
        bars = ax.bar(
            x, [height for height, _ in pairs], 0.9 * width, yerr=[error for _, error in pairs], capsize=3, color=colour(i),
            hatch=hatch(i), edgecolor="white", ecolor=INK, label=name,
        )  # fmt: skip
        if len(runs) <= LABELLED:
            labels = [f"{h:.2g}" if abs(h) < 100 else f"{h:,.0f}" for h, _ in pairs]
            ax.bar_label(bars, labels, padding=2, fontsize=7.5)
    if min(heights) <= 0:
        ax.margins(y=0.12)
    ax.set_xticks(range(2), SIDES)
    ax.grid(axis="x", visible=False)
