"""Tar shards in the webdataset layout as an image list: one index a shard, every picture reachable at once.

A shard holds <key>.jpg (or another picture) and <key>.cls (the label in decimal) side by side. Its index is written
beside it as <shard>.idx, in the format of DALI's wds2idx (v1.2), so DALI's own reader can use it too.

Why training does not use fn.readers.webdataset: it reads shards one after another and shuffles in a window of
initial_fill (1,024) pictures. On 8 class-sorted shards of 2,500 pictures the position of a picture in two epochs
correlates .97; with shuffle_after_epoch .2 (whole shards move), and in both the first 64 pictures are of one class.
Here an index entry is a (shard, offset, size), so the epoch is the same uniform permutation as for loose files
(correlation 0), every sampler and a resume in mid-epoch work, and a picture costs one positioned read.
benchmarks/data.py measures both orders.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, product
from pathlib import Path

import numpy as np

from ltfast.data.decode import BadImage
from ltfast.data.folders import IMAGE_SUFFIXES
from ltfast.data.list_files import MAX_LABEL_DIGITS
from ltfast.data.lists import ImageList
from ltfast.data.paths import PathTable
from ltfast.errors import UserError
from ltfast.launch import speaks

log = logging.getLogger("ltfast.data")

VERSION = "v1.2"
LABEL = "cls"
INDEX_THREADS = 8
_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class TarList(ImageList):
    """An ImageList whose picture i is `sizes[i]` bytes at `starts[i]` of shards[shard[i]]; its paths read
    <shard>/<member>, the shard as in shard_names.
    """

    shards: tuple[Path, ...] = ()
    shard: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    starts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def loose(self) -> bool:
        """See ImageList.loose."""
        return False

    def read(self, index: int) -> bytes:
        """See ImageList.read."""
        size = int(self.sizes[index])
        try:
            handle = os.open(self.shards[self.shard[index]], os.O_RDONLY)
            try:
                data = os.pread(handle, size, int(self.starts[index]))
            finally:
                os.close(handle)
        except OSError as error:
            raise BadImage((error.strerror or str(error)).lower()) from error
        if len(data) != size:
            raise BadImage("the shard ends early")
        return data

    def select(self, indices: np.ndarray) -> TarList:
        """See ImageList.select."""
        return replace(
            self,
            paths=self.paths.select(indices),
            labels=self.labels[indices],
            shard=self.shard[indices],
            starts=self.starts[indices],
            sizes=self.sizes[indices],
        )


def expand_shards(pattern: str) -> list[Path]:
    """Files of "A-{000..127}.tar", "{a,b}.tar", "*.tar" (or several joined by '::'). UserError for one that is
    missing or stands twice.
    """
    shards: list[Path] = []
    for part in pattern.split("::"):
        for name in _braces(part):
            found = sorted(glob.glob(name)) if any(c in name for c in "*?[") else [name]
            shards += [Path(f) for f in found]
    wrong = [f"shard {s} {'is a folder' if s.is_dir() else 'does not exist'}" for s in shards if not s.is_file()]
    if wrong or not shards:
        raise UserError(
            f'{pattern}: {wrong[0] if wrong else "no shard"}; give a pattern such as "/data/train-{{000..127}}.tar"'
        )
    if twice := [shard for shard, n in Counter(shards).items() if n > 1]:
        raise UserError(f"{pattern!r}: shard {twice[0]} stands twice; remove one")
    return shards


def _braces(pattern: str) -> list[str]:
    parts = re.split(r"(\{[^{}]*\})", pattern)
    return ["".join(choice) for choice in product(*(_alternatives(part) for part in parts))]


def _alternatives(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if span is None:
        return part[1:-1].split(",")
    first, last = span.groups()
    return [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]


Component = tuple[str, int, int, str]  # extension, offset of the data, size, member name


def shard_index(shard: Path) -> list[list[Component]]:
    """The samples of a shard: from <shard>.idx when it is newer than the shard, else read from the tar and written.

    The shard's time of change counts, too: a file that `cp -p`, `rsync -t` or `tar -x` puts in its place brings its old
    time of modification along.
    """
    path = Path(f"{shard}.idx")
    try:
        written, file = path.stat().st_mtime_ns, shard.stat()
        if written > max(file.st_mtime_ns, file.st_ctime_ns):
            return _parse_index(path)
    except (OSError, ValueError):
        pass
    samples = _walk(shard)
    _write_index(path, samples)
    return samples


def _walk(shard: Path) -> list[list[Component]]:
    components: list[tuple[str, Component]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isreg() and stem:
                    entry = (extension, member.offset_data, member.size, member.name)
                    components.append((f"{folder}/{stem}", entry))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"shard {shard} is not a readable, uncompressed tar file ({error}); obtain it again") from error
    return [[entry for _, entry in group] for _, group in groupby(components, key=lambda c: c[0])]


def _write_index(path: Path, samples: list[list[Component]]) -> None:
    lines = [f"{VERSION} {len(samples)}", *(" ".join(" ".join(map(str, c)) for c in sample) for sample in samples)]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a read-only folder: the index is made anew next time


def _parse_index(path: Path) -> list[list[Component]]:
    head, *lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    if head != f"{VERSION} {len(lines)}":
        raise ValueError(f"{path} is not a complete index of version {VERSION}")
    samples = []
    for line in lines:
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError(f"{path}: a member name holds blanks")
        samples.append(
            [(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)]
        )
    return samples


def shard_names(shards: Iterable[Path]) -> dict[Path, str]:
    """Each shard's file name, after as many of its folders as tell it from others of that file name."""
    left = {shard: shard.absolute().parts for shard in shards}
    names: dict[Path, str] = {}
    depth = 0
    while left:
        depth += 1
        ends = Counter(parts[-depth:] for parts in set(left.values()))
        alone = {shard: parts[-depth:] for shard, parts in left.items() if ends[parts[-depth:]] == 1}
        names |= {shard: os.path.join(*end) for shard, end in alone.items()}
        left = {shard: parts for shard, parts in left.items() if shard not in alone}
    return names


