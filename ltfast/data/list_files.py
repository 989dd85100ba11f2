"""Parsers of list files: '<relative path> <label>' text, CSV, iNaturalist's JSON. Text is parsed vectorised."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable

import numpy as np

from ltfast.data.paths import PathTable
from ltfast.errors import UserError

MAX_LABEL_DIGITS = 7
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
NAME_COLUMNS = ("class", "category", "class_name", "species", "diagnosis")
LABEL_COLUMNS = ("label", "class_id", "category_id", "target", *NAME_COLUMNS)
Parsed = tuple[PathTable, np.ndarray, tuple[str, ...] | None, tuple[int, ...] | None]
"""Paths, labels, and where the file has them the name and the number of each class."""


def parse_text(data: bytes, source: str) -> Parsed:
    """'<path> <label>' lines; the label is what follows the last blank, so paths may hold blanks."""
    text = np.frombuffer(data.removeprefix(b"\xef\xbb\xbf"), dtype=np.uint8)
    ends = np.flatnonzero(text == 10)
    if len(text) and text[-1] != 10:
        ends = np.append(ends, len(text))
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends + 1])[: len(ends)]
    blank = (text == 32) | (text == 9) | (text == 13)
    ends = _trim_right(blank, starts, ends)
    lines = np.flatnonzero(ends > starts)
    starts, ends = starts[lines], ends[lines]
    blanks = np.flatnonzero(blank)
    nearest = np.searchsorted(blanks, ends) - 1
    cuts = blanks[np.maximum(nearest, 0)] if len(blanks) else np.full(len(ends), -1)
    path_ends = _trim_right(blank, starts, cuts)
    bad = (nearest < 0) | (cuts < starts) | (path_ends <= starts)
    labels = _digits(text, cuts + 1, ends, bad)
    if bad.any():
        first = int(np.argmax(bad))
        shown = text[starts[first] : ends[first]].tobytes()[:120].decode(errors="replace")
        raise UserError(
            f"{source}: line {int(lines[first]) + 1}: {shown!r} is not '<relative path> <label>' with a label >= 0"
        )
    edge = np.zeros(len(text) + 1, dtype=np.int8)
    edge[starts] += 1
    edge[path_ends] -= 1
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(path_ends - starts)])
    return PathTable(text[np.cumsum(edge[:-1], dtype=np.int8).astype(bool)].tobytes(), offsets), labels, None, None


def _trim_right(blank: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    ends = ends.copy()
    while len(ends):
        loose = (ends > starts) & blank[np.maximum(ends - 1, 0)]
        if not loose.any():
            break
        ends -= loose
    return ends


def _digits(text: np.ndarray, starts: np.ndarray, ends: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Decimal numbers text[starts:ends] as int32; entries that are none are marked in `bad` (changed in place)."""
    values = np.zeros(len(starts), dtype=np.int64)
    lengths = np.where(bad, 0, ends - starts)
    bad |= (lengths < 1) | (lengths > MAX_LABEL_DIGITS)
    for place in range(int(lengths.max(initial=0)) if not bad.any() else MAX_LABEL_DIGITS):
        active = (place < lengths) & ~bad
        digit = text[np.where(active, starts + place, 0)].astype(np.int64) - 48
        bad |= active & ((digit < 0) | (digit > 9))
        values = np.where(active, values * 10 + digit, values)
    return values.astype(np.int32)


def parse_csv(data: bytes, source: str, named: bool = True) -> Parsed:
    """Columns by header name (PATH_COLUMNS, LABEL_COLUMNS, NAME_COLUMNS), or path and label where there is no header.

    Labels are numbers, or with a header names: the classes are then those, sorted. Beside numbers a column of NAME_COLUMNS
    names the classes if it has one name for each.
    """
    paths, labels, names, lines, header = _csv_columns(data, source)
    table = PathTable.of(path.encode("utf-8", "surrogateescape") for path in paths)
    words = [i for i, label in enumerate(labels) if not _is_label(label)]
    if not words:
        numbers = np.array(labels, dtype=np.int32)
        pairs = sorted(set(zip(numbers.tolist(), names, strict=True)))
        ids, of_id = tuple(number for number, _ in pairs), tuple(name for _, name in pairs)
        if not (named and all(of_id) and len(set(ids)) == len(set(of_id)) == len(pairs)):
            return table, numbers, None, None
        return table, np.searchsorted(ids, numbers).astype(np.int32), of_id, ids
    if header and named and all(labels) and len(words) == len(labels):
        distinct, index = np.unique(labels, return_inverse=True)
        return table, index.astype(np.int32), tuple(map(str, distinct)), None
    at = labels.index("") if "" in labels else words[0]
    if not header:
        why = "; class names need a first line such as 'path,class'"
    elif not labels[at]:
        why = ""
    else:
        why = "; names and numbers are mixed" if named else "; the train list has numbers, not names"
    raise UserError(
        f"{source}: line {lines[at]}: {f'{paths[at]},{labels[at]}'[:120]!r} is not '<relative path>,<label>' with a label >= 0{why}"
    )


def _csv_columns(data: bytes, source: str) -> tuple[list[str], list[str], list[str], list[int], bool]:
    """Paths, labels, class names ("" without a column for them), line numbers, and whether a header named the columns."""
    rows = csv.reader(io.StringIO(data.decode("utf-8-sig", errors="surrogateescape"), newline=""))
    columns: tuple[list[str], list[str], list[str]] = ([], [], [])
    lines: list[int] = []
    places, header = [0, 1, -1], False
    for row in filter(None, rows):
        if not lines and not header:
            titles = [cell.strip().lower() for cell in row]
            found = [_first(titles, PATH_COLUMNS), _first(titles, LABEL_COLUMNS)]
            if header := min(found) >= 0:
                places = [*found, _first(titles, [name for name in NAME_COLUMNS if name != titles[found[1]]])]
                continue
        for column, place in zip(columns, places, strict=True):
            column.append(row[place] if 0 <= place < len(row) else "")
        lines.append(rows.line_num)
    paths, *texts = columns
    labels, names = ([t.strip().encode("utf-8", "surrogateescape").decode(errors="replace") for t in c] for c in texts)
    if "" in paths:
        raise UserError(f"{source}: line {lines[paths.index('')]}: no path; a line is '<relative path>,<label>'")
    return paths, labels, names, lines, header


def _first(titles: list[str], known: Iterable[str]) -> int:
    """Place of the first of `known` among the titles, -1 without one."""
    return next((titles.index(name) for name in known if name in titles), -1)


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MAX_LABEL_DIGITS


def parse_json(data: bytes, source: str) -> Parsed:
    """iNaturalist's COCO-like file: images {id, file_name}, annotations {image_id, category_id}, categories {id,
    name}.

    Labels are the categories in the order of their ids (in 2018 the ids are already 0..8141); read_lists makes them those of
    train.
    """
    try:
        content = json.loads(data)
        order = sorted((int(c["id"]), str(c.get("name", c["id"]))) for c in content["categories"])
        label_of = {identity: label for label, (identity, _) in enumerate(order)}
        class_of = {a["image_id"]: label_of[int(a["category_id"])] for a in content["annotations"]}
        labels = np.fromiter((class_of[image["id"]] for image in content["images"]), dtype=np.int32)
        names = PathTable.of(image["file_name"] for image in content["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} is not an iNaturalist annotation file ({type(error).__name__}: {error}); "
            "it needs images, annotations and categories"
        ) from error
    return names, labels, tuple(name for _, name in order), tuple(identity for identity, _ in order)
