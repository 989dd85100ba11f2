"""`ltfast data check`: every file of a data set looked at in parallel, before a run meets the bad ones.

Headers by default (a file's first and last kilobytes); a full decode on request finds bit rot too. What
cannot be decoded is "bad" and can be excluded from training by the written list; what decodes but is unusual (CMYK,
gray, EXIF-rotated, another format than its name says) is only counted.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ltfast.data.copies import HEAD, UNKNOWN, Copies, find_copies, signature
from ltfast.data.dali_pipeline import dali_available
from ltfast.data.decode import (
    NEXT_PAGE,
    BadImage,
    JpegHeader,
    Reader,
    dali_distortion,
    dali_fault,
    dali_tiff_fault,
    decode,
    file_format,
    jpeg_header,
    look,
    reader,
    sample_bits,
    tiff_fault,
    tiff_tags,
    webp_size,
)
from ltfast.data.folders import SUFFIX_FORMATS
from ltfast.data.lists import ImageList, unknown_label
from ltfast.data.paths import duplicate_indices, missing_hint
from ltfast.errors import UserError
from ltfast.tables import write_csv

if TYPE_CHECKING:
    from rich.console import Console

TAIL = 1 << 12  # bytes read of a large file beside its HEAD; the whole file when they do not settle it
CHUNK = 512  # files a task
SAMPLE = 32  # files of more than 8 bits that are decoded without `full`
FEW_LEVELS = 16  # what 12 bits in files of 16 are read as
BAD = "bad: "  # what a finding about a file that cannot be decoded begins with


@dataclass(frozen=True, slots=True)
class Finding:
    """One file: bad says why it cannot be decoded ('' when it can); notes are what is unusual about it."""

    bad: str
    notes: tuple[str, ...] = ()
    signature: int = UNKNOWN
    """See ltfast.data.copies."""
    deep: bool = False
    """Whether it has more than 8 bits a sample."""
    dim: bool = False
    """Whether it is deep, was decoded, and FEW_LEVELS or fewer are left."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What was found in one split."""

    split: str
    source: str
    images: int
    bad: list[tuple[str, str]]
    """(relative path, reason)."""
    notes: dict[str, int]
    """CMYK, gray, EXIF-rotated, named .jpg but PNG, ...: number of files."""
    duplicates: list[str]
    """Paths that stand more than once."""
    empty_classes: list[str]
    """Classes without an image: names, or labels below the largest."""
    copies: Copies = field(default_factory=Copies)
    """The same pictures under other names."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Result of check_dataset; ok when every file decodes, labels have no gap, no picture stands in two splits or classes,
    no file twice, and notes is empty."""

    splits: list[SplitReport]
    decoded: bool
    """Whether pictures were decoded fully or only their headers read."""
    notes: list[str] = field(default_factory=list)
    """What is wrong with the set as a whole."""

    @property
    def bad(self) -> int:
        """Number of files that cannot be decoded."""
        return sum(len(split.bad) for split in self.splits)

    @property
    def ok(self) -> bool:
        """Nothing that would stop or bend a training run."""
        found = any(s.bad or s.duplicates or s.copies.elsewhere or s.copies.relabelled for s in self.splits)
        return not found and not self.splits[0].empty_classes and not self.notes


