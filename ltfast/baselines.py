"""Figures of plain cross-entropy on the embedded default, from committed result rows, to set a run beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ltfast.config import Config
from ltfast.metrics import OVERALL
from ltfast.recipes import build_config


def baseline_for(config: Config) -> dict[str, Any] | None:
    """Mean test figures of `--method ce` on the same data, network and descent (made by benchmarks/figures.py), or None."""
    path = Path(__file__).with_name("baselines.json")
    table = json.loads(path.read_text()) if path.exists() else {}
    found = table.get(config.data.dataset)
    if found is None:
        return None
    measured = build_config(config.data.dataset, "ce", {}, {})
    if (config.data, config.model, config.optim) != (measured.data, measured.model, measured.optim):
        return None
    return {**dict.fromkeys(OVERALL), **found}
