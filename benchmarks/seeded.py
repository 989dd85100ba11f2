"""Runs over seeds, read from result rows, and their pairing with a baseline's runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = dict[str, Any]  # metric -> value, and "stream" -> what makes a seed the same run
Stream = tuple[str, int]  # version of torch, which adds up in an order of its own; version of what a seed draws
Runs = dict[tuple[str, int, Stream], Run]  # (name, seed, stream) -> run

DRAWS = 2  # 2: pictures that an epoch draws again have augmentations of their own (rows that do not say so are of 1)


def rows(path: Path, *, longest: bool = False) -> list[dict[str, Any]]:
    """Rows of a file, none if it is missing; longest: only of its longest runs, beside which shorter ones are smoke."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not longest:
        return found
    found = [row for row in found if not row["config"].get("flags")]
    sizes = [row["config"]["images"] * row["config"]["epochs"] for row in found]
    return [row for row, size in zip(found, sizes, strict=True) if size == max(sizes)]


def read(rows: list[dict[str, Any]], name_and_seed: Callable[[str], tuple[str, int]]) -> Runs:
    """All runs, later ones later; the last row of a metric wins.

    name_and_seed: what a row's case says.
    """
    runs: Runs = {}
    for row in rows:
        stream = row.get("torch", ""), row.get("config", {}).get("draws", 1)
        key = *name_and_seed(row["case"]), stream
        runs[key] = {**runs.pop(key, {"stream": stream}), row["metric"]: row["value"]}
    return runs


def newest(runs: Runs) -> dict[tuple[str, int], Run]:
    """(name, seed) -> the last run."""
    return {(name, seed): run for (name, seed, _), run in runs.items()}


def pairs(runs: Runs, name: str, base: str) -> list[tuple[Run, Run]]:
    """The last runs of `name`, each with the run of `base` of the same seed and stream, without which it is another run."""
    found = [
        (run, runs.get((base, seed, run["stream"]))) for (other, seed), run in newest(runs).items() if other == name
    ]
    return [(run, partner) for run, partner in found if partner is not None]