def inspect(path: str, full: bool = False) -> Finding:
    """What there is to say about a file; full decodes it."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            read = _reader(file.fileno(), size)
            data = file.read() if full or size <= 2 * HEAD else file.read(HEAD)
            if len(data) < size and not _settled(data, read, size):
                file.seek(0)
                data = file.read()
            if len(data) < size:
                return _whole(data, path, read, size)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            return Finding(f"missing{missing_hint(path)}")
        return Finding((error.strerror or str(error)).lower())
    return judge(data, path, full)


def judge(data: bytes, name: str, full: bool = False) -> Finding:
    """`inspect` for bytes at hand. What only DALI cannot read, or reads wrongly, is bad where it is installed: there training uses it."""
    why = look(data)
    if not why and (fault := dali_fault(data) or dali_distortion(data)) and dali_available():
        why = fault
    if why:
        return Finding(why)
    found = _whole(data, name, reader(data), len(data))
    if not full:
        return found
    try:
        picture = decode(data)
    except BadImage as error:
        return Finding(str(error))
    return replace(found, dim=found.deep and int(np.asarray(picture).max()) < FEW_LEVELS)


def _whole(data: bytes, path: str, read: Reader, size: int) -> Finding:
    """What to say of a picture of `size` bytes that is not bad, from its first ones."""
    tags = tiff_tags(read) if file_format(data[:16]) == "TIFF" else {}  # they may stand anywhere in it
    bits = sample_bits(data, tags)
    return Finding("", tuple(_notes(data, path, tags, bits)), signature(size, data), bits > 8)


def _reader(file: int, size: int) -> Reader:
    """A Reader of an open file."""
    return lambda start, count: os.pread(file, count, start) if start < size else b""


def _settled(head: bytes, read: Reader, size: int) -> bool:
    """Whether a large file is seen to be whole without the rest of it."""
    kind, tail = file_format(head[:16]), read(size - TAIL, TAIL)
    if kind == "TIFF":
        tags = tiff_tags(read)
        return not tiff_fault(tags) and not dali_tiff_fault(tags)
    if kind == "PNG":
        return b"IEND" in tail
    if kind == "WEBP":
        return webp_size(head) <= size
    return b"\xff\xd9" in tail and isinstance(jpeg_header(head), JpegHeader)


def _notes(data: bytes, path: str, tags: Mapping[int, int], bits: int) -> Iterator[str]:
    """What is unusual about a picture with these first bytes, these tags of a TIFF and so many bits a sample."""
    kind = file_format(data[:16])
    suffix = os.path.splitext(path)[1].lower()
    if SUFFIX_FORMATS.get(suffix, kind) != kind:
        yield f"{kind} named {suffix}"
    header = jpeg_header(data) if kind == "JPEG" else None
    if isinstance(header, JpegHeader):
        if header.components == 1:
            yield "gray"
        elif header.components == 4:
            yield "CMYK"
        if header.orientation != 1:
            yield "EXIF-rotated (not turned by the loaders)"
    if bits > 8:
        yield f"{bits} bits (read as 8)"
    if NEXT_PAGE in tags:
        yield "several pages (the first is read)"


def check_dataset(lists: dict[str, ImageList], *, full: bool = False, workers: int = 8) -> CheckReport:
    """Looks at every file of the splits (each list once, 'train' first) and at their labels and paths.

    full: decode every picture, which takes far longer, instead of reading headers; workers: threads.
    """
    notes, splits, signatures, names = [], [], [], distinct(lists)
    if lists["train"].num_classes < 2:
        notes.append("only one class: a classifier needs at least two")
    if "test" in lists and not len(lists["test"]):
        notes.append(f"no image to test on in {lists['test'].source}")
    notes += filter(None, (unknown_label(split, images, lists["train"]) for split, images in names))
    for split, images in names:
        report, signed, dim = _check_split(split, images, full, workers)
        splits.append(report)
        notes += filter(None, [dim])
        signatures.append(signed)
    copies = find_copies(names, signatures, workers)
    return CheckReport([replace(s, copies=c) for s, c in zip(splits, copies, strict=True)], full, notes)


def distinct(lists: dict[str, ImageList]) -> list[tuple[str, ImageList]]:
    """The splits without those that are an earlier one under another name, and without an empty val."""
    seen: dict[int, tuple[str, ImageList]] = {}
    for split, images in lists.items():
        if len(images) or split != "val":
            seen.setdefault(id(images), (split, images))
    return list(seen.values())


def _check_split(split: str, images: ImageList, full: bool, workers: int) -> tuple[SplitReport, np.ndarray, str]:
    """The report without copies, each picture's signature, and a note on pictures that few levels are left of, or ''."""

    def look_at(start: int) -> list[Finding]:
        return [examine(images, i, full) for i in range(start, min(start + CHUNK, len(images)))]

    bad: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    signatures = np.empty(len(images), dtype=np.int64)
    deep: dict[int, bool] = {}
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for i, finding in enumerate(chain.from_iterable(pool.map(look_at, range(0, len(images), CHUNK)))):
            if finding.bad:
                bad.append((images.paths[i], finding.bad))
            notes.update(finding.notes)
            signatures[i] = finding.signature
            if finding.deep:
                deep[i] = finding.dim
        if not full:
            sample = list(deep)[:: math.ceil(len(deep) / SAMPLE) or 1]
            decoded = list(pool.map(lambda i: examine(images, i, True), sample))
            bad += [(images.paths[i], finding.bad) for i, finding in zip(sample, decoded, strict=True) if finding.bad]
            deep = {i: finding.dim for i, finding in zip(sample, decoded, strict=True) if not finding.bad}
    again = duplicate_indices(images.paths) if images.loose else []  # names in shards are no paths
    duplicates = sorted({images.paths[index] for _, index in again})
    names = images.names
    empty = [names[c] for c in np.flatnonzero(images.counts == 0).tolist()]
    report = SplitReport(split, images.source, len(images), bad, dict(notes.most_common()), duplicates, empty)
    return report, signatures, _dim_note(split, list(deep.values()))


