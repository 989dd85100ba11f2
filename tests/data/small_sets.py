"""Tiny stand-ins for the public sets, in every form the readers take: torchvision's pickles, a tree, an .npz pack."""

import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = tuple(f"class{c}" for c in range(10))
PER_CLASS, TEST_PER_CLASS = 20, 3


def balanced(num_classes: int, per_class: int, seed: int = 0, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 3, side, side] noise whose mean tells the class, and shuffled labels [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    base = (labels * 200 // num_classes)[:, None, None, None]
    return (base + rng.integers(0, 50, (len(labels), 3, side, side))).astype(np.uint8), labels


def python2_pickle(images: np.ndarray, labels: np.ndarray, key: str = "labels") -> bytes:
    """{"data": uint8 [n, 3072], key: [labels]} as Python 2's cPickle wrote it: byte strings, old numpy names."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    raw = images.reshape(len(images), -1)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01"
    array += number(raw.shape[0]) + number(raw.shape[1]) + b"\x86"
    array += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + number(-1) + number(-1) + b"K\x00tb\x89"
    array += b"T" + len(raw.tobytes()).to_bytes(4, "little") + raw.tobytes() + b"tb"
    items = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + text("data") + array + text(key) + items + b"u."


def write_cifar10(root: Path, *, python2: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """root/cifar-10-batches-py with 200 training and 30 test pictures; returns the training pool in file order."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(images: np.ndarray, labels: np.ndarray) -> bytes:
        if python2:
            return python2_pickle(images, labels)
        return pickle.dumps({"data": images.reshape(len(images), -1), "labels": labels.tolist()}, protocol=2)

    images, labels = balanced(10, PER_CLASS)
    for i in range(5):
        part = slice(40 * i, 40 * (i + 1))
        (folder / f"data_batch_{i + 1}").write_bytes(dump(images[part], labels[part]))
    (folder / "test_batch").write_bytes(dump(*balanced(10, TEST_PER_CLASS, seed=1)))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(NAMES)}, protocol=2))
    return images, labels


def write_cifar100(root: Path) -> None:
    """root/cifar-100-python with 300 training and 100 test pictures."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "train").write_bytes(python2_pickle(*balanced(100, 3), key="fine_labels"))
    (folder / "test").write_bytes(python2_pickle(*balanced(100, 1, seed=1), key="fine_labels"))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine{c}" for c in range(100)]}, protocol=2))


def write_tree(root: Path, counts: dict[str, tuple[int, ...]], side: int = 32, suffix: str = "png") -> Path:
    """root/<split>/<class>/<i>.png, counts per class for each split; the split "" writes class folders alone."""
    for split, numbers in counts.items():
        for c, n in enumerate(numbers):
            folder = root / split / f"class{c:03d}"
            folder.mkdir(parents=True)
            for i, picture in enumerate(balanced(1, n, seed=c, side=side)[0] if n else ()):
                Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i:04d}.{suffix}")
    return root


def pack_arrays(num_classes: int = 10, per_class: int = PER_CLASS, side: int = 32) -> dict[str, np.ndarray]:
    """The arrays of an .npz pack."""
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"class{c}" for c in range(num_classes)])}
    for seed, (split, n) in enumerate({"train": per_class, "test": TEST_PER_CLASS}.items()):
        images, labels = balanced(num_classes, n, seed, side)
        files = [jpeg(image) for image in images]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0] + [len(file) for file in files])
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    return arrays


def jpeg(image: np.ndarray) -> bytes:
    """A picture [3, H, W] as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, format="JPEG", quality=90)
    return stream.getvalue()