def read_shards(pattern: str) -> TarList:
    """All samples of the shards of a pattern, in the order of the shards."""
    return read_splits({"train": pattern})["train"]


def read_splits(patterns: Mapping[str, str]) -> dict[str, TarList]:
    """`read_shards` of each split's pattern; no two pictures of all splits have one name. UserError for a shard in two splits."""
    shards = {split: expand_shards(pattern) for split, pattern in patterns.items()}
    seen: dict[Path, str] = {}
    for split, shard in ((split, shard) for split, part in shards.items() for shard in part):
        first = seen.setdefault(shard.resolve(), split)
        if first != split:
            raise UserError(f"shard {shard} is in {first} and in {split}; take it off one of the two")
    named = shard_names(chain.from_iterable(shards.values()))
    return {split: _read_all(pattern, shards[split], named) for split, pattern in patterns.items()}


def _read_all(pattern: str, shards: list[Path], named: Mapping[Path, str]) -> TarList:
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        parts = list(pool.map(_read_shard, shards, [named[shard] for shard in shards]))
    names = [name for part in parts for name in part[0]]
    if not names:
        raise UserError(f"{pattern}: the shards hold no sample with a picture and a .{LABEL} label")
    labels, starts, sizes = (np.concatenate([part[k] for part in parts]) for k in (1, 2, 3))
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part[0]) for part in parts])
    return TarList(
        Path(), PathTable.of(names), labels, pattern, shards=tuple(shards), shard=shard, starts=starts, sizes=sizes
    )


def _read_shard(shard: Path, called: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    samples = shard_index(shard)
    names, rows = [], np.empty((len(samples), 3), dtype=np.int64)
    with open(shard, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - tarfile.BLOCKSIZE, 0))
        if file.read().strip(b"\0") and speaks():
            log.warning("shard %s lacks the end mark of a tar file: it may have been cut off", shard)
        for i, sample in enumerate(samples):
            plain = [c for c in sample if c[0].lower() in _EXTENSIONS]  # before .depth.png
            pictures = plain or [c for c in sample if c[0].lower().rpartition(".")[2] in _EXTENSIONS]
            labels = [c for c in sample if c[0] == LABEL]
            for what, found in (("picture", pictures), (f".{LABEL} label", labels)):
                if len(found) != 1:
                    has = f"{len(found)} {what}s" if found else f"no {what}"
                    raise UserError(
                        f"shard {shard}: sample {sample[0][3]!r} has {has}; pack one <key>.jpg and one <key>.{LABEL}"
                    )
            (picture,), (label,) = pictures, labels
            digits = os.pread(file.fileno(), label[2], label[1]).strip()
            if not digits.isdigit() or len(digits) > MAX_LABEL_DIGITS:
                raise UserError(f"shard {shard}: {label[3]!r} holds {digits[:40]!r}, not a label 0..C-1 in decimal")
            rows[i] = int(digits), picture[1], picture[2]
            names.append(f"{called}/{picture[3]}")
    return names, rows[:, 0].astype(np.int32), rows[:, 1].copy(), rows[:, 2].copy()
