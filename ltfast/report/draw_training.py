"""Figures of how training went: curves, feature quality, gradients, ascent, forces, groups, time.

Each function takes the runs' numbers (ltfast.report.numbers) as entries and returns a Figure; the i-th run of the report
has the same colour, marker and line style everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ltfast.report.page import Entry
from ltfast.report.style import (
    FAINT,
    INK,
    MAP,
    colour,
    distinct,
    every,
    hatch,
    legend_below,
    line,
    log_ticks,
    marker,
    panels,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[Entry]
ASCENT_LINES = 8  # of more groups (classes, for cc-sam) that many are shown, evenly chosen
GROUP_BARS = 60  # above this many classes the groups figure shows points instead of bars


def plot(ax: Axes, x: Any, y: Any, i: int, label: str, style: int | None = None, **options: Any) -> None:
    """One line over epochs in the i-th colour and marker; points that are not finite are left out."""
    whole_epochs(ax)
    known = np.isfinite(y)
    if known.any():
        x, y = np.asarray(x)[known], np.asarray(y)[known]
        ax.plot(
            x, y, color=colour(i), linestyle=line(i if style is None else style), marker=marker(i),
            markevery=every(len(x)), label=label, **options,
        )  # fmt: skip


def whole_epochs(ax: Axes) -> None:
    """Ticks at whole epochs: a run of one epoch has one tick, not 0.96, 0.98, ..."""
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)


def draw_curves(runs: Runs) -> Figure:
    """Training loss, learning rate and, where a run has any, validation accuracy by epoch; vertical lines mark groupings."""
    parts = [("loss", "training loss"), ("lr", "learning rate")]
    if any(np.isfinite(run["top1"]).any() for _, _, run in runs):
        parts += [("top1", "validation, all classes (%)")]
        parts += [(k, f"validation, {k}-shot (%)") for k in ("many", "medium", "few")]
    figure, axes = panels(3, 2) if len(parts) > 2 else panels(2)
    for ax, (key, title) in zip(axes, parts, strict=True):
        for i, name, run in runs:
            plot(ax, run["epoch"], run[key], i, name)
        if not ax.lines:
            ax.text(0.5, 0.5, "no such classes", ha="center", transform=ax.transAxes, color="#777777")
        for i, _, run in runs if ax.lines else ():
            for epoch in run["groupings"]:
                ax.axvline(epoch + 0.5, color=colour(i), linewidth=0.8, linestyle=":")
        ax.set(title=title, xlabel="epoch")
        if key == "loss":
            ax.set_yscale("log")
            log_ticks(ax.yaxis, "{x:g}")
        if key not in ("loss", "lr"):
            ax.set_ylim(-3, 103)
    legend_below(figure, axes)
    return figure


def draw_quality(runs: Runs) -> Figure:
    """Quality, spread and distance of features by epoch: head solid with open markers, tail dashed with full ones."""
    figure, axes = panels(3, height=3.3)
    titles = {
        "quality": "quality Q = -1/D - lambda_q log V", "variance": "spread V within a class",
        "distance": "distance D to the nearest class",
    }  # fmt: skip
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for i, name, run in runs:
            plot(ax, run["epoch"], run["head"][key], i, f"{name}: head", style=0, markerfacecolor="white")
            plot(ax, run["epoch"], run["tail"][key], i, f"{name}: tail", style=1)
        ax.set(title=title, xlabel="epoch")
        if key != "quality":
            ax.set_yscale("log")
            log_ticks(ax.yaxis, "{x:g}")
    legend_below(figure, axes, columns=2 * min(3, len(runs)))
    return figure


def draw_similarity(runs: Runs) -> Figure:
    """Cosines between group gradients by epoch: each pair of many, medium, few, and few against the whole gradient."""
    pairs = list(dict.fromkeys(pair for _, _, run in runs for pair in run["pairs"]))
    last = [name for name in ("few", "medium", "many") if any(name in run["whole"] for _, _, run in runs)][:1]
    figure, axes = panels(max(1, len(pairs) + len(last)), sharey=True)
    for ax, pair in zip(axes, pairs, strict=False):
        for i, name, run in runs:
            if pair in run["pairs"]:
                plot(ax, run["epoch"], run["pairs"][pair], i, name)
        ax.set(title=pair, xlabel="epoch")
    for ax, shot in zip(axes[len(pairs) :], last, strict=True):
        for i, name, run in runs:
            if shot in run["whole"]:
                plot(ax, run["epoch"], run["whole"][shot], i, name)
        ax.set(title=f"{shot} and the whole", xlabel="epoch")
    for ax in axes:
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_ylim(-1.05, 1.05)
    axes[0].set_ylabel("cosine of gradients")
    legend_below(figure, axes)
    return figure


def draw_group_similarity(runs: Runs) -> Figure:
    """Cosine matrix of the groups' gradients at the last probe, and each group's cosine with the whole gradient."""
    figure, axes = panels(2, len(runs), height=3.0, width_ratios=[1, 1.7])
    between = [np.where(np.eye(len(run["matrix"]), dtype=bool), np.nan, run["matrix"]) for _, _, run in runs]
    reach = max(0.2, *(float(np.nanmax(np.abs(matrix), initial=0)) for matrix in between))  # without the ones
    for (_, name, run), matrix, left, right in zip(runs, between, axes[::2], axes[1::2], strict=True):
        image = left.imshow(matrix, cmap=MAP, vmin=-reach, vmax=reach)
        left.grid(False)
        ticks = np.arange(len(matrix))
        title = f"{shorten(name)}: cosines, epoch {int(run['epoch'][-1])}"
        left.set(title=title, xticks=ticks, yticks=ticks, xlabel="group", ylabel="group")
        for i, j in np.ndindex(matrix.shape):
            if len(matrix) <= 8 and np.isfinite(matrix[i, j]):
                ink = "black" if matrix[i, j] > 0.2 * reach else "white"
                left.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=8)
        figure.colorbar(image, ax=left, shrink=0.85)
        for k in range(run["whole"].shape[1]):
            plot(right, run["epoch"], run["whole"][:, k], k, f"group {k}")
        right.axhline(0, color=INK, linewidth=0.8)
        right.set(title="with the whole gradient", xlabel="epoch", ylabel="cosine", ylim=(-1.05, 1.05))
    legend_below(figure, axes, columns=8)
    return figure


def draw_ascent(runs: Runs) -> Figure:
    """One row per run: radii of Eq. 13 by group against their bounds, shares clipped, norms, refresh cosines; of a fixed radius
    its value."""
    columns = 4 if any(run["bounds"] is not None for _, _, run in runs) else 3
    figure, axes = panels(columns, len(runs), height=2.5)
    directions = [ascent_directions(run) for _, _, run in runs]
    labels = dict.fromkeys(label for shown in directions for label in shown)
    # Groups first: they have the colours that they have in other figures.
    place = {label: i for i, label in enumerate(sorted(labels, key=lambda label: not label.startswith("group ")))}
    for r, ((_, name, run), shown) in enumerate(zip(runs, directions, strict=True)):
        radius, *between, norm, last = axes[columns * r : columns * (r + 1)]
        for label, k in shown.items():
            plot(norm, run["epoch"], run["norm"][:, k], place[label], label)
        norm.set(title="|direction| before scaling", xlabel="epoch", yscale="log")
        log_ticks(norm.yaxis, "{x:g}")
        if run["bounds"] is None:
            for ax in (radius, *between):
                ax.set_axis_off()
            radius.set_title(shorten(name))
            radius.text(0.5, 0.5, f"fixed radius {run['rho']:g}", ha="center", transform=radius.transAxes)
        else:
            radii(radius, between[0], run, {place[label]: k for label, k in shown.items()})
            radius.set_title(f"{shorten(name)}: radius rho_k")
        if np.isfinite(run["refresh_cos"]).any():
            refreshes(last, run)
        else:
            for label, k in shown.items() if run["shared"] is None else ():
                plot(last, run["epoch"], run["length"][:, k], place[label], label)
            if run["shared"] is not None:
                whole_epochs(last)
                last.plot(run["epoch"], run["shared"], color=INK)
            which = "perturbation" if run["shared"] is None else "shared perturbation"
            last.set(title=f"norm of the {which}", xlabel="epoch", ylim=(0, 1.3 * last.get_ylim()[1]))
    legend_below(figure, axes, columns=8)
    return figure


def ascent_directions(run: dict[str, Any]) -> dict[str, int]:
    """Label and number of the directions that are shown: all, or ASCENT_LINES of them."""
    n = len(run["labels"])
    shown = range(n) if n <= ASCENT_LINES else np.linspace(0, n - 1, ASCENT_LINES).round().astype(int).tolist()
    return {run["labels"][k]: k for k in shown}


def radii(radius: Axes, clipped: Axes, run: dict[str, Any], shown: dict[int, int]) -> None:
    """Radii by epoch with their bounds as a band, and the share outside; shown: place among colours -> direction."""
    for i, k in shown.items():
        plot(radius, run["epoch"], run["radius"][:, k], i, run["labels"][k])
        plot(clipped, run["epoch"], 100 * (run["above"] + run["below"])[:, k], i, run["labels"][k])
    radius.axhspan(*run["bounds"], color=FAINT, zorder=0)
    radius.set(xlabel="epoch", yscale="log")
    log_ticks(radius.yaxis, "{x:g}")
    clipped.set(title="radii clipped (%)", xlabel="epoch", ylim=(-4, 104))


def refreshes(ax: Axes, run: dict[str, Any]) -> None:
    """Cosine of the old matrix's direction to the exact one: mean of each epoch, and a line down to its smallest."""
    whole_epochs(ax)
    known = np.isfinite(run["refresh_cos"])
    epoch, mean, low = run["epoch"][known], run["refresh_cos"][known], run["refresh_min"][known]
    ax.vlines(epoch, low, mean, color="#999999", linewidth=1.2)
    ax.plot(epoch, mean, "o", color=INK, markersize=3.6)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(title="cosine at Gram refreshes", xlabel="epoch", ylim=(-1.05, 1.05))


