"""An .npz pack of JPEG files: for train and test, all files one after another, their offsets and their labels.

Arrays: {train,test}_bytes uint8, {train,test}_offsets int64 [n + 1], {train,test}_labels integers [n], class_names [C]
strings. Read with allow_pickle=False. 60,000 pictures of 32 x 32 decode in 2 s on one core with torchvision's decoder
(Pillow: 6 s, threads gain nothing under the interpreter lock; the pixels are the same), so nothing is cached on disk.
"""

from __future__ import annotations

import itertools
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from ltfast.data.longtail import IntArray
from ltfast.data.pool import ImageArray, Pool, check_labels
from ltfast.errors import UserError

PARTS = ("bytes", "offsets", "labels")


def read_pack(path: Path) -> Pool:
    """Everything in the pack, decoded to RGB. UserError naming the file and the array or picture that is wrong."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}  # each access unpacks the whole array again
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as an .npz pack ({error})") from error
    wanted = [f"{split}_{part}" for split in ("train", "test") for part in PARTS] + ["class_names"]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise UserError(f"{path}: the array {missing[0]!r} is missing; a pack holds {', '.join(wanted)}")
    names = tuple(str(name) for name in arrays["class_names"])
    train, train_labels = _decode_split(path, arrays, "train", len(names))
    test, test_labels = _decode_split(path, arrays, "test", len(names))
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{path}: train pictures are {_size(train)}, test pictures {_size(test)}; they must agree")
    return Pool(train, train_labels, test, test_labels, names)


def _decode_split(
    path: Path, arrays: dict[str, np.ndarray], split: str, num_classes: int
) -> tuple[ImageArray, IntArray]:
    data, offsets, labels = (arrays[f"{split}_{part}"] for part in PARTS)
    where = f"{path} ({split})"
    fits = len(offsets) == len(labels) + 1 and len(labels) > 0 and offsets[0] >= 0 and offsets[-1] <= len(data)
    if not fits or data.dtype != np.uint8 or (np.diff(offsets) <= 0).any():
        raise UserError(
            f"{where}: offsets do not cut {len(labels)} pictures out of {len(data)} bytes; the pack is damaged"
        )
    labels = labels.astype(np.int64)
    check_labels(labels, num_classes, where)
    return _decode(data, offsets.tolist(), where), labels


def _decode(data: np.ndarray, offsets: list[int], where: str) -> ImageArray:
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        stream = torch.from_numpy(data)
    images: torch.Tensor | None = None
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        try:
            picture = decode_jpeg(stream[start:stop], mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise UserError(f"{where}: picture {i} cannot be decoded as JPEG; rebuild the pack") from error
        if images is None:
            images = torch.empty(len(offsets) - 1, *picture.shape, dtype=torch.uint8)
        if picture.shape != images.shape[1:]:
            raise UserError(
                f"{where}: picture {i} is {_size(picture[None])}, picture 0 is {_size(images)}; sizes must agree"
            )
        images[i] = picture
    assert images is not None
    return images.numpy()


def _size(images: np.ndarray | torch.Tensor) -> str:
    return f"{images.shape[-1]} x {images.shape[-2]}"
