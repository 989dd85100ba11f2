"""Figures of the loss's geometry: landscapes and Hessian spectra of head and tail.

Each function takes the runs' results of ltfast.report.geometry as entries and returns a Figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ltfast.report.geometry import SIDES, Landscape
from ltfast.report.page import Entry
from ltfast.report.style import INK, MAP, colour, hatch, legend_below, line, log_ticks, marker, panels, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 14  # filled contour levels
DECADES = 4  # told apart below the top of the scale: what is smaller counts as solved
LABELLED = 3  # runs: with more, the values over the bars run into each other
QUANTILE = 0.97  # losses above this quantile of all points share the last colour, so that basins keep most of the scale


def draw_landscapes(runs: Sequence[Entry], axis: str) -> Figure:
    """One row a run, head and tail side by side, all on one logarithmic colour scale; marks at the known weights."""
    figure, axes = panels(2, len(runs), width=4.4, height=3.5)
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
            marks(ax, run)
            if r + 1 == len(runs):
                ax.set_xlabel(axis)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, label="loss", fraction=0.04, pad=0.02, aspect=18 * len(runs))
    ticks = levels[::2]
    bar.set_ticks(ticks.tolist(), labels=[f"{10**t:.2g}" for t in ticks])
    return figure


def filled(ax: Any, run: Landscape, z: Any, levels: Any) -> Any:
    """Filled contours of log10 loss with thin labelled lines between them, so that they read in grey as well."""
    x, y = run.surface.x.numpy(), run.surface.y.numpy()
    image = ax.contourf(x, y, z, levels=levels, cmap=MAP, extend="both")
    lines = ax.contour(x, y, z, levels=levels, colors="white", linewidths=0.5, linestyles="solid")
    for text in ax.clabel(lines, levels[1::3], colors=INK, fmt=lambda t: f"{10**t:.2g}", fontsize=6.5, inline=False):
        text.set_bbox({"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75})
    return image


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
            side = (0, 9) if i != 1 else (0, -17)
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


def draw_spectra(runs: Sequence[Entry]) -> Figure:
    """Eigenvalue density of head and tail (logarithmic), largest eigenvalue and trace with their errors."""
    figure, axes = panels(4, height=3.0)
    for ax, side in zip(axes[:2], SIDES, strict=True):
        ends = [(run.spectra[side].bottom[0], run.spectra[side].top[0]) for _, _, run in runs]
        low, high = min(e[0] for e in ends), max(e[1] for e in ends)
        width = max(high - low, 1e-12)
        grid = torch.linspace(low - 0.05 * width, high + 0.05 * width, 600, dtype=torch.float64)
        for i, name, run in runs:
            density = run.spectra[side].density(grid, width / 120).numpy()
            ax.plot(grid, np.maximum(density, 1e-12), color=colour(i), linestyle=line(i), linewidth=1.4, label=name)
        floor = 0.3 / (max(run.spectra[side].size for _, _, run in runs) * width / 120 * 2.5)
        for i, _, run in runs:  # a probe may give the largest eigenvalue too little weight to be seen
            ax.plot(
                run.spectra[side].top[0],
                1.5 * floor,
                marker=marker(i),
                color=colour(i),
                markeredgecolor="white",
                zorder=5,
            )
        ax.set(title=f"{side}: density", xlabel="eigenvalue", yscale="log", ylim=(floor, None))
        log_ticks(ax.yaxis, "{x:g}")
    for ax, key, title in zip(axes[2:], ("top", "trace"), ("largest eigenvalue", "trace"), strict=True):
        width = 0.8 / len(runs)
        for r, (i, name, run) in enumerate(runs):
            pairs = [getattr(run.spectra[side], key) for side in SIDES]
            x = np.arange(2) + (r - (len(runs) - 1) / 2) * width
            bars = ax.bar(
                x, [p[0] for p in pairs], 0.9 * width, yerr=[p[1] if p[1] == p[1] else 0.0 for p in pairs], capsize=3,
                color=colour(i), hatch=hatch(i), edgecolor="white", ecolor=INK, label=name,
            )  # fmt: skip
            if len(runs) <= LABELLED:
                labels = [f"{p[0]:.2g}" if abs(p[0]) < 100 else f"{p[0]:,.0f}" for p in pairs]
                ax.bar_label(bars, labels, padding=2, fontsize=7.5)
        ax.set_xticks(range(2), SIDES)
        ax.margins(y=0.12)
        ax.set(title=title)
        ax.grid(axis="x", visible=False)
    legend_below(figure, axes[:2])
    return figure