def _dim_note(split: str, dim: list[bool]) -> str:
    """What to say of the deep pictures that were decoded; nothing where most are bright, since some may well be dark."""
    if not dim or 2 * sum(dim) < len(dim):
        return ""
    return (
        f"{split}: {sum(dim):,} of {len(dim):,} pictures of 16 bits that were looked at use 12 or fewer of them: at most "
        f"{FEW_LEVELS} levels are left; stretch them to 65,535 first"
    )


def examine(images: ImageList, index: int, full: bool = False) -> Finding:
    """`inspect` for picture `index` of a list, loose or in a shard."""
    if images.loose:
        return inspect(images.file(index), full)
    try:
        return judge(images.read(index), images.paths[index], full)
    except BadImage as error:
        return Finding(str(error))


def found_files(split: SplitReport) -> Iterator[tuple[str, str, str]]:
    """(finding, path, the other path or '') of every file to look at, copies after bad files."""
    yield from ((f"{BAD}{reason}", path, "") for path, reason in split.bad)
    yield from (("duplicate path", path, "") for path in split.duplicates)
    same = {f"also in {other}": pairs for other, pairs in split.copies.elsewhere.items()}
    same |= {"same picture in another class": split.copies.relabelled}
    same |= {"copy in the same class": split.copies.repeated}
    yield from ((what, *pair) for what, pairs in same.items() for pair in pairs)


def print_check(report: CheckReport, console: Console | None = None, examples: int = 5) -> None:
    """The report as a table, with the first `examples` bad files of each split."""
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    console = console or RichConsole()
    depth = "full decode" if report.decoded else "headers"
    table = Table("split", "files", "finding", "count", "example", title=f"Files ({depth})")
    for split in report.splits:
        found = list(found_files(split))
        counts = Counter(what for what, *_ in found)
        example = {what: " = ".join(filter(None, paths)) for what, *paths in reversed(found)}
        bad = Counter({what: n for what, n in counts.items() if what.startswith(BAD)}).most_common(examples)
        others = [(what, n) for what, n in counts.items() if not what.startswith(BAD)]
        rows = [(what, n, example[what]) for what, n in bad]
        rows += [(note, n, "") for note, n in split.notes.items()]
        rows += [(what, n, example[what]) for what, n in others]
        if split.empty_classes:
            rows.append(("class without an image", len(split.empty_classes), split.empty_classes[0]))
        for row, (finding, count, shown) in enumerate(rows or [("nothing unusual", 0, "")]):
            head = (split.split, f"{split.images:,}") if row == 0 else ("", "")
            table.add_row(*head, finding, f"{count:,}" if count else "", escape(shown))
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False)


def write_bad_list(report: CheckReport, path: str | Path) -> int:
    """Writes '<relative path>TAB<reason>' lines of every bad file, for --exclude-list; returns how many. UserError where
    it cannot be written."""
    rows = sorted({row for split in report.splits for row in split.bad})
    lines = b"".join(os.fsencode(f"{name}\t{reason}\n") for name, reason in rows)
    try:
        Path(path).write_bytes(lines)
    except OSError as error:
        raise UserError(f"--bad-list {path}: cannot be written: {error.strerror}") from error
    return len(rows)


def write_findings(report: CheckReport, path: str | Path) -> int:
    """Writes a CSV with a line for each bad file, repeated path and copy (split, finding, path, other path); returns how
    many. UserError where it cannot be written."""
    rows = [(split.split, *row) for split in report.splits for row in found_files(split)]
    write_csv(path, [("split", "finding", "path", "same_as"), *rows])
    return len(rows)


def read_bad_list(path: str | Path) -> set[bytes]:
    """The relative paths of a list that write_bad_list made (or of plain lines with one path each)."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"bad-file list {path} cannot be read: {error.strerror}; see `ltfast data check`") from error
    # A path may hold a tab, a reason does not.
    return {line.rpartition(b"\t")[0] or line for line in lines if line.strip()}
