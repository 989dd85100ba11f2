"""Values as text: JSON and TOML; names in one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any
from unicodedata import normalize


def plain(value: Any) -> Any:
    """Numbers of any kind as JSON values: arrays and tensors as lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def composed(name: str) -> str:
    """The name with its accents in its letters: macOS writes them apart, and the two spellings look the same."""
    return normalize("NFC", name)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: Python's own writes NaN and Infinity, which JSON has not; here they are null."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def toml_of(values: Mapping[str, Any]) -> str:
    """TOML of plain values (str, bool, int, float, lists of them) and of one level of tables; tomllib reads it back."""

    def line(name: str, value: Any) -> str:
        # JSON's strings, numbers, booleans and lists are TOML's, but for the names of inf and nan and a bare DEL.
        special = isinstance(value, float) and not math.isfinite(value)
        text = str(value) if special else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return f"{name} = {text}"

    plain = [line(k, v) for k, v in values.items() if not isinstance(v, Mapping)]
    tables = [
        "\n".join([f"[{name}]", *(line(k, v) for k, v in table.items())])
        for name, table in values.items()
        if isinstance(table, Mapping)
    ]
    return "\n\n".join(["\n".join(plain), *tables]) + "\n"
