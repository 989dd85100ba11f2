"""CSV files that commands write with --csv FILE."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ltfast.errors import UserError


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes `rows`, the heads first, as UTF-8 with file names byte for byte; UserError where it cannot be written."""
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written: {error.strerror}") from error
