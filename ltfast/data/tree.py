"""Small pictures from an image-folder tree: root/train/<class>/, optional val/ and test/; or class folders alone.

The tree, and what stands in for a split that it lacks, are those of the data set "folder" (folders.py, public.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL.Image import Image, Resampling

from ltfast.data.decode import BadImage, load_picture
from ltfast.data.folders import scan_folder
from ltfast.data.lists import ImageList, validate_lists
from ltfast.data.longtail import IntArray
from ltfast.data.pool import ImageArray, Pool
from ltfast.data.public import HELD_OUT_SHARE, assign_splits
from ltfast.errors import UserError

READERS = 8
"""Threads: they overlap the file system's waiting, decoding itself gains little from them."""


def read_tree(
    root: Path, size: int | None = None, share: float = HELD_OUT_SHARE, trained: Sequence[str] | None = None
) -> Pool:
    """All pictures as RGB squares. size: side to resize to (bilinear), None takes the first picture's shorter side;
    share: of each class of train, to test on where there is neither test/ nor val/; trained: see `scan_folder`.
    """
    lists = assign_splits(scan_folder(root, trained), share=share)
    validate_lists(lists, exist=False, trained=trained is not None)
    names = lists["train"].names
    size = size or min(_load(lists["train" if len(lists["train"]) else "test"].file(0)).size)
    read = {split: _read(images, size) for split, images in lists.items()}
    val = read["val"] if len(lists["val"]) else None
    paths = {split: images.paths for split, images in lists.items()}
    return Pool(*read["train"], *read["test"], names, val, lists["test"].split, lists["train"].fingerprint(), paths)


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
        raise UserError(
            f"{path}: cannot be read as a picture ({error}); remove or replace it (`ltfast data check` lists all)"
        ) from error
