"""Figures of plain cross-entropy on the embedded default, from committed result rows, to set a run beside."""

from __future__ import annotations

from typing import Any

from ltfast.config import Config


def baseline_for(config: Config) -> dict[str, Any] | None:
    """Mean test result of `--method ce` on the same split (committed seeds), or None where none was measured."""
    return None
