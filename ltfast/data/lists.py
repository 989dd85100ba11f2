"""Image lists: '<relative path> <label>' text files, CSV and iNaturalist's JSON; folders.py reads image-folder trees.

Everything ends as an `ImageList`: compact paths, int32 labels, class names. Parsing is vectorised.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ltfast.data.decode import read_file
from ltfast.data.longtail import select_subset
from ltfast.data.paths import PathTable, contained, duplicate_indices, missing_indices, shared_indices
from ltfast.errors import UserError
from ltfast.tables import write_csv

MAX_LABEL_DIGITS = 7
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_id", "category", "category_id", "target")


@dataclass(frozen=True, slots=True)
class ImageList:
    """One split: file i is root / paths[i], its class labels[i] (int32 [n]); source is the list file or folder it
    came from.
    """

    root: Path
    paths: PathTable
    labels: np.ndarray
    source: str
    class_names: tuple[str, ...] | None = None
    split: str = ""
    """The data set's own split that the images are of: 'val' for a test split that the set calls val."""
    class_ids: tuple[int, ...] | None = None
    """The number of each class in the list file, where it is not the label itself (JSON's category ids)."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Largest label plus one, or the number of names where the format carries names."""
        if self.class_names is not None:
            return len(self.class_names)
        return int(self.labels.max()) + 1 if len(self) else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each class [C]: its label where the format carries no names."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def counts(self) -> np.ndarray:
        """Images in each class, int64 [C]."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def fingerprint(self) -> int:
        """CRC-32 of relative paths and labels: the same wherever the folder lies."""
        return zlib.crc32(self.labels.astype("<i4").tobytes(), self.paths.fingerprint())

    def file(self, index: int) -> str:
        """Full name of file `index`."""
        return os.path.join(self.root, self.paths[index])

    @property
    def loose(self) -> bool:
        """Whether every picture is a file of its own (`file`), else only `read` gives its bytes."""
        return True

    def read(self, index: int) -> bytes:
        """The bytes of picture `index`. Raises BadImage when it cannot be read."""
        return read_file(self.file(index))

    def select(self, indices: np.ndarray) -> ImageList:
        """The sub-list at `indices`, in that order; classes keep their numbers."""
        return replace(self, paths=self.paths.select(indices), labels=self.labels[indices])

    def without(self, excluded: set[bytes]) -> ImageList:
        """The list without the paths in `excluded`, spelled plainly or not; classes keep their numbers."""
        excluded = excluded.union(PathTable.of(excluded).plain().iter_raw())
        keep = np.fromiter((name not in excluded for name in self.paths.iter_raw()), dtype=bool, count=len(self))
        return self if keep.all() else self.select(np.flatnonzero(keep))


def read_list(path: str | Path, root: str | Path) -> ImageList:
    """Reads one list file, format by suffix: .txt / .lst (space or tab), .csv, .json (iNaturalist), each also as .gz.

    Paths must be relative to `root` (or absolute inside it). Raises UserError naming the file, the line and the fix.
    """
    path, root = Path(path), Path(root)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"list file {path} does not exist; check the option that names it") from error
    except OSError as error:
        raise UserError(f"list file {path} cannot be read: {error.strerror}") from error
    kind = path.suffix.lower()
    if kind == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise UserError(f"list file {path} is not a complete gzip file ({error}); obtain it again") from error
        kind = Path(path.stem).suffix.lower()
    parsers: dict[str, Callable[[bytes, str], tuple[PathTable, np.ndarray, list[tuple[int, str]] | None]]] = {
        ".csv": _parse_csv,
        ".json": _parse_json,
    }
    names, labels, classes = parsers.get(kind, _parse_text)(data, str(path))
    if not len(labels):
        raise UserError(f"list file {path} holds no image; expected lines '<relative path> <label>'")
    images = ImageList(root, contained(names, root, str(path)), labels, str(path))
    if classes is None:
        return images
    return replace(images, class_names=tuple(name for _, name in classes), class_ids=tuple(i for i, _ in classes))


def write_lists(lists: dict[str, ImageList], folder: str | Path) -> list[Path]:
    """Writes each split that has images as <split>.csv (path, label, class), which read_list takes; returns the files.

    Raises:
        UserError: pictures in shards, which no list can name; a file is there already, or cannot be written.
    """
    files = {split: Path(folder) / f"{split}.csv" for split, images in lists.items() if len(images)}
    if not all(images.loose for images in lists.values()):
        raise UserError(f"--lists {folder}: pictures in shards cannot be named by lists; leave it out")
    if there := next((file for file in files.values() if file.exists()), None):
        raise UserError(f"--lists {folder}: {there} is there already; choose another folder")
    for split, file in files.items():
        images, names = lists[split], lists[split].names
        with contextlib.suppress(OSError):  # write_csv tells
            file.parent.mkdir(parents=True, exist_ok=True)
        rows = ((path, label, names[label]) for path, label in zip(images.paths, images.labels.tolist(), strict=True))
        write_csv(file, itertools.chain([("path", "label", "class")], rows), "--lists")
    return list(files.values())


def _parse_text(data: bytes, source: str) -> tuple[PathTable, np.ndarray, None]:
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
    return PathTable(text[np.cumsum(edge[:-1], dtype=np.int8).astype(bool)].tobytes(), offsets), labels, None


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


def _parse_csv(data: bytes, source: str) -> tuple[PathTable, np.ndarray, None]:
    """Two columns by header name (see PATH_COLUMNS, LABEL_COLUMNS), or the first two when there is no header."""
    rows = csv.reader(io.StringIO(data.decode("utf-8-sig", errors="surrogateescape"), newline=""))
    path_at, label_at = 0, 1
    names: list[str] = []
    labels: list[int] = []
    for row in rows:
        if not row:
            continue
        if not names and rows.line_num == 1:
            header = [cell.strip().lower() for cell in row]
            found = [
                next((header.index(c) for c in known if c in header), -1) for known in (PATH_COLUMNS, LABEL_COLUMNS)
            ]
            if min(found) >= 0:
                path_at, label_at = found
                continue
        try:
            label = int(row[label_at])
            names.append(row[path_at])
        except (ValueError, IndexError):
            label = -1
        if not 0 <= label < 10**MAX_LABEL_DIGITS:
            raise UserError(
                f"{source}: line {rows.line_num}: {','.join(row)[:120]!r} is not '<relative path>,<label>' "
                "with a label >= 0"
            )
        labels.append(label)
    return (
        PathTable.of(name.encode("utf-8", "surrogateescape") for name in names),
        np.array(labels, dtype=np.int32),
        None,
    )


def _parse_json(data: bytes, source: str) -> tuple[PathTable, np.ndarray, list[tuple[int, str]]]:
    """iNaturalist's COCO-like file: images {id, file_name}, annotations {image_id, category_id}, categories {id,
    name}.

    Labels are the categories in the order of their ids (in 2018 the ids are already 0..8141); match_classes makes them
    those of train.
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
    return names, labels, order


