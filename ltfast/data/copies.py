"""Pictures that are in a data set more than once, byte for byte, under whatever name.

A picture of the test split that training saw makes the figure too good; one picture in two classes of train teaches both.
Sizes and a checksum of some bytes, which the look at the headers has at hand, leave few candidates; those are read whole.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ltfast.data.decode import BadImage
from ltfast.data.lists import ImageList

UNKNOWN = 0  # signature of a file that could not be read
HEAD = 1 << 16  # bytes that a look at the headers reads of a large file
SIGNED = slice(-(1 << 12), None)  # of the HEAD: beyond the headers of most pictures
Pair = tuple[str, str]


@dataclass
class Copies:
    """Of one split, pictures that are byte for byte the same as an earlier one: (path, path of the earlier one)."""

    elsewhere: dict[str, list[Pair]] = field(default_factory=lambda: defaultdict(list))
    """Earlier split -> its pictures that this split holds, too."""
    relabelled: list[Pair] = field(default_factory=list)
    """In this split under another class."""
    repeated: list[Pair] = field(default_factory=list)
    """In this split under the same class and another path."""


def signature(size: int, data: bytes) -> int:
    """Equal for equal files: 64 bits of the size and of `data`, the whole file or at least its HEAD."""
    return (size & 0x7FFFFFFF) << 32 | zlib.crc32(memoryview(data)[:HEAD][SIGNED])


def find_copies(
    splits: Sequence[tuple[str, ImageList]], signatures: Sequence[np.ndarray], workers: int
) -> list[Copies]:
    """What each split shares with itself and with the ones before it; signatures: one int64 per picture, UNKNOWN = none."""
    found = [Copies() for _ in splits]
    for places in _same_bytes(splits, signatures, workers):
        first: dict[int, dict[int, str]] = {}  # split -> class -> path, of those before
        for split, index in places:
            images = splits[split][1]
            label, path = int(images.labels[index]), images.paths[index]
            for other, theirs in first.items():
                if other != split:
                    found[split].elsewhere[splits[other][0]].append((path, next(iter(theirs.values()))))
            mine = first.setdefault(split, {})
            known = mine.setdefault(label, path)
            another = next((p for k, p in mine.items() if k != label), None)
            if another is not None:
                found[split].relabelled.append((path, another))
            elif known != path:
                found[split].repeated.append((path, known))
    return found


def _same_bytes(
    splits: Sequence[tuple[str, ImageList]], signatures: Sequence[np.ndarray], workers: int
) -> Iterator[list[tuple[int, int]]]:
    """(split, index) of pictures that are the same, two or more at a time."""
    key = np.concatenate(signatures)
    split = np.repeat(np.arange(len(splits)), [len(s) for s in signatures])
    index = np.concatenate([np.arange(len(s)) for s in signatures])
    _, group, count = np.unique(key, return_inverse=True, return_counts=True)
    again = np.flatnonzero((count[group] > 1) & (key != UNKNOWN))
    candidates = [(int(split[i]), int(index[i])) for i in again]
    by_bytes: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for place, digest in zip(
            candidates, pool.map(lambda at: _digest(splits[at[0]][1], at[1]), candidates), strict=True
        ):
            by_bytes[digest].append(place)
    return (places for digest, places in by_bytes.items() if digest and len(places) > 1)


def _digest(images: ImageList, index: int) -> bytes:
    try:
        return hashlib.blake2b(images.read(index), digest_size=16).digest()
    except BadImage:  # gone since it was looked at
        return b""
