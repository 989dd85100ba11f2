"""An .npz pack of square JPEG or PNG pictures: all files of a split one after another, their offsets and their labels.

Arrays: {train,test}_bytes uint8, {train,test}_offsets int64 [n + 1], {train,test}_labels integers [n], class_names [C]
strings; val_* likewise, where there is a validation split. Read with allow_pickle=False. Pictures are decoded when they are
asked for, so a long-tailed subset costs only itself and nothing is cached on disk.
"""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ltfast.data.decode import BadImage, decode
from ltfast.data.longtail import IntArray
from ltfast.data.pool import ImageArray, Pool, check_labels
from ltfast.errors import UserError

PARTS = {"bytes": "uint8", "offsets": "integer", "labels": "integer"}


class JpegPictures:
    """n encoded squares of one size that decode on indexing, as uint8 [m, 3, H, W] RGB."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray, where: str) -> None:
        self._files = [data[start:stop].tobytes() for start, stop in itertools.pairwise(offsets.tolist())]
        self._where = where
        self.shape = (len(self._files), *self._decode(0).shape)
        height, width = self.shape[2:]
        if height != width:
            raise UserError(f"{where}: pictures are {width} x {height} pixels; crop or resize them to squares")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: IntArray) -> ImageArray:
        """Pictures at these positions. UserError naming the first that is damaged or of another size."""
        pictures = np.empty((len(index), *self.shape[1:]), dtype=np.uint8)
        for row, i in enumerate(index.tolist()):
            picture = self._decode(i)
            if picture.shape != self.shape[1:]:
                sizes = (f"{shape[2]} x {shape[1]}" for shape in (picture.shape, self.shape[1:]))
                raise UserError(f"{self._where}: picture {i} is {' and picture 0 '.join(sizes)}; sizes must agree")
            pictures[row] = picture
        return pictures

    def _decode(self, i: int) -> ImageArray:
        try:
            return np.asarray(decode(self._files[i])).transpose(2, 0, 1)
        except BadImage as error:
            raise UserError(f"{self._where}: picture {i} cannot be decoded ({error}); rebuild the pack") from error


def read_pack(path: Path) -> Pool:
    """The whole pack, pictures decoded on use. UserError naming the file and the array or picture that is wrong."""
    arrays = _load(path)
    splits = ["train", "test"] + (["val"] if any(key.startswith("val_") for key in arrays) else [])
    wanted = [f"{split}_{part}" for split in splits for part in PARTS] + ["class_names"]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise UserError(f"{path}: the array {missing[0]!r} is missing; a pack holds {', '.join(wanted)}")
    if np.ndim(arrays["class_names"]) != 1:
        raise UserError(
            f"{path}: class_names has shape {list(np.shape(arrays['class_names']))}, not [C]; rebuild the pack"
        )
    names = tuple(str(name) for name in arrays["class_names"])
    train, train_labels = _split(path, arrays, "train", len(names))
    held = {}
    for split in splits[1:]:
        pictures, labels = _split(path, arrays, split, len(names))
        if train.shape[1:] != pictures.shape[1:]:
            raise UserError(
                f"{path}: train pictures are {train.shape[1:]}, {split} pictures {pictures.shape[1:]}; they must agree"
            )
        held[split] = pictures[np.arange(len(pictures))], labels
    return Pool(
        train, train_labels, *held["test"], names, val=held.get("val"), identity=zlib.crc32(arrays["train_bytes"])
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}  # each access unpacks the whole array again
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes zipfile, zlib, numpy and tokenize raise nearly everything there is
        raise UserError(f"{path}: cannot be read as an .npz pack ({error}); check --data-dir") from error


def _split(path: Path, arrays: dict[str, Any], split: str, num_classes: int) -> tuple[JpegPictures, IntArray]:
    where = f"{path} ({split})"
    for part, kind in PARTS.items():
        array = np.asarray(arrays[f"{split}_{part}"])
        if array.ndim != 1 or not np.issubdtype(array.dtype, getattr(np, kind)):
            raise UserError(
                f"{where}: {split}_{part} is {array.dtype} {list(array.shape)}, not {kind} [n]; rebuild the pack"
            )
    data = arrays[f"{split}_bytes"]
    offsets, labels = (arrays[f"{split}_{part}"].astype(np.int64) for part in ("offsets", "labels"))
    fits = len(offsets) == len(labels) + 1 and len(labels) > 0 and offsets[0] >= 0 and offsets[-1] <= len(data)
    if not fits or (np.diff(offsets) <= 0).any():
        raise UserError(
            f"{where}: offsets do not cut {len(labels)} pictures out of {len(data)} bytes; rebuild the pack"
        )
    check_labels(labels, num_classes, where)
    return JpegPictures(data, offsets, where), labels
