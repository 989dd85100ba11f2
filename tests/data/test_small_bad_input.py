"""What a user can get wrong with small sets: one line that names the file or option, the value and the fix."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ltfast.data import load
from ltfast.errors import UserError
from tests.data import small_sets


def nothing(root: Path) -> None:
    """No data at all."""


def cifar(root: Path) -> None:
    small_sets.write_cifar10(root)


def cifar_without(name: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        small_sets.write_cifar10(root)
        (root / "cifar-10-batches-py" / name).unlink()

    return make


def cifar_with(name: str, content: bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        small_sets.write_cifar10(root)
        (root / "cifar-10-batches-py" / name).write_bytes(content)

    return make


def cifar_with_label(label: int) -> Callable[[Path], None]:
    images, labels = small_sets.balanced(10, 4)
    labels[11] = label
    return cifar_with("data_batch_2", small_sets.python2_pickle(images, labels))


def tree(splits: dict[str, tuple[int, ...]], broken: str = "", content: bytes = b"") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        small_sets.write_tree(root, splits)
        if broken:
            (root / broken).write_bytes(content)

    return make


def pack(change: Callable[[dict], object] = lambda arrays: None, **options: int) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        arrays = small_sets.pack_arrays(**options)
        change(arrays)
        np.savez(root / "pack.npz", **arrays)

    return make


def text_pack(root: Path) -> None:
    (root / "pack.npz").write_text("not a zip")


def object_pack(root: Path) -> None:
    np.savez(root / "pack.npz", class_names=np.array([{}], dtype=object))


def cut_first_picture(arrays: dict) -> None:
    data = arrays["train_bytes"].copy()
    data[: arrays["train_offsets"][1]] = 0
    arrays["train_bytes"] = data


def odd_picture(arrays: dict) -> None:
    odd = np.frombuffer(small_sets.jpeg(np.zeros((3, 16, 32), np.uint8)), np.uint8)
    arrays["train_bytes"] = np.concatenate([arrays["train_bytes"], odd])
    arrays["train_offsets"] = np.append(arrays["train_offsets"], len(arrays["train_bytes"]))
    arrays["train_labels"] = np.append(arrays["train_labels"], np.uint8(0))


def relabel(key: str, place: int, label: int) -> Callable[[dict], None]:
    return lambda arrays: arrays[key].__setitem__(place, label)


def retype(key: str, dtype: type) -> Callable[[dict], None]:
    return lambda arrays: arrays.update({key: arrays[key].astype(dtype)})


def reshape(key: str, shape: tuple[int, ...]) -> Callable[[dict], None]:
    return lambda arrays: arrays.update({key: arrays[key].reshape(shape)})


def swapped(offsets: np.ndarray) -> np.ndarray:
    return offsets[[0, 2, 1, *range(3, len(offsets))]]


def empty_class(arrays: dict) -> None:
    arrays["train_labels"][arrays["train_labels"] == 4] = 5


TEN = (4,) * 10
GOOD_TREE = {"train": TEN, "test": (1,) * 10}
DIGITS: dict = {"dataset": "digits-lt", "data_dir": None}
CASES = [
    ("missing folder", nothing, {"sub": "absent"}, r"--data-dir \S+absent does not exist; .*cifar-10-batches-py"),
    ("empty folder", nothing, {}, r"--data-dir \S+ is empty or holds something else"),
    ("no data_dir", nothing, {"data_dir": None, "dataset": "folder-small"}, "--data-dir is needed"),
    ("missing batch", cifar_without("data_batch_4"), {}, r"data_batch_4: the file is missing"),
    (
        "cut batch",
        cifar_with("data_batch_1", b"\x80\x02}(U\x04da"),
        {},
        r"data_batch_1: cannot be read as a CIFAR file",
    ),
    ("no dictionary", cifar_with("test_batch", pickle.dumps([1])), {}, r"test_batch: .*no dictionary"),
    ("wrong content", cifar_with("test_batch", pickle.dumps({"data": 1})), {}, r"test_batch: holds no CIFAR pictures"),
    ("no names", cifar_with("batches.meta", pickle.dumps({})), {}, r"batches.meta: holds no 'label_names'"),
    ("label too large", cifar_with_label(10), {}, r"label 10 of image 51 is outside 0\.\.9"),
    ("negative label", cifar_with_label(-1), {}, r"label -1 of image 51 is outside 0\.\.9"),
    ("ten as hundred", tree(GOOD_TREE), {"dataset": "cifar100-lt"}, "10 classes found, cifar100-lt has 100"),
    ("wrong size", pack(side=16), {}, r"pictures are 16 x 16, cifar10-lt has 32 x 32"),
    ("not a picture", tree(GOOD_TREE, "train/class003/0001.png", b"text"), {}, r"class003/0001\.png: cannot be read"),
    ("empty picture", tree(GOOD_TREE, "test/class000/0000.png"), {}, r"test/class000/0000\.png: .*empty file"),
    (
        "empty class",
        tree({"train": (4, 0, 4, *TEN[3:]), "test": (1,) * 10}),
        {},
        r"train: 1 of 10 classes have no image \(class class001\)",
    ),
    ("empty test class", tree({"train": TEN, "test": (1,) * 9 + (0,)}), {}, r"\(test split\): class 9 has no image"),
    ("extra test class", tree({"train": TEN, "test": (1,) * 11}), {}, r"class010"),
    ("too few to hold out", tree({"": (1, *TEN[1:])}), {}, r"\(test split\): class 0 has no image"),
    ("damaged pack", text_pack, {}, r"pack\.npz: cannot be read as an \.npz pack"),
    ("objects in a pack", object_pack, {}, r"pack\.npz: cannot be read as an \.npz pack"),
    ("array missing", pack(lambda a: a.pop("test_labels")), {}, "the array 'test_labels' is missing"),
    ("offsets", pack(lambda a: a.update(train_offsets=a["train_offsets"] * 2)), {}, "offsets do not cut 200 pictures"),
    (
        "bytes type",
        pack(retype("train_bytes", np.int8)),
        {},
        r"\(train\): train_bytes is int8 \[\d+\], not uint8 \[n\]",
    ),
    ("offsets type", pack(retype("train_offsets", float)), {}, r"train_offsets is float64 \[201\], not integer \[n\]"),
    ("labels type", pack(retype("test_labels", float)), {}, r"\(test\): test_labels is float64 \[\d+\], not integer"),
    ("string labels", pack(retype("train_labels", str)), {}, r"train_labels is <U\d+ \[200\], not integer \[n\]"),
    (
        "label column",
        pack(reshape("train_labels", (-1, 1))),
        {},
        r"train_labels is uint8 \[200, 1\], not integer \[n\]",
    ),
    ("one label", pack(lambda a: a.update(train_labels=np.int64(3))), {}, r"train_labels is int64 \[\], not integer"),
    ("one name", pack(reshape("class_names", (1, 10))), {}, r"class_names has shape \[1, 10\], not \[C\]"),
    (
        "offsets that fall",
        pack(lambda a: a.update(train_offsets=swapped(a["train_offsets"].astype(np.uint64)))),
        {},
        "offsets do not cut 200 pictures",
    ),
    ("bad JPEG", pack(cut_first_picture), {}, r"\(train\): picture 0 cannot be decoded"),
    ("odd picture", pack(odd_picture), {"imbalance": 1}, r"picture 200 is 32 x 16 and picture 0 32 x 32"),
    ("pack label", pack(relabel("test_labels", 3, 12)), {}, r"\(test\): label 12 of image 3 is outside 0\.\.9"),
    ("pack class", pack(empty_class), {}, r"\(train\): class 4 has no image"),
    ("imbalance", cifar, {"imbalance": 0.5}, "--imbalance 0.5"),
    ("imbalance too large", cifar, {"imbalance": 1000}, r"class \d keeps none of its \d+ images .*--imbalance"),
    ("imbalance type", cifar, {"imbalance_type": "linear"}, "--imbalance-type 'linear': choose one of exp, step"),
    ("val negative", cifar, {"val_per_class": -1}, "--val-per-class -1"),
    ("limit too small", cifar, {"limit_train": 9}, "--limit-train 9: at least one image for each of the 10 classes"),
    ("batch too large", nothing, DIGITS | {"batch": 325}, "--batch 325 is larger than the 324 training images"),
    ("a batch to take", nothing, DIGITS | {"batch": 325}, "--batch 32 makes 11 steps of them"),
    ("for ranks, too", nothing, DIGITS | {"batch": 330, "world": 3}, "--batch 24 makes 14 steps of them"),
    ("batch zero", nothing, DIGITS | {"batch": 0}, "--batch 0: it must be at least 1"),
    ("batch and ranks", nothing, DIGITS | {"batch": 33, "world": 2}, "--batch 33 cannot be shared evenly by 2"),
    ("sampler", nothing, DIGITS | {"sampler": "balanced"}, "--sampler 'balanced': choose one of instance"),
    ("progressive", nothing, DIGITS | {"sampler": "progressive"}, "--epochs"),
    ("views", nothing, DIGITS | {"views": "cifra"}, "--views 'cifra': choose one of"),
    ("gray pictures", nothing, DIGITS | {"views": "cifar"}, "--views cifar needs colour pictures"),
    ("dataset", nothing, {"dataset": "cifar10"}, "--dataset 'cifar10' is unknown; did you mean cifar10-lt"),
    ("option of large sets", nothing, DIGITS | {"workers": 3}, "digits-lt does not take the option 'workers'"),
]


@pytest.mark.parametrize(("make", "options", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_clear_line(tmp_path: Path, make: Callable[[Path], None], options: dict, message: str) -> None:
    make(tmp_path)
    arguments: dict = {"dataset": "cifar10-lt", "data_dir": tmp_path, "imbalance": 2, "batch": 8} | options
    if "sub" in arguments:
        arguments["data_dir"] = tmp_path / arguments.pop("sub")
    if arguments["dataset"] == "digits-lt":
        arguments.pop("imbalance")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        load(**arguments)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("make", [cifar, tree(GOOD_TREE), pack()], ids=["cifar", "tree", "pack"])
def test_the_same_sets_unharmed_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    assert load("cifar10-lt", data_dir=tmp_path, imbalance=2, batch=8).num_classes == 10


def test_failed_download_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_args: object, **_options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz cannot be downloaded .*no network"):
        load("cifar10-lt", data_dir=tmp_path, download=True)


def test_download_is_checked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        assert (filename, md5) == ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
        small_sets.write_cifar10(Path(root))

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    assert load("cifar10-lt", data_dir=tmp_path / "new", download=True, imbalance=2, batch=8).num_classes == 10
