"""cifar10-lt and cifar100-lt: torchvision's folder, an image-folder tree, or an .npz pack of JPEGs; all give one Pool.

torchvision's files are pickles. They are read here by an unpickler that can build arrays and nothing else, so a file
that a user passes in cannot run code, whatever its checksum. The subset of a class depends only on the order inside it,
so the three sources give the field's pictures as far as they keep CIFAR's own order.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ltfast.data.pack import read_pack
from ltfast.data.pool import ImageArray, Pool, check_labels
from ltfast.data.tree import read_tree
from ltfast.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""The constants of the field's recipes, for both sets (the true per-channel deviation of CIFAR-10 is 0.247 0.243
0.262)."""
SIDE = 32
TEST_SHARE = 1 / 6  # CIFAR's own, for class folders alone
DEFAULT_DIR = Path("data")


class _Files(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str
    torchvision_class: str
    num_classes: int


FILES = {
    "cifar10-lt": _Files(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
        "CIFAR10",
        10,
    ),
    "cifar100-lt": _Files(
        "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names", "CIFAR100", 100
    ),
}


def read_cifar(dataset: str, data_dir: Path | None, download: bool = False) -> Pool:
    """The full, balanced pool. data_dir: any of the three forms; download: fetch torchvision's folder there when
    missing.

    UserError when nothing is found, a file cannot be read, or classes or picture size are not CIFAR's.
    """
    files = FILES[dataset]
    root = DEFAULT_DIR if data_dir is None else data_dir
    pool = _read(files, root)
    if pool is None and download:
        _download(files, root)
        pool = _read(files, root)
    if pool is None:
        state = "is empty or holds something else" if root.is_dir() else "does not exist"
        raise UserError(
            f"{dataset}: --data-dir {root} {state}; it must hold torchvision's {files.folder}, "
            "train/<class>/ folders or an .npz pack (--download fetches it)"
        )
    if len(pool.class_names) != files.num_classes:
        raise UserError(
            f"{root}: {len(pool.class_names)} classes found, {dataset} has {files.num_classes}; check --dataset"
        )
    check_labels(pool.test_labels, files.num_classes, f"{root} (test split)")
    if pool.images.shape[2:] != (SIDE, SIDE):
        raise UserError(
            f"{root}: pictures are {pool.images.shape[3]} x {pool.images.shape[2]}, {dataset} has {SIDE} x {SIDE}"
        )
    return pool


def _read(files: _Files, root: Path) -> Pool | None:
    if root.is_file():
        return read_pack(root)
    for folder in (root / files.folder, root):
        if (folder / files.meta).is_file():
            return _read_batches(files, folder)
    packs = sorted(root.glob("*.npz")) if root.is_dir() else []
    if len(packs) == 1:
        return read_pack(packs[0])
    folders = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    if {"train", "training"} & {entry.name.lower() for entry in folders} or len(folders) >= files.num_classes:
        return read_tree(root, share=TEST_SHARE)
    return None


def _read_batches(files: _Files, folder: Path) -> Pool:
    train = [_batch(folder / name, files.labels) for name in files.train]
    test_images, test_labels = _batch(folder / files.test, files.labels)
    names = _unpickle(folder / files.meta).get(files.names)
    if not isinstance(names, list):
        raise UserError(f"{folder / files.meta}: holds no {files.names!r}; download the data again")
    images, labels = (np.concatenate(part) for part in zip(*train, strict=True))
    return Pool(images, labels, test_images, test_labels, tuple(str(name) for name in names))


def _batch(path: Path, label_key: str) -> tuple[ImageArray, np.ndarray]:
    content = _unpickle(path)
    data, labels = content.get("data"), content.get(label_key)
    if not isinstance(data, np.ndarray) or not isinstance(labels, list) or data.dtype != np.uint8:
        raise UserError(f"{path}: holds no CIFAR pictures with {label_key!r}; download the data again")
    if data.shape != (len(labels), 3 * SIDE * SIDE):
        raise UserError(f"{path}: {len(labels)} labels for an array of shape {data.shape}; download the data again")
    return data.reshape(-1, 3, SIDE, SIDE), np.array(labels, dtype=np.int64)


def _latin1(text: str, encoding: str) -> bytes:
    """What a protocol-2 pickle written by Python 3 asks of _codecs.encode, and no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not expected")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays out of plain containers; every other name in the stream is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        key = ("multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module, name)
        if key not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return allowed[key]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing; download the data again") from error
    # A damaged stream can raise almost anything from inside the unpickler.
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a CIFAR file ({error}); download the data again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read as a CIFAR file (no dictionary); download the data again")
    return content


def _download(files: _Files, root: Path) -> None:
    """Fetch and unpack the published archive, checked against torchvision's md5."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    facts = getattr(datasets, files.torchvision_class)
    try:
        download_and_extract_archive(facts.url, str(root), filename=facts.filename, md5=facts.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{facts.url} cannot be downloaded to {root} ({error}); fetch it elsewhere and unpack it there, "
            "or give --data-dir"
        ) from error
