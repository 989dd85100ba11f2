"""Image lists: files of them (list_files.py parses, folders.py reads image-folder trees), their splits and their checks.

Everything ends as an `ImageList`: compact paths, int32 labels, class names.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ltfast.data.decode import read_file
from ltfast.data.list_files import Parsed, parse_csv, parse_json, parse_text, parse_tsv
from ltfast.data.longtail import select_subset
from ltfast.data.paths import PathTable, contained, duplicate_indices, missing_hint, missing_indices, shared_indices
from ltfast.errors import UserError
from ltfast.tables import write_csv


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
    """The number of each class in a list file that has numbers and names (JSON's categories, a CSV with both)."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Largest label plus one, or the number of names (of numbers, see `no_images`) where these are given."""
        known = self.class_ids if self.class_names is None else self.class_names
        if known is not None:
            return len(known)
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


def no_images(root: Path, classes: Sequence[str]) -> ImageList:
    """The train list of a data set that has none, to evaluate a model with these classes on: names, or numbers from 0."""
    numbers = tuple(range(len(classes)))
    plain = tuple(classes) == tuple(map(str, numbers))
    none = np.empty(0, dtype=np.int32)
    return ImageList(
        root, PathTable.of(()), none, "the run", None if plain else tuple(classes), class_ids=numbers if plain else None
    )


def read_list(path: str | Path, root: str | Path, named: bool = True) -> ImageList:
    """Reads one list file, format by suffix: .txt / .lst (space or tab), .csv, .tsv, .json (iNaturalist), each also as .gz.

    Paths must be relative to `root` (or absolute inside it). named: whether names that a CSV has for its classes count, which
    they do not beside a train list of numbers alone. Raises UserError naming the file, the line and the fix.
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
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"list file {path} is not a complete gzip file ({error}); obtain it again") from error
        kind = Path(path.stem).suffix.lower()
    parsers: dict[str, Callable[[bytes, str], Parsed]] = {
        ".csv": partial(parse_csv, named=named),
        ".tsv": partial(parse_tsv, named=named),
        ".json": parse_json,
    }
    names, labels, class_names, class_ids = parsers.get(kind, parse_text)(data, str(path))
    if not len(labels):
        raise UserError(f"list file {path} holds no image; expected lines '<relative path> <label>'")
    return ImageList(root, contained(names, root, str(path)), labels, str(path), class_names, class_ids=class_ids)


def read_lists(
    files: Iterable[tuple[str, Path]],
    root: Path,
    check: Callable[[str, ImageList], None] = lambda split, images: None,
    train: ImageList | None = None,
) -> dict[str, ImageList]:
    """The list files of a data set's splits, train first, each checked when it is read; classes are numbered as in train: by
    number and name where both files have both, else by name. train: instead of a file.

    UserError for a class that train lacks or calls otherwise, and where one file has only numbers and the other only names.
    """
    of_run, lists = train, {} if train is None else {"train": train}
    for split, file in files:
        train = lists.get("train")
        images = read_list(file, root, named=train is None or train.class_names is not None)
        check(split, images)
        if of_run is not None and of_run.class_names is None:
            images = _called_by_number(of_run, file, images)
        lists[split] = images if train is None else _numbered_as(train, images)
    return lists


def _called_by_number(train: ImageList, file: Path, images: ImageList) -> ImageList:
    """Of a run whose classes are called 0, 1, ...: a file's own names go before its numbers, if they are the run's classes."""
    try:
        named = read_list(file, images.root)
    except UserError:  # names that are read by no number
        return images
    if named.class_names is None or not set(named.class_names) <= set(train.names):
        return images
    label_of = np.array([train.names.index(name) for name in named.class_names], dtype=np.int32)
    return replace(named, labels=label_of[named.labels], class_names=None, class_ids=None)


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
        images = lists[split]
        names = [os.fsencode(name).decode(errors="replace") for name in images.names]  # read_list takes UTF-8 alone
        with contextlib.suppress(OSError):  # write_csv tells
            file.parent.mkdir(parents=True, exist_ok=True)
        rows = ((path, label, names[label]) for path, label in zip(images.paths, images.labels.tolist(), strict=True))
        write_csv(file, itertools.chain([("path", "label", "class")], rows), "--lists")
    return list(files.values())


def _numbered_as(train: ImageList, images: ImageList) -> ImageList:
    if images.class_names is None:
        if train.class_ids is not None:  # the numbers are those of train's file
            label_of_id = {number: label for label, number in enumerate(train.class_ids)}
            if unknown := sorted(set(images.labels.tolist()) - label_of_id.keys()):
                raise UserError(
                    f"{images.source}: label {unknown[0]} is not in {train.source}, whose labels are {_span(train.class_ids)}"
                )
            return replace(images, labels=np.array([label_of_id[i] for i in images.labels.tolist()], dtype=np.int32))
        if train.class_names is None:
            return images
        raise UserError(
            f"{images.source}: labels are numbers, but {train.source} names its classes; name them here, too"
        )
    if train.class_names is None:
        if images.num_classes == train.num_classes:
            return images
        raise UserError(
            f"{images.source}: {images.num_classes:,} categories, but {train.source} has {train.num_classes:,} classes and no "
            "names to match them by; give a JSON list of train, too"
        )
    numbered = images.class_ids is not None and train.class_ids is not None
    ours, theirs = (
        (images.class_ids or (), train.class_ids or ()) if numbered else (images.class_names, train.class_names)
    )
    label_of = {key: label for label, key in enumerate(theirs)}
    for key, name in zip(ours, images.class_names, strict=True):
        label = label_of.get(key)
        if label is None or train.class_names[label] != name:
            which = f"category {key} ({name!r})" if numbered else f"class {name!r}"
            what = "is not in" if label is None else f"is {train.class_names[label]!r} in"
            raise UserError(f"{images.source}: {which} {what} {train.source}; all lists need the same categories")
    labels = np.array([label_of[key] for key in ours], dtype=np.int32)[images.labels]
    return replace(images, labels=labels, class_names=train.class_names, class_ids=train.class_ids)


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}..{numbers[-1]}"


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


def validate_lists(lists: dict[str, ImageList], exist: bool = True, trained: bool = False) -> int:
    """Checks the splits of one data set together and returns C.

    train must hold every class 0..C-1 at least once, and two of them; no other split may name a class beyond them; test
    may not be empty; no path twice in a split or in two splits (the names in shards are no paths); with `exist` every
    file must be there. trained: a model is to be evaluated, so train may hold nothing at all. Raises UserError naming the
    list, an example and the fix.
    """
    train = lists["train"]
    num_classes = train.num_classes
    if (len(train) or not trained) and (empty := empty_classes(train)):
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
            first_absent = images.paths[absent[0]]
            raise UserError(
                f"{images.source}: {len(absent)} of {len(images)} files are not below {images.root}, "
                f"first {first_absent!r}{missing_hint(first_absent) or '; check --data-dir, or see `ltfast data check`'}"
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