def draw_forces(runs: Runs) -> Figure:
    """Norms of the loss gradient, GKP and weight decay by epoch, one panel a run, on a common scale."""
    columns = min(3, len(runs))
    figure, axes = panels(columns, -(-len(runs) // columns), sharey=True)
    parts = (("gradient", "loss gradient (times alpha)"), ("gkp", "GKP"), ("decay", "weight decay"))
    for ax, (_, name, run) in zip(axes, runs, strict=False):
        for k, (key, label) in enumerate(parts):
            plot(ax, run["epoch"], run[key], k, label)
        ax.set(title=shorten(name, 32), xlabel="epoch", yscale="log")
        log_ticks(ax.yaxis, "{x:g}")
    for ax in axes[len(runs) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("norm")
    legend_below(figure, axes)
    return figure


def draw_groups(runs: Runs) -> Figure:
    """Class sizes in the colour and hatch of their group, one panel a run; a strip a group where classes are many."""
    columns = min(2, len(runs))
    figure, axes = panels(columns, -(-len(runs) // columns), width=7.2 if columns == 1 else None)
    for ax, (_, name, run) in zip(axes, runs, strict=False):
        bars = len(run["counts"]) <= GROUP_BARS
        (group_bars if bars else group_strips)(ax, run)
        ax.set(title=f"{shorten(name)}: grouped before epoch {run['epoch'] + 1}")
        ax.grid(axis="x" if bars else "y", visible=False)
    for ax in axes[len(runs) :]:
        ax.set_visible(False)
    legend_below(figure, axes, columns=8)
    return figure


def group_bars(ax: Axes, run: dict[str, Any]) -> None:
    """A bar a class, largest first, with the epoch of its bank entry over it."""
    order = np.argsort(-run["counts"], kind="stable")
    for k in range(run["group"].max() + 1):
        at = np.flatnonzero(run["group"][order] == k)
        bar: dict[str, Any] = {"color": colour(k), "hatch": hatch(k), "edgecolor": "white", "label": f"group {k}"}
        ax.bar(at, run["counts"][order][at], 0.85, **bar)
    ax.set(yscale="log", xlabel="classes, largest first", ylabel="training images")
    ax.set_ylim(min(1.0, 0.6 * run["counts"].min()), 2 * run["counts"].max())
    log_ticks(ax.yaxis)
    if len(order) <= 20:
        short = distinct(run["names"], 10)
        names = [short[c] for c in order]
        ax.set_xticks(range(len(order)), names, rotation=0 if max(map(len, names)) < 4 else 60)
        for x, c in enumerate(order if run["entries"] else []):
            if run["entries"][c] is None:
                continue
            where: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "fontsize": 7}
            ax.annotate(f"e{run['entries'][c]}", (x, run["counts"][c]), **where)


def group_strips(ax: Axes, run: dict[str, Any]) -> None:
    """A strip a group: a mark for each class at its size, spread out evenly within the strip."""
    for k in range(run["group"].max() + 1):
        sizes = run["counts"][run["group"] == k]
        spread = (np.arange(len(sizes)) * 0.618) % 1 - 0.5
        ax.scatter(sizes, k + 0.6 * spread, s=9, color=colour(k), marker=marker(k), alpha=0.7, linewidth=0)
    labels = [f"group {k}\n{n} classes" for k, n in enumerate(run["classes"])]
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="training images of the class")
    log_ticks(ax.xaxis)


def draw_times(runs: Runs) -> Figure:
    """Left: seconds by part of the run; right: a training epoch over a scouting epoch, measured and predicted by FLOPs."""
    ratios = [(name, run) for _, name, run in runs if run["measured"] is not None]
    figure, axes = panels(2 if ratios else 1, height=max(2.0, 1.2 + 0.45 * len(runs)))
    parts = [
        part
        for part in ("compiling", "scouting", "grouping", "training")
        if any(part in run["parts"] for _, _, run in runs)
    ]
    rows, start = np.arange(len(runs)), np.zeros(len(runs))
    for k, part in enumerate(parts):
        seconds = np.array([run["parts"].get(part, 0.0) for _, _, run in runs])
        axes[0].barh(rows, seconds, 0.6, left=start, color=colour(k), hatch=hatch(k), edgecolor="white", label=part)
        start += seconds
    axes[0].set_yticks(rows, [shorten(name) for _, name, _ in runs])
    axes[0].invert_yaxis()
    axes[0].set(title="where the time went", xlabel="seconds")
    under(axes[0])
    axes[0].grid(axis="y", visible=False)
    if ratios:
        ax, y = axes[1], np.arange(len(ratios))
        for k, key in enumerate(("measured", "predicted")):
            values = [run[key] for _, run in ratios]
            bars = ax.barh(
                y + (k - 0.5) * 0.36, values, 0.34, color=colour(k), hatch=hatch(k), edgecolor="white", label=key
            )
            ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        ax.set_yticks(y, [shorten(name) for name, _ in ratios])
        ax.set(title="cost of a training step", xlabel="in scouting steps", xlim=(0, 1.25 * max(ax.get_xlim()[1], 1)))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        under(ax)
    return figure


def under(ax: Axes) -> None:
    """A legend below one panel."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=4)


def draw_profile(runs: Runs) -> Figure:
    """Milliseconds of one step by part, one bar a run; a diamond marks the plan's prediction."""
    figure, (ax,) = panels(1, width=7.2, height=max(1.6, 0.9 + 0.5 * len(runs)))
    parts = list(dict.fromkeys(part for _, _, run in runs for part in run["parts"]))
    rows, start = np.arange(len(runs)), np.zeros(len(runs))
    for k, part in enumerate(parts):
        values = np.array([1e3 * run["parts"].get(part, 0.0) for _, _, run in runs])
        ax.barh(rows, values, 0.6, left=start, color=colour(k), hatch=hatch(k), edgecolor="white", label=part)
        start += values
    known = [(i, 1e3 * run["predicted"]) for i, (_, _, run) in enumerate(runs) if run["predicted"] is not None]
    if known:
        y, x = zip(*known, strict=True)
        ax.plot(x, y, "D", color=INK, markersize=8, label="predicted")
    ax.set_yticks(rows, [shorten(name) for _, name, _ in runs])
    ax.invert_yaxis()
    ax.set(xlabel="milliseconds a step")
    ax.grid(axis="y", visible=False)
    legend_below(figure, [ax], columns=4)
    return figure
