"""A million relative file names in one bytes object, and the questions asked of them all at once.

A list of a million Python strings is a million objects; here the text lies in one buffer with
an int64 offset for each name (8 bytes beyond the text).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from ltfast.errors import UserError


class PathTable(Sequence[str]):
    """n relative paths; ``table[i]`` is a str, ``table.raw(i)`` the bytes, ``table.select(indices)`` another table."""

    __slots__ = ("_text", "offsets")

    def __init__(self, text: bytes, offsets: np.ndarray) -> None:
        """text: all names one after another; offsets: int64 [n + 1], name i is text[offsets[i]:offsets[i + 1]]."""
        self._text = text
        self.offsets = offsets

    @classmethod
    def of(cls, names: Iterable[str | bytes]) -> PathTable:
        """A table of the given names, in their order."""
        raw = [os.fsencode(name) for name in names]
        offsets = np.zeros(len(raw) + 1, dtype=np.int64)
        np.cumsum(np.fromiter((len(name) for name in raw), dtype=np.int64, count=len(raw)), out=offsets[1:])
        return cls(b"".join(raw), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, index: int) -> bytes:
        """The name as bytes, as the file system has it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        index %= len(self)
        return self._text[self.offsets[index] : self.offsets[index + 1]]

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(self.raw(index))

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(name) for name in self.iter_raw())

    def iter_raw(self) -> Iterator[bytes]:
        """All names as bytes, in order."""
        ends = self.offsets.tolist()
        text = self._text
        return (text[ends[i] : ends[i + 1]] for i in range(len(ends) - 1))

    def select(self, indices: np.ndarray) -> PathTable:
        """The names at `indices` (integers or a mask [n]), in that order."""
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        return PathTable.of(self.raw(int(i)) for i in indices)

    def plain(self) -> PathTable:
        """The same names without '.' and empty components ('./a//b' is 'a/b'), so that a file has one name."""
        if b"./" not in self._text and b"//" not in self._text:
            return self
        text = np.frombuffer(self._text, dtype=np.uint8)
        slash, first = text == ord("/"), np.zeros(len(text) + 1, dtype=bool)
        first[self.offsets] = True
        begins = first[:-1].copy()  # where a component begins
        begins[1:] |= slash[:-1]
        dot = begins & (text == ord("."))
        dot[:-1] &= slash[1:]
        dot &= ~first[1:]
        dropped = dot | (slash & begins & ~first[:-1])
        dropped[1:] |= dot[:-1]
        return PathTable(
            text[~dropped].tobytes(), self.offsets - np.searchsorted(np.flatnonzero(dropped), self.offsets)
        )

    def ending_in(self, *suffixes: bytes) -> np.ndarray:
        """Which names end so, in capitals or not; bool [n]."""
        ends = (name.lower().endswith(suffixes) for name in self.iter_raw())
        return np.fromiter(ends, dtype=bool, count=len(self))

    def fingerprint(self) -> int:
        """CRC-32 of the names in their order."""
        return zlib.crc32(self.offsets.tobytes(), zlib.crc32(self._text))


def duplicate_indices(table: PathTable, limit: int | None = None) -> list[tuple[int, int]]:
    """(first, repeat) index pairs of names that occur more than once; at most `limit` of them."""
    if len(set(table.iter_raw())) == len(table):
        return []
    first: dict[bytes, int] = {}
    pairs = []
    for i, name in enumerate(table.iter_raw()):
        earlier = first.setdefault(name, i)
        if earlier != i:
            pairs.append((earlier, i))
            if limit is not None and len(pairs) >= limit:
                break
    return pairs


def shared_indices(first: PathTable, second: PathTable) -> list[int]:
    """Indices of the names of `second` that `first` holds too."""
    names = set(second.iter_raw()).intersection(first.iter_raw())
    return [i for i, name in enumerate(second.iter_raw()) if name in names] if names else []


def missing_hint(name: str) -> str:
    """What to say beside a missing file that a list of Windows may name, or ''."""
    return "; its path has backslashes, use /" if "\\" in name else ""


def missing_indices(root: Path, table: PathTable, limit: int | None = None) -> list[int]:
    """Indices of names with no directory entry below `root`; at most `limit` of them.

    Reads each directory once instead of asking for each file: far fewer round trips on a network file
    system. A dangling link counts as present here; `ltfast.data.check.check_dataset` opens every file.
    """
    base = os.fsencode(root)
    entries: dict[bytes, set[bytes]] = {}
    missing = []
    for i, name in enumerate(table.iter_raw()):
        folder, _, leaf = name.rpartition(b"/")
        found = entries.get(folder)
        if found is None:
            found = entries[folder] = _entries(os.path.join(base, folder))
        if leaf not in found:
            missing.append(i)
            if limit is not None and len(missing) >= limit:
                break
    return missing


def _entries(folder: bytes) -> set[bytes]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        unreadable(error)


def unreadable(error: OSError) -> NoReturn:
    """Raise the UserError for a folder that cannot be read."""
    raise UserError(
        f"folder {os.fsdecode(error.filename)} cannot be read: {error.strerror}; check its rights"
    ) from error


def contained(names: PathTable, root: Path, source: str) -> PathTable:
    """The same table with every name plain (PathTable.plain), relative and inside `root`, by its text.

    An absolute name inside root is made relative. A '..' component, a name outside root, an empty name or a NUL byte
    is a UserError that names `source`. Symbolic links are followed on purpose: data sets are often assembled from
    links.
    """
    names = names.plain()
    text = names._text
    absolute = any(name.startswith(b"/") for name in names.iter_raw()) if b"/" in text else False
    if not absolute and b".." not in text and b"\0" not in text and bool(np.all(np.diff(names.offsets) > 0)):
        return names
    linked, real = (os.fsencode(place) + b"/" for place in (os.path.abspath(root), root.resolve()))
    kept = []
    for i, name in enumerate(names.iter_raw()):
        relative = name.removeprefix(linked if name.startswith(linked) else real)
        if not relative or b"\0" in relative or relative.startswith(b"/") or b".." in relative.split(b"/"):
            shown = os.fsdecode(name).replace("\0", "\\0")
            raise UserError(f"{source}: entry {i + 1}: path {shown!r} leaves {root} (or is empty); use paths inside it")
        kept.append(relative)
    return PathTable.of(kept)
