"""Figures of the loss's geometry: landscapes and Hessian spectra of head and tail.

Each function takes [(run name, result of ltfast.report.geometry)] and returns a Figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ltfast.report.geometry import SIDES, Curvature, Landscape
from ltfast.report.style import INK, MAP, colour, every, hatch, legend_below, line, marker, panels, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 16  # filled contour levels
FLOOR = 1e-4  # losses below this count as it: their logarithm would take up the whole colour scale


def draw_landscapes(runs: Sequence[tuple[str, Landscape]], axis: str) -> Figure:
    """One row a run, head and tail side by side, all on one logarithmic colour scale; marks at the named weights."""
    figure, axes = panels(2, len(runs), width=4.1, height=3.3)
    values = [np.maximum(run.surface.values.numpy(), FLOOR) for _, run in runs]
    finite = np.concatenate([v[np.isfinite(v)] for v in values])
    low, high = np.log10(finite.min()), np.log10(np.maximum(finite.max(), 10 * finite.min()))
    levels = np.logspace(low, high, LEVELS)
    image = None
    for r, (name, run) in enumerate(runs):
        for k, side in enumerate(SIDES):
            ax = axes[2 * r + k]
            z = np.where(np.isfinite(values[r][k]), values[r][k], 10**high)
            image = filled(ax, run, z, levels)
            ax.set(title=f"{shorten(name)}: {side} ({run.images[side]} images)", xlabel=axis, ylabel=axis)
            ax.grid(False)
            marks(ax, run)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, label="loss", shrink=min(1.0, 0.9), format="%.2g")
    bar.set_ticks(levels[:: max(1, LEVELS // 6)].tolist())
    return figure


def filled(ax: Any, run: Landscape, z: Any, levels: Any) -> Any:
    """Filled contours with thin lines between them, so that they read in grey as well."""
    from matplotlib.colors import LogNorm

    x, y = run.surface.x.numpy(), run.surface.y.numpy()
    image = ax.contourf(x, y, z, levels=levels, cmap=MAP, norm=LogNorm(levels[0], levels[-1]), extend="max")
    ax.contour(x, y, z, levels=levels, colors="white", linewidths=0.4)
    return image


def marks(ax: Any, run: Landscape) -> None:
    """Numbered or starred marks at the known weights, joined in order of time."""
    x, y = zip(*run.points, strict=True)
    if len(x) > 1:
        ax.plot(x, y, color="white", linewidth=2.6)
        ax.plot(x, y, color=INK, linewidth=1.2, linestyle="--")
    for i, (a, b) in enumerate(run.points):
        ax.plot(a, b, marker=(5, 1, 0) if len(x) == 1 else marker(i), color="white", markersize=11, markeredgecolor=INK)
        if len(x) > 1:
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            side = (0, 9) if i != 1 else (0, -17)
            ax.annotate(run.labels[i], (a, b), textcoords="offset points", xytext=side, ha="center", fontsize=7.5, bbox=box)
    left, right = ax.get_xlim()
    if len(x) > 1:  # labels of marks near the edge stay inside
        ax.set_xlim(left, right)


def draw_spectra(runs: Sequence[tuple[str, Curvature]]) -> Figure:
    """Eigenvalue density of head and tail (logarithmic), largest eigenvalue and trace with their errors."""
    figure, axes = panels(4, width=3.1, height=3.0)
    for ax, side in zip(axes[:2], SIDES, strict=True):
        ends = [(run.spectra[side].bottom[0], run.spectra[side].top[0]) for _, run in runs]
        low, high = min(e[0] for e in ends), max(e[1] for e in ends)
        width = max(high - low, 1e-12)
        grid = torch.linspace(low - 0.05 * width, high + 0.05 * width, 600, dtype=torch.float64)
        for i, (name, run) in enumerate(runs):
            density = run.spectra[side].density(grid, width / 120).numpy()
            ax.plot(
                grid, np.maximum(density, 1e-12), color=colour(i), linestyle=line(i), marker=marker(i),
                markevery=every(600, 10), label=name,
            )  # fmt: skip
        floor = 0.3 / (max(run.spectra[side].size for _, run in runs) * width / 120 * 2.5)
        ax.set(title=f"{side}: density", xlabel="eigenvalue", yscale="log", ylim=(floor, None))
    for ax, key, title in zip(axes[2:], ("top", "trace"), ("largest eigenvalue", "trace"), strict=True):
        width = 0.8 / len(runs)
        for i, (name, run) in enumerate(runs):
            pairs = [getattr(run.spectra[side], key) for side in SIDES]
            x = np.arange(2) + (i - (len(runs) - 1) / 2) * width
            ax.bar(
                x, [p[0] for p in pairs], 0.9 * width, yerr=[p[1] if p[1] == p[1] else 0.0 for p in pairs], capsize=3,
                color=colour(i), hatch=hatch(i), edgecolor="white", ecolor=INK, label=name,
            )  # fmt: skip
        ax.set_xticks(range(2), SIDES)
        ax.set(title=title)
        ax.grid(axis="x", visible=False)
    legend_below(figure, axes[0])
    return figure
