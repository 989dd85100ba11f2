"""Image-folder trees as image lists, and thinning any list to a long tail."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ltfast.data.lists import ImageList
from ltfast.data.longtail import first_of_each_class, limited_counts, long_tail_counts, select_subset
from ltfast.data.paths import PathTable
from ltfast.errors import UserError

FOLDER_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"})


def scan_folder(root: str | Path) -> dict[str, ImageList]:
    """An image-folder tree: root/train/<class>/..., root/val/..., root/test/...; or root/<class>/... as 'train' alone.

    Classes are the sorted folder names of train (folders of the other splits must be among them); files are sorted
    by name, below a class folder at any depth. Files without an image suffix are ignored.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist or is not a folder; give --data-dir")
    folders = {split: next((n for n in names if (root / n).is_dir()), None) for split, names in FOLDER_SPLITS.items()}
    if folders["train"] is None:
        folders = {"train": ""}
    classes = tuple(sorted(entry.name for entry in os.scandir(root / (folders["train"] or "")) if entry.is_dir()))
    if not classes:
        raise UserError(
            f"{root / (folders['train'] or '')} holds no class folders; expected <class>/<picture>.jpg below it"
        )
    return {split: _scan_split(root, name, classes) for split, name in folders.items() if name is not None}


def _scan_split(root: Path, split: str, classes: tuple[str, ...]) -> ImageList:
    numbers = {name: label for label, name in enumerate(classes)}
    extra = sorted(e.name for e in os.scandir(root / split) if e.is_dir() and e.name not in numbers)
    if extra:
        raise UserError(
            f"{root / split} holds the class folder {extra[0]!r} that the training folder lacks; remove or add it"
        )
    names: list[str] = []
    labels: list[int] = []
    for name, label in numbers.items():
        for folder, subfolders, files in os.walk(root / split / name, followlinks=True):
            subfolders.sort()
            below = os.path.relpath(folder, root)
            pictures = [f"{below}/{f}" for f in sorted(files) if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]
            names += pictures
            labels += [label] * len(pictures)
    return ImageList(root, PathTable.of(names), np.array(labels, dtype=np.int32), str(root / split), classes)


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
