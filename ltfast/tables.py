"""CSV files that commands write."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ltfast.errors import UserError


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]], option: str = "--csv") -> None:
    """Writes `rows`, the heads first, as UTF-8 with file names byte for byte; UserError, naming the option, where it cannot be
    written."""
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}") from error
