"""Small pictures from an image-folder tree: root/train/<class>/, optional val/ and test/; or class folders alone.

Without test/, val/ is the test split; with class folders alone a balanced test split is held out, a sixth of the
smallest class from every class (CIFAR's own share), drawn with the fixed seed of the subset.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL.Image import Image, Resampling

from ltfast.data.decode import BadImage, load_picture
from ltfast.data.folders import scan_folder
from ltfast.data.lists import ImageList
from ltfast.data.longtail import IntArray
from ltfast.data.pool import ImageArray, Pool, check_labels, hold_out_test
from ltfast.errors import UserError

TEST_SHARE = 6
READERS = 8
"""Threads: they overlap the file system's waiting, decoding itself gains little from them."""


def read_tree(root: Path, size: int | None = None) -> Pool:
    """All pictures as RGB squares. size: side to resize to (bilinear); None takes the first picture's shorter side."""
    lists = scan_folder(root)
    names = lists["train"].class_names
    assert names is not None
    for split, images in lists.items():
        check_labels(images.labels.astype(np.int64), len(names), str(root / split) if len(lists) > 1 else str(root))
    size = size or min(_load(lists["train"].file(0)).size)
    read = {split: _read(images, size) for split, images in lists.items()}
    if len(read) == 1:
        per_class = max(1, int(lists["train"].counts.min()) // TEST_SHARE)
        return hold_out_test(*read["train"], names, per_class, str(root))
    test = read["test"] if "test" in read else read["val"]
    val = read["val"] if "test" in read and "val" in read else None
    return Pool(*read["train"], *test, names, val)


def _read(images: ImageList, size: int) -> tuple[ImageArray, IntArray]:
    pictures = np.empty((len(images), 3, size, size), dtype=np.uint8)

    def load(index: int) -> None:
        pictures[index] = _picture(images.file(index), size).transpose(2, 0, 1)

    with ThreadPoolExecutor(READERS) as threads:
        for _ in threads.map(load, range(len(images)), chunksize=64):
            pass
    return pictures, images.labels.astype(np.int64)


def _picture(path: str, size: int) -> ImageArray:
    picture = _load(path)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Resampling.BILINEAR)
    return np.asarray(picture)


def _load(path: str) -> Image:
    try:
        return load_picture(path)
    except BadImage as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); remove or replace it") from error
