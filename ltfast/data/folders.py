"""Image-folder trees as image lists, and thinning any list to a long tail."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ltfast.data.lists import ImageList, no_images
from ltfast.data.longtail import first_of_each_class, limited_counts, long_tail_counts, select_subset
from ltfast.data.paths import PathTable, unreadable
from ltfast.errors import UserError
from ltfast.launch import speaks
from ltfast.text import composed

log = logging.getLogger("ltfast.data")
FOLDER_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SUFFIX_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".jp2": "JPEG2000",
}
IMAGE_SUFFIXES = frozenset(SUFFIX_FORMATS)
CLASSES_SHOWN = 5


def scan_folder(root: str | Path, trained: Sequence[str] | None = None) -> dict[str, ImageList]:
    """An image-folder tree: root/train/<class>/..., root/val/..., root/test/...; or root/<class>/... as 'train' alone.

    Splits may be called as in FOLDER_SPLITS, in capitals or not.

    Classes are the sorted folder names of train (folders of the other splits must be among them); files are sorted
    by name, below a class folder at any depth. Hidden files and folders do not count; files without an image suffix
    are not read, nor are pictures beside the class folders; a warning says how many. Links are followed, into each folder of a
    class once. A class may be written in either Unicode form (macOS decomposes names).

    trained: classes of a model that is to be evaluated; where there is no train, it is empty and has these.
    """
    root = Path(root)
    check_folder(root)
    there = {name.lower(): name for name in _subfolders(root)}  # of "Train" and "train" the latter, which sorts behind
    folders = {split: next((there[n] for n in names if n in there), None) for split, names in FOLDER_SPLITS.items()}
    if folders["train"] is None:
        if there and there.keys() <= {name for names in FOLDER_SPLITS.values() for name in names}:
            if trained is not None:
                return _held_out_folders(root, folders, tuple(trained))
            raise UserError(
                f"{root} holds {', '.join(there.values())} and no folder train; expected train/<class>/<picture>.jpg"
            )
        folders = {"train": ""}
    classes = tuple(sorted({composed(name) for name in _subfolders(root / (folders["train"] or ""))}))
    if not classes:
        raise UserError(
            f"{root / (folders['train'] or '')} holds no class folders; expected <class>/<picture>.jpg below it"
        )
    return _scan_splits(root, folders, classes, "that the training folder lacks; remove or add it")


def _held_out_folders(root: Path, folders: dict[str, str | None], classes: tuple[str, ...]) -> dict[str, ImageList]:
    known = ", ".join(classes[:CLASSES_SHOWN]) + (", ..." if len(classes) > CLASSES_SHOWN else "")
    unknown = f"that the run was not trained on; its classes are {known}"
    return {"train": no_images(root, classes), **_scan_splits(root, folders, classes, unknown)}


def _scan_splits(
    root: Path, folders: dict[str, str | None], classes: tuple[str, ...], unknown: str
) -> dict[str, ImageList]:
    """The lists of the folders that are there; unknown: what is wrong with a class folder beyond `classes`."""
    unread: Counter[str] = Counter()
    lists = {
        split: _scan_split(root, name, classes, unknown, unread) for split, name in folders.items() if name is not None
    }
    warn_of_unread(root, unread)
    _warn_of_classless([root / name for name in folders.values() if name is not None])
    return lists


def check_folder(root: Path) -> None:
    """UserError if there is no folder `root`."""
    if not os.path.isdir(root):
        what = "is a file, not a folder of pictures" if os.path.exists(root) else "no such folder of pictures"
        raise UserError(f"{root}: {what}")


def warn_of_unread(root: str | Path, unread: Counter[str]) -> None:
    """One line on the files below `root` that were passed over, by suffix; none without any."""
    if unread and speaks():
        kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in unread.most_common())
        log.warning("%s: files not read, for their suffix: %s", root, kinds)


def _warn_of_classless(splits: list[Path]) -> None:
    """One line on the pictures that lie beside the class folders; none without any."""
    counts = {
        folder: sum(_is_picture(e.name) and e.is_file() for e in os.scandir(folder) if not e.name.startswith("."))
        for folder in splits
    }
    if any(counts.values()) and speaks():
        shown = ", ".join(f"{count:,} in {folder}" for folder, count in counts.items() if count)
        log.warning("pictures not read, for they lie in no class folder: %s", shown)


def _scan_split(root: Path, split: str, classes: tuple[str, ...], unknown: str, unread: Counter[str]) -> ImageList:
    numbers = {composed(name): label for label, name in enumerate(classes)}
    here = _subfolders(root / split)
    extra = [name for name in here if composed(name) not in numbers]
    if extra:
        raise UserError(f"{root / split} holds the class folder {extra[0]!r} {unknown}")
    names, above = [], os.path.join(root, "")
    labels: list[int] = []
    for name in here:
        for file in pictures_below(root / split / name, unread):
            names.append(file.removeprefix(above))
            labels.append(numbers[composed(name)])
    return ImageList(root, PathTable.of(names), np.array(labels, dtype=np.int32), str(root / split), classes)


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        unreadable(error)


def pictures_below(folder: Path, unread: Counter[str]) -> Iterator[str]:
    """The picture files below a folder; the others are counted in `unread`, by suffix."""
    for file in _files(folder):
        if _is_picture(file):
            yield file
        else:
            unread[os.path.splitext(file)[1].lower()] += 1


def _is_picture(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _files(folder: Path) -> Iterator[str]:
    """Files below a folder, sorted by name in each folder. A folder is visited once, and those above never."""
    seen = {(s.st_dev, s.st_ino) for s in map(os.stat, folder.resolve().parents)}
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))


def thin(images: ImageList, imbalance: float, kind: str = "exp") -> ImageList:
    """Keeps of class c what the field's long-tail rule keeps (longtail.py), from the classes as they are numbered.

    The longest class is the largest one, so a class may hold fewer images than the rule asks; it then keeps them all.
    """
    counts = images.counts
    wanted = np.maximum(long_tail_counts(int(counts.max()), images.num_classes, imbalance, kind), 1)
    kept = select_subset(images.labels.astype(np.int64), np.minimum(wanted, counts)).train
    return images.select(np.sort(kept))


def limit(images: ImageList, total: int) -> ImageList:
    """At most `total` images in the same class proportions, each class at least one: the first ones of every class."""
    labels = images.labels.astype(np.int64)
    return images.select(first_of_each_class(labels, limited_counts(images.counts, total)))