def match_classes(lists: dict[str, ImageList]) -> dict[str, ImageList]:
    """The splits of one data set with JSON's categories numbered as in train, by id and name.

    UserError for a category that train lacks or calls otherwise, or where train's file has no names to match.
    """
    train = lists["train"]
    return {s: i if i is train or i.class_ids is None else _numbered_as(train, i) for s, i in lists.items()}


def _numbered_as(train: ImageList, images: ImageList) -> ImageList:
    ids, names = images.class_ids or (), images.class_names or ()
    if train.class_ids is None or train.class_names is None:
        if images.num_classes == train.num_classes:
            return images
        raise UserError(
            f"{images.source}: {len(ids):,} categories, but {train.source} has {train.num_classes:,} classes and no names "
            "to match them by; give a JSON list of train, too"
        )
    known = dict(zip(train.class_ids, train.class_names, strict=True))
    for identity, name in zip(ids, names, strict=True):
        if (there := known.get(identity)) != name:
            what = "is not in" if there is None else f"is {there!r} in"
            raise UserError(
                f"{images.source}: category {identity} ({name!r}) {what} {train.source}; all lists need the same categories"
            )
    labels = np.searchsorted(train.class_ids, ids).astype(np.int32)[images.labels]  # ids ascend
    return replace(images, labels=labels, class_names=train.class_names, class_ids=train.class_ids)


