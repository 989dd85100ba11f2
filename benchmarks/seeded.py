"""Runs over seeds, read from result rows, and their pairing with a baseline's runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = dict[str, Any]  # metric -> value, and "torch" -> its version
Runs = dict[tuple[str, int, str], Run]  # (name, seed, version of torch) -> run


def rows(path: Path, *, longest: bool = False) -> list[dict[str, Any]]:
    """Rows of a file, none if it is missing; longest: only of its longest runs, beside which shorter ones are smoke."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not longest:
        return found
    sizes = [row["config"]["images"] * row["config"]["epochs"] for row in found]
    return [row for row, size in zip(found, sizes, strict=True) if size == max(sizes)]


def read(rows: list[dict[str, Any]], name_and_seed: Callable[[str], tuple[str, int]]) -> Runs:
    """All runs, later ones later; the last row of a metric wins.

    name_and_seed: what a row's case says.
    """
    runs: Runs = {}
    for row in rows:
        key = *name_and_seed(row["case"]), row.get("torch", "")
        runs[key] = {**runs.pop(key, {"torch": key[2]}), row["metric"]: row["value"]}
    return runs


def newest(runs: Runs) -> dict[tuple[str, int], Run]:
    """(name, seed) -> the last run."""
    return {(name, seed): run for (name, seed, _), run in runs.items()}


def pairs(runs: Runs, name: str, base: str) -> list[tuple[Run, Run]]:
    """The last runs of `name`, each with the run of `base` of the same seed and version of torch, which adds up in an order
    of its own: the same seed is another run with another version."""
    found = [
        (run, runs.get((base, seed, run["torch"]))) for (other, seed), run in newest(runs).items() if other == name
    ]
    return [(run, partner) for run, partner in found if partner is not None]
