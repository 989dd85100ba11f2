"""Runs that differ in their seed alone, as one: means, spreads, and what a setting changes at the same seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from ltfast.report.page import Table
from ltfast.report.runs import RunView

FIGURES = ("top1", "many", "medium", "few", "ece")
HEAD = ("top-1 %", "many", "medium", "few", "ECE %")
PLUS_MINUS = "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}"  # a browser would break the line at "+-"
# Beside the seed: where pictures lie (which they are says the run's data row), a seed's own bank and GPU, how a run is stopped
# and written down.
ASIDE = (
    "seed", "out", "data_dir", "train_list", "val_list", "test_list", "exclude_list", "bank", "device", "workers", "max_hours",
    "max_restarts", "max_bad_steps", "tensorboard", "table", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
)  # fmt: skip


def half_interval(values: Sequence[float], level: float = 0.95) -> float:
    """Half of the Student-t confidence interval of the mean of independent values; infinite for one."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else float("inf")


def over_seeds(views: Sequence[RunView]) -> Table | None:
    """A row for each setting that ended runs share: how many they are, mean +- standard deviation of the test figures, and the
    difference in top-1 to the first setting at the seeds of both, +- half of its 95 % interval. None where no setting has
    two runs. Where a seed was trained twice the second runs are one another's partners.
    """
    settings: dict[tuple[object, ...], dict[tuple[int, int], RunView]] = {}
    for view in views:
        if view.ended:
            runs, seed = settings.setdefault(settings_of(view), {}), view.config.run.seed
            runs[seed, sum(other == seed for other, _ in runs)] = view
    if all(len(runs) < 2 for runs in settings.values()):
        return None
    first = next(iter(settings.values()))
    rows = []
    for runs in settings.values():
        figures = [spread([view.test.get(name) for view in runs.values()]) for name in FIGURES]
        changes = [view.test["top1"] - first[seed].test["top1"] for seed, view in runs.items() if seed in first]
        against = "" if runs is first else change(changes)
        names = ", ".join(view.name for view in runs.values())
        rows.append((next(iter(runs.values())).config.method, len(runs), *figures, against, names))
    return Table(("method", "number", *HEAD, "top-1 against the first", "runs"), rows)


def settings_of(view: RunView) -> tuple[object, ...]:
    """Everything that makes a run what it is, but its seed: its settings, and its training pictures."""
    config, data = dataclasses.asdict(view.config), view.kind("data")[-1]
    names = [(section, name) for section, values in config.items() if isinstance(values, dict) for name in values]
    settings = (str(config[section][name]) for section, name in names if name not in ASIDE)
    pictures = (str(data.get(name)) for name in ("class_names", "counts", "sizes", "fingerprint"))
    return (config["method"], bool(view.config.preserve.bank), *settings, *pictures)


def spread(values: Sequence[float | None]) -> str | None:
    """Mean +- standard deviation of what is there."""
    found = [value for value in values if value is not None]
    if len(found) < 2:
        return f"{found[0]:.1f}" if found else None
    return f"{statistics.fmean(found):.1f}{PLUS_MINUS}{statistics.stdev(found):.1f}"


def change(values: Sequence[float]) -> str | None:
    """Mean difference +- half of its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:+.1f} (one seed)" if values else None
    return f"{statistics.fmean(values):+.1f}{PLUS_MINUS}{half_interval(values):.1f}"