def unknown_label(split: str, images: ImageList, train: ImageList) -> str:
    """What to say of a split with a label that no training image has room for, or an empty string."""
    if not len(images) or int(images.labels.max()) < train.num_classes:
        return ""
    return f"{images.source}: label {int(images.labels.max())} in {split}, but {train.source} has classes 0..{train.num_classes - 1}"


def empty_classes(images: ImageList) -> str:
    """Message about classes without an image, or an empty string."""
    empty = np.flatnonzero(images.counts == 0)
    if not len(empty):
        return ""
    shown = ", ".join(images.names[c] for c in empty[:5].tolist())
    fix = "remove the class or add an image to it" if images.class_names else "labels must be 0..C-1 without gaps"
    return (
        f"{images.source}: {len(empty):,} of {images.num_classes:,} classes have no image (class {shown}"
        f"{', ...' if len(empty) > 5 else ''}); {fix}"
    )


def validate_lists(lists: dict[str, ImageList], exist: bool = True) -> int:
    """Checks the splits of one data set together and returns C.

    train must hold every class 0..C-1 at least once, and two of them; no other split may name a class beyond them; test
    may not be empty; no path twice in a split or in two splits (the names in shards are no paths); with `exist` every
    file must be there. Raises UserError naming the list, an example and the fix.
    """
    train = lists["train"]
    num_classes = train.num_classes
    if empty := empty_classes(train):
        raise UserError(empty)
    if num_classes < 2:
        raise UserError(f"{train.source}: only one class; a classifier needs at least two")
    for split, images in lists.items():
        if split == "test" and not len(images):
            raise UserError(
                f"{images.source}: no image to test on; add some, or remove it: then val, or a tenth of train, is test"
            )
        if unknown := unknown_label(split, images, train):
            raise UserError(unknown)
        repeats = duplicate_indices(images.paths, limit=1) if images.loose else []
        if repeats:
            first, again = repeats[0]
            raise UserError(
                f"{images.source}: {images.paths[first]!r} stands twice (entries {first + 1} and {again + 1}); "
                "remove one"
            )
        absent = missing_indices(images.root, images.paths) if exist else []
        if absent:
            raise UserError(
                f"{images.source}: {len(absent)} of {len(images)} files are not below {images.root}, "
                f"first {images.paths[absent[0]]!r}; check --data-dir, or see `ltfast data check`"
            )
    for (first_split, earlier), (split, images) in itertools.combinations(lists.items(), 2):
        both = shared_indices(earlier.paths, images.paths) if images.loose else []
        if both:
            raise UserError(
                f"{images.source}: {len(both):,} of {len(images):,} {split} images are in {first_split} too, first "
                f"{images.paths[both[0]]!r}; take them off one of the two"
            )
    return num_classes


def hold_out(images: ImageList, share: float, seed: int) -> tuple[ImageList, ImageList]:
    """(rest, held out): about `share` of each class drawn with `seed`, never a class's last image."""
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    rng = np.random.default_rng(seed)
    taken = np.zeros(len(images), dtype=bool)
    order = rng.permutation(len(images))
    by_class = order[np.argsort(images.labels[order], kind="stable")]
    for block in np.split(by_class, np.cumsum(images.counts)[:-1]):
        taken[block[: min(math.ceil(len(block) * share), max(len(block) - 1, 0))]] = True
    return images.select(np.flatnonzero(~taken)), images.select(np.flatnonzero(taken))


def hold_out_each(images: ImageList, per_class: int) -> tuple[ImageList, ImageList]:
    """(rest, held out): the same number of images of every class, drawn as longtail.py draws validation images."""
    subset = select_subset(images.labels.astype(np.int64), images.counts, per_class)
    return images.select(np.sort(subset.train)), images.select(np.sort(subset.val))
