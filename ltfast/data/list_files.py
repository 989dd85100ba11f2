"""Parsers of list files: '<relative path> <label>' text, CSV, iNaturalist's JSON. Text is parsed vectorised."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ltfast.data.paths import PathTable
from ltfast.errors import UserError
from ltfast.text import composed

MAX_LABEL_DIGITS = 7
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
NAME_COLUMNS = ("class", "category", "class_name", "label_name", "species", "species_name", "diagnosis")
LABEL_COLUMNS = ("label", "class_id", "category_id", "label_id", "target", "class_label", *NAME_COLUMNS)
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
SPLIT_VALUES = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLIT_VALUES |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
SAVE_AS = "save it as UTF-8 (in Excel: 'CSV UTF-8')"
Parsed = tuple[PathTable, np.ndarray, tuple[str, ...] | None, tuple[int, ...] | None]
"""Paths, labels, and where the file has them the name and the number of each class."""


def parse_text(data: bytes, source: str) -> Parsed:
    """'<path> <label>' lines; the label is what follows the last blank, so paths may hold blanks."""
    text = np.frombuffer(_unmarked(data, source), dtype=np.uint8)
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


def _unmarked(data: bytes, source: str) -> bytes:
    """The text without a byte order mark; UserError for one of UTF-16."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{source}: is UTF-16; {SAVE_AS}")
    return data.removeprefix(codecs.BOM_UTF8)


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


def parse_tsv(data: bytes, source: str, named: bool = True) -> Parsed:
    """Columns between tabs, as in parse_csv, where the first line names them; else '<path> <label>' lines."""
    titles = _first_line(_decoded(data, source)).replace('"', "").split("\t")
    if min(_places(titles)[:2]) < 0:
        return parse_text(data, source)
    return parse_csv(data, source, named, "\t")


def parse_csv(data: bytes, source: str, named: bool = True, delimiter: str | None = None) -> Parsed:
    """Columns by header name (PATH_COLUMNS, LABEL_COLUMNS, NAME_COLUMNS), or path and label where there is no header.

    Labels are numbers, or with a header names: the classes are then those, sorted. Beside numbers a column of NAME_COLUMNS
    names the classes if it has one name for each. delimiter: what parts the columns; None: a semicolon or a tab where the first
    line has one and no comma, else a comma.
    """
    paths, labels, names, lines, header = _csv_columns(data, source, delimiter)
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
        titles = f"{', '.join(PATH_COLUMNS)}, and {', '.join(LABEL_COLUMNS)}"
        why = f"; class names need a first line such as 'path,class' (titles known: {titles})"
    elif not labels[at]:
        why = ""
    else:
        why = "; names and numbers are mixed" if named else "; the train list has numbers, not names"
    raise UserError(
        f"{source}: line {lines[at]}: {f'{paths[at]},{labels[at]}'[:120]!r} is not '<relative path>,<label>' with a label >= 0{why}"
    )


def _csv_columns(
    data: bytes, source: str, delimiter: str | None
) -> tuple[list[str], list[str], list[str], list[int], bool]:
    """Paths, labels, class names ("" without a column for them), line numbers, and whether a header named the columns."""
    text = _decoded(data, source)
    first = _first_line(text)
    delimiter = delimiter or next((d for d in ";\t" if d in first and "," not in first), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
    lines: list[int] = []
    places, header, split = [0, 1, -1, -1], False, ""
    for row in _rows(rows, source):
        if not lines and not header:
            found = _places(row)
            if header := min(found[:2]) >= 0:
                places, split = found, row[found[3]].strip()
                continue
        for column, place in zip(columns, places, strict=True):
            column.append(row[place] if 0 <= place < len(row) else "")
        lines.append(rows.line_num)
    paths, labels, names, splits = columns
    if "" in paths:
        raise UserError(f"{source}: line {lines[paths.index('')]}: no path; a line is '<relative path>,<label>'")
    _refuse_mixed(splits, split, source)
    labels, names = (
        [_utf8(text.strip(), source, line) for text, line in zip(column, lines, strict=True)]
        for column in (labels, names)
    )
    return paths, labels, names, lines, header


def _rows(rows: Any, source: str) -> Iterator[list[str]]:
    """Rows of a csv reader that are not blank. UserError for one that it cannot take apart."""
    try:
        yield from (row for row in rows if any(map(str.strip, row)))
    except csv.Error as error:
        raise UserError(f"{source}: line {rows.line_num}: {error}; is a quotation mark missing?") from error


def _decoded(data: bytes, source: str) -> str:
    """The text; bytes that are not UTF-8 stay what they are, since file names may hold any."""
    return _unmarked(data, source).decode(errors="surrogateescape")


def _first_line(text: str) -> str:
    """The first line that is not blank."""
    return next(filter(str.strip, io.StringIO(text, newline="")), "")


def _places(row: list[str]) -> list[int]:
    """Where a row of titles has the path, the label, the class name and the split, -1 for none."""
    titles = [cell.strip().lower() for cell in row]
    label = _first(titles, LABEL_COLUMNS)
    names = [name for name in NAME_COLUMNS if label < 0 or name != titles[label]]
    return [_first(titles, PATH_COLUMNS), label, _first(titles, names), _first(titles, SPLIT_COLUMNS)]


def _first(titles: list[str], known: Iterable[str]) -> int:
    """Place of the first of `known` among the titles, -1 without one."""
    return next((titles.index(name) for name in known if name in titles), -1)


def _refuse_mixed(values: list[str], title: str, source: str) -> None:
    """UserError where a column says of which split each picture is, and they are of several: all would be taken for one."""
    said = dict.fromkeys(value.strip().lower() for value in values)
    if len({SPLIT_VALUES[value] for value in said if value in SPLIT_VALUES}) > 1:
        shown = ", ".join(value for value in said if value in SPLIT_VALUES)
        raise UserError(f"{source}: holds several splits (column {title!r}: {shown}); give each its own list")


def _utf8(text: str, source: str, line: int) -> str:
    """A name in its composed form, since one name may be written in two; UserError if it was not UTF-8: names that differ in
    such letters would be one."""
    if text.isascii():
        return text
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return composed(raw.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: line {line}: {raw.decode(errors='replace')!r} is not UTF-8; {SAVE_AS}") from error


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
        found = {(a["image_id"], label_of[int(a["category_id"])]) for a in content["annotations"]}
        class_of = dict(found)
        images = [(image["id"], image["file_name"]) for image in content["images"]]
        names = PathTable.of(name for _, name in images)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} is not an iNaturalist annotation file ({type(error).__name__}: {error}); "
            "it needs images, annotations and categories"
        ) from error
    if len(class_of) < len(found):
        several = Counter(identity for identity, _ in found)
        name = next((name for identity, name in images if several[identity] > 1), None)
        if name is not None:
            raise UserError(f"{source}: {name} has annotations of several categories; a picture has one class here")
    bare = [name for identity, name in images if identity not in class_of]
    if bare:
        raise UserError(f"{source}: {bare[0]} has no annotation ({len(bare):,} of {len(images):,} pictures)")
    labels = np.fromiter((class_of[identity] for identity, _ in images), dtype=np.int32)
    return names, labels, tuple(name for _, name in order), tuple(identity for identity, _ in order)
